"""``grouped_preconditioner`` on the CPU: one call into compiled code, Cholesky and products with matrices as lanes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import DTYPE_CODES
from ..extension import csrc
from ..registry import count_launch, implements
from ._common import COMPILED, refuse


def verify(
    grams: Tensor, drifts: Tensor | None, damping: float, weight: float, transposed: bool, maps: Tensor, realigned: Tensor
) -> tuple[bool, str]:
    """Takes CPU matrices of any strides, up to rank 128."""
    reason = refuse(grams, grams.shape[1])
    if reason is not None:
        return False, reason
    return True, f"{COMPILED}, Cholesky and products in fp64"


@implements("grouped_preconditioner", "native", verify)
def grouped_preconditioner(
    grams: Tensor, drifts: Tensor | None, damping: float, weight: float, transposed: bool, maps: Tensor, realigned: Tensor
) -> None:
    """See the reference."""
    count_launch()
    count, rank, _ = grams.shape
    grams = grams.contiguous()
    drifts = None if drifts is None else drifts.contiguous()
    drift_address, target = (0, 0) if drifts is None else (drifts.data_ptr(), realigned.data_ptr())
    csrc.preconditioner(
        count, rank, DTYPE_CODES[maps.dtype], grams.data_ptr(), drift_address, damping, weight, transposed, maps.data_ptr(), target,
        torch.get_num_threads(),
    )  # fmt: skip
