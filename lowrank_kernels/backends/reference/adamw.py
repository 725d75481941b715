"""The moment step with optional r×r maps: the specification of ``grouped_adamw_``."""

from __future__ import annotations

from torch import Tensor

from ..registry import implements
from ._common import always, compute_dtype


def apply_map(matrix: Tensor, x: Tensor, rank_dim: int) -> Tensor:
    """An r×r map on the thin side of a factor: ``M x`` for (r, d) (``rank_dim`` 0), ``x M`` for (d, r) (``rank_dim`` 1)."""
    return matrix.to(x.dtype) @ x if rank_dim == 0 else x @ matrix.to(x.dtype)


@implements("grouped_adamw_", "reference", always)
def grouped_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grad_maps: Tensor | None,
    momentum_maps: Tensor | None,
    rank_dims: list[int],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    missed: list[int],
    bias_correction: bool,
    maximize: bool,
) -> None:
    """One step for each i, in fp32 at least::

        g = P_i · grad_i                     (grad_maps; no map: P = I)
        m = β₁ C_i · m + (1-β₁) g            (momentum_maps; no exp_avgs: m = g)
        v = β₂ v + (1-β₂) g²                 (no exp_avg_sqs: the direction is m itself)
        x = (1 - lr·weight_decay) x - lr · (m / (1-β₁ᵗ)) / (√(v / (1-β₂ᵗ)) + eps)

    with ``t = step - missed[i]`` (``missed`` empty: no steps were missed) and no bias correction if not asked for.
    """
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        g = grad.to(compute_dtype(param.dtype))
        if maximize:
            g = -g
        if grad_maps is not None:
            g = apply_map(grad_maps[i], g, rank_dims[i])
        t = step - missed[i] if missed else step
        correction1 = 1 - beta1**t if bias_correction else 1.0
        correction2 = 1 - beta2**t if bias_correction else 1.0
        m = g
        if exp_avgs:
            m = exp_avgs[i]
            if momentum_maps is not None:
                m = apply_map(momentum_maps[i], m, rank_dims[i])
            m = m.lerp(g, 1 - beta1)
            exp_avgs[i].copy_(m)
        direction = m / correction1
        if exp_avg_sqs:
            v = exp_avg_sqs[i].mul_(beta2).addcmul_(g, g, value=1 - beta2)
            direction = direction / ((v / correction2).sqrt() + eps)
        param.copy_(param.to(g.dtype) * (1 - lr * weight_decay) - lr * direction)
