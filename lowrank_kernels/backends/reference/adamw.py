"""The moment step with optional r×r maps: the specification of ``grouped_adamw_``."""

from __future__ import annotations

import math

from torch import Tensor

from ..dtypes import compute_dtype
from ..moments import Maps, Numbers, Stepped
from ..registry import implements
from ._common import always


def apply_map(matrix: Tensor, x: Tensor, rank_dim: int) -> Tensor:
    """An r×r map on the thin side of a factor: ``M x`` for (r, d) (``rank_dim`` 0), ``x M`` for (d, r) (``rank_dim`` 1)."""
    return matrix.to(x.dtype) @ x if rank_dim == 0 else x @ matrix.to(x.dtype)


def _correction(beta: float, t: int | Tensor, like: Tensor) -> float | Tensor:
    """``1 - βᵗ``. A counter on the device is fp32, in which ``1 - 0.999`` has four digits left; expm1 keeps them all."""
    if not isinstance(t, Tensor) or beta == 0:
        return 1 - beta**t if beta else 1.0
    return -(t.to(like.dtype) * math.log(beta)).expm1()


@implements("grouped_adamw_", "reference", always)
def grouped_adamw_(stepped: Stepped, maps: Maps, rank_dims: list[int], drifts: Tensor | None, numbers: Numbers) -> None:
    """One step for each i, in fp32 at least::

        g = P_i · grad_i + T_i · x           (maps.grad, maps.param; no map: P = I, T = 0)
        m = β₁ C_i · m + (1-β₁) g            (maps.momentum; no exp_avgs: m = g)
        v = β₂ v + (1-β₂) g²                 (no exp_avg_sqs: the direction is m itself)
        x = (1 - lr·weight_decay) x - lr · D_i · (m / (1-β₁ᵗ)) / (√v / √(1-β₂ᵗ) + eps)        (maps.direction; no map: D = I)
        drifts[i] = Xᵀ(X - X_old) with X = x (d, r), or X = xᵀ for x (r, d)

    with ``t = step - missed[i]`` (``missed`` empty: no steps were missed) and no bias correction if not asked for.
    """
    params, grads, exp_avgs, exp_avg_sqs, _ = stepped
    lr, beta1, beta2, eps, weight_decay, step, missed, bias_correction, maximize = numbers
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        g = grad.to(compute_dtype(param.dtype))
        if maximize:
            g = -g
        if maps.grad is not None:
            g = apply_map(maps.grad[i], g, rank_dims[i])
        old = param.to(g.dtype)
        if maps.param is not None:
            g = g + apply_map(maps.param[i], old, rank_dims[i])
        t = step - missed[i] if missed else step
        correction1, correction2 = (_correction(beta, t, g) if bias_correction else 1.0 for beta in (beta1, beta2))
        m = g
        if exp_avgs:
            m = exp_avgs[i]
            if maps.momentum is not None:
                m = apply_map(maps.momentum[i], m, rank_dims[i])
            m = m.lerp(g, 1 - beta1)
            exp_avgs[i].copy_(m)
        direction = m / correction1
        if exp_avg_sqs:
            v = exp_avg_sqs[i].mul_(beta2).addcmul_(g, g, value=1 - beta2)
            direction = direction / (v.sqrt() / correction2**0.5 + eps)
        if maps.direction is not None:
            direction = apply_map(maps.direction[i], direction, rank_dims[i])
        new = old * (1 - lr * weight_decay) - lr * direction
        if drifts is not None:
            # Of the factor as it is stored, rounding included: the next step sees that one.
            stored = new.to(param.dtype).to(g.dtype)
            tall, moved = (x.mT if rank_dims[i] == 0 else x for x in (stored, stored - old))
            drifts[i].copy_(tall.mT @ moved)
        param.copy_(new)
