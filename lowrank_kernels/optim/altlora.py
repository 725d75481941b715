"""AltLoRA and AltLoRA+: alternating projections of the full gradient, with momentum that stays aligned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Unpack

import torch
from torch import Tensor

from .._checks import as_flag, as_number
from ..backends.dtypes import compute_dtype
from ..backends.lists import matrix_layout
from ..backends.moments import Stepped
from ..ops.altlora_turn import altlora_turn_as_gathered_, as_a_whole
from ..parallel.shards import is_sharded
from ._shared.arguments import AdamWOptions, ParamsT, refuse_adams
from ._shared.pairing import FactorPair, LikePairs, Position
from ._shared.state import may_step, moments
from .preconditioned import DEFAULT_DAMPING, OTHER, RANK_DIM, Active, PreconditionedOptimizer

NO_PAIRS = LikePairs(())
ORDERS = {"B": ("B", "A"), "A": ("A", "B"), "joint": ("AB", "AB")}


class AlternatingOptimizer(PreconditionedOptimizer):
    """What :class:`AltLoRA` and :class:`AltLoRAPlus` share: whose turn a step is, the drifts that realign momentum, missed turns."""

    counts = frozenset({"late"})
    positions = frozenset({"late"})
    fixed = frozenset({"order"})
    numbers = (*PreconditionedOptimizer.numbers, "drift_damping")
    #: What ``freeze_idle`` holds frozen.
    _idle: frozenset[Position] = frozenset()
    small_arguments = frozenset({"grad_maps", "momentum_maps", "drifts"})

    def _factor_state(self, group: dict[str, Any], part: Tensor, rank: int) -> dict[str, Tensor]:
        drift = torch.zeros(rank, rank, dtype=compute_dtype(part.dtype), device=part.device)
        return {**moments(part, "exp_avg"), "drift": drift}

    def _reads_of_frozen(self) -> frozenset[Position]:
        # What moves a factor is written into its partner's drift.
        partners = {p: q for pair in self._pairs for p, q in ((pair.a, pair.b), (pair.b, pair.a))}
        return frozenset(q for p, q in partners.items() if may_step(self._at(p)))

    def _moments(self, group: dict[str, Any]) -> dict[str, Any]:
        """How the moment step differs from AdamW's."""
        return {}

    def _inverts_at_once(self, group: dict[str, Any], side: str) -> bool:
        return group["order"] != side  # whose turn it is first

    def _updates_due(self, group_index: int, index: int, group: dict[str, Any] | None = None) -> int | Tensor:
        group = self.param_groups[group_index] if group is None else group
        if index not in self._factors[group_index] or group["order"] == "joint":
            return group["step"]
        side = "B" if index in self._second_factors[group_index] else "A"
        return (group["step"] + (1 if group["order"] == side else 0)) // 2

    @staticmethod
    def _whose_turn(group: dict[str, Any], later: int = 0) -> str:
        """Whose turn the step is that is counted last, or one that is so much later. Where there are turns the host counts (see
        :meth:`_check_hyperparameters`); a counter on the device is not read."""
        first, second = ORDERS[group["order"]]
        return first if first == second or (group["step"] + later) % 2 else second

    def _update(self) -> None:
        self._follow_damping()
        super()._update()

    def _follow_damping(self) -> None:
        """Where a group's δ was changed, put the new one for the old into the drifts that its factors' moves left to their partners (those
        that are not zero): C is of the δ of the turn that it aligns, and ``I - (XᵀX + δI)⁻¹ K`` is that C with one and the same δ."""
        changes = [group["damping"] - group["drift_damping"] for group in self.param_groups]
        if not any(changes):
            return
        self._begin_writing()
        for pair in self._pairs:
            for side in "AB":
                change = changes[self._position(pair, side)[0]]
                partner = self._at(self._position(pair, OTHER[side]))
                if change and partner in self.state:
                    drift = self.state[partner]["drift"]
                    drift.diagonal().add_(drift.any().to(drift.dtype), alpha=change)
        for group in self.param_groups:
            group["drift_damping"] = group["damping"]

    def _step_pairs(self, pairs: LikePairs) -> None:
        group = self._group(pairs, "A")
        active = {side: self._active(pairs, side) for side in self._whose_turn(group)}
        for side, found in active.items():
            self._note_late(pairs, found.pairs, side)
        active = {side: found for side, found in active.items() if found.pairs}
        late = {side: self._with_late_partner(found.pairs, side) for side, found in active.items()}
        behind = {side: self._realigned(late[side], OTHER[side]) for side in late if late[side]}
        if self._jointly(pairs):
            self._step_sides(active)
        else:
            for side, found in active.items():
                self._turn(found, side)
        for side, realigned in behind.items():
            self._carry_twice(late[side], side, realigned)
        if group["freeze_idle"]:
            self._freeze_idle(pairs, self._whose_turn(group, later=1))

    def _jointly(self, pairs: LikePairs) -> bool:
        """Whether the operations of a step are called one by one."""
        return self._group(pairs, "A")["order"] == "joint" or is_sharded(self._at(pairs[0].a))

    def _turn(self, active: Active, side: str) -> None:
        """One turn of the factors of a side."""
        pairs, other = active.pairs, OTHER[side]
        self._step_side(
            active,
            side,
            operation=altlora_turn_as_gathered_,
            partners=self._tall(pairs, other),
            behind=self._stacked_state(pairs, side, "drift"),
            moved=self._stacked_state(pairs, other, "drift"),
            damping=self._group(pairs, other)["damping"],
            own_damping=self._group(pairs, side)["damping"],
            weight=pairs[0].scale ** -2,
            **self._moments(self._group(pairs, side)),
        )

    def _step_sides(self, active: dict[str, Active]) -> None:
        """The same of both sides at once (Jacobi: every preconditioner, and what aligns the momentum, from the factors as they were), or of
        factors of which each rank holds a part, whose Gram matrices are sums over ranks."""
        misaligned = {side: self._stacked_state(found.pairs, side, "drift") for side, found in active.items()}
        maps = {
            side: self._preconditioners(
                found.pairs, side, self._partners(active, side), weight=found.pairs[0].scale ** -2, drifts=misaligned[side]
            )
            for side, found in active.items()
        }
        moved = {side: torch.empty_like(drifts) for side, drifts in misaligned.items()}
        for side, (preconditioners, realignments) in maps.items():
            moments_of_side = self._moments(self._group(active[side].pairs, side))
            self._step_side(
                active[side], side, grad_maps=preconditioners, momentum_maps=realignments, drifts=moved[side], **moments_of_side
            )
        for side, drifts in misaligned.items():  # aligned now
            self._write_stacked_state(active[side].pairs, side, "drift", drifts.zero_())
        for side, drifts in moved.items():
            of_side = active[side].pairs
            self._over_shards(drifts, of_side, side).diagonal(dim1=1, dim2=2).add_(self._group(of_side, side)["damping"])
            self._set_drift(of_side, OTHER[side], drifts)

    def _example_side(self, pairs: LikePairs, side: str) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
        factors, partners = self._factors_of(pairs, side), self._factors_of(pairs, OTHER[side])
        if not self._group(pairs, side)["freeze_idle"] and not all(partner.requires_grad for partner in partners):
            grams, _ = self._example_stacks(pairs)  # these miss their turns, see _carry_twice
            yield "grouped_gram", grams.device.type, ([x.detach() for x in self._tall(pairs, OTHER[side])], None, grams)
            yield "grouped_preconditioner", grams.device.type, (grams, grams, 0.0, 1.0, side == "B", grams, grams)
        if not self._jointly(pairs) and matrix_layout(factors) is not None:  # else the step finds no layout
            _, stack = self._example_stacks(pairs)
            stepped, dims = Stepped(factors, factors, [], []), [RANK_DIM[side]] * len(pairs)
            taken = as_a_whole(stepped, self._tall(pairs, OTHER[side]), stack, stack, dims)
            if taken is not None:
                yield "grouped_altlora_turn_", stack.device.type, taken[1]
                return
        yield from super()._example_side(pairs, side)

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        super()._check_hyperparameters(group)
        if group["order"] not in tuple(ORDERS):
            raise ValueError(f"{type(self).__name__}: order must be 'B' (first), 'A' (first) or 'joint', got {group['order']!r}")
        as_flag(type(self).__name__, "freeze_idle", group["freeze_idle"])
        as_number(type(self).__name__, "drift_damping", group["drift_damping"], 0.0)
        if group["capturable"] and group["order"] != "joint":
            raise ValueError(
                f"{type(self).__name__}: capturable=True needs order='joint', got order={group['order']!r}: whose turn it is is decided on "
                "the host, and a replayed CUDA graph would repeat one factor's turn for ever"
            )

    def _realigned(self, pairs: LikePairs, side: str) -> Tensor:
        """C in fp64 of the factors of this side."""
        _, realigned = self._preconditioners(pairs, side, drifts=self._stacked_state(pairs, side, "drift").double())
        assert realigned is not None
        return realigned.mT if side == "B" else realigned

    def _set_drift(self, pairs: LikePairs, side: str, value: Tensor) -> None:
        self._write_stacked_state(pairs, side, "drift", self._stacked_state(pairs, side, "drift").copy_(value))

    def _carry_twice(self, pairs: LikePairs, side: str, realigned: Tensor) -> None:
        """After an update of X whose partners missed their turns: ``C ← (I - (XᵀX + δI)⁻¹ K) C_old`` by
        ``K ← K + (XᵀX + δI - K)(I - C_old)``; ``realigned``: C_old in fp64."""
        damped = self._grams(pairs, side)
        damped.diagonal(dim1=1, dim2=2).add_(self._group(pairs, side)["damping"])
        drift = self._stacked_state(pairs, OTHER[side], "drift").to(damped.dtype)
        identity = torch.eye(damped.shape[1], dtype=damped.dtype, device=damped.device)
        self._set_drift(pairs, OTHER[side], drift + (damped - drift) @ (identity - realigned))

    def _note_late(self, pairs: LikePairs, active: LikePairs, side: str) -> None:
        """Remember which factors miss this turn of theirs."""
        group = self._group(pairs, side)
        if group["late"] or len(active) < len(pairs):
            of_side, taken = set(pairs.indices[side]), set(active.indices[side])
            group["late"] = sorted(set(group["late"]) - of_side | of_side - taken)

    def _with_late_partner(self, pairs: LikePairs, side: str) -> LikePairs:
        late = self._group(pairs, OTHER[side])["late"]
        return LikePairs(pair for pair in pairs if self._position(pair, OTHER[side])[1] in late) if late else NO_PAIRS

    def _take_state(self, state_dict: dict[str, Any]) -> None:
        super()._take_state(state_dict)
        self._freeze_as_counted()

    def _after_undo(self) -> None:
        self._freeze_as_counted()

    def _freeze_as_counted(self) -> None:
        """Freeze and thaw as the steps that are counted leave it, after the count was put back or loaded: the factor that was left trained
        may be the one whose turn is over, and its partner would miss the next."""
        for pair in self._pairs:
            group = self.param_groups[pair.a[0]]
            # With "joint" nothing is idle, and the device may count. Before the first step nothing is frozen but by the user.
            if group["freeze_idle"] and group["order"] != "joint" and group["step"]:
                self._freeze_idle([pair], self._whose_turn(group, later=1))
        self._thaw_all_but(lambda group: group["freeze_idle"] and group["step"])

    def _thaw_all_but(self, freezes: Callable[[dict[str, Any]], object]) -> None:
        """Thaw what is held frozen in groups that freeze nothing any more."""
        left = {position for position in self._idle if not freezes(self.param_groups[position[0]])}
        for position in left:
            self._at(position).requires_grad_(True)
        self._idle -= left

    def _freeze_idle(self, pairs: list[FactorPair], next_turn: str) -> None:
        active: set[Position] = set()
        idle: set[Position] = set()
        for pair in pairs:
            for side in "AB":
                position = self._position(pair, side)
                self._at(position).requires_grad_(side in next_turn)
                (active if side in next_turn else idle).add(position)
        self._idle = self._idle - active | idle

    def _before_update(self) -> None:
        super()._before_update()
        self._thaw_all_but(lambda group: group["freeze_idle"])  # switched off since

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_idle": self._idle}


