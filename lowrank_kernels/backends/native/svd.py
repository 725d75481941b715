"""``grouped_svd`` on the CPU: the reference's block Krylov iteration, whose thin QRs run in compiled code.

The dense products are torch's own GEMMs (oneDNN, MKL), which are the floor; what torch loops over are the QRs of the blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.svd import grouped_svd as block_krylov_svd
from ..registry import implements
from ._common import refuse
from .qr import grouped_qr


def verify(
    xs: list[Tensor],
    oversample: int,
    iterations: int | None,
    tolerance: float,
    us: list[Tensor],
    ss: Tensor,
    vs: list[Tensor],
) -> tuple[bool, str]:
    """Takes CPU matrices, with blocks of up to 128 columns."""
    reason = refuse(xs[0], ss.shape[1] + oversample)
    if reason is not None:
        return False, reason
    return True, "torch's GEMMs, thin QRs in compiled code"


@implements("grouped_svd", "native", verify)
def grouped_svd(
    xs: list[Tensor],
    oversample: int,
    iterations: int | None,
    tolerance: float,
    us: list[Tensor],
    ss: Tensor,
    vs: list[Tensor],
) -> None:
    """See the reference."""
    block_krylov_svd(xs, oversample, iterations, tolerance, us, ss, vs, thin_qr=_thin_qr)


def _thin_qr(blocks: Tensor) -> Tensor:
    """Orthonormal bases of a stack of tall blocks (b, m, p)."""
    qs = torch.empty_like(blocks, memory_format=torch.contiguous_format)
    grouped_qr(list(blocks), None, list(qs), blocks.new_empty(len(blocks), blocks.shape[2], blocks.shape[2]))
    return qs
