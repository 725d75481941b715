"""SDS-LoRA (Oh, Baik & Lee, arXiv 2606.16454), Algorithm 1, one layer at a time.

Three things that the paper leaves open are fixed here, as in the package:

* the signs of QR's columns follow the previous Q (Householder QR returns arbitrary ones, and a flipped column of Q
  changes ΔW although A and B did not change);
* "clear all optimizer states" includes the step counter of Adam's bias correction;
* the ceiling of the refresh rule is integer arithmetic, and the interval stays k after T_total.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .adamw import adamw_


def aligned_qr(x: Tensor, previous: Tensor) -> Tensor:
    """The Q (d, r) of the thin QR of x (d, r), each column pointing the way it did in ``previous``: ``⟨q_j, previous_j⟩ > 0``."""
    q, _ = torch.linalg.qr(x)
    return q * torch.where((q * previous).sum(dim=0) < 0, -1.0, 1.0).to(q.dtype)


def svd_of_product(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``left @ rightᵀ = U diag(σ) Vᵀ`` for thin factors (m, r) and (n, r): two thin QRs and one r × r SVD, no m × n matrix."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right)
    u, sigma, vh = torch.linalg.svd(r_left @ r_right.T)
    return q_left @ u, sigma, q_right @ vh.T


def is_refresh_step(t: int, t_total: int, phases: int, refresh_every: int | None = None) -> bool:
    """Whether Q is recomputed after update t = 1, 2, … of the main stage: ``t mod ⌈k·t / T_total⌉ = 0``, or every n-th t."""
    if refresh_every is not None:
        return t % refresh_every == 0
    interval = min((phases * t + t_total - 1) // t_total, phases)
    return t % interval == 0


class SDSLoRALayer:
    """One adapted layer and its optimizer: ``ΔW = sBA`` in warm-up, ``ΔW = s(Q_B A + B Q_Aᵀ)`` (Eq. 5) afterwards.

    The caller computes the gradients and passes them to :meth:`step`. They are those of the ΔW that
    :meth:`delta_weight` returns, with Q_A and Q_B as constants: for ``G = ∂L/∂W``

        warm-up:     ∂L/∂A = s Bᵀ G,      ∂L/∂B = s G Aᵀ
        main stage:  ∂L/∂A = s Q_Bᵀ G,    ∂L/∂B = s G Q_A          (Eq. 6)

    Args:
        A: (r, d_in), updated in place.
        B: (d_out, r), updated in place; zero at the start, or anything with ``BA = 0``.
        scale: s.
        total_steps: how often ``step`` will be called, warm-up included.
        warmup_steps: T, at least 1.
        phases: k, the number of phases of the refresh rule; their intervals are 1 … k.
        refresh_every: a uniform schedule instead, every so many steps.

    Attributes:
        Q_A (d_in, r), Q_B (d_out, r): the constant bases; None during warm-up.
    """

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        scale: float,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        total_steps: int,
        warmup_steps: int = 10,
        phases: int = 5,
        refresh_every: int | None = None,
    ) -> None:
        if not 1 <= warmup_steps < total_steps:
            raise ValueError(f"need 1 <= warmup_steps < total_steps, got {warmup_steps} and {total_steps}")
        self.A, self.B, self.scale = A, B, scale
        self.Q_A: Tensor | None = None
        self.Q_B: Tensor | None = None
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.warmup_steps, self.t_total = warmup_steps, total_steps - warmup_steps
        self.phases, self.refresh_every = phases, refresh_every
        self.steps = 0
        self.clear_state()

    def clear_state(self) -> None:
        """Forget Adam's moments and its step count."""
        self.adam_step = 0
        self.exp_avgs = [torch.zeros_like(self.A), torch.zeros_like(self.B)]
        self.exp_avg_sqs = [torch.zeros_like(self.A), torch.zeros_like(self.B)]

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW (d_out, d_in)."""
        if self.Q_A is None or self.Q_B is None:
            return self.scale * (self.B @ self.A)
        return self.scale * (self.Q_B @ self.A + self.B @ self.Q_A.T)

    @torch.no_grad()
    def step(self, grad_A: Tensor, grad_B: Tensor, lr: float | None = None) -> None:
        """One iteration of Algorithm 1 after the backward pass; ``lr`` replaces the learning rate (for schedules)."""
        self.steps += 1
        self.adam_step += 1
        adamw_(
            [self.A, self.B], [grad_A, grad_B], self.exp_avgs, self.exp_avg_sqs,
            step=self.adam_step, lr=self.lr if lr is None else lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay,
        )  # fmt: skip
        t = self.steps - self.warmup_steps
        if t == 0:
            self.reparametrize()
            self.clear_state()
        elif t > 0 and is_refresh_step(t, self.t_total, self.phases, self.refresh_every):
            self.refresh()

    def reparametrize(self) -> None:
        """End of warm-up (Eq. 8): from ``sBA = UΣVᵀ``, ``A = ΣVᵀ/2s``, ``B = UΣ/2s``, ``Q_A = V``, ``Q_B = U``; ΔW stays the same."""
        U, sigma, V = svd_of_product(self.scale * self.B, self.A.T)
        self.A.copy_(sigma[:, None] * V.T / (2 * self.scale))
        self.B.copy_(U * sigma / (2 * self.scale))
        self.Q_A, self.Q_B = V, U

    def refresh(self) -> None:
        """``Aᵀ = Q_A R_A``, ``B = Q_B R_B``."""
        assert self.Q_A is not None and self.Q_B is not None
        self.Q_A = aligned_qr(self.A.T, self.Q_A)
        self.Q_B = aligned_qr(self.B, self.Q_B)
