"""OPLoRA and its subroutine LoRSum (Almansoori et al. 2025, Algorithms 1 and 2, Listing 1), one layer at a time.

U = B (d_out, r) and V = Aᵀ (d_in, r), ``ΔW = sUVᵀ``; ``G = SᵀX`` is the gradient of the full weight, S (tokens, d_out) the gradient of the
layer's output and X (tokens, d_in) its input.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lorsum(
    start: tuple[Tensor, Tensor],
    factors: list[tuple[Tensor, Tensor]],
    coefficients: list[float],
    sweeps: int = 1,
    proximal: float = 0.0,
    first: str = "u",
) -> tuple[Tensor, Tensor]:
    """``U Vᵀ ≈ Σ c_j P_j Q_jᵀ`` by alternating least squares from ``start``; λ holds each solve near the start (Equation 7)."""
    U, V = start
    eye = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
    for turn in range(2 * sweeps):
        if (first == "u") == (turn % 2 == 0):
            total = proximal * start[0]
            for c, (P, Q) in zip(coefficients, factors, strict=True):
                total = total + c * (P @ (Q.T @ V))
            U = torch.linalg.solve(V.T @ V + proximal * eye, total.T).T
        else:
            total = proximal * start[1]
            for c, (P, Q) in zip(coefficients, factors, strict=True):
                total = total + c * (Q @ (P.T @ U))
            V = torch.linalg.solve(U.T @ U + proximal * eye, total.T).T
    return U, V


def scaled_lorsum(
    start: tuple[Tensor, Tensor],
    kept: float,
    step: Tensor,
    metrics: tuple[Tensor, Tensor],
    sweeps: int,
    proximal: float,
    first: str = "u",
) -> tuple[Tensor, Tensor]:
    """``kept·U⁰V⁰ᵀ + D_U⁻¹·step·D_V⁻¹`` at rank r in the norm ``⟨·, D_U · D_V⟩`` (Equations 6 and 10), with whole matrices."""
    (U, V), (D_U, D_V) = start, metrics
    weight = kept * U @ V.T + torch.linalg.solve(D_U, step) @ torch.linalg.inv(D_V)
    eye = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
    for turn in range(2 * sweeps):
        if (first == "u") == (turn % 2 == 0):
            U = torch.linalg.solve(V.T @ D_V @ V + proximal * eye, (weight @ D_V @ V + proximal * start[0]).T).T
        else:
            V = torch.linalg.solve(U.T @ D_U @ U + proximal * eye, (weight.T @ D_U @ U + proximal * start[1]).T).T
    return U, V


class Kronecker:
    """The running average of one side's ``statistic`` (d, d), ``D ← LoRSum(βD + (1−β)·statistic)`` (Algorithm 1, line 8), from 0.

    LoRSum's result is ``PD`` with a projection P; of its singular value decomposition WΣZᵀ the symmetric WΣWᵀ is kept.
    """

    def __init__(self, basis: Tensor, decay: float, damping: float, sweeps: int) -> None:
        self.W, self.D = basis, basis.new_zeros(len(basis), len(basis))
        self.decay, self.damping, self.sweeps, self.updates = decay, damping, sweeps, 0

    def update(self, statistic: Tensor) -> Tensor:
        """The damped average (d, d), without the weight of its start."""
        eye = torch.eye(len(self.W), dtype=self.W.dtype, device=self.W.device)
        average = self.decay * self.D + (1 - self.decay) * statistic
        U, V = lorsum((self.W, self.W), [(average, eye)], [1.0], self.sweeps)
        W, sigma, _ = torch.linalg.svd(U @ V.T)
        rank = self.W.shape[1]
        self.W, self.updates = W[:, :rank], self.updates + 1
        self.D = self.W * sigma[:rank] @ self.W.T
        return self.D / (1 - self.decay**self.updates) + self.damping * eye


class OPLoRALayer:
    """Algorithm 1, scaled if there are ``metrics`` (of U, of V); without, ``sUVᵀ ← LoRSum((1 − ηγ)sUVᵀ − ηG − ηαM)``. Then the
    momentum by ``momentum_mode``::

        "lowrank"    M ← LoRSum(αM + G), with the same K and λ, at its own rank (Equation 9)
        "projected"  M ← (αM + G) V(VᵀV)⁻¹Vᵀ with the V at which G was taken (LoFT): factors M_U and that V
        "naive"      M_U ← αM_U + GV(VᵀV)⁻¹, and M is M_U Vᵀ with whatever V is by then

    M starts as 0·V_Mᵀ with V_M random (``momentum_start``, whose columns are its rank), for zero factors would stay zero.
    """

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        scale: float,
        *,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        sweeps: int = 2,
        proximal: float = 1e-3,
        momentum_mode: str = "lowrank",
        momentum_start: Tensor | None = None,
        first: str = "u",
        metrics: tuple[Kronecker, Kronecker] | None = None,
    ) -> None:
        self.U, self.V, self.s = B, A.T, scale
        self.lr, self.momentum, self.weight_decay, self.mode = lr, momentum, weight_decay, momentum_mode
        self.metrics = metrics
        self.sums = {"sweeps": sweeps, "proximal": proximal, "first": first}
        start = self.V if momentum_start is None else momentum_start
        self.M = B.new_zeros(len(B), start.shape[1]), start

    def delta_weight(self) -> Tensor:
        """ΔW (d_out, d_in)."""
        return self.s * (self.U @ self.V.T)

    def step(self, S: Tensor, X: Tensor) -> None:
        """One step at the full gradient SᵀX."""
        V, gradient = self.V, (S.T, X.T)
        kept, lr = 1 - self.lr * self.weight_decay, self.lr / self.s
        if self.metrics is None:
            factors = [(self.U, V), gradient, self.M]
            self.U, self.V = lorsum((self.U, V), factors, [kept, -lr, -lr * self.momentum], **self.sums)
        else:
            damped = self.metrics[0].update(S.T @ S / len(S)), self.metrics[1].update(X.T @ X / len(X))
            full = S.T @ X + self.momentum * self.M[0] @ self.M[1].T
            self.U, self.V = scaled_lorsum((self.U, V), kept, -lr * full, damped, **self.sums)
        if not self.momentum:
            return
        if self.mode == "lowrank":
            self.M = lorsum(self.M, [self.M, gradient], [self.momentum, 1.0], **self.sums)
            return
        M_U, M_V = self.M
        inverse = torch.linalg.inv(V.T @ V)
        if self.mode == "projected":
            self.M = (self.momentum * M_U @ (M_V.T @ V) + S.T @ (X @ V)) @ inverse, V
        else:
            self.M = self.momentum * M_U + S.T @ (X @ V) @ inverse, self.V


class SVDLoRALayer:
    """The yardstick: full gradient, full momentum, and the rank-r truncated SVD of ΔW after every step."""

    def __init__(self, A: Tensor, B: Tensor, scale: float, *, lr: float, momentum: float = 0.0) -> None:
        self.weight, self.rank = scale * (B @ A), len(A)
        self.lr, self.momentum, self.M = lr, momentum, torch.zeros_like(self.weight)

    def delta_weight(self) -> Tensor:
        """ΔW (d_out, d_in)."""
        return self.weight

    def step(self, S: Tensor, X: Tensor) -> None:
        """One step at the full gradient SᵀX."""
        self.M = self.momentum * self.M + S.T @ X
        u, s, vh = torch.linalg.svd(self.weight - self.lr * self.M, full_matrices=False)
        self.weight = u[:, : self.rank] * s[: self.rank] @ vh[: self.rank]
