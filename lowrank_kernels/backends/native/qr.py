"""``grouped_qr`` on the CPU: CholeskyQR with a Householder path for what is ill-conditioned, one call for all matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dtypes import DTYPE_CODES
from ..extension import csrc
from ..lists import as_stored
from ..registry import count_launch, implements
from . import cuda_qr
from ._common import COMPILED, refuse, refuse_gaps


def verify(
    xs: Sequence[Tensor], previous: Sequence[Tensor] | None, qs: Sequence[Tensor], rs: Tensor, layouts: Any = None
) -> tuple[bool, str]:
    """Takes CPU matrices of any strides, up to rank 128; CUDA ones where cuSOLVER and cuBLAS are found."""
    first = as_stored(xs)[0][0]
    if first.device.type == "cuda":
        return cuda_qr.verify(list(xs), None if previous is None else list(previous), list(qs), rs)
    reason = refuse(first, rs.shape[1]) or refuse_gaps("rs", rs)
    if reason is not None:
        return False, reason
    return True, f"{COMPILED}, CholeskyQR with a Householder path"


@implements("grouped_qr", "native", verify)
def grouped_qr(xs: Sequence[Tensor], previous: Sequence[Tensor] | None, qs: Sequence[Tensor], rs: Tensor, layouts: Any = None) -> None:
    """See the reference. ``layouts``: those of ``lists.matrix_layout`` for xs, previous and qs, or None."""
    first = as_stored(xs)[0][0]
    if first.device.type == "cuda":
        return cuda_qr.grouped_qr(list(xs), None if previous is None else list(previous), list(qs), rs)
    count_launch()
    x, old, q = layouts or (None, None, None)
    before = (None, 0) if previous is None else as_stored(previous)
    csrc.qr(*as_stored(xs), x, *before, old, *as_stored(qs), q, DTYPE_CODES[first.dtype], rs.shape[1], rs.data_ptr(),
             torch.get_num_threads())  # fmt: skip
