"""``grouped_gram`` on the CPU: one call into compiled code, sums over blocks of rows in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import count_launch, implements
from . import _csrc
from ._common import DTYPE_CODES, MAX_RANK, addresses, refuse_device, strides, table


def verify(xs: list[Tensor], ys: list[Tensor] | None, grams: Tensor) -> tuple[bool, str]:
    """Takes CPU matrices of any strides, up to 128 columns."""
    reason = refuse_device(xs[0])
    if reason is not None:
        return False, reason
    columns = max(grams.shape[1:])
    if columns > MAX_RANK:
        return False, f"matrices of {columns} columns: the compiled code stops at {MAX_RANK}"
    if not grams.is_contiguous():
        return False, f"grams must be contiguous, got strides {grams.stride()}"
    return True, f"compiled code ({_csrc.instruction_set()}), accumulated in {str(grams.dtype).removeprefix('torch.')}"


@implements("grouped_gram", "native", verify)
def grouped_gram(xs: list[Tensor], ys: list[Tensor] | None, grams: Tensor) -> None:
    """See the reference."""
    n = len(xs)
    x_strides = strides(xs)
    rows = table(
        addresses(xs),
        (0,) * n if ys is None else addresses(ys),
        [x.shape[0] for x in xs],
        *x_strides,
        *(x_strides if ys is None else strides(ys)),
    )
    count_launch()
    wide, (_, r, k) = grams.dtype == torch.float64, grams.shape
    _csrc.gram(n, rows, DTYPE_CODES[xs[0].dtype], wide, r, k, grams.data_ptr(), torch.get_num_threads())
