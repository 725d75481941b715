"""``grouped_damped_inverse`` on the CPU: one call into compiled code, Householder and substitution with matrices as lanes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import DTYPE_CODES
from ..extension import csrc
from ..registry import count_launch, implements
from ._common import COMPILED, refuse


def verify(rs: Tensor, damping: float, out: Tensor) -> tuple[bool, str]:
    """Takes CPU matrices of any strides, up to rank 128."""
    reason = refuse(rs, rs.shape[1])
    if reason is not None:
        return False, reason
    return True, f"{COMPILED}, Householder and substitution in fp64"


@implements("grouped_damped_inverse", "native", verify)
def grouped_damped_inverse(rs: Tensor, damping: float, out: Tensor) -> None:
    """See the reference."""
    count_launch()
    count, rank, _ = rs.shape
    csrc.damped_inverse(count, rank, DTYPE_CODES[rs.dtype], rs.data_ptr(), *rs.stride(), damping, out.data_ptr(), torch.get_num_threads())
