"""``grouped_qr`` on the CPU: CholeskyQR with a Householder road for what is ill-conditioned, one call for all matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import count_launch, implements
from . import _csrc, cuda_qr
from ._common import DTYPE_CODES, MAX_RANK, addresses, refuse_device, strides, table


def verify(xs: list[Tensor], previous: list[Tensor] | None, qs: list[Tensor], rs: Tensor) -> tuple[bool, str]:
    """Takes CPU matrices of any strides, up to rank 128; CUDA ones where cuSOLVER and cuBLAS are found."""
    if xs[0].device.type == "cuda":
        return cuda_qr.verify(xs, previous, qs, rs)
    reason = refuse_device(xs[0])
    if reason is not None:
        return False, reason
    if xs[0].shape[1] > MAX_RANK:
        return False, f"rank {xs[0].shape[1]}: the compiled code stops at {MAX_RANK}"
    if not rs.is_contiguous():
        return False, f"rs must be contiguous, got strides {rs.stride()}"
    return True, f"compiled code ({_csrc.instruction_set()}), CholeskyQR with a Householder road"


@implements("grouped_qr", "native", verify)
def grouped_qr(xs: list[Tensor], previous: list[Tensor] | None, qs: list[Tensor], rs: Tensor) -> None:
    """See the reference."""
    if xs[0].device.type == "cuda":
        return cuda_qr.grouped_qr(xs, previous, qs, rs)
    n = len(xs)
    x_strides = strides(xs)
    rows = table(
        addresses(xs),
        (0,) * n if previous is None else addresses(previous),
        addresses(qs),
        [x.shape[0] for x in xs],
        *x_strides,
        *(x_strides if previous is None else strides(previous)),
        *strides(qs),
    )
    count_launch()
    _csrc.qr(n, rows, DTYPE_CODES[xs[0].dtype], xs[0].shape[1], rs.data_ptr(), torch.get_num_threads())
