"""LoRA-RITE: adaptive steps that do not depend on how ΔW is split into factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Unpack

import torch
from torch import Tensor

from ..backends.dtypes import compute_dtype
from ..backends.lists import as_stored, column, copy_, located, states, widened
from ..ops import grouped_damped_inverse, grouped_eigh, grouped_eigvalsh, grouped_gram, grouped_qr
from ..parallel.shards import KEEP_WHOLE
from ._shared.arguments import AdamWOptions, ParamsT
from ._shared.pairing import FactorPair, LikePairs, Position
from ._shared.state import moments
from .preconditioned import DEFAULT_DAMPING, OTHER, Active, PreconditionedOptimizer

#: The most memory that one side of like pairs may keep between steps for the next bases.
SPARE_BYTES = 1 << 20


class LoRARITE(PreconditionedOptimizer):
    """LoRA-RITE (Yen et al., arXiv 2410.20625), its second moments r×r matrices V. For A, with ``B = QR``::

        X = R⁻ᵀ ∂A ,  Π = Qᵀ Q_prev                                 unmagnified gradient; change of basis since A's last update
        V⁻ = Π V Πᵀ ,  ρ ← β₂ (ρ + max|λ(V) - λ(V⁻)|)               what the old second moment loses by it
        V ← β₂ V⁻ + (1-β₂) X Xᵀ
        M ← β₁ Π M + (1-β₁) (V̂ + ρ̂ I + eps I)^{-1/2} X               hats: divided by 1-β₂ᵗ
        A ← A - lr (R⁻¹ M + weight_decay·A)

    B is the mirror image (``Aᵀ = QR``); both are taken from the factors as they were. With fewer tokens than r in a step, X has
    directions in which there is nothing but rounding, and an eps as small as Adam's makes steps of them: such a run is no better
    determined than its rounding, and two backends, or two machines, differ.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad: as ``torch.optim.AdamW``; see :class:`LowRankOptimizer`.
        damping: δ, absolute: R is the triangular factor of ``[B; √δ I]``, so that a rank-deficient B (zero, at the start) does not
            divide by zero (0 is refused where a factor is zero). Q, in Π, is that of B itself.

    State of a factor: ``exp_avg``, ``basis`` (the partner's Q, of the partner's shape), ``second`` (r, r), ``escaped`` ().

    Raises:
        TypeError, ValueError: no pair of factors among ``params``, an argument of a wrong kind or out of range.
    """

    small_arguments = frozenset({"grad_maps", "momentum_maps", "direction_maps"})

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

    def _accept_pairs(self) -> None:
        super()._accept_pairs()
        for pair in self._pairs:
            rank, widths = self._rank(pair), (self._at(pair.b).shape[0], self._at(pair.a).shape[1])
            if rank > min(widths):
                raise ValueError(
                    f"LoRARITE: {pair.name} is of rank {rank}, more than its {widths[0]} × {widths[1]} weight has, so that its factors "
                    "have no QR with orthonormal columns; give that layer a lower rank, or take AltLoRAPlus"
                )

    def _accept_sharded(self, pair: FactorPair) -> None:
        raise RuntimeError(f"LoRARITE: {pair.name} is sharded (a DTensor), and each step takes the QR of whole factors; {KEEP_WHOLE}")

    def _create_state(self) -> bool:
        if not super()._create_state():
            return False
        for pair in self._pairs:
            for factor, partner in ((self._at(pair.a), self._at(pair.b)), (self._at(pair.b), self._at(pair.a).mT)):
                state = self.state.get(factor)
                if state and "basis" not in state:
                    state["basis"] = torch.zeros(partner.shape, dtype=compute_dtype(partner.dtype), device=partner.device)
        return True

    def _expected_states(self, group_index: int, group: dict[str, Any]) -> Iterator[tuple[Position, dict[str, Tensor]]]:
        partners = {p: self._at(q).shape for pair in self._pairs for p, q in ((pair.a, pair.b), (pair.b, pair.a))}
        for position, state in super()._expected_states(group_index, group):
            if position in partners:  # a basis is tall
                shape = sorted(partners[position], reverse=True)
                state["basis"] = torch.empty(shape, dtype=compute_dtype(self._at(position).dtype), device="meta")
            yield position, state

    def _factor_state(self, group: dict[str, Any], part: Tensor, rank: int) -> dict[str, Tensor]:
        second = torch.zeros(rank, rank, dtype=compute_dtype(part.dtype), device=part.device)
        return {**moments(part, "exp_avg"), "second": second, "escaped": second.new_zeros(())}

    def _step_pairs(self, pairs: LikePairs) -> None:
        active = {side: self._active(pairs, side) for side in "AB"}
        maps = {side: self._maps(active, side) for side, found in active.items() if found.pairs}
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

    def _maps(self, active: Mapping[str, Active], side: str) -> tuple[Tensor, Tensor, Tensor]:
        """``(V̂ + ρ̂I + eps I)^{-1/2} R⁻ᵀ``, Π and R⁻¹ (each (N, r, r), fp64) for the ``active`` factors of a side; moves V, ρ and Q."""
        pairs = active[side].pairs
        group, of_factors = self._group(pairs, side), states(self.state, self._factors_of(pairs, side))
        (_, beta2), bases = group["betas"], located(column(of_factors, "basis"))
        partners = self._partners(active, side)
        if partners[0].dtype != bases[0].dtype:
            partners = widened(list(partners), bases[0].dtype)
        qs, rs = grouped_qr(partners, out=self._spare(pairs, side, bases))
        inverse_r = grouped_damped_inverse(rs.double(), self._group(pairs, OTHER[side])["damping"])
        change = grouped_gram(qs, bases, dtype=torch.float64)
        energy = inverse_r.mT @ grouped_gram(active[side].tall_grads(side), dtype=torch.float64) @ inverse_r

        stacked = {key: self._stacked_state(pairs, side, key) for key in ("second", "escaped")}
        before = stacked["second"].double()
        moved = change @ before @ change.mT
        lost = (grouped_eigvalsh(before) - grouped_eigvalsh(moved)).abs().amax(dim=1)
        escaped = beta2 * (stacked["escaped"].double() + lost)
        second = beta2 * moved + (1 - beta2) * energy
        self._begin_writing()
        for key, value in (("second", second), ("escaped", escaped)):
            stacked[key].copy_(value)
            self._write_stacked_state(pairs, side, key, stacked[key])
        copy_(bases.stored, as_stored(qs)[0])

        eigenvalues, vectors = grouped_eigh(second)
        hat = (eigenvalues.clamp_min(0) + escaped[:, None]) / (1 - beta2 ** self._steps(pairs, side)) + group["eps"]
        return vectors @ (hat.rsqrt()[:, :, None] * vectors.mT) @ inverse_r.mT, change, inverse_r

    @staticmethod
    def _spare(pairs: LikePairs, side: str, bases: Sequence[Tensor]) -> Sequence[Tensor]:
        """Where the new bases go while the old ones are needed: kept from step to step where making them costs more than filling them."""
        spare = pairs.kept.get(side)
        if spare is None:
            spare = located(list(map(torch.empty_like, bases)))
            if sum(x.nbytes for x in spare) <= SPARE_BYTES:
                pairs.kept[side] = spare
        return spare

    def _steps(self, pairs: LikePairs, side: str) -> int | Tensor:
        """How many updates the factors have had: one number, or one for each (N, 1); on the device in fp64."""
        group = self._group(pairs, side)
        step = group["step"].double() if isinstance(group["step"], Tensor) else group["step"]
        if not group["missed"]:
            return step
        missed = groupby(group["missed"].get(index, 0) for index in pairs.indices[side])
        device = self._at(pairs[0].a).device
        # Made there: a copy from the host waits, and a CUDA graph would repeat it from memory that is somebody else's by then.
        runs = [torch.full((sum(1 for _ in run), 1), count, dtype=torch.float64, device=device) for count, run in missed]
        return step - torch.cat(runs)

    def _example_side(self, pairs: LikePairs, side: str) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
        grams, rs = self._example_stacks(pairs)
        device, tall = grams.device.type, [x.detach() for x in self._tall(pairs, OTHER[side])]
        yield "grouped_qr", device, (tall, None, tall, rs)
        yield "grouped_damped_inverse", device, (grams, self._group(pairs, OTHER[side])["damping"], grams)
        yield "grouped_gram", device, (tall, None, grams)
        yield "grouped_eigh", device, (grams, grams[:, 0], grams)
        yield from self._example_mapped(pairs, side)