class AltLoRA(AlternatingOptimizer):
    """AltLoRA (Algorithm 1 of the AltLoRA paper): one factor takes its turn in each step. A's turn, with G the full gradient::

        g = s⁻² (BᵀB + δI)⁻¹ ∂A                 the best approximation of G by sBg (Theorem 1)
        M ← β₁ C_A M + (1-β₁) g                 C_A carries M from the old column space of B to the new (Theorem 2)
        A ← A - lr (M + weight_decay·A)

    B's turn is the mirror image, with the current A. ``C_A = (BᵀB + δI)⁻¹ BᵀB_old`` is I after A's turn, and the previous factors
    are not stored: with ``K = δI + Bᵀ(B - B_old)``, r×r and formed in the pass that writes B, ``C_A = I - (BᵀB + δI)⁻¹ K``. A turn whose
    gradient is None changes nothing; then C_A spans two updates of B (:meth:`_carry_twice`). The trajectory of ΔW does not depend on how
    ΔW is split into B and A (Theorem 4).

    Args:
        params, lr, maximize, scale, lr_ratio, …: see :class:`LowRankOptimizer`; parameters that are no factors get AdamW with
            its default betas, eps and weight decay.
        momentum: β₁, without bias correction. OneCycleLR and CyclicLR, where they find ``betas``, cycle those (here of the parameters
            that are no factors) and leave ``momentum``: pass them ``cycle_momentum=False`` and schedule ``momentum`` yourself.
        weight_decay: decoupled, multiplied by lr; of everything. None: 0 for factors, AdamW's 0.01 for the rest.
        order: whose turn is first: "B" (B = 0 at the start, so A's gradient is zero), "A", or "joint": both in every step, from the
            factors as they were. A factor whose partner is frozen (LoRA-FA) still moves at its own turns alone, every second step; "joint"
            moves it in each. ``capturable=True`` takes "joint" only: a replayed CUDA graph repeats one and the same step.
        damping: δ, absolute (see :data:`DEFAULT_DAMPING`). 0 is refused where the first step inverts the Gram matrix of a zero factor.
        freeze_idle: switch ``requires_grad`` of the factor whose turn it is not, which saves its backward GEMMs. Off by default:
            DistributedDataParallel and torch.compile do not cope with parameters whose ``requires_grad`` changes. It is the optimizer's
            then: a factor that you froze is thawed at its turn, and after the last step half of the factors stay frozen, which
            ``for p in optimizer.param_groups[0]["params"]: p.requires_grad_(True)`` undoes. Switched off in a group, it thaws them in the
            next step. ``load_state_dict`` freezes and thaws as the loaded steps left it.

    State of a factor: ``exp_avg`` and ``drift`` (r, r), its K: what its partner moved since ``exp_avg`` was aligned. A frozen factor has
    it too if its partner is trained. ``group["late"]`` holds the positions of factors that missed their last turn,
    ``group["drift_damping"]`` the δ in the K's that the group's factors made: ``damping`` may be scheduled.

    Raises:
        TypeError, ValueError: no pair of factors among ``params``, an argument of a wrong kind or out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float | None = None,
        *,
        order: str = "B",
        damping: float = DEFAULT_DAMPING,
        freeze_idle: bool = False,
        **options: Unpack[AdamWOptions],
    ) -> None:
        refuse_adams(type(self), options)
        method = {"momentum": momentum, **_alternation(order, damping, freeze_idle)}
        super().__init__(params, lr, weight_decay=weight_decay, method_defaults=method, **options)

    def _moments(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"betas": (group["momentum"], 0.0), "bias_correction": False}


class AltLoRAPlus(AlternatingOptimizer):
    """AltLoRA+ (Algorithm 2): AltLoRA with second moments, ``v ← β₂ v + (1-β₂) g²`` (not carried), AdamW's bias corrections
    (counted per factor: how often it was updated) and decoupled weight decay.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad: as ``torch.optim.AdamW``; see :class:`LowRankOptimizer`.
        order, damping, freeze_idle: see :class:`AltLoRA`.

    State of a factor: ``exp_avg``, ``exp_avg_sq`` and ``drift`` (r, r).

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
        order: str = "B",
        damping: float = DEFAULT_DAMPING,
        freeze_idle: bool = False,
        **options: Unpack[AdamWOptions],
    ) -> None:
        method = _alternation(order, damping, freeze_idle)
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, method_defaults=method, **options)

    def _factor_state(self, group: dict[str, Any], part: Tensor, rank: int) -> dict[str, Tensor]:
        return {**super()._factor_state(group, part, rank), **moments(part, "exp_avg_sq")}


def _alternation(order: str, damping: float, freeze_idle: bool) -> dict[str, Any]:
    return {"order": order, "damping": damping, "freeze_idle": freeze_idle, "late": [], "drift_damping": damping}
