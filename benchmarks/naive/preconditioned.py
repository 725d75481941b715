"""AltLoRA, AltLoRA+, ScaledGD, ScaledAdamW, LoRA-Pro and LoRA-RITE, one layer at a time.

Shapes: A (r, d_in), B (d_out, r), ``ΔW = sBA``; gradients are those of A and B (``∂A = sBᵀG``, ``∂B = sGAᵀ``); δ is the
damping; ``lr_ratio`` is LoRA+'s, the learning rate of B over that of A. A gradient that is None leaves its factor, and all
that belongs to it, as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor


class _Layer:
    """The factors and hyperparameters of one layer."""

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        scale: float,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 0.0,
        lr_ratio: float = 1.0,
    ) -> None:
        self.A, self.B, self.s = A, B, scale
        self.lr = {"A": lr, "B": lr * lr_ratio}
        self.betas, self.eps, self.weight_decay, self.damping = betas, eps, weight_decay, damping
        self.M = {"A": torch.zeros_like(A), "B": torch.zeros_like(B)}
        self.V = {"A": torch.zeros_like(A), "B": torch.zeros_like(B)}
        self.updates = {"A": 0, "B": 0}
        self.steps = 0

    def delta_weight(self) -> Tensor:
        """ΔW (d_out, d_in)."""
        return self.s * (self.B @ self.A)

    def inverse(self, gram: Tensor) -> Tensor:
        """``(gram + δI)⁻¹``."""
        return torch.linalg.inv(gram + self.damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))

    def adamw(self, name: str, gradient: Tensor) -> None:
        """AdamW on one factor, with its own count of updates."""
        factor, (beta1, beta2) = getattr(self, name), self.betas
        self.updates[name] += 1
        t, M, V = self.updates[name], self.M[name], self.V[name]
        factor.mul_(1 - self.lr[name] * self.weight_decay)
        M.mul_(beta1).add_(gradient, alpha=1 - beta1)
        V.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        factor.sub_(self.lr[name] * (M / (1 - beta1**t)) / ((V / (1 - beta2**t)).sqrt() + self.eps))


class AltLoRALayer(_Layer):
    """AltLoRA (Algorithm 1) and, with ``plus``, AltLoRA+ (Algorithm 2); ``order`` "B" or "A" first, or "joint"."""

    def __init__(self, *args: object, order: str = "B", plus: bool = False, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.order, self.plus = order, plus
        rank = torch.eye(len(self.A), dtype=self.A.dtype, device=self.A.device)
        # How the momentum of A is carried from the column space of the B it was aligned with to that of the current B.
        self.transport = {"A": rank.clone(), "B": rank.clone()}

    def step(self, grad_A: Tensor | None, grad_B: Tensor | None) -> None:
        """One step: one factor's turn, or both at once from the factors as they were."""
        turn = self.steps % 2 if self.order == "B" else (self.steps + 1) % 2
        self.steps += 1
        old_A, old_B = self.A.clone(), self.B.clone()
        a_turn, b_turn = (True, True) if self.order == "joint" else (turn == 1, turn == 0)
        if a_turn and grad_A is not None:
            inverse = self.inverse(old_B.T @ old_B)
            self.update("A", inverse @ grad_A / self.s**2, self.transport["A"] @ self.M["A"])
        if b_turn and grad_B is not None:
            inverse = self.inverse(old_A @ old_A.T)
            self.update("B", grad_B @ inverse / self.s**2, self.M["B"] @ self.transport["B"])
        if a_turn and grad_A is not None:
            self.transport["A"] = torch.eye(len(self.A), dtype=self.A.dtype, device=self.A.device)
        if b_turn and grad_B is not None:
            self.transport["B"] = torch.eye(len(self.A), dtype=self.A.dtype, device=self.A.device)
        if b_turn and grad_B is not None:
            self.transport["A"] = self.inverse(self.B.T @ self.B) @ (self.B.T @ old_B) @ self.transport["A"]
        if a_turn and grad_A is not None:
            self.transport["B"] = self.transport["B"] @ (old_A @ self.A.T) @ self.inverse(self.A @ self.A.T)

    def update(self, name: str, gradient: Tensor, aligned: Tensor) -> None:
        """Momentum from the aligned momentum and the projected gradient, and the step along it."""
        factor, (beta1, beta2) = getattr(self, name), self.betas
        self.updates[name] += 1
        t = self.updates[name]
        M = self.M[name] = beta1 * aligned + (1 - beta1) * gradient
        direction = M
        if self.plus:
            V = self.V[name] = beta2 * self.V[name] + (1 - beta2) * gradient**2
            direction = (M / (1 - beta1**t)) / ((V / (1 - beta2**t)).sqrt() + self.eps)
        factor.sub_(self.lr[name] * (direction + self.weight_decay * factor))


