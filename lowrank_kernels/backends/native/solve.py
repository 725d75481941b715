"""``grouped_solve`` on the CPU: one call into compiled code, Cholesky and substitution with rows as lanes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import count_launch, implements
from . import _csrc
from ._common import DTYPE_CODES, MAX_RANK, addresses, refuse_device, strides, table


def verify(grams: Tensor, rhs: list[Tensor], damping: float, left: bool, out: list[Tensor]) -> tuple[bool, str]:
    """Takes CPU matrices of any strides, up to rank 128."""
    reason = refuse_device(grams)
    if reason is not None:
        return False, reason
    if grams.shape[1] > MAX_RANK:
        return False, f"rank {grams.shape[1]}: the compiled code stops at {MAX_RANK}"
    return True, f"compiled code ({_csrc.instruction_set()}), Cholesky in {str(grams.dtype).removeprefix('torch.')}"


@implements("grouped_solve", "native", verify)
def grouped_solve(grams: Tensor, rhs: list[Tensor], damping: float, left: bool, out: list[Tensor]) -> None:
    """See the reference. From the left, the transposes of rhs and out are solved from the right."""
    grams = grams.contiguous()
    across, along = (1, 0) if left else (0, 1)
    rhs_strides, out_strides = strides(rhs), strides(out)
    rows = table(
        addresses(rhs),
        addresses(out),
        [matrix.shape[across] for matrix in rhs],
        *(section[dim] for section in (rhs_strides, out_strides) for dim in (across, along)),
    )
    count_launch()
    wide, code = grams.dtype == torch.float64, DTYPE_CODES[rhs[0].dtype]
    _csrc.solve(len(rhs), rows, code, wide, grams.shape[1], grams.data_ptr(), damping, torch.get_num_threads())
