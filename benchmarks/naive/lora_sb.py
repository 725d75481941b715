"""LoRA-SB (Ponkshe et al. 2024), one layer at a time: where it starts (Eq. 1, 2, 7) and the gradient that it trains R with (Theorem 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .adamw import adamw_


def lora_sb_start(gradients: Sequence[Tensor], rank: int, scale: float, lr: float, update: str = "adam") -> tuple[Tensor, Tensor, Tensor]:
    """B (m, r), R (r, r), A (r, n) from the full gradients (m, n) of some samples at W0."""
    total = torch.stack(list(gradients)).sum(dim=0)
    delta = -lr * (total.sign() if update == "adam" else total / len(gradients))
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :rank], torch.diag(S[:rank]) / scale, Vh[:rank]


def optimal_gradient(B: Tensor, A: Tensor, grad_R: Tensor, scale: float) -> Tensor:
    """``s⁻²(BᵀB)⁻¹ g_R (AAᵀ)⁻¹``, Equation 4."""
    return torch.linalg.solve(B.T @ B, grad_R) @ torch.linalg.inv(A @ A.T) / scale**2


class LoRASBLayer:
    """The factors of one layer, R's moments, and a step on ``∂R``."""

    def __init__(self, B: Tensor, R: Tensor, A: Tensor, scale: float, *, lr: float, update: str = "adam") -> None:
        self.B, self.R, self.A, self.scale = B, R.clone(), A, scale
        self.lr, self.update, self.steps = lr, update, 0
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(R), torch.zeros_like(R)

    def delta_weight(self) -> Tensor:
        return self.scale * self.B @ self.R @ self.A

    def step(self, grad_W: Tensor) -> None:
        """One step from the full gradient of the weight (which training never has: only ``∂R = s·BᵀGAᵀ`` of it)."""
        self.step_core(self.scale * self.B.T @ grad_W @ self.A.T)

    def step_core(self, grad_R: Tensor) -> None:
        """One step from ``∂R``."""
        g = optimal_gradient(self.B, self.A, grad_R, self.scale)
        self.steps += 1
        if self.update == "adam":
            adamw_([self.R], [g], [self.exp_avg], [self.exp_avg_sq], step=self.steps, lr=self.lr)
        else:
            self.R -= self.lr * g
