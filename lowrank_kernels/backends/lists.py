"""What a step asks of many tensors at once: in compiled code (``csrc/cpu/lists.cpp``) where that is built, else in Python.

With hundreds of small tensors, what Python does for each of them is most of a step's time.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .dtypes import FLOATING
from .extension import csrc

Item = TypeVar("Item")

#: Types of tensors that are their own memory; FSDP2's DTensor is none.
PLAIN = frozenset((Tensor, nn.Parameter))


class Tall(Sequence[Tensor]):
    """A list of matrices of which the first ``transposed`` (default: all) stand for their transposes.

    Views are created lazily: creating one costs more than a small operation on it, and compiled code needs none. ``layout``: where they
    lie, if that has been read (:func:`matrix_layout`); it holds for as long as none of them moves.
    """

    __slots__ = ("layout", "stored", "transposed")

    def __init__(self, stored: Sequence[Tensor], transposed: int | None = None, layout: Any = None) -> None:
        self.stored = stored if isinstance(stored, list) else list(stored)
        self.transposed = len(self.stored) if transposed is None else transposed
        self.layout = layout

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        matrix = self.stored[index]
        return matrix.mT if range(len(self))[index] < self.transposed else matrix

    def __iter__(self) -> Iterator[Tensor]:
        for index, matrix in enumerate(self.stored):
            yield matrix.mT if index < self.transposed else matrix


def _compiled() -> bool:
    """Whether to ask compiled code: it is built, and this is no graph being traced, into which it cannot go."""
    return csrc is not None and not torch.compiler.is_compiling()


def partition(items: Iterable[Item], key: Callable[[Item], Any]) -> dict[Any, list[Item]]:
    """The items of each key, in their order; the keys in the order of their first items."""
    found: defaultdict[Any, list[Item]] = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return found


def as_stored(tensors: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """A list as it is stored, and how many of it, from the first on, stand for their transposes."""
    if type(tensors) is Tall:  # isinstance() of an abstract Sequence calls Python
        return tensors.stored, tensors.transposed
    return (tensors if isinstance(tensors, list) else list(tensors)), 0


def plain(tensors: Sequence[Tensor]) -> bool:
    """Whether all are their own memory: no subclass but ``Parameter``."""
    stored, _ = as_stored(tensors)
    return csrc.plain(stored) if _compiled() else PLAIN.issuperset(map(type, stored))


def alike(tensors: Sequence[Tensor], like: Tensor | None = None, ndim: int | None = None) -> bool:
    """Whether all are plain, strided, floating, of one dtype and device (those of ``like``, if given), and of ``ndim`` dimensions.

    None is negated lazily: its memory would hold −x.
    """
    stored, _ = as_stored(tensors)
    if not stored:
        return True
    if _compiled():
        return csrc.alike(stored, like, -1 if ndim is None else ndim)
    like = stored[0] if like is None else like
    if not PLAIN.issuperset(map(type, (like, *stored))) or like.dtype not in FLOATING:
        return False
    if not torch.compiler.is_compiling() and any(map(Tensor.is_neg, stored)):
        return False
    return all(x.dtype is like.dtype and x.device == like.device and x.layout is torch.strided and ndim in (None, x.ndim) for x in stored)


def as_in_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether memory holds what these tensors, of one dtype and device, are: all are plain, none is negated lazily."""
    stored, _ = as_stored(tensors)
    if _compiled() and alike(stored):
        return True
    return PLAIN.issuperset(map(type, stored)) and not any(map(Tensor.is_neg, stored))


def matrix_layout(matrices: Sequence[Tensor]) -> Any:
    """Where plain, :func:`alike` matrices lie, for compiled code; its ``columns`` are what all have, or -1.

    None if they are not that, or if compiled code has not looked: what a transform of ``torch.func`` has wrapped has no memory.
    """
    if not _compiled() or torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    known = matrices.layout if type(matrices) is Tall else None
    return csrc.matrix_layout(*as_stored(matrices)) if known is None else known


def located(matrices: Sequence[Tensor]) -> Tall:
    """The list with its layout, so that it is read once for all operations; for as long as no matrix moves."""
    return Tall(*as_stored(matrices), matrix_layout(matrices))


def signature(tensors: Sequence[Tensor]) -> Any:
    """Something to compare: the dtypes, devices and shapes of all; None if one is not plain, strided and floating, or is negated lazily."""
    stored, transposed = as_stored(tensors)
    if _compiled():
        return csrc.signature(stored, transposed)
    if not (PLAIN.issuperset(map(type, stored)) and all(x.layout is torch.strided and x.dtype in FLOATING for x in stored)):
        return None
    if not torch.compiler.is_compiling() and any(map(Tensor.is_neg, stored)):
        return None
    return [(x.dtype, x.device, x.shape[::-1] if i < transposed else x.shape) for i, x in enumerate(stored)]


def sizes(matrices: Sequence[Tensor], dim: int) -> list[int]:
    """Their sizes along dimension 0 or 1."""
    stored, transposed = as_stored(matrices)
    found = csrc.sizes(stored, transposed, dim) if _compiled() else None
    return [x.shape[1 - dim if i < transposed else dim] for i, x in enumerate(stored)] if found is None else found


def width(matrices: Sequence[Tensor]) -> int:
    """How many columns the first one has."""
    stored, transposed = as_stored(matrices)
    return stored[0].shape[0 if transposed else 1]


