"""The ``torch.library`` namespace of the package, and what all operations need to define themselves in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends.lists import PLAIN, Tall, as_in_memory, as_stored, matrix_layout

NAMESPACE = "lowrank_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(name: str, signature: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``lowrank_kernels::name`` for every device, with its meta implementation."""
    LIBRARY.define(f"{name}{signature}")
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


def no_backward(name: str, why: str, instead: str = "Call it on detached tensors or under torch.no_grad().") -> None:
    """Register a backward that says that ``name`` has none, for whoever asks."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name} has no backward: {why}. {instead}")

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, lib=LIBRARY)


def applies(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for calls that :func:`is_plain_eager` has found to be plain: without the look for functorch's wrappers at every
    argument, which takes a tenth of a small layer's time."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


#: Types whose memory is what it seems: no tensor subclass.
_PLAIN = PLAIN | {type(None)}


def is_eager() -> bool:
    """Whether no compiler, tracer, dispatch mode, functorch transform or forward mode is at work."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def is_transformed() -> bool:
    """Whether a ``torch.func`` transform, forward-mode differentiation or ``torch.jit.trace`` is at work, and no compiler: what sees
    torch's own operations alone, or would write ours into its graph."""
    if torch.compiler.is_compiling():
        return False
    transform = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    return transform or torch._C._get_tracing_state() is not None


def records_nothing(*given: Tensor | Sequence[Tensor] | Sequence[Tensor | None] | None) -> bool:
    """Whether autograd has nothing to record: it is off, or none of the tensors, or of the lists of them, requires a gradient."""
    if not torch.is_grad_enabled():
        return True
    lists = ([one] if isinstance(one, Tensor) else as_stored(one)[0] for one in given if one is not None)  # type: ignore[arg-type]
    return not any(tensor is not None and tensor.requires_grad for tensors in lists for tensor in tensors)


def is_plain_eager(*tensors: Tensor | None) -> bool:
    """Whether nothing needs an operation as a node: no compiler, dispatch mode, functorch transform, forward mode, tensor subclass or
    tensor that is negated lazily (``Tensor.is_neg``: its memory holds −x, which the dispatcher knows and kernels do not).

    Then the same implementations are called without the dispatcher, whose path through Python costs more than a small operation.
    """
    if not is_eager() or not _PLAIN.issuperset(map(type, tensors)) or tensors[0].is_meta:  # type: ignore[union-attr]
        return False
    for tensor in tensors:  # noqa: SIM110 (a generator takes longer)
        if tensor is not None and tensor.is_neg():
            return False
    return True


def is_plain_node(*tensors: Tensor | None) -> bool:
    """Whether an operation may stand as a node: nothing but a compiler or a dispatch mode is there, no transform and no tensor subclass."""
    in_transform = not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
    return not in_transform and _PLAIN.issuperset(map(type, tensors))


def are_plain_eager(first: Sequence[Tensor], *others: Sequence[Tensor] | None) -> bool:
    """:func:`is_plain_eager` of whole lists, each of one dtype and device; the first one is not empty."""
    if not is_eager() or not all(map(as_in_memory, (first, *(other for other in others if other is not None)))):
        return False
    return not as_stored(first)[0][0].is_meta


def resolved(tensors: Sequence[Any] | None) -> list[Any] | None:
    """An optional list, or a list of optional tensors, without lazy negation, which the dispatcher resolves in other lists only."""
    if tensors is None or torch.compiler.is_compiling():
        return None if tensors is None else list(tensors)
    return [x.resolve_neg() if x is not None and x.is_neg() else x for x in tensors]


def is_list(*candidates: object) -> bool:
    """Whether all are lists of the kinds that operations take, or None."""
    return {list, tuple, Tall, type(None)}.issuperset(map(type, candidates))


def fitting_layouts(xs: Sequence[Tensor], *others: Sequence[Tensor] | None) -> tuple[Any, ...] | None:
    """Where all these lists of matrices lie, for backends: of xs, and of each other one that is given.

    None if compiled code has not found that xs has one number of columns, and that the others are of its dtype, device and shapes: then the
    operation's checks say what does not fit.
    """
    if not is_list(xs, *others) or not xs or forward_ad._current_level >= 0:
        return None
    first = matrix_layout(xs)
    if first is None or first.columns < 0:
        return None
    found = {id(xs): first}
    for given in others:
        if given is not None and id(given) not in found:
            layout = found[id(given)] = matrix_layout(given)
            if layout is None or not first.fits(layout):
                return None
    return first, *(None if given is None else found[id(given)] for given in others)


def for_eager(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The list as backends get it: :class:`Tall` where compiled code may read it, else a list of tensors."""
    if type(tensors) is Tall and tensors.stored and tensors.stored[0].device.type == "cpu":
        return tensors
    return list(tensors)
