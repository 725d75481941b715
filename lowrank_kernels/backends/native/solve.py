"""``grouped_solve`` on the CPU: one call into compiled code, Cholesky and substitution with rows as lanes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..registry import count_launch, implements
from . import _csrc
from ._common import DTYPE_CODES, MAX_RANK, addresses, refuse_device, strides, table


def verify(grams: Tensor, rhs: list[Tensor] | Tensor, damping: float, left: bool, out: list[Tensor] | Tensor) -> tuple[bool, str]:
    """Takes CPU matrices of any strides, up to rank 128."""
    reason = refuse_device(grams)
    if reason is not None:
        return False, reason
    if grams.shape[1] > MAX_RANK:
        return False, f"rank {grams.shape[1]}: the compiled code stops at {MAX_RANK}"
    return True, f"compiled code ({_csrc.instruction_set()}), Cholesky in {str(grams.dtype).removeprefix('torch.')}"


def _as_tall(matrices: list[Tensor] | Tensor, left: bool) -> tuple[Sequence[int], ...]:
    """Addresses, heights, row and column strides of the matrices (of their transposes, from the left)."""
    across, along = (1, 0) if left else (0, 1)
    if isinstance(matrices, Tensor):  # stacked: no view of each is needed
        n, start, step = len(matrices), matrices.data_ptr(), matrices.stride(0) * matrices.element_size()
        of_all = (matrices.shape[1 + across], matrices.stride(1 + across), matrices.stride(1 + along))
        return [start + i * step for i in range(n)], *((number,) * n for number in of_all)
    both = strides(matrices)
    return addresses(matrices), [matrix.shape[across] for matrix in matrices], both[across], both[along]


@implements("grouped_solve", "native", verify)
def grouped_solve(grams: Tensor, rhs: list[Tensor] | Tensor, damping: float, left: bool, out: list[Tensor] | Tensor) -> None:
    """See the reference. From the left, the transposes of rhs and out are solved from the right."""
    grams = grams.contiguous()
    starts, heights, *rhs_strides = _as_tall(rhs, left)
    out_starts, _, *out_strides = _as_tall(out, left)
    rows = table(starts, out_starts, heights, *rhs_strides, *out_strides)
    count_launch()
    wide, code = grams.dtype == torch.float64, DTYPE_CODES[rhs[0].dtype]
    _csrc.solve(len(rhs), rows, code, wide, grams.shape[1], grams.data_ptr(), damping, torch.get_num_threads())
