"""Linear layer with a low-rank adapter (plain, decoupled, with an r×r core): the specification of ``lora_linear`` and its backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dropout import dropped
from ..registry import implements
from ._common import always
from ._thin import stacked, token_sum
from .dropout import dropout_mask


@implements("lora_linear", "reference", always)
def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    q_a: Tensor | None,
    q_b: Tensor | None,
    scale: float,
    mask: Tensor | None,
    keep: float,
    core: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y = x W0ᵀ + bias + s·(x̃ Aᵀ Q_Bᵀ + x̃ Q_A Bᵀ)`` for x (tokens, d_in); plain LoRA: ``s·x̃ Aᵀ Bᵀ``; with a core R: ``s·x̃ Aᵀ Rᵀ Bᵀ``.

    Returns y and the rank-r activation that the gradient of B (or R) needs: ``x̃ Q_A`` (decoupled) or ``x̃ Aᵀ`` (plain, core).
    With a core that activation and the core are fp32 at least: their product over the tokens is all that R learns from.
    Dropout is by a ``mask`` (tokens, d_in), or by a ``seed`` (1,) int64 in its place, which stands for :func:`dropout_mask` of it.
    """
    if seed is not None:
        mask = dropout_mask(seed, *x.shape, keep)
    x_adapter = dropped(x, mask, keep)
    if core is not None:
        hidden = x_adapter.to(core.dtype) @ a.to(core.dtype).mT
        update, up = (hidden @ core.mT).to(x.dtype), [b]
    elif q_a is None or q_b is None:
        hidden = x_adapter @ a.mT
        update, up = hidden, [b]
    else:
        rank = a.shape[0]
        update = x_adapter @ torch.cat([a, q_a]).mT
        hidden, up = update[:, rank:].contiguous(), [q_b, b]
    y = None if weight is None else F.linear(x, weight, bias)
    if y is None:
        y = (update * scale) @ stacked(up, len(x)).mT
    else:
        y.addmm_(update, stacked(up, len(x)).mT, alpha=scale)
    return y, hidden


@implements("lora_linear_backward", "reference", always)
def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    q_a: Tensor | None,
    q_b: Tensor | None,
    hidden: Tensor,
    scale: float,
    mask: Tensor | None,
    keep: float,
    needs: list[bool],
    core: Tensor | None = None,
    seed: Tensor | None = None,
) -> list[Tensor]:
    """The gradients that ``needs`` asks for, of (x, weight, bias, A, B) and, with a core, R, in this order; no GEMM for any other.

    Decoupled: ``∂A = s (∂y Q_B)ᵀ x̃``, ``∂B = s ∂yᵀ (x̃ Q_A)``: Q_A and Q_B are constants (SDS-LoRA, Eq. 6). With a core:
    ``∂R = s (∂y B)ᵀ (x̃ Aᵀ)`` in the core's dtype, and what plain LoRA has with BR in B's place, or RA in A's.
    """
    need_x, need_weight, need_bias, need_a, need_b, *need_more = needs
    need_core = any(need_more)
    if seed is not None and (need_x or need_a):
        mask = dropout_mask(seed, grad.shape[0], a.shape[1], keep)
    decoupled = q_a is not None and q_b is not None
    rank = a.shape[0]
    out: list[Tensor] = []
    if core is not None:
        if need_x or need_a or need_core:
            on_b = grad.to(core.dtype) @ b.to(core.dtype)
        if need_x or need_a:
            projected = through_a = (on_b @ core).to(grad.dtype)
            down = a
        core_hidden, hidden = hidden, (hidden @ core.mT).to(grad.dtype) if need_b else hidden
    elif need_x and decoupled:
        assert q_a is not None and q_b is not None
        projected = grad @ stacked([q_b, b], len(grad))
        through_a, down = projected[:, :rank], torch.cat([a, q_a])
    elif need_x or need_a:
        projected = through_a = grad @ stacked([q_b if q_b is not None else b], len(grad))
        down = a
    if need_x:
        if mask is None and weight is not None:
            out.append((grad @ weight).addmm_(projected, down, alpha=scale))
        else:
            grad_x = dropped((projected * scale) @ down, mask, keep)
            out.append(grad_x if weight is None else grad_x.addmm_(grad, weight))
    if need_weight:
        out.append(grad.mT @ x)
    if need_bias:
        out.append(grad.sum(dim=0))
    if need_a:
        out.append((through_a * scale).mT @ dropped(x, mask, keep))
    if need_b:
        out.append(token_sum(grad, hidden * scale))
    if need_core:
        out.append((on_b * scale).mT @ core_hidden)
    return out
