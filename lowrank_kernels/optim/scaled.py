"""ScaledGD and ScaledAdamW: Riemannian gradients (Zhang & Pilanci 2024)."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from ._shared.arguments import AdamWOptions, ParamsT, refuse_adams
from ._shared.pairing import LikePairs
from ._shared.state import moments
from .preconditioned import DEFAULT_DAMPING, PreconditionedOptimizer


class ScaledOptimizer(PreconditionedOptimizer):
    """What ScaledAdamW and ScaledGD share: a step of both factors of each pair on Riemannian gradients."""

    def _moments(self, group: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """How the moment step of factors differs from AdamW's, and by what their gradients are multiplied."""
        return {}, 1.0

    def _step_pairs(self, pairs: LikePairs) -> None:
        active = {side: self._active(pairs, side) for side in "AB"}
        moments_of = {side: self._moments(self._group(pairs, side)) for side, found in active.items() if found.pairs}
        maps = {
            side: self._preconditioners(active[side].pairs, side, self._partners(active, side), weight=weight)[0]
            for side, (_, weight) in moments_of.items()
        }
        for side, preconditioners in maps.items():
            self._step_side(active[side], side, grad_maps=preconditioners, **moments_of[side][0])


class ScaledAdamW(ScaledOptimizer):
    """AdamW on the Riemannian gradients ``ĝ_A = (BᵀB + δI)⁻¹ ∂A`` and ``ĝ_B = ∂B (AAᵀ + δI)⁻¹``, both from the factors as they
    were (Jacobi, the formula of Zhang & Pilanci 2024; their code is Gauss-Seidel).

    Args:
        params, lr, betas, eps, weight_decay, amsgrad: as ``torch.optim.AdamW``; see :class:`LowRankOptimizer`.
        damping: δ, absolute (see :data:`DEFAULT_DAMPING`). 0 is refused where the first step inverts the Gram matrix of a zero factor.

    Raises:
        TypeError, ValueError: no pair of factors among ``params``, an argument of a wrong kind or out of range.
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


class ScaledGD(ScaledOptimizer):
    """Scaled gradient descent: SGD with heavy-ball momentum, as ``torch.optim.SGD``, on the gradients of :class:`ScaledAdamW`.

    One step at learning rate lr is one simultaneous least-squares step of OPLoRA (both factors from the old ones) at lr·s² with λ = δ.

    Args:
        params, lr: see :class:`LowRankOptimizer`; parameters that are no factors get AdamW with its default betas and eps.
        momentum: μ of ``m ← μ m + ĝ``; 0 keeps no state for the factors. OneCycleLR and CyclicLR cycle ``betas`` instead, which are
            those of the parameters that are no factors: pass them ``cycle_momentum=False``.
        weight_decay: decoupled, multiplied by lr; of everything. None: 0 for factors, AdamW's 0.01 for the rest.
        damping: δ, absolute (see :data:`DEFAULT_DAMPING`). 0 is refused where the first step inverts the Gram matrix of a zero factor.

    Raises:
        TypeError, ValueError: no pair of factors among ``params``, an argument of a wrong kind or out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float | None = None,
        *,
        damping: float = DEFAULT_DAMPING,
        **options: Unpack[AdamWOptions],
    ) -> None:
        refuse_adams(type(self), options)
        method = {"damping": damping, "momentum": momentum}
        super().__init__(params, lr, weight_decay=weight_decay, method_defaults=method, **options)

    def _keeps_state(self, group: dict[str, Any]) -> bool:
        return bool(group["momentum"])

    def _factor_state(self, group: dict[str, Any], part: Tensor, rank: int) -> dict[str, Tensor]:
        return moments(part, "exp_avg") if self._keeps_state(group) else {}

    def _moments(self, group: dict[str, Any]) -> tuple[dict[str, Any], float]:
        return self._sgd(group)
