"""The low-rank layer split at its rank-r activations: the specification of ``lora_down`` and ``lora_up`` and of their backward passes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..registry import implements
from ._common import always
from ._thin import stacked, token_sum


@implements("lora_down", "reference", always)
def lora_down(x: Tensor, a: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``x Aᵀ`` and ``x Q_A`` for x (tokens, d_in) and the stacked factors of all layers, A and Q_Aᵀ (k, d_in)."""
    if q is None:
        return x @ a.mT, None
    through_a, through_q = (x @ torch.cat([a, q]).mT).split(len(a), 1)
    return through_a.contiguous(), through_q.contiguous()


@implements("lora_down_backward", "reference", always)
def lora_down_backward(
    grad_x: Tensor | None, on_a: Tensor | None, on_q: Tensor | None, x: Tensor | None, a: Tensor | None, q: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """``∂x = grad_x + P A + P_Q Q_Aᵀ`` (with a) and ``∂A = Pᵀ x`` (with x), for P = ``on_a`` and P_Q = ``on_q``, (tokens, k) or None.

    ``grad_x`` is what reached x by other paths; it is not changed.
    """
    of_x = None
    if a is not None:
        on, factor = (on_q, q) if on_a is None else (on_a, a)
        if on_a is not None and on_q is not None and q is not None:
            on, factor = torch.cat([on_a, on_q], dim=1), torch.cat([a, q])
        assert on is not None and factor is not None
        of_x = on @ factor if grad_x is None else torch.addmm(grad_x, on, factor)
    return of_x, None if x is None or on_a is None else on_a.mT @ x


@implements("lora_up", "reference", always)
def lora_up(
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    hidden: Tensor,
    b: Tensor,
    hidden_q: Tensor | None,
    q_b: Tensor | None,
    scale: float,
) -> Tensor:
    """``y = x W0ᵀ + bias + s·(H Q_Bᵀ + H_Q Bᵀ)`` for H (tokens, r); plain LoRA: ``s·H Bᵀ``."""
    if hidden_q is None or q_b is None:
        update, up = hidden, [b]
    else:
        update, up = torch.cat([hidden, hidden_q], dim=1), [q_b, b]
    if x is None or weight is None:
        return (update * scale) @ stacked(up, len(hidden)).mT
    return F.linear(x, weight, bias).addmm_(update, stacked(up, len(hidden)).mT, alpha=scale)


@implements("lora_up_backward", "reference", always)
def lora_up_backward(
    grad: Tensor, weight: Tensor | None, hidden: Tensor | None, b: Tensor, q_b: Tensor | None, scale: float, needs: list[bool]
) -> list[Tensor]:
    """What ``needs`` asks for of ``∂x = ∂y W0``, ``∂H = s ∂y Q_B``, ``∂B = s ∂yᵀ H_Q``, ``∂H_Q = s ∂y B``, in this order.

    Plain LoRA has B in the place of Q_B. ``hidden`` is the activation that meets B: H_Q, or plain LoRA's H.
    """
    need_x, need_hidden, need_b, need_q = needs
    out = []
    if need_x:
        assert weight is not None
        out.append(grad @ weight)
    on_hidden = on_q = None
    if need_hidden and need_q:
        assert q_b is not None
        on_hidden, on_q = (grad @ stacked([q_b, b], len(grad)) * scale).split(b.shape[1], 1)
    elif need_hidden:
        on_hidden = grad @ stacked([b if q_b is None else q_b], len(grad)) * scale
    elif need_q:
        on_q = grad @ stacked([b], len(grad)) * scale
    if on_hidden is not None:
        out.append(on_hidden)
    if need_b:
        assert hidden is not None
        out.append(token_sum(grad, hidden * scale))
    if on_q is not None:
        out.append(on_q)
    return out
