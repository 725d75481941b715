"""``grouped_eigh`` on the CPU: one call into compiled code, tridiagonal form and implicit QL steps with matrices as lanes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import DTYPE_CODES
from ..extension import csrc
from ..registry import count_launch, implements
from ._common import COMPILED, refuse


def verify(xs: Tensor, values: Tensor, vectors: Tensor | None) -> tuple[bool, str]:
    """Takes CPU matrices of any strides, up to rank 128 (where it still is faster than LAPACK)."""
    reason = refuse(xs, xs.shape[1])
    if reason is not None:
        return False, reason
    return True, f"{COMPILED}, Householder and implicit QL in fp64"


@implements("grouped_eigh", "native", verify)
def grouped_eigh(xs: Tensor, values: Tensor, vectors: Tensor | None) -> None:
    """See the reference."""
    count_launch()
    count, rank, _ = xs.shape
    into = values.data_ptr(), 0 if vectors is None else vectors.data_ptr()
    csrc.eigh(count, rank, DTYPE_CODES[xs.dtype], xs.data_ptr(), *xs.stride(), *into, torch.get_num_threads())
