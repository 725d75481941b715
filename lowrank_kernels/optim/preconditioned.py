"""What the methods share that precondition the gradient of one factor with the Gram matrix of the other.

The Gram matrices are accumulated and solved in fp64: they square the condition number, and with σ₁ = 10, κ = 1e6 and a damping of
1e-6 an fp32 Cholesky of the damped Gram fails every time, an fp64 one never. The maps that come of them are applied in the dtype of
the state. In fp32 their rounding moves ΔW by up to about 6e-8 σ₁²/δ of a step: 2e-4 for σ₁ = 1 and κ = 1e3 at the default δ, 4e-2 for
σ₁ = 10 and κ = 1e6, where δ = 1e-6 makes it 0.2 (the momentum's maps are solved for and do not). With fp64 factors nothing is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import as_number
from ..backends.dtypes import compute_dtype
from ..backends.lists import Gathered, Tall, column, consecutive, gather, holds, partition, states
from ..backends.moments import Maps
from ..ops import grouped_gram, grouped_preconditioner
from ..parallel.shards import is_sharded, local_parts, shard_dims, shard_group
from ._shared.base import LowRankOptimizer
from ._shared.pairing import FactorPair, LikePairs, Position

#: Absolute damping δ of every Gram matrix; a group's δ is that of its own factors' Gram matrices, which precondition their partners.
#: `python -m benchmarks.damping` is the experiment behind the number, on factors with singular
#: values down to 1e-6 and on LoRA's own start: at 1e-7 and below runs of ScaledGD and LoRA-RITE blow up, at 1e-6 none does, but four
#: methods end 10 to 35 % higher than at 1e-5; from 1e-4 on AltLoRA, which nothing normalizes, slows down (+17 %, +61 % at 1e-3).
DEFAULT_DAMPING = 1e-5

OTHER = {"A": "B", "B": "A"}
#: Which dimension of a factor is r: A is (r, d_in), B is (d_out, r).
RANK_DIM = {"A": 0, "B": 1}
#: All r×r arguments of the moment step.
_SMALL = ("grad_maps", "momentum_maps", "param_maps", "direction_maps", "drifts")


def tall(tensors: list[Tensor], side: str) -> Sequence[Tensor]:
    """What this rank holds of factors of a side, or of their gradients, as tall matrices: Aᵀ (d_in, r) without a copy, B (d_out, r)."""
    return Tall(local_parts(tensors)) if side == "A" else local_parts(tensors)


class Active(NamedTuple):
    """Like pairs whose factors of one side have a gradient, and what the moment step of these factors needs."""

    pairs: LikePairs
    found: Gathered

    def tall_factors(self, side: str) -> Sequence[Tensor]:
        """The factors, :func:`tall`."""
        return self._tall(self.found.params, side, grads=False)

    def tall_grads(self, side: str) -> Sequence[Tensor]:
        """Their gradients, :func:`tall`."""
        return self._tall(self.found.grads, side, grads=True)

    def _tall(self, tensors: list[Tensor], side: str, *, grads: bool) -> Sequence[Tensor]:
        layout, transposed = self.found.layout, side == "A"
        if layout is None:
            return tall(tensors, side)
        return Tall(tensors, len(tensors) if transposed else 0, layout.matrices(grads, transposed))  # as they were gathered


class PreconditionedOptimizer(LowRankOptimizer):
    """Factors are stepped side by side (all As, or all Bs, of like pairs in one call), each with r×r maps; the rest gets AdamW."""

    adamw_takes_factors = False
    reads_frozen_partners = True
    numbers = (*LowRankOptimizer.numbers, "damping")
    #: Which r×r matrices the moment step of factors has, by the names of its arguments.
    small_arguments = frozenset({"grad_maps"})

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        super()._check_hyperparameters(group)
        as_number(type(self).__name__, "damping", group["damping"], 0.0)

    def _accept_pairs(self) -> None:
        self._refuse_decoupled()

    def _before_update(self) -> None:
        self._refuse_switched()

    def _accept_as_given(self) -> None:
        super()._accept_as_given()
        for pair in self._pairs:
            for side in "AB":
                group = self.param_groups[self._position(pair, side)[0]]
                if group["damping"] == 0 and self._inverts_at_once(group, side):
                    self._refuse_zero(pair, side)

    def _inverts_at_once(self, group: dict[str, Any], side: str) -> bool:
        """Whether the first step takes the inverse of the Gram matrix of this side's factors."""
        return True

    def _refuse_zero(self, pair: FactorPair, side: str) -> None:
        """With δ = 0 a zero factor, as B of LoRA's start, has no (XᵀX)⁻¹, and its partner would become NaN."""
        factor, partner = self._at(self._position(pair, side)), self._at(self._position(pair, OTHER[side]))
        if partner.grad is not None and not is_sharded(factor) and not factor.any():
            raise ValueError(
                f"{type(self).__name__}: damping is 0, and {side} of {pair.name} is zero: its Gram matrix has no inverse, the first step "
                f"would be NaN. Give damping (the default is {DEFAULT_DAMPING:g}), or start from other factors"
            )

    def _alike(self, pairs: Iterable[FactorPair]) -> Iterator[LikePairs]:
        """As the base class has it, and of one scale, which then is a number and not a tensor to be sent to the device."""
        for alike in super()._alike(pairs):
            yield from map(LikePairs, partition(alike, lambda pair: pair.scale).values())

    def _update(self) -> None:
        self._step_rest()
        for pairs in self._all_alike():
            self._step_pairs(pairs)

    def _step_pairs(self, pairs: LikePairs) -> None:
        """One step of pairs that agree in everything but their widths: rank, scale, dtype, device, groups."""
        raise NotImplementedError

    @staticmethod
    def _position(pair: FactorPair, side: str) -> Position:
        return pair.a if side == "A" else pair.b

    def _group(self, pairs: LikePairs, side: str) -> dict[str, Any]:
        return self.param_groups[self._position(pairs[0], side)[0]]

    def _factors_of(self, pairs: LikePairs, side: str) -> list[Tensor]:
        params = self._group(pairs, side)["params"] if pairs else []  # like pairs share their groups
        return [params[index] for index in pairs.indices[side]]

    def _tall(self, pairs: LikePairs, side: str) -> Sequence[Tensor]:
        """The factors, :func:`tall`."""
        return tall(self._factors_of(pairs, side), side)

    def _active(self, pairs: LikePairs, side: str) -> Active:
        """Those whose factor of this side has a gradient; the others' factors miss the step."""
        group = self._group(pairs, side)
        found = gather(group["params"], pairs.indices[side], self.state)
        if not found.idle:
            return Active(pairs, found)
        for index in found.idle:
            self._miss(group, index)
        missing = set(found.idle)
        return Active(LikePairs(pair for pair in pairs if self._position(pair, side)[1] not in missing), found)

    def _partners(self, active: Mapping[str, Active], side: str) -> Sequence[Tensor]:
        """The partners of the ``active`` factors of a side, :func:`tall`; where all of them are active, too, they have been read."""
        pairs, other = active[side].pairs, active.get(OTHER[side])
        return self._tall(pairs, OTHER[side]) if other is None or other.pairs is not pairs else other.tall_factors(OTHER[side])

    def _grams(self, pairs: LikePairs, side: str, factors: Sequence[Tensor] | None = None) -> Tensor:
        """``XᵀX`` (N, r, r) in fp64 of the factors of this side, X being Aᵀ or B; these are looked up where they are not given."""
        factors = self._tall(pairs, side) if factors is None else factors
        return self._over_shards(grouped_gram(factors, dtype=torch.float64), pairs, side)

    def _preconditioners(
        self, pairs: LikePairs, side: str, partners: Sequence[Tensor] | None = None, *, weight: float = 1.0, drifts: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """``P = w (XᵀX + δI)⁻¹`` of the factors of this side, X being their partners, and with drifts C (of B's momentum Cᵀ).

        (N, r, r), in the dtype of the drifts, or else of the factors' state.
        """
        grams, damping = self._grams(pairs, OTHER[side], partners), self._group(pairs, OTHER[side])["damping"]
        dtype = compute_dtype(self._at(pairs[0].a).dtype) if drifts is None else drifts.dtype
        return grouped_preconditioner(grams, damping, weight=weight, drifts=drifts, transposed=side == "B", dtype=dtype)

    def _over_shards(self, sums: Tensor, pairs: LikePairs, side: str) -> Tensor:
        """``sums`` over the long dimension of factors of a side; where that is sharded (FSDP2), the sum of all ranks' sums, in place."""
        group = shard_group(self._at(self._position(pairs[0], side)))
        if group is not None:
            torch.distributed.all_reduce(sums, group=group)
        return sums

    def _accept_sharded(self, pair: FactorPair) -> None:
        if not (is_sharded(self._at(pair.a)) and is_sharded(self._at(pair.b))):
            raise RuntimeError(f"{type(self).__name__}: of {pair.name} one factor is a DTensor and the other is not; shard both or none")
        placements = {side: shard_dims(self._at(self._position(pair, side))) for side in "AB"}
        for side, dims in placements.items():
            long_dim = 1 - RANK_DIM[side]
            if len(dims) > 1 or any(dim != long_dim for _, dim in dims):
                raise RuntimeError(
                    f"{type(self).__name__}: {side} of {pair.name} is sharded along dimension {dims[0][1]}; Gram matrices need it whole "
                    "along r: shard A (r, d_in) along d_in and B (d_out, r) along d_out, "
                    "fully_shard(…, shard_placement_fn=lowrank_kernels.shard_placement(model))"
                )

    def _step_side(self, active: Active, side: str, **options: Any) -> None:
        """The moment step of all factors of one side, with the maps in ``options`` (in any float dtype), as :meth:`_adamw` has it."""
        pairs, found = active
        dtype = compute_dtype(self._at(pairs[0].a).dtype)
        maps = {key: value.to(dtype) if key.endswith("_maps") and value is not None else value for key, value in options.items()}
        members, dims = pairs.indices[side], [RANK_DIM[side]] * len(pairs)
        group_index = self._position(pairs[0], side)[0]
        self._adamw(group_index, members, is_factor=True, is_second=side == "B", found=found, rank_dims=dims, **maps)

    def _stacked_state(self, pairs: LikePairs, side: str, key: str) -> Tensor:
        """The r×r state of this name of all factors of a side as one (N, r, r) tensor; :meth:`_write_stacked_state` writes it.

        The state of each factor is a view of it, made when the factors step together for the first time (after loading, or in other
        company, again), so that nothing is gathered and scattered. Where CUDA graphs hold addresses, each keeps its own memory.
        """
        group, name = self._group(pairs, side), f"{side}.{key}"
        stacked, views = pairs.kept.get(name, (None, ()))
        unchanged = stacked is not None and holds(self.state, group["params"], pairs.indices[side], key, views)
        if unchanged and stacked.data_ptr() == views[0].data_ptr():
            return stacked
        of_factors = states(self.state, self._factors_of(pairs, side))
        values = column(of_factors, key)
        base = values[0]._base
        if base is not None and base.shape[0] == len(values) and base.data_ptr() == values[0].data_ptr() and consecutive(values):
            return base
        stacked = torch.stack(values)
        if not group["capturable"]:
            views = list(stacked.unbind())
            pairs.kept[name] = stacked, views
            for state, view in zip(of_factors, views, strict=True):
                state[key] = view
        return stacked

    def _write_stacked_state(self, pairs: LikePairs, side: str, key: str, stacked: Tensor) -> None:
        """What was written into ``stacked``, which came from :meth:`_stacked_state`, into the state too, where that has its own memory."""
        if self._group(pairs, side)["capturable"]:
            torch._foreach_copy_([self.state[factor][key] for factor in self._factors_of(pairs, side)], list(stacked.unbind()))

    def _example_calls(self) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
        yield from super()._example_calls()
        for pairs in self._alike(self._pairs):
            for side in "AB":
                if any(factor.requires_grad for factor in self._factors_of(pairs, side)):
                    yield from self._example_side(pairs, side)

    def _example_side(self, pairs: LikePairs, side: str) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
        """The calls of a step of the factors of a side: Gram matrices of the partners, what they give, and the moment step."""
        grams, maps = self._example_stacks(pairs)
        device, drifts = grams.device.type, maps if "drifts" in self.small_arguments else None
        yield "grouped_gram", device, ([x.detach() for x in self._tall(pairs, OTHER[side])], None, grams)
        yield "grouped_preconditioner", device, (grams, drifts, 0.0, 1.0, side == "B", maps, maps)
        yield from self._example_mapped(pairs, side)

    def _example_stacks(self, pairs: LikePairs) -> tuple[Tensor, Tensor]:
        """Two stacks (N, r, r), in fp64 and in the dtype of the factors' state."""
        rank, factor = self._rank(pairs[0]), self._at(pairs[0].a)
        grams, maps = (
            torch.empty(len(pairs), rank, rank, dtype=d, device=factor.device) for d in (torch.float64, compute_dtype(factor.dtype))
        )
        return grams, maps

    def _example_mapped(self, pairs: LikePairs, side: str) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
        """The moment step of the factors of a side."""
        _, stack = self._example_stacks(pairs)
        *maps, drifts = (stack if name in self.small_arguments else None for name in _SMALL)
        dims = [RANK_DIM[side]] * len(pairs)
        yield from self._example_adamw(self._position(pairs[0], side)[0], pairs.indices[side], Maps(*maps), dims, drifts)
