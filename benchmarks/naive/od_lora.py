"""OD-LoRA, Algorithm 1, one layer at a time: SDS-LoRA's layer with another start."""

from __future__ import annotations

import torch
from torch import Tensor

from .adamw import adamw_
from .sds_lora import SDSLoRALayer, is_refresh_step, svd_of_product


class ODLoRALayer(SDSLoRALayer):
    """One adapted layer and its optimizer; arguments and gradients as :class:`SDSLoRALayer`.

    Args:
        rounds: N.
        round_steps: T.
    """

    def __init__(self, A: Tensor, B: Tensor, scale: float, *, rounds: int = 5, round_steps: int = 10, **kwargs: object) -> None:
        super().__init__(A, B, scale, warmup_steps=rounds * round_steps, **kwargs)  # type: ignore[arg-type]
        self.round_steps = round_steps

    @torch.no_grad()
    def step(self, grad_A: Tensor, grad_B: Tensor, lr: float | None = None) -> None:
        """One iteration of Algorithm 1 after the backward pass."""
        self.steps += 1
        self.adam_step += 1
        adamw_(
            [self.A, self.B], [grad_A, grad_B], self.exp_avgs, self.exp_avg_sqs,
            step=self.adam_step, lr=self.lr if lr is None else lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay,
        )  # fmt: skip
        t = self.steps - self.warmup_steps
        if t <= 0:
            if self.steps % self.round_steps == 0:
                self.Q_B, _, self.Q_A = self.truncated_svd()
                self.A.zero_()
                self.B.zero_()
                self.clear_state()
        elif t == self.round_steps:
            U, sigma, V = self.truncated_svd()
            self.A.copy_(sigma[:, None] * V.T / (2 * self.scale))
            self.B.copy_(U * sigma / (2 * self.scale))
            self.Q_A, self.Q_B = V, U
            self.clear_state()
        elif t > self.round_steps and is_refresh_step(t, self.t_total, self.phases, self.refresh_every):
            self.refresh()

    def truncated_svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """``ΔW ≈ U_r diag(σ_r) V_rᵀ`` of the current ΔW, of rank up to 2r, through its thin factors."""
        rank = len(self.A)
        if self.Q_A is None or self.Q_B is None:
            left, right = self.B, self.A.T
        else:
            left, right = torch.cat([self.Q_B, self.B], dim=1), torch.cat([self.A.T, self.Q_A], dim=1)
        U, sigma, V = svd_of_product(self.scale * left, right)
        return U[:, :rank], sigma[:rank], V[:, :rank]
