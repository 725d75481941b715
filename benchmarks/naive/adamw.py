"""AdamW (Loshchilov & Hutter, Algorithm 2) on a list of tensors, one tensor after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """One step, in place, on parameters and moments; ``step`` counts from 1, this step included."""
    beta1, beta2 = betas
    for param, grad, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        param.mul_(1 - lr * weight_decay)
        m.mul_(beta1).add_(grad, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        m_hat = m / (1 - beta1**step)
        v_hat = v / (1 - beta2**step)
        param.sub_(lr * m_hat / (v_hat.sqrt() + eps))
