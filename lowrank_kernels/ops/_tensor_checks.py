"""What tensors must be that an operation takes: their kind, dtypes, shapes and devices, and that none is written which another one reads.

Numbers and flags are checked by the package's ``_checks``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends.dtypes import FLOATING
from ..backends.lists import Tall, alike, as_stored, sharing, signature
from ._library import is_eager, is_list

#: Arguments by name: lists of tensors, single ones, or nothing.
Given = Mapping[str, Sequence[Tensor] | Tensor | None]


def refuse_tangents(operation: str, argument: str, tensors: Iterable[Any]) -> None:
    """Refuse tensors with a forward-mode derivative, which the operation would drop without a word."""
    if any(isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            f"{operation} has no forward-mode derivative (torch.func.jvp, jacfwd), but {argument} has a tangent: "
            "its result is a constant for autograd; call it on detached tensors"
        )


def check_list(
    operation: str,
    argument: str,
    tensors: Sequence[Tensor],
    *,
    like: Tensor | None = None,
    ndim: int | None = 2,
    written: bool = False,
) -> None:
    """Refuse a list whose tensors are not strided, floating, of one dtype and on one device (those of ``like``, if given).

    Of what is ``written``, refuse what is negated lazily too: torch's dispatcher cannot write into it.
    """
    if not isinstance(tensors, (list, tuple, Tall)):
        raise TypeError(f"{operation}: {argument} must be a list of tensors, got {type(tensors).__name__}; wrap it in [ ]")
    if forward_ad._current_level >= 0:
        refuse_tangents(operation, argument, tensors)
    if alike(tensors, like, ndim):  # what fails here is explained below
        return
    for index, tensor in enumerate(tensors):
        check_tensor(operation, f"{argument}[{index}]", tensor)
        like = tensor if like is None else like
        if ndim is not None and tensor.ndim != ndim:
            raise ValueError(f"{operation}: {argument}[{index}] must have {ndim} dimensions, got shape {tuple(tensor.shape)}")
        if tensor.dtype != like.dtype:
            raise TypeError(f"{operation}: {argument}[{index}] has dtype {tensor.dtype}, expected {like.dtype}; call once per dtype")
        if tensor.device != like.device:
            raise ValueError(f"{operation}: {argument}[{index}] is on {tensor.device}, expected {like.device}; call once per device")
        if written and tensor.is_neg():
            refuse_negated(operation, f"{argument}[{index}]")


def check_tensor(operation: str, argument: str, tensor: Any) -> None:
    """Refuse what is no strided, floating tensor."""
    check_strided(operation, argument, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{operation}: {argument} has dtype {tensor.dtype}; use one of {', '.join(map(str, FLOATING))}")


def check_tensor_on(operation: str, argument: str, tensor: Any, other: str, device: torch.device) -> None:
    """Refuse what is no strided, floating tensor on the device of the ``other`` argument."""
    check_tensor(operation, argument, tensor)
    if tensor.device != device:
        raise ValueError(f"{operation}: {argument} is on {tensor.device}, {other} on {device}; move them together")


def check_strided(operation: str, argument: str, tensor: Any) -> None:
    """Refuse what is no tensor, and one that is sparse, or whose layout is another one that no backend reads."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{operation}: {argument} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{operation}: {argument} is {tensor.layout}; only strided tensors are taken, call .to_dense()")


def _tensors(given: Given) -> list[Tensor]:
    """All tensors of all arguments."""
    lists = ([one] if isinstance(one, Tensor) else as_stored(one)[0] for one in given.values() if one is not None)
    return [tensor for tensors in lists for tensor in tensors]


def _names(given: Given) -> list[str]:
    """What these tensors are called in an error."""
    counts = {name: 1 if isinstance(one, Tensor) else len(one) for name, one in given.items() if one is not None}
    return [name if isinstance(given[name], Tensor) else f"{name}[{index}]" for name, count in counts.items() for index in range(count)]


def check_writable(operation: str, **given: Sequence[Tensor] | Tensor | None) -> None:
    """Refuse tensors that share memory, that autograd would not see written, or that are of inference mode, outside of it."""
    if not is_eager():
        return
    written, only = _tensors(given), next(iter(given.values())) if len(given) == 1 else None
    if (shared := sharing(only if isinstance(only, Tall) else written)) is not None:
        first, second = (_names(given)[index] for index in shared)
        if first == second:
            raise ValueError(f"{operation}: {first} is expanded: several of its elements are one; pass a contiguous tensor")
        raise ValueError(f"{operation}: {first} and {second} share memory, and what is written into one would overwrite the other")
    if not torch.is_inference_mode_enabled() and not isinstance(only, Tall):  # as a step has it, whose results are its own
        for index, tensor in enumerate(written):
            if tensor.is_inference():
                name = _names(given)[index]
                raise RuntimeError(
                    f"{operation}: {name} is written, but an inference tensor; clone() it, or call under torch.inference_mode()"
                )
    if torch.is_grad_enabled():
        for index, tensor in enumerate(written):
            if tensor.requires_grad and (tensor if tensor._base is None else tensor._base).is_leaf:  # torch refuses a leaf's views, too
                raise RuntimeError(
                    f"{operation}: {_names(given)[index]} is written, but requires a gradient; detach() it, or call under torch.no_grad()"
                )


