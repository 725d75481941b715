"""``lora_down`` and ``lora_up`` on the CPU: the compiled adapter of ``lora_linear``, split at the rank-r activations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..extension import csrc
from ..registry import Verdict, count_launch, implements
from .lora_linear import LARGEST_RANK, adapter_verdict, dense

#: Rows of the stacked factors of all layers; above it torch's GEMMs are as fast.
LARGEST_STACK = 96


def verify_down(x: Tensor, a: Tensor, q: Tensor | None) -> Verdict:
    """Takes fp32 and fp64, up to 96 rows of factors."""
    return adapter_verdict(x, a.shape[0], LARGEST_STACK)


@implements("lora_down", "native", verify_down)
def lora_down(x: Tensor, a: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """See the reference."""
    count_launch()
    factors = [factor for factor in (a, q) if factor is not None]
    through = [x.new_empty(x.shape[0], a.shape[0]) for _ in factors]
    csrc.adapter_forward(x.contiguous(), dense(factors), [], 1.0, None, through, torch.get_num_threads())
    return through[0], None if q is None else through[1]


def verify_down_backward(
    grad_x: Tensor | None, on_a: Tensor | None, on_q: Tensor | None, x: Tensor | None, a: Tensor | None, q: Tensor | None
) -> Verdict:
    """As :func:`verify_down`."""
    some = on_q if on_a is None else on_a
    assert some is not None
    return adapter_verdict(some, some.shape[1], LARGEST_STACK)


@implements("lora_down_backward", "native", verify_down_backward)
def lora_down_backward(
    grad_x: Tensor | None, on_a: Tensor | None, on_q: Tensor | None, x: Tensor | None, a: Tensor | None, q: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """See the reference."""
    count_launch()
    into_x = [(on, factor) for on, factor in ((on_a, a), (on_q, q)) if on is not None and factor is not None]
    of_x = None
    if into_x:
        (on, factor), *_ = into_x
        of_x = on.new_zeros(on.shape[0], factor.shape[1]) if grad_x is None else grad_x.new_empty(grad_x.shape)
    of_a = None if on_a is None or x is None else x.new_empty(on_a.shape[1], x.shape[1])
    if of_x is not None or of_a is not None:
        through, downs = dense([on for on, _ in into_x] or [on_a]), dense([factor for _, factor in into_x])  # type: ignore[list-item]
        before = None if of_x is None or grad_x is None else grad_x.contiguous()
        kept, gradients = None if of_a is None or x is None else x.contiguous(), (of_x, of_a, None)
        csrc.adapter_backward(None, kept, None, before, through, downs, [], 1.0, *gradients, torch.get_num_threads())
    return of_x, of_a


def verify_up(x: Tensor | None, weight: Tensor | None, bias: Tensor | None, hidden: Tensor, b: Tensor, hidden_q: Tensor | None,
              q_b: Tensor | None, scale: float) -> Verdict:  # fmt: skip
    """Takes fp32 and fp64, up to rank 32."""
    return adapter_verdict(hidden, b.shape[1], LARGEST_RANK)


@implements("lora_up", "native", verify_up)
def lora_up(x: Tensor | None, weight: Tensor | None, bias: Tensor | None, hidden: Tensor, b: Tensor, hidden_q: Tensor | None,
            q_b: Tensor | None, scale: float) -> Tensor:  # fmt: skip
    """See the reference."""
    count_launch()
    base = None if x is None or weight is None else F.linear(x, weight, bias)
    y = hidden.new_zeros(hidden.shape[0], b.shape[0]) if base is None else base
    through, ups = ([hidden], [b]) if hidden_q is None or q_b is None else ([hidden, hidden_q], [q_b, b])
    csrc.adapter_forward(None, [], dense(ups), scale, y, _dense_rows(through), torch.get_num_threads())
    return y


def verify_up_backward(
    grad: Tensor, weight: Tensor | None, hidden: Tensor | None, b: Tensor, q_b: Tensor | None, scale: float, needs: list[bool]
) -> Verdict:
    """As :func:`verify_up`."""
    return adapter_verdict(grad, b.shape[1], LARGEST_RANK)


@implements("lora_up_backward", "native", verify_up_backward)
def lora_up_backward(
    grad: Tensor, weight: Tensor | None, hidden: Tensor | None, b: Tensor, q_b: Tensor | None, scale: float, needs: list[bool]
) -> list[Tensor]:
    """See the reference."""
    count_launch()
    need_x, need_hidden, need_b, need_q = needs
    grad, rank = grad.contiguous(), b.shape[1]
    of_x = grad @ weight if need_x and weight is not None else None
    on_hidden = grad.new_empty(grad.shape[0], rank) if need_hidden else None
    on_q = grad.new_empty(grad.shape[0], rank) if need_q else None
    of_b = grad.new_empty(b.shape) if need_b else None
    pairs = [(on, up) for on, up in ((on_hidden, b if q_b is None else q_b), (on_q, b)) if on is not None]
    if pairs or of_b is not None:
        met = _dense_rows([hidden])[0] if need_b and hidden is not None else None
        through, ups = [on for on, _ in pairs], dense([up for _, up in pairs] or [b])
        gradients = None, None, of_b
        csrc.adapter_backward(grad, None, met, None, through, [], ups, scale, *gradients, torch.get_num_threads())
    return [found for found in (of_x, on_hidden, of_b, on_q) if found is not None]


def _dense_rows(parts: list[Tensor]) -> list[Tensor]:
    """Compiled code takes slices of what all layers went down to."""
    return [part if part.stride(1) == 1 else part.contiguous() for part in parts]
