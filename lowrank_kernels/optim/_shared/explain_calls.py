"""Calls without data, for ``explain()``: which backend takes a call is decided by the columns, dtype and device of its thin matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...backends.dtypes import compute_dtype
from ...backends.sums import Sums, Sweeps

#: Operation → its arguments, results included, from thin matrices and as many square ones.
_ARGUMENTS: dict[str, Callable[[list[Tensor], Tensor], tuple[Any, ...]]] = {
    "grouped_gram": lambda xs, squares: (xs, None, squares),
    "grouped_lorsum": lambda xs, squares: ((xs, xs), Sums(xs, list(xs), [1.0], None), Sweeps(1, 0.0, True), (xs, xs)),
    "grouped_lorsum_product": lambda xs, squares: (xs, Sums(xs, list(xs), [1.0], None), xs),
    "grouped_qr": lambda xs, squares: (xs, None, xs, squares),
    "grouped_solve": lambda xs, squares: (squares, xs, 0.0, False, xs),
    "grouped_svd_product": lambda xs, squares: (xs, xs, xs, squares[:, 0].contiguous(), xs),
}


def thin_call(operation: str, like: Sequence[Tensor], columns: int) -> tuple[str, str, tuple[Any, ...]]:
    """``(operation, device type, arguments)`` of a call on matrices that are as tall as those of ``like`` and have so many columns."""
    dtype = compute_dtype(like[0].dtype)
    xs = [x.new_empty(len(x), columns, dtype=dtype) for x in like]
    squares = torch.empty(len(xs), columns, columns, dtype=dtype, device=xs[0].device)
    return operation, xs[0].device.type, _ARGUMENTS[operation](xs, squares)
