"""``lora_down`` and ``lora_up``: ``lora_linear`` split at the rank-r activations, for layers that share an input (q, k, v; gate, up).

``lora_down`` projects the input for all of the layers in one read of it; each layer goes on by ``lora_up``. In the backward pass the
base layers' ∂x are summed first, and the low-rank part of all layers joins them in one pass; ``∂A`` of all layers is one read of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .._checks import as_number
from ..backends.dtypes import FLOATING, autocast_dtype, cast
from ..backends.registry import run
from ._library import LIBRARY, NAMESPACE, applies, define, is_plain_eager, is_plain_node, no_backward
from ._tensor_checks import check_lists, check_tensor, check_tensor_on
from .lora_linear import flat


def lora_down(
    x: Tensor, factors: Sequence[Tensor], bases: Sequence[Tensor] | None = None
) -> tuple[Tensor, list[Tensor], list[Tensor] | None]:
    """``x Aᵢᵀ`` for every layer i and, with ``bases``, ``x Q_Aᵢ`` (SDS-LoRA Eq. 5), in one read of x.

    Args:
        x: (..., d_in).
        factors: Aᵢ (rᵢ, d_in), trainable; another dtype than x's is cast.
        bases: Q_Aᵢᵀ (rᵢ, d_in), constants; None for plain LoRA.

    Returns:
        x for the base layers (cast as autocast asks): gradients that flow back through it are summed before the low-rank part is added
        to them, in one pass. Then the list of ``x Aᵢᵀ`` (..., rᵢ), and that of ``x Q_Aᵢ`` or None.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or there is no layer.
    """
    _check_down(x, factors, bases)
    x = cast(x, autocast_dtype(x))
    q = None if bases is None else cast(torch.cat(list(bases)).detach(), x.dtype)
    eager = is_plain_eager(x, *factors)
    if eager and torch.is_grad_enabled() and (x.requires_grad or any(factor.requires_grad for factor in factors)):
        passed, *through = _apply_down(x, q, *factors)
        count = len(factors)
        return x if passed is None else passed, through[:count], None if q is None else through[count:]
    a = cast(torch.cat(list(factors)), x.dtype)
    through_q: Tensor | None
    if eager:
        through_a, through_q = _down(x, a, q)
    elif is_plain_node(x, *factors):
        through_a, *rest = torch.ops.lowrank_kernels.lora_down(x, a, q)
        through_q = rest[0] if rest else None
        if through_q is not None and not x.requires_grad:  # then nothing reads its gradient
            through_q = through_q.detach()
    else:
        through_a, through_q = F.linear(x, a), None if q is None else F.linear(x, q)
    ranks = [factor.shape[0] for factor in factors]
    return x, list(through_a.split_with_sizes(ranks, -1)), None if through_q is None else list(through_q.split_with_sizes(ranks, -1))


def lora_up(
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    hidden: Tensor,
    b: Tensor,
    scale: float = 1.0,
    *,
    hidden_q: Tensor | None = None,
    q_b: Tensor | None = None,
) -> Tensor:
    """``y = x W0ᵀ + bias + s·H Bᵀ``, decoupled ``… + s·(H Q_Bᵀ + H_Q Bᵀ)``, for ``H = x Aᵀ`` and ``H_Q = x Q_A`` of :func:`lora_down`.

    Args:
        x: (..., d_in), as :func:`lora_down` returned it; None with a weight of None: the adapter's part alone.
        weight: the frozen W0 (d_out, d_in), or None.
        bias: frozen, (d_out,) or None.
        hidden: H (..., r).
        b: (d_out, r), trainable; another dtype than H's is cast.
        scale: s.
        hidden_q: H_Q (..., r); with ``q_b``, the constant Q_B (d_out, r), of a decoupled layer.

    Everything is cast to the dtype of ``hidden``.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or ``scale`` do not fit, or one of two that come together is missing.
    """
    try:
        fits = _up_fits(x, weight, bias, hidden, b, hidden_q, q_b)
    except (AttributeError, IndexError, ValueError):  # something is no tensor, or no matrix
        fits = False
    if not fits:
        _check_up(x, weight, bias, hidden, b, hidden_q, q_b)
    scale, dtype = as_number("lora_up", "scale", scale), hidden.dtype
    b = cast(b, dtype)
    hidden_q = None if hidden_q is None else cast(hidden_q, dtype)
    q_b = None if q_b is None else cast(q_b.detach() if q_b.requires_grad else q_b, dtype)
    if x is not None:
        x = cast(x, dtype)
        weight, bias = (None if t is None else cast(t, dtype) for t in (weight, bias))
    frozen = not any(t is not None and t.requires_grad for t in (weight, bias))
    eager = frozen and is_plain_eager(hidden, x, weight, bias, b, hidden_q, q_b)
    if not eager and not (frozen and is_plain_node(hidden, x, weight, bias, b, hidden_q, q_b)):
        delta = F.linear(hidden, b) if q_b is None or hidden_q is None else F.linear(hidden, q_b) + F.linear(hidden_q, b)
        return scale * delta if x is None or weight is None else F.linear(x, weight, bias) + scale * delta
    leading = hidden.shape[:-1]
    rows = [None if t is None else flat(t) for t in (x, hidden, hidden_q)]
    arguments = (rows[0], weight, bias, rows[1], b, rows[2], q_b, scale)
    if not eager:
        y = torch.ops.lowrank_kernels.lora_up(*arguments)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, hidden, b, hidden_q)):
        y = _apply_up(*arguments)
    else:
        y = _up(*arguments)
    return y if len(leading) == 1 else y.view(*leading, y.shape[-1])


def _check_down(x: Tensor, factors: Sequence[Tensor], bases: Sequence[Tensor] | None) -> None:
    name = "lora_down"
    if not isinstance(factors, (list, tuple)) or not (bases is None or isinstance(bases, (list, tuple))):
        check_lists(name, factors=factors, bases=() if bases is None else bases)
    if not factors or (bases is not None and len(bases) != len(factors)):
        given = "" if bases is None else f" with {len(bases)} bases"
        raise ValueError(f"{name}: need one factor at least, and as many bases or none; got {len(factors)} factors{given}")
    check_tensor(name, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{name}: x must be (..., d_in), got a tensor without dimensions")
    device, width = x.device, x.shape[-1]
    for argument, tensors in (("factors", factors), ("bases", bases or ())):
        for index, (tensor, factor) in enumerate(zip(tensors, factors, strict=True) if tensors else ()):
            if not _is_ordinary(tensor, device):
                check_tensor_on(name, f"{argument}[{index}]", tensor, "x", device)
            if tensor.ndim != 2 or tensor.shape != (factor.shape[0], width):
                expected = f"(r, {width})" if tensor is factor else f"({factor.shape[0]}, {width})"
                raise ValueError(f"{name}: {argument}[{index}] must be {expected}, got {tuple(tensor.shape)}")


def _is_ordinary(tensor: Any, device: torch.device) -> bool:
    """The quick form of :func:`check_tensor_on`, for every call."""
    return isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.dtype in FLOATING and tensor.device == device


def _up_fits(
    x: Tensor | None, weight: Tensor | None, bias: Tensor | None, hidden: Tensor, b: Tensor, hidden_q: Tensor | None, q_b: Tensor | None
) -> bool:
    """The quick form of :func:`_check_up`, for every call: True for ordinary arguments, False for what deserves a closer look."""
    device, shape, (d_out, rank) = hidden.device, hidden.shape, b.shape
    if len(shape) == 0 or shape[-1] != rank or (hidden_q is None) != (q_b is None) or (x is None) != (weight is None):
        return False
    for tensor in (hidden, b, x, weight, bias, hidden_q, q_b):
        if tensor is not None and not _is_ordinary(tensor, device):
            return False
    if q_b is not None and (hidden_q.shape != shape or q_b.shape != b.shape):  # type: ignore[union-attr]
        return False
    if x is None or weight is None:
        return bias is None
    return x.shape[:-1] == shape[:-1] and weight.shape == (d_out, x.shape[-1]) and (bias is None or bias.shape == (d_out,))


def _check_up(
    x: Tensor | None, weight: Tensor | None, bias: Tensor | None, hidden: Tensor, b: Tensor, hidden_q: Tensor | None, q_b: Tensor | None
) -> None:
    if (x is None) != (weight is None) or (hidden_q is None) != (q_b is None) or (weight is None and bias is not None):
        raise ValueError("lora_up: x and weight come together, hidden_q and q_b too, and a bias only with a weight")
    check_tensor("lora_up", "hidden", hidden)
    device = hidden.device
    for name, tensor in (("b", b), ("x", x), ("weight", weight), ("bias", bias), ("hidden_q", hidden_q), ("q_b", q_b)):
        if not (tensor is None and name != "b") and not _is_ordinary(tensor, device):
            check_tensor_on("lora_up", name, tensor, "hidden", device)
    if hidden.ndim == 0 or b.ndim != 2:
        raise ValueError(f"lora_up: need hidden (..., r) and b (d_out, r), got {tuple(hidden.shape)} and {tuple(b.shape)}")
    leading, (d_out, rank) = tuple(hidden.shape[:-1]), b.shape
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "hidden": (hidden, (*leading, rank)),
        "hidden_q": (hidden_q, (*leading, rank)),
    }
    expected |= {"q_b": (q_b, (d_out, rank)), "bias": (bias, (d_out,))}
    if x is not None:
        d_in = x.shape[-1] if x.ndim else 0
        expected |= {"x": (x, (*leading, d_in)), "weight": (weight, (d_out, d_in))}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"lora_up: {name} must be {shape} (b has r={rank}, d_out={d_out}), got {tuple(tensor.shape)}")


def _down(x: Tensor, a: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor | None]:
    through_a, through_q = run("lora_down", x.device.type, x.reshape(-1, x.shape[-1]), a, q)
    leading = x.shape[:-1]
    return through_a.view(*leading, a.shape[0]), None if through_q is None else through_q.view(*leading, a.shape[0])


def _up(*args: Any) -> Tensor:
    return run("lora_up", args[3].device.type, *args)


class _Down(torch.autograd.Function):
    """x, as a view that collects the gradients of the base layers (None where x wants no gradient), ``x Aᵀ`` of every layer, ``x Q_A`` of
    every layer. A layer that is not used gets no gradient, as without the others: an optimizer would take zeros for one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor | None, *factors: Tensor) -> tuple[Tensor | None, ...]:
        need_x, _, *needs = ctx.needs_input_grad
        a = torch.cat(factors).to(x.dtype)
        ctx.save_for_backward(x if any(needs) else None, a if need_x else None, q if need_x else None)
        ctx.set_materialize_grads(False)
        ctx.of_factors = [(factor.shape[0], factor.dtype) for factor in factors]
        ranks = [rank for rank, _ in ctx.of_factors]
        through_a, through_q = (() if through is None else through.split_with_sizes(ranks, -1) for through in _down(x, a, q))
        if not need_x:
            ctx.mark_non_differentiable(*through_q)
        return (x.view_as(x) if need_x else None, *through_a, *through_q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor | None, *on: Tensor | None) -> tuple[Tensor | None, ...]:
        x, a, q = ctx.saved_tensors
        ranks = [rank for rank, _ in ctx.of_factors]
        count, some = len(ranks), next((grad for grad in on if grad is not None), None)
        if some is None:
            return (grad_x, *[None] * (1 + count))
        whole = _joined(on[:count], ranks), _joined(on[count:], ranks)
        rows = [None if t is None else t.reshape(-1, t.shape[-1]).contiguous() for t in (grad_x, *whole, x)]
        of_x, of_a = run("lora_down_backward", some.device.type, *rows, a, q)
        pieces = [None] * count if of_a is None else of_a.split_with_sizes(ranks)
        of_factors = [
            piece.to(dtype) if grad is not None and needed else None
            for piece, grad, needed, (_, dtype) in zip(pieces, on, ctx.needs_input_grad[2:], ctx.of_factors, strict=False)
        ]
        return (None if of_x is None else of_x.view(*some.shape[:-1], of_x.shape[-1]), None, *of_factors)


