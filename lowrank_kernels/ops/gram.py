"""``grouped_gram``: Gram and cross-Gram matrices of many thin factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.dtypes import compute_dtype
from ..backends.lists import as_stored, sizes, width
from ..backends.registry import run
from ._library import are_plain_eager, define, fitting_layouts, for_eager, is_eager, no_backward, records_nothing, resolved
from ._tensor_checks import check_list, check_same_length


def grouped_gram(xs: Sequence[Tensor], ys: Sequence[Tensor] | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """``X_iᵀ X_i``, or ``X_iᵀ Y_i``, for all matrices of a list, stacked.

    Args:
        xs: (d_i, r) of one r, dtype and device; any heights, any strides (``A.mT`` needs no copy).
        ys: (d_i, k) of one k; None means xs.
        dtype: of the accumulation and the result: fp32 or fp64; fp64 factors take fp64 only. None: theirs, fp32 at least. A Gram matrix
            squares the condition number: with κ(X) = 1e6 only fp64 keeps what a small damping needs.

    Returns:
        (N, r, k), or (N, r, r) and exactly symmetric without ys.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit; nothing was computed.

    The result is a constant for autograd: its backward raises an error that says so.
    """
    layouts = fitting_layouts(xs, ys)  # of ys of another width: None
    if layouts is None:
        _check(xs, ys)
    natural = compute_dtype(as_stored(xs)[0][0].dtype) if xs else torch.float32
    if dtype not in (None, torch.float32, torch.float64) or (natural == torch.float64 and dtype == torch.float32):
        raise TypeError(f"grouped_gram: dtype must be torch.float64{'' if natural == torch.float64 else ' or torch.float32'}, got {dtype}")
    double = torch.float64 in (dtype, natural)
    if xs and records_nothing(xs, ys) and (is_eager() if layouts else are_plain_eager(xs, ys)):
        return _grouped_gram(for_eager(xs), None if ys is None else for_eager(ys), double, layouts)
    return torch.ops.lowrank_kernels.grouped_gram(list(xs), resolved(ys), double)


def _check(xs: Sequence[Tensor], ys: Sequence[Tensor] | None) -> None:
    check_list("grouped_gram", "xs", xs)
    if ys is not None:
        check_same_length("grouped_gram", xs=xs, ys=ys)
        check_list("grouped_gram", "ys", ys, like=xs[0] if xs else None)
    for name, factors in (("xs", xs), ("ys", () if ys is None else ys)):
        columns = sizes(factors, 1)
        if columns and columns.count(columns[0]) < len(columns):
            index = next(i for i, width in enumerate(columns) if width != columns[0])
            raise ValueError(f"grouped_gram: {name}[{index}] has {columns[index]} columns, {name}[0] has {columns[0]}")
    if ys is not None:
        heights, others = sizes(xs, 0), sizes(ys, 0)
        if heights != others:
            index = next(i for i, (height, other) in enumerate(zip(heights, others, strict=True)) if height != other)
            raise ValueError(f"grouped_gram: xs[{index}] has {heights[index]} rows, ys[{index}] has {others[index]}")


def _empty_result(xs: Sequence[Tensor], ys: Sequence[Tensor] | None, double: bool) -> Tensor:
    dtype = torch.float64 if double or (xs and as_stored(xs)[0][0].dtype == torch.float64) else torch.float32
    if not xs:
        return torch.empty(0, 0, 0, dtype=dtype)
    return torch.empty(len(xs), width(xs), width(xs if ys is None else ys), dtype=dtype, device=as_stored(xs)[0][0].device)


def _grouped_gram(xs: Sequence[Tensor], ys: Sequence[Tensor] | None, double: bool, layouts: Any = None) -> Tensor:
    grams = _empty_result(xs, ys, double)
    if xs:
        run("grouped_gram", grams.device.type, xs, ys, grams, layouts)
    return grams


define("grouped_gram", "(Tensor[] xs, Tensor[]? ys, bool double) -> Tensor", _grouped_gram, _empty_result)
no_backward("grouped_gram", "Gram matrices are constants in every method of this package")
__all__ = ["grouped_gram"]