def check_apart(operation: str, written: Given, read: Given, in_place: Iterable[tuple[Tensor, Tensor]] = ()) -> None:
    """Refuse writing into memory that is read, too; what is written has been found to be apart (:func:`check_writable`).

    ``in_place``: what is read, with what is written in its place: the two may be one tensor.
    """
    if not is_eager():
        return
    targets, sources = _tensors(written), _tensors(read)
    if sharing(targets + sources) is None:
        return
    own = {x.data_ptr() for x, new in in_place if x.data_ptr() == new.data_ptr() and x.stride() == new.stride()}
    if own and sharing(targets + [x for x in sources if x.data_ptr() not in own]) is None:
        return
    for source, name in zip(sources, _names(read), strict=True):  # which may share memory with each other
        first, second = sharing([*targets, source]) or (0, 0)
        if first != second and source.data_ptr() not in own:
            raise ValueError(f"{operation}: {_names(written)[first]} is written and shares memory with {name}; pass a tensor of its own")


def refuse_negated(operation: str, argument: str) -> NoReturn:
    """Refuse a tensor that would be written, but whose memory holds −x (``Tensor.is_neg``)."""
    raise ValueError(f"{operation}: {argument} is written, but negated lazily (is_neg()); pass a copy, .resolve_neg()")


def check_stack(operation: str, argument: str, stack: Any, dtypes: Sequence[torch.dtype] | None = (torch.float32, torch.float64)) -> None:
    """Refuse what is no stack (N, r, r) in one of the dtypes; None: in any."""
    if not isinstance(stack, Tensor):
        raise TypeError(f"{operation}: {argument} must be one stacked tensor (N, r, r), got {type(stack).__name__}; torch.stack a list")
    check_strided(operation, argument, stack)
    if stack.ndim != 3 or stack.shape[1] != stack.shape[2]:
        raise ValueError(f"{operation}: {argument} must be (N, r, r), got {tuple(stack.shape)}")
    if dtypes is not None and stack.dtype not in dtypes:
        names = " or ".join(f"fp{8 * dtype.itemsize}" for dtype in dtypes)
        raise TypeError(f"{operation}: {argument} must be {names}, got {stack.dtype}")


def check_stack_of(operation: str, argument: str, stack: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Refuse what is no stack of this shape, in this dtype and on this device."""
    check_stack(operation, argument, stack, None)
    if stack.shape != shape or stack.dtype != dtype or stack.device != device:
        raise ValueError(
            f"{operation}: {argument} must be {dtype} of shape {tuple(shape)} on {device}, "
            f"got {stack.dtype} of shape {tuple(stack.shape)} on {stack.device}"
        )


def check_same_shapes(operation: str, argument: str, tensors: Sequence[Tensor], other: str, others: Sequence[Tensor]) -> None:
    """Refuse tensors that do not have the shapes of the ``others``, one by one."""
    for index, (tensor, like) in enumerate(zip(tensors, others, strict=True)):
        if tensor.shape != like.shape:
            raise ValueError(f"{operation}: {argument}[{index}] has shape {tuple(tensor.shape)}, {other}[{index}] has {tuple(like.shape)}")


def check_like(
    operation: str, argument: str, tensors: Sequence[Tensor], other: str, others: Sequence[Tensor], *, written: bool = False
) -> None:
    """Refuse a list whose tensors have not the dtype, device and shapes of the ``others``, which have been checked."""
    plain = is_list(tensors) and forward_ad._current_level < 0
    if plain and (wanted := signature(others)) is not None and signature(tensors) == wanted:
        return
    check_list(operation, argument, tensors, like=others[0] if others else None, written=written)  # what fails is explained
    check_same_length(operation, **{other: others, argument: tensors})
    check_same_shapes(operation, argument, tensors, other, others)


def check_lists(operation: str, **lists: Any) -> None:
    """Refuse what is no list: a tensor or an array has a length, too, but no truth value."""
    for name, values in lists.items():
        if not isinstance(values, (list, tuple, range, Tall)):
            raise TypeError(f"{operation}: {name} must be a list, got {type(values).__name__}")


def check_same_length(operation: str, **lists: Sequence[Any]) -> None:
    """Refuse lists of different lengths, and what is no list."""
    check_lists(operation, **lists)
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{operation}: lists must have equal lengths, got {', '.join(f'{n}: {c}' for n, c in lengths.items())}")