def _joined(grads: Sequence[Tensor | None], ranks: list[int]) -> Tensor | None:
    """The gradients of the columns of one product; zero for those that have none, None if none has any."""
    found = [grad for grad in grads if grad is not None]
    if not found:
        return None
    if len(found) < len(grads):
        zero, leading = found[0].new_zeros(()), found[0].shape[:-1]
        found = [zero.expand(*leading, rank) if grad is None else grad for grad, rank in zip(grads, ranks, strict=True)]
    return torch.cat(found, -1)


def _up_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, _, hidden, b, hidden_q, q_b, scale = inputs
    need_x, _, _, need_hidden, need_b, need_q, *_ = ctx.needs_input_grad
    ctx.needs, ctx.scale = [need_x, need_hidden, need_b, need_q], scale
    of_b = hidden if hidden_q is None else hidden_q
    ctx.save_for_backward(weight if need_x else None, of_b if need_b else None, b, q_b)


def _up_grads(needs: list[bool], grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of all inputs, of which ``grads`` are those that are needed."""
    found = iter(grads)
    of_x, of_hidden, of_b, of_q = (next(found) if needed else None for needed in needs)
    return of_x, None, None, of_hidden, of_b, of_q, None, None


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        y = _up(*args)
        _up_setup(ctx, args, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        args = (grad.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.needs)
        return _up_grads(ctx.needs, run("lora_up_backward", grad.device.type, *args))


_apply_down, _apply_up = applies(_Down), applies(_Up)


# The same as nodes, for compilers and dispatch modes. A node cannot hand x through, so gradients that reach it by other paths join outside.


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _down_node(x: Tensor, a: Tensor, q: Tensor | None) -> list[Tensor]:
    return _given(*_down(x, a, q))


def _down_fake(x: Tensor, a: Tensor, q: Tensor | None) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], a.shape[0]) for factor in (a, q) if factor is not None]


def _down_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, a, q = inputs
    need_x, need_a = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_a else None, a if need_x else None, q if need_x else None)


def _down_autograd(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, Tensor | None, None]:
    x, a, q = ctx.saved_tensors
    on_a, on_q = (*grads, None)[:2]
    found = iter(torch.ops.lowrank_kernels.lora_down_backward(on_a, None if q is None else on_q, x, a, q))
    return next(found) if a is not None else None, next(found) if x is not None else None, None


def _down_backward(on_a: Tensor, on_q: Tensor | None, x: Tensor | None, a: Tensor | None, q: Tensor | None) -> list[Tensor]:
    rows = [None if t is None else t.reshape(-1, t.shape[-1]).contiguous() for t in (on_a, on_q, x)]
    of_x, of_a = run("lora_down_backward", on_a.device.type, None, *rows, a, q)
    return _given(None if of_x is None else of_x.view(*on_a.shape[:-1], of_x.shape[-1]), of_a)


def _down_backward_fake(on_a: Tensor, on_q: Tensor | None, x: Tensor | None, a: Tensor | None, q: Tensor | None) -> list[Tensor]:
    of_x = None if a is None else on_a.new_empty(*on_a.shape[:-1], a.shape[1])
    return _given(of_x, None if x is None else x.new_empty(on_a.shape[-1], x.shape[-1]))


def _up_fake(x: Any, weight: Any, bias: Any, hidden: Tensor, b: Tensor, hidden_q: Any, q_b: Any, scale: float) -> Tensor:
    return hidden.new_empty(hidden.shape[0], b.shape[0])


def _up_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    args = (grad.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.needs)
    return _up_grads(ctx.needs, torch.ops.lowrank_kernels.lora_up_backward(*args))


def _up_backward(grad: Tensor, *rest: Any) -> list[Tensor]:
    # Slices of one product are several results here, which must not share memory.
    found = run("lora_up_backward", grad.device.type, grad, *rest)
    return [tensor.contiguous() for tensor in found]


def _up_backward_fake(grad: Tensor, weight: Any, hidden: Any, b: Tensor, q_b: Any, scale: float, needs: list[bool]) -> list[Tensor]:
    tokens, (d_out, rank) = grad.shape[0], b.shape
    shapes = (tokens, 0 if weight is None else weight.shape[1]), (tokens, rank), (d_out, rank), (tokens, rank)
    return [grad.new_empty(shape) for shape, needed in zip(shapes, needs, strict=True) if needed]


define("lora_down", "(Tensor x, Tensor a, Tensor? q) -> Tensor[]", _down_node, _down_fake)
define(
    "lora_down_backward",
    "(Tensor on_a, Tensor? on_q, Tensor? x, Tensor? a, Tensor? q) -> Tensor[]",
    _down_backward,
    _down_backward_fake,
)
define(
    "lora_up",
    "(Tensor? x, Tensor? weight, Tensor? bias, Tensor hidden, Tensor b, Tensor? hidden_q, Tensor? q_b, float scale) -> Tensor",
    _up,
    _up_fake,
)
define(
    "lora_up_backward",
    "(Tensor grad, Tensor? weight, Tensor? hidden, Tensor b, Tensor? q_b, float scale, bool[] needs) -> Tensor[]",
    _up_backward,
    _up_backward_fake,
)
for _name in ("lora_down_backward", "lora_up_backward"):
    no_backward(
        _name, "layers that share an input have no second derivatives", "Call share_inputs(model, ()) before, or use torch.func.grad."
    )
torch.library.register_autograd(f"{NAMESPACE}::lora_down", _down_autograd, setup_context=_down_setup, lib=LIBRARY)
torch.library.register_autograd(f"{NAMESPACE}::lora_up", _up_autograd, setup_context=_up_setup, lib=LIBRARY)
__all__ = ["lora_down", "lora_up"]
