"""What the truncated SVDs share: where their singular triples go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.dtypes import compute_dtype
from ._tensor_checks import Given, check_apart, check_list, check_writable


def check_out(
    operation: str, out: Any, shapes: tuple[list[tuple[int, int]], list[tuple[int, int]]], like: Tensor | None, **read: Sequence[Tensor]
) -> None:
    """Refuse what is no pair ``(us, vs)`` of lists of tensors like ``like``, of these shapes, apart from each other and what is read."""
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        got = f"{len(out)} values" if isinstance(out, (tuple, list)) else type(out).__name__
        raise TypeError(f"{operation}: out must be a pair (us, vs) of lists of tensors, got {got}")
    for name, tensors, expected in zip(("out[0]", "out[1]"), out, shapes, strict=True):
        check_list(operation, name, tensors, like=like, written=True)
        if len(tensors) != len(expected):
            raise ValueError(f"{operation}: {name} must have {len(expected)} tensors, got {len(tensors)}")
        for index, (tensor, shape) in enumerate(zip(tensors, expected, strict=True)):
            if tensor.shape != shape:
                raise ValueError(f"{operation}: {name}[{index}] must have shape {shape}, got {tuple(tensor.shape)}")
    written: Given = {"out[0]": out[0], "out[1]": out[1]}
    check_writable(operation, **written)
    check_apart(operation, written, read)


def empty_values(xs: Sequence[Tensor], rank: int) -> Tensor:
    """The singular values of all matrices of a list, (N, rank)."""
    return xs[0].new_empty(len(xs), rank, dtype=compute_dtype(xs[0].dtype)) if xs else torch.empty(0, rank)
