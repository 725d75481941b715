"""``grouped_polar`` on the CPU: the QR of ``grouped_qr``, Jacobi rotations on R; one call for all matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import count_launch, implements
from . import _csrc
from ._common import DTYPE_CODES, MAX_RANK, addresses, refuse_device, strides, table


def verify(xs: list[Tensor], out: list[Tensor]) -> tuple[bool, str]:
    """Takes CPU matrices of any strides, up to rank 128."""
    reason = refuse_device(xs[0])
    if reason is not None:
        return False, reason
    if xs[0].shape[1] > MAX_RANK:
        return False, f"rank {xs[0].shape[1]}: the compiled code stops at {MAX_RANK}"
    return True, f"compiled code ({_csrc.instruction_set()}), CholeskyQR and one-sided Jacobi"


@implements("grouped_polar", "native", verify)
def grouped_polar(xs: list[Tensor], out: list[Tensor]) -> None:
    """See the reference."""
    rows = table(addresses(xs), addresses(out), [x.shape[0] for x in xs], *strides(xs), *strides(out))
    count_launch()
    _csrc.polar(len(xs), rows, DTYPE_CODES[xs[0].dtype], xs[0].shape[1], torch.get_num_threads())
