"""What the native implementations share: tables, and the usual reasons to refuse a call."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from ..extension import csrc

#: Why compiled code takes a call, to begin with: said at every call, so made once.
COMPILED = f"compiled code ({csrc.instruction_set()})"

#: The largest r that the kernels are laid out for (``kMaxRank``).
MAX_RANK = 128


def table(*sections: Sequence[int]) -> array[int]:
    """An int64 table of equally long sections, as ``csrc`` reads them."""
    return array("q", list(chain.from_iterable(sections)))


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def refuse_device(tensor: Tensor) -> str | None:
    """Why compiled CPU code cannot take ``tensor``; None if it can."""
    if tensor.device.type != "cpu":
        return f"it is written for CPU tensors, these are on {tensor.device.type}"
    if tensor.layout != torch.strided:
        return f"it needs strided tensors, got layout {tensor.layout}"
    return None


def refuse(tensor: Tensor, r: int) -> str | None:
    """Why compiled CPU code cannot take ``tensor``, or matrices of r columns; None if it can."""
    return refuse_device(tensor) or (None if r <= MAX_RANK else f"r = {r}: the compiled code stops at {MAX_RANK}")


def refuse_gaps(argument: str, tensor: Tensor) -> str | None:
    """Why compiled code cannot write into ``tensor``, of which it takes the address alone; None if it can."""
    return None if tensor.is_contiguous() else f"{argument} must be contiguous, got strides {tensor.stride()}"


def strides(matrices: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """The row strides of all matrices, and their column strides."""
    pairs = [matrix.stride() for matrix in matrices]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