class ScaledLayer(_Layer):
    """ScaledGD (``adam=False``; heavy-ball momentum as ``torch.optim.SGD``) and ScaledAdamW: Riemannian gradients, Jacobi."""

    def __init__(self, *args: object, adam: bool, momentum: float = 0.0, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.adam, self.momentum = adam, momentum

    def step(self, grad_A: Tensor | None, grad_B: Tensor | None) -> None:
        """``ĝ_A = (BᵀB + δI)⁻¹ ∂A``, ``ĝ_B = ∂B (AAᵀ + δI)⁻¹``, then SGD or AdamW."""
        preconditioned = {
            "A": None if grad_A is None else self.inverse(self.B.T @ self.B) @ grad_A,
            "B": None if grad_B is None else grad_B @ self.inverse(self.A @ self.A.T),
        }
        for name, gradient in preconditioned.items():
            if gradient is None:
                continue
            if self.adam:
                self.adamw(name, gradient)
            else:
                factor = getattr(self, name)
                factor.mul_(1 - self.lr[name] * self.weight_decay)
                self.M[name] = self.momentum * self.M[name] + gradient
                factor.sub_(self.lr[name] * self.M[name])


class LoRAProLayer(_Layer):
    """LoRA-Pro as OD-LoRA's authors ran it: AdamW on the gradients of Eq. 3 in the AltLoRA paper; X = 0 or Sylvester."""

    def __init__(self, *args: object, sylvester: bool, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.sylvester = sylvester

    def step(self, grad_A: Tensor | None, grad_B: Tensor | None) -> None:
        """``g_A = s⁻²(BᵀB)⁻¹∂A + XA``, ``g_B = s⁻²[I - B(BᵀB)⁻¹Bᵀ]∂B(AAᵀ)⁻¹ - BX``; a factor alone: ``s⁻²(BᵀB)⁻¹∂A`` or
        ``s⁻²∂B(AAᵀ)⁻¹``, which then is the step that is closest to G."""
        A, B = self.A, self.B
        if grad_A is None or grad_B is None:
            if grad_A is not None:
                self.adamw("A", self.inverse(B.T @ B) @ grad_A / self.s**2)
            if grad_B is not None:
                self.adamw("B", grad_B @ self.inverse(A @ A.T) / self.s**2)
            return
        inverse_B, inverse_A = self.inverse(B.T @ B), self.inverse(A @ A.T)
        g_A = inverse_B @ grad_A / self.s**2
        g_B = (grad_B - B @ (inverse_B @ (B.T @ grad_B))) @ inverse_A / self.s**2
        if self.sylvester:
            rank = torch.eye(len(A), dtype=A.dtype, device=A.device)
            system = torch.kron(B.T @ B, rank) + torch.kron(rank, A @ A.T)  # row-major vec: (BᵀB)X + X(AAᵀ)
            X = torch.linalg.solve(system, -(g_A @ A.T).flatten()).view_as(rank)
            g_A, g_B = g_A + X @ A, g_B - B @ X
        self.adamw("A", g_A)
        self.adamw("B", g_B)


def positive_qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """Thin QR with a nonnegative diagonal of R: V and M live in the basis Q, whose signs must be those of R."""
    Q, R = torch.linalg.qr(x)
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0)
    return Q * signs, signs[:, None] * R


class LoRARITELayer(_Layer):
    """LoRA-RITE (arXiv 2410.20625), Jacobi, as METHODS §3 writes it; with damping, R is that of ``[other; √δ I]``."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        rank = torch.zeros(len(self.A), len(self.A), dtype=self.A.dtype, device=self.A.device)
        self.basis: dict[str, Tensor | None] = {"A": None, "B": None}
        self.second = {"A": rank.clone(), "B": rank.clone()}
        self.escaped = {"A": 0.0, "B": 0.0}
        self.M = {"A": torch.zeros_like(self.A), "B": torch.zeros_like(self.B.T)}

    def step(self, grad_A: Tensor | None, grad_B: Tensor | None) -> None:
        """A by the QR of B, B by the QR of Aᵀ, both from the factors as they were."""
        old_A, old_B = self.A.clone(), self.B.clone()
        if grad_A is not None:
            self.A -= self.lr["A"] * (self.direction("A", old_B, grad_A) + self.weight_decay * old_A)
        if grad_B is not None:
            self.B -= self.lr["B"] * (self.direction("B", old_A.T, grad_B.T).T + self.weight_decay * old_B)

    def direction(self, name: str, other: Tensor, gradient: Tensor) -> Tensor:
        """The step of a factor (r, d) whose partner is ``other`` (d', r) = QR, for its gradient (r, d)."""
        beta1, beta2 = self.betas
        Q, R = positive_qr(other)
        if self.damping:
            _, R = positive_qr(torch.cat([R, self.damping**0.5 * torch.eye(len(R), dtype=R.dtype, device=R.device)]))
        X = torch.linalg.solve(R.T, gradient)
        previous = self.basis[name]
        change = torch.eye(len(R), dtype=R.dtype, device=R.device) if previous is None else Q.T @ previous
        V_before = change @ self.second[name] @ change.T
        lost = (torch.linalg.eigvalsh(self.second[name]) - torch.linalg.eigvalsh(V_before)).abs().max()
        self.escaped[name] = beta2 * (self.escaped[name] + float(lost))
        self.second[name] = beta2 * V_before + (1 - beta2) * X @ X.T
        self.updates[name] += 1
        t = self.updates[name]
        V = (self.second[name] + self.escaped[name] * torch.eye(len(R), dtype=R.dtype, device=R.device)) / (1 - beta2**t)
        values, vectors = torch.linalg.eigh(V + self.eps * torch.eye(len(R), dtype=R.dtype, device=R.device))
        X = vectors @ torch.diag(values.rsqrt()) @ vectors.T @ X
        self.M[name] = beta1 * change @ self.M[name] + (1 - beta1) * X
        self.basis[name] = Q
        return torch.linalg.solve(R, self.M[name])