def consecutive(tensors: list[Tensor]) -> bool:
    """Whether they lie one behind the other, each contiguous."""
    if _compiled():
        return csrc.consecutive(tensors)
    begins = [x.data_ptr() for x in tensors]
    return all(x.is_contiguous() for x in tensors) and begins[1:] == [
        begin + x.nbytes for begin, x in zip(begins[:-1], tensors[:-1], strict=True)
    ]


def held(references: list[weakref.ref[Any]], wanted: tuple[tuple[str, str], ...]) -> tuple[list[Any], ...] | None:
    """For each ``(attribute, key)``: what stands under the key in that dictionary of each object; None if one is gone or lacks it."""
    if _compiled():
        return csrc.held(references, wanted)
    objects = [reference() for reference in references]
    if any(found is None for found in objects):
        return None
    columns = tuple([getattr(found, attribute).get(key) for found in objects] for attribute, key in wanted)
    return None if any(value is None for column in columns for value in column) else columns


def first_sparse_gradient(params: list[Tensor], indices: list[int]) -> int | None:
    """The first of the ``indices`` whose parameter has a sparse gradient; None if there is none."""
    if _compiled():
        return csrc.first_sparse_gradient(params, indices)
    grads = ((index, params[index].grad) for index in indices)
    return next((index for index, grad in grads if grad is not None and grad.is_sparse), None)


class Gathered(NamedTuple):
    """What a moment step needs, of those of some parameters that have a gradient."""

    members: list[int]
    params: list[Tensor]
    grads: list[Tensor]
    #: The indices of the parameters without a gradient.
    idle: list[int]
    #: The moments of those that keep them.
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    #: Where all these tensors lie, for compiled code, which has found that they fit each other; None if it has not looked, or not found so.
    layout: Any


def gather(params: list[Tensor], indices: list[int], state: dict[Tensor, dict[str, Any]]) -> Gathered:
    """Those of the parameters at ``indices`` that have a gradient, and their moments; compiled code looks once at each tensor."""
    if _compiled():
        return Gathered(*csrc.gather(params, indices, state, "exp_avg", "exp_avg_sq"))
    members = [index for index in indices if params[index].grad is not None]
    stepped = [params[index] for index in members]
    grads = [p.grad for p in stepped if p.grad is not None]
    exp_avgs, exp_avg_sqs = (column(states(state, stepped), key) for key in ("exp_avg", "exp_avg_sq"))
    return Gathered(members, stepped, grads, [i for i in indices if params[i].grad is None], exp_avgs, exp_avg_sqs, None)


def states(state: dict[Tensor, dict[str, Any]], params: list[Tensor]) -> list[dict[str, Any]]:
    """The optimizer's state of each of the parameters."""
    return csrc.states(state, params) if _compiled() else [state[p] for p in params]


def sharing(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Two tensors that share memory, as their indices; (i, i): tensor i has several elements in one place (it is expanded).

    Views with gaps are not held against others, since columns of one matrix may interleave.
    """
    stored, _ = as_stored(tensors)
    if _compiled():
        layout = tensors.layout if type(tensors) is Tall else None
        return csrc.sharing(stored if layout is None else layout)
    ranges = []
    for index, x in enumerate(stored):
        if x.layout is not torch.strided or x.dtype not in FLOATING or x.is_neg() or not x.numel():
            continue
        if x.is_contiguous() or (x.ndim == 2 and x.mT.is_contiguous()):
            if begin := x.data_ptr():  # 0 of fake and distributed tensors
                ranges.append((begin, begin + x.nbytes, index))
        elif any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
            return index, index
    for (_, end, one), (begin, _, other) in pairwise(sorted(ranges)):
        if begin < end:
            return min(one, other), max(one, other)
    return None


def copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source into its target; like them in shape. On a CPU torch takes a call for each."""
    if not (_compiled() and csrc.copy(targets, sources)):
        torch._foreach_copy_(targets, sources)


def widened(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in another dtype, by one call for all; themselves if they have it."""
    if tensors[0].dtype == dtype:
        return tensors
    wide = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    copy_(wide, tensors)
    return wide


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device. On a GPU from pinned memory: a copy from other memory waits for all that was launched before."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


def on_device(values: Sequence[float], device: torch.device) -> Tensor:
    """Numbers of the host in fp64 on the device; one for all is filled in there."""
    if len(set(values)) == 1:
        return torch.full((len(values),), values[0], dtype=torch.float64, device=device)
    return sent(torch.tensor(values, dtype=torch.float64, device="cpu"), device)


def complete(state: dict[Tensor, dict[str, Any]], groups: list[list[Tensor]], may_be_empty: bool) -> bool:
    """Whether each parameter of the groups has a state, and one with something in it unless that ``may_be_empty``."""
    if _compiled():
        return csrc.complete(state, groups, may_be_empty)
    return all((found := state.get(p)) is not None and (may_be_empty or bool(found)) for params in groups for p in params)


def column(of: list[dict[str, Any]], key: str) -> list[Any]:
    """What stands under ``key``, for those states that have it."""
    return csrc.column(of, key) if _compiled() else [state[key] for state in of if key in state]


def holds(state: dict[Tensor, dict[str, Any]], params: list[Tensor], indices: list[int], key: str, values: list[Tensor]) -> bool:
    """Whether the state of each of the parameters at ``indices`` holds, under ``key``, this very one of the ``values``."""
    if _compiled():
        return csrc.holds(state, params, indices, key, values)
    return len(indices) == len(values) and all(state[params[i]].get(key) is value for i, value in zip(indices, values, strict=True))
