"""LoRA-RITE: adaptive steps that do not depend on how ΔW is split into factors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Unpack

import torch
from torch import Tensor

from ..ops import grouped_eigh, grouped_eigvalsh, grouped_gram, grouped_qr
from .base import AdamWOptions, FactorPair, LikePairs, ParamsT, Position, moments, state_dtype
from .preconditioned import DEFAULT_DAMPING, OTHER, PreconditionedOptimizer
from .shards import KEEP_WHOLE


class LoRARITE(PreconditionedOptimizer):
    """LoRA-RITE (Yen et al., arXiv 2410.20625) with the r×r second moments of METHODS §3. For A, with ``B = QR``::

        X = R⁻ᵀ ∂A ,  Π = Qᵀ Q_prev                                 unmagnified gradient; change of basis since A's last update
        V⁻ = Π V Πᵀ ,  ρ ← β₂ (ρ + max|λ(V) - λ(V⁻)|)               what the old second moment loses by it
        V ← β₂ V⁻ + (1-β₂) X Xᵀ
        M ← β₁ Π M + (1-β₁) (V̂ + ρ̂ I + eps I)^{-1/2} X               hats: divided by 1-β₂ᵗ
        A ← A - lr (R⁻¹ M + weight_decay·A)

    B is the mirror image (``Aᵀ = QR``); both are taken from the factors as they were.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad: as ``torch.optim.AdamW``; see :class:`LowRankOptimizer`.
        damping: δ, absolute: R is the triangular factor of ``[B; √δ I]``, so that a rank-deficient B (zero, at the start) does not
            divide by zero.
        capturable: not supported; True is an error.

    State of a factor: ``exp_avg``, ``basis`` (the partner's Q, of the partner's shape), ``second`` (r, r), ``escaped`` ().
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        amsgrad: bool = False,
        *,
        damping: float = DEFAULT_DAMPING,
        **options: Unpack[AdamWOptions],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, method_defaults={"damping": damping}, **options)

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        super()._check_hyperparameters(group)
        if group["capturable"]:
            raise ValueError(
                f"{type(self).__name__}: capturable=True is not supported: every step calls torch.linalg.eigh, "
                "which waits for the device and cannot be captured"
            )

    def _accept_sharded(self, pair: FactorPair) -> None:
        raise RuntimeError(f"LoRARITE: {pair.name} is sharded (a DTensor), and each step takes the QR of whole factors; {KEEP_WHOLE}")

    def _create_state(self) -> None:
        super()._create_state()
        for pair in self._pairs:
            for factor, partner in ((self._at(pair.a), self._at(pair.b)), (self._at(pair.b), self._at(pair.a).mT)):
                state = self.state.get(factor)
                if state and "basis" not in state:
                    state["basis"] = torch.zeros(partner.shape, dtype=state_dtype(partner.dtype), device=partner.device)

    def _expected_states(self, group_index: int, group: dict[str, Any]) -> Iterator[tuple[Position, dict[str, Tensor]]]:
        partners = {p: self._at(q).shape for pair in self._pairs for p, q in ((pair.a, pair.b), (pair.b, pair.a))}
        for position, state in super()._expected_states(group_index, group):
            if position in partners:  # a basis is tall
                shape = sorted(partners[position], reverse=True)
                state["basis"] = torch.empty(shape, dtype=state_dtype(self._at(position).dtype), device="meta")
            yield position, state

    def _factor_state(self, group: dict[str, Any], part: Tensor) -> dict[str, Tensor]:
        rank, dtype = min(part.shape), state_dtype(part.dtype)
        second = torch.zeros(rank, rank, dtype=dtype, device=part.device)
        return {**moments(part, "exp_avg"), "second": second, "escaped": second.new_zeros(())}

    def _step_pairs(self, pairs: LikePairs) -> None:
        active = {side: self._with_gradient(pairs, side) for side in "AB"}
        maps = {side: self._maps(active[side], side) for side in "AB" if active[side]}
        for side, (grad_maps, momentum_maps, direction_maps) in maps.items():
            if side == "B":  # maps act from the right there
                grad_maps, momentum_maps, direction_maps = grad_maps.mT, momentum_maps.mT, direction_maps.mT
            self._step_side(
                active[side],
                side,
                grad_maps=grad_maps.contiguous(),
                momentum_maps=momentum_maps.contiguous(),
                direction_maps=direction_maps.contiguous(),
                bias_correction=False,
            )

    def _maps(self, pairs: LikePairs, side: str) -> tuple[Tensor, Tensor, Tensor]:
        """``(V̂ + ρ̂I + eps I)^{-1/2} R⁻ᵀ``, Π and R⁻¹ (each (N, r, r), fp64) for the factors of a side; moves V, ρ and Q."""
        group, states = self._group(pairs, side), [self.state[factor] for factor in self._factors_of(pairs, side)]
        (_, beta2), device = group["betas"], self._at(pairs[0].a).device
        partners = [x.to(states[0]["basis"].dtype) for x in self._tall(pairs, OTHER[side])]
        qs, rs = grouped_qr(partners)
        inverse_r = _damped_inverse(rs.double(), group["damping"])
        change = grouped_gram(qs, [state["basis"] for state in states], dtype=torch.float64)
        energy = inverse_r.mT @ grouped_gram(self._tall_grads(pairs, side), dtype=torch.float64) @ inverse_r

        before = torch.stack([state["second"] for state in states]).double()
        moved = change @ before @ change.mT
        lost = (grouped_eigvalsh(before) - grouped_eigvalsh(moved)).abs().amax(dim=1)
        escaped = beta2 * (torch.stack([state["escaped"] for state in states]).double() + lost)
        second = beta2 * moved + (1 - beta2) * energy
        for state, q, v, rho in zip(states, qs, second, escaped, strict=True):
            state["basis"].copy_(q)
            state["second"].copy_(v)
            state["escaped"].copy_(rho)

        missed = [group["missed"].get(self._position(pair, side)[1], 0) for pair in pairs]
        steps = group["step"] - torch.tensor(missed, dtype=torch.float64, device=device)
        eigenvalues, vectors = grouped_eigh(second)
        hat = (eigenvalues.clamp_min(0) + escaped[:, None]) / (1 - beta2**steps)[:, None] + group["eps"]
        return vectors @ (hat.rsqrt()[:, :, None] * vectors.mT) @ inverse_r.mT, change, inverse_r


def _damped_inverse(rs: Tensor, damping: float) -> Tensor:
    """``R_δ⁻¹`` with ``R_δᵀ R_δ = RᵀR + δI``, from the QR of [R; √δ I]: the condition number is not squared."""
    identity = torch.eye(rs.shape[1], dtype=rs.dtype, device=rs.device)
    if damping > 0:
        _, rs = grouped_qr(list(torch.cat([rs, (damping**0.5 * identity).expand_as(rs)], dim=1)))
    return torch.linalg.solve_triangular(rs, identity.expand_as(rs), upper=True)
