"""LoRA-Pro, as OD-LoRA's authors ran it: AdamW on adjusted gradients, no full-size momentum."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Unpack

import torch
from torch import Tensor

from .._checks import as_flag
from ..ops import grouped_gram, grouped_preconditioner, grouped_solve, grouped_sylvester
from ._shared.arguments import AdamWOptions, ParamsT
from ._shared.pairing import LikePairs
from .preconditioned import DEFAULT_DAMPING, Active, PreconditionedOptimizer


class LoRAPro(PreconditionedOptimizer):
    """LoRA-Pro (Eq. 3 of the AltLoRA paper): AdamW on the gradients whose joint step is closest to the full gradient G::

        g_A = s⁻² (BᵀB + δI)⁻¹ ∂A + X A
        g_B = s⁻² [I - B(BᵀB + δI)⁻¹Bᵀ] ∂B (AAᵀ + δI)⁻¹ - B X

    X changes how the step is split between the factors, not (to first order) what it does to ΔW. Everything is taken from the factors as
    they were; as the terms with X and the projection are r×r maps of the factor itself, no full-size matrix is formed. If one factor
    of a pair has no gradient (frozen, LoRA-FA), the other's step alone is as close to G as it can be:
    ``g_A = s⁻² (BᵀB + δI)⁻¹ ∂A`` or ``g_B = s⁻² ∂B (AAᵀ + δI)⁻¹``.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad: as ``torch.optim.AdamW``; see :class:`LowRankOptimizer`.
        sylvester: X solves ``BᵀB X + X AAᵀ = -s⁻²(BᵀB + δI)⁻¹ ∂A Aᵀ`` (δ on the right-hand side alone; through the eigenvectors of
            the two Grams); False: X = 0.
        damping: δ, absolute (see :data:`DEFAULT_DAMPING`). 0 is refused where the first step inverts the Gram matrix of a zero factor.

    Raises:
        TypeError, ValueError: no pair of factors among ``params``, an argument of a wrong kind or out of range.
    """

    small_arguments = frozenset({"grad_maps", "param_maps"})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        amsgrad: bool = False,
        *,
        sylvester: bool = True,
        damping: float = DEFAULT_DAMPING,
        **options: Unpack[AdamWOptions],
    ) -> None:
        method = {"sylvester": sylvester, "damping": damping}
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, method_defaults=method, **options)

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        super()._check_hyperparameters(group)
        as_flag(type(self).__name__, "sylvester", group["sylvester"])

    def _step_pairs(self, pairs: LikePairs) -> None:
        active = {side: self._active(pairs, side) for side in "AB"}
        (with_a, _), (with_b, _) = active["A"], active["B"]
        if with_a is pairs and with_b is pairs:
            self._step_both(pairs, active["A"], active["B"])
            return
        of_a, of_b = set(with_a), set(with_b)
        if both := LikePairs(pair for pair in with_a if pair in of_b):
            self._step_both(both, self._active(both, "A"), self._active(both, "B"))
        for side, present, others in (("A", with_a, of_b), ("B", with_b, of_a)):
            if alone := LikePairs(pair for pair in present if pair not in others):
                maps, _ = self._preconditioners(alone, side, weight=alone[0].scale ** -2)
                self._step_side(self._active(alone, side), side, grad_maps=maps)

    def _step_both(self, pairs: LikePairs, active_a: Active, active_b: Active) -> None:
        group = self._group(pairs, "A")
        tall_b, tall_a = active_b.tall_factors("B"), active_a.tall_factors("A")
        gram_b, gram_a = self._grams(pairs, "B", tall_b), self._grams(pairs, "A", tall_a)
        damping_b, damping_a = (self._group(pairs, side)["damping"] for side in "BA")
        s = pairs[0].scale ** -2
        sign = -1.0 if group["maximize"] else 1.0
        map_a, _ = grouped_preconditioner(gram_b, damping_b, weight=s)
        map_b, _ = grouped_preconditioner(gram_a, damping_a, weight=s)
        # Bᵀ∂B, (N, r, r): what the projection takes away from g_B lies in the range of B, hence a map of B itself. Solved, not
        # multiplied by the two inverses: their entries would cancel, at the price of cond(B)² cond(A)² in place of cond(B) cond(A).
        overlap_b = grouped_gram(tall_b, active_b.tall_grads("B"), dtype=torch.float64)
        self._over_shards(overlap_b, pairs, "B")
        projection = s * grouped_solve(gram_a, grouped_solve(gram_b, overlap_b, damping_b), damping_a, side="right")
        x = torch.zeros_like(projection)
        if group["sylvester"]:
            overlap_a = grouped_gram(active_a.tall_grads("A"), tall_a, dtype=torch.float64)
            self._over_shards(overlap_a, pairs, "A")
            x = grouped_sylvester(gram_b, gram_a, -s * grouped_solve(gram_b, overlap_a, damping_b))
        # The maps of the factors themselves come from the gradients: they change sign with them.
        self._step_side(active_a, "A", grad_maps=map_a, param_maps=sign * x)
        self._step_side(active_b, "B", grad_maps=map_b, param_maps=-sign * (projection + x))

    def _example_calls(self) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
        yield from super()._example_calls()
        for pairs in self._alike(self._pairs):
            if not any(self._at(pair.a).requires_grad and self._at(pair.b).requires_grad for pair in pairs):
                continue
            grams, _ = self._example_stacks(pairs)
            yield "grouped_solve", grams.device.type, (grams, grams, 0.0, True, grams)
            if self._group(pairs, "A")["sylvester"]:
                yield "grouped_sylvester", grams.device.type, (grams, grams, grams, grams)
