"""``grouped_solve`` on the CPU: one call into compiled code, Cholesky and substitution with rows as lanes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import DTYPE_CODES
from ..extension import csrc
from ..registry import count_launch, implements
from ._common import COMPILED, refuse


def verify(grams: Tensor, rhs: list[Tensor] | Tensor, damping: float, left: bool, out: list[Tensor] | Tensor) -> tuple[bool, str]:
    """Takes CPU matrices of any strides, up to rank 128."""
    reason = refuse(grams, grams.shape[1])
    if reason is not None:
        return False, reason
    return True, f"{COMPILED}, Cholesky in {str(grams.dtype).removeprefix('torch.')}"


@implements("grouped_solve", "native", verify)
def grouped_solve(grams: Tensor, rhs: list[Tensor] | Tensor, damping: float, left: bool, out: list[Tensor] | Tensor) -> None:
    """See the reference. From the left, the transposes of rhs and out are solved from the right."""
    grams = grams.contiguous()
    count_launch()
    wide, code = grams.dtype == torch.float64, DTYPE_CODES[rhs[0].dtype]
    csrc.solve(rhs, out, left, code, wide, grams.shape[1], grams.data_ptr(), damping, torch.get_num_threads())
