"""What SDS-LoRA and OD-LoRA share: the decoupled parametrization ``ΔW = s(Q_B A + B Q_Aᵀ)`` in both kinds of layers.

Ours hold Q_A and Q_B as buffers. A foreign one is an unmodified LoRA layer of rank 2r of any
library, ``s [Q_B B] [A; Q_Aᵀ]``, of which the optimizer trains one half and overwrites the other (OD-LoRA, Eq. 4).
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple, TypeAlias, Unpack

import torch
from torch import Tensor, nn

from .._checks import as_flag, as_integer, check_choice
from ..backends.dtypes import compute_dtype
from ..backends.lists import Tall, held, located, partition
from ..ops import grouped_polar, grouped_qr, grouped_svd_product
from ..pairs import halves_are_bases, owners, switch_count
from ..parallel.ranks import DataParallelGroup, assign_ranks, check_process_group, data_parallel_group, exchange, group_of_a_copy
from ..parallel.shards import KEEP_WHOLE, all_gathered, assign, is_sharded, shard_dims
from ._shared.arguments import AdamWOptions, ParamsT
from ._shared.base import LowRankOptimizer
from ._shared.idle_halves import IdleHalf, owner, remove_all
from ._shared.notices import warn
from ._shared.pairing import FactorPair, LikePairs, Position

Action: TypeAlias = Callable[[list[FactorPair]], None]

_requires_grad = attrgetter("requires_grad")

#: What a group calls the places of the As of pairs that were frozen when the others were decoupled.
STILL_PLAIN = "still_plain"

#: Where a layer of ours holds its A, Q_Aᵀ and Q_B.
_HELD = (("_parameters", "lora_A"), ("_buffers", "q_a"), ("_buffers", "q_b"))


class DecoupledFactors(NamedTuple):
    """Views of one pair's factors: ``ΔW = s(q_b @ a + b @ q_a)``, or ``s·b @ a`` while it is plain LoRA.

    a: A (r, d_in); b: B (d_out, r); q_a: Q_Aᵀ (r, d_in); q_b: Q_B (d_out, r).
    """

    a: Tensor
    b: Tensor
    q_a: Tensor
    q_b: Tensor


def refresh_due(t: int, total: int, phases: int) -> bool:
    """The phased schedule: after main step t (from 1) of ``total``, refresh if ``t mod ⌈phases·t/total⌉ = 0``.

    So the run has ``phases`` phases with intervals 1, 2, …, ``phases``; beyond ``total`` the interval stays ``phases``.
    """
    interval = min(-(-phases * t // total), phases)
    return t % interval == 0


def _half(pair_a: bool, rank: int, decoupled: bool, idle: bool) -> tuple[slice, ...]:
    """The trained (or the idle) half of ``lora_A`` (2r, d_in) or ``lora_B`` (d_out, 2r) of a foreign layer.

    ``lora_A = [A; Q_Aᵀ]`` always; ``lora_B`` is ``[B 0]`` while plain and ``[Q_B B]`` when decoupled.
    """
    first, last = slice(None, rank), slice(rank, None)
    if pair_a:
        return (last if idle else first,)
    return (slice(None), last if decoupled != idle else first)


def _no_wider_than_tall(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same ``left @ rightᵀ`` with no more columns than rows: in a layer narrower than 2r, I and the product itself."""
    rows = min(len(left), len(right))
    if left.shape[1] <= rows:
        return left, right
    identity = torch.eye(rows, dtype=left.dtype, device=left.device)
    return (identity, right @ left.mT) if len(left) == rows else (left @ right.mT, identity)


def _renew(factors: Sequence[Tensor], bases: Sequence[Tensor], polar: bool) -> None:
    """Write orthonormal bases of the factors' ranges over the old ones, whose signs QR keeps."""
    if polar:
        grouped_polar(factors, out=bases)
    else:
        grouped_qr(factors, previous=bases, out=bases)


class _Sorted(NamedTuple):
    """The first ``known`` of ``pairs``, sorted by what every step asks of them.

    foreign: those of foreign layers; factors: of each group, the indices of its As, and of the Bs of foreign layers.
    """

    pairs: list[FactorPair]
    known: int
    foreign: list[FactorPair]
    factors: list[list[int]]


class DecoupledOptimizer(LowRankOptimizer):
    """AdamW on A and B of decoupled adapters; a subclass says when Q_A and Q_B are set anew.

    Args:
        start_steps: how many steps come before the main run.
        total_steps: number of ``step()`` calls of the whole run; the phased schedule is a function of it.
        phases: k of the phased schedule (:func:`refresh_due`).
        refresh_every: n; a uniform schedule (after main steps n, 2n, …) in place of the phased one.
        basis: "qr" or "polar", how a refresh makes the bases.
        split_work: let the ranks divide the layers among them where bases are made (QR, polar factors, SVD), and send each other the
            results in one all-gather. It pays if making all bases takes longer than ``S/β + P/(P-1)·t₀``: S bytes of bases, P ranks,
            bandwidth β and latency t₀ of an all-gather (docs/stacks.md has figures). All ranks then hold the same bases to the last bit.
        process_group: the ranks that do so, all with equal factors, as under DDP and FSDP2; None: the default group.
    """

    moves_both_factors = True
    counts = positions = frozenset({STILL_PLAIN})
    fixed = frozenset({"start_steps"})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float | None,
        amsgrad: bool,
        *,
        start_steps: int,
        total_steps: int | None,
        phases: int,
        refresh_every: int | None,
        basis: str,
        split_work: bool,
        process_group: Any,
        method_defaults: dict[str, Any] | None = None,
        **options: Unpack[AdamWOptions],
    ) -> None:
        as_flag(type(self).__name__, "split_work", split_work)
        check_process_group(type(self).__name__, process_group)
        self._split_work, self._process_group = bool(split_work), process_group
        self._begin_hooking()
        #: ``switch_count()`` when model and optimizer were last found to come from one step, unless one was loaded since then.
        self._agreed_at: int | None = None
        self._told_of_halves = False
        self._due: tuple[dict[Action, list[FactorPair]], list[FactorPair]] = {}, []
        schedule = {"total_steps": total_steps, "phases": phases, "refresh_every": refresh_every, "start_steps": start_steps}
        method = {**schedule, "basis": basis, STILL_PLAIN: [], **(method_defaults or {})}
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, method_defaults=method, **options)

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        super()._check_hyperparameters(group)
        name, start_steps, total_steps = type(self).__name__, group["start_steps"], group["total_steps"]
        for key in ("total_steps", "phases", "refresh_every"):
            if group[key] is not None or key == "phases":
                as_integer(name, key, group[key], most=math.inf)
        if total_steps is None and group["refresh_every"] is None:
            raise ValueError(
                f"{name}: total_steps is missing: pass the number of step() calls of the whole run (the refresh schedule is a "
                "function of it), or refresh_every=n for a uniform schedule, which needs no total"
            )
        if total_steps is not None and total_steps <= start_steps:
            raise ValueError(f"{name}: total_steps must be larger than the {start_steps} steps of the start phase, got {total_steps}")
        check_choice(name, "basis", group["basis"], ("qr", "polar"))
        if group["capturable"]:
            raise ValueError(
                f"{name}: capturable=True is not supported: the schedule decides on the host when the bases are refreshed, which a "
                "replayed CUDA graph would never see"
            )

    # ---------------------------------------------------------------- what a subclass says

    def _is_decoupled(self, group: dict[str, Any], step: int) -> bool:
        """Whether pairs of ``group`` are decoupled after ``step`` steps (else they are plain LoRA)."""
        raise NotImplementedError

    def _start_action(self, group: dict[str, Any], step: int) -> Action | None:
        """What follows the update of step ``step ≤ start_steps``."""
        raise NotImplementedError

    def _main_action(self, group: dict[str, Any], t: int) -> Action | None:
        """What follows the update of main step t = 1, 2, …"""
        if group["refresh_every"] is not None:
            return self._refresh if t % group["refresh_every"] == 0 else None
        return self._refresh if refresh_due(t, group["total_steps"] - group["start_steps"], group["phases"]) else None

    # ---------------------------------------------------------------- the step

    def _update(self) -> None:
        (due, passed_over), self._due = self._due, ({}, [])  # actions are methods of this optimizer, which is not to hold itself
        super()._update()
        for action, affected in due.items():
            action(affected)
            if action != self._refresh:
                self._agreed_at = None
                self._mark_plain(affected, False)
        self._mark_plain(passed_over, True)

    def _actions_due(self) -> tuple[dict[Action, list[FactorPair]], list[FactorPair]]:
        """What follows the coming step's update, and for which pairs; and the frozen ones that stay plain while others are decoupled.

        A frozen layer is left alone. One that is thawed when it has missed its turn takes it at the end of the next step.

        Raises:
            RuntimeError: only one factor of a pair trains, and new bases would change both.
        """
        actions = []
        for group in self.param_groups:
            step = group["step"] + 1
            t = step - group["start_steps"]
            actions.append(self._start_action(group, step) if t <= 0 else self._main_action(group, t))
        late = any(group[STILL_PLAIN] for group in self.param_groups)
        if not (late or any(actions)):
            return {}, []
        if not late and all(action == self._refresh for action in actions) and self._all_train():
            return {self._refresh: self._pairs}, []
        due: defaultdict[Action, list[FactorPair]] = defaultdict(list)
        passed_over, layers = [], owners()
        for pair in self._pairs:
            action, group = actions[pair.a[0]], self.param_groups[pair.a[0]]
            trained = self._at(pair.a).requires_grad, self._at(pair.b).requires_grad
            if not any(trained):
                plain = not self._layer(pair, layers).decoupled if pair.holds_bases else not self._decoupled_after(pair, group["step"])
                if plain and self._is_decoupled(group, group["step"] + 1):
                    passed_over.append(pair)
                continue
            if pair.a[1] in group[STILL_PLAIN] and action in (None, self._refresh):
                action = self._reparametrize
            if action is not None:
                # A refresh of our layers writes the bases alone, which are buffers.
                if not (all(trained) or (pair.holds_bases and action == self._refresh)):
                    raise RuntimeError(f"{type(self).__name__}: {self._half_frozen(pair)}. Nothing was changed")
                due[action].append(pair)
        return due, passed_over

    def _half_frozen(self, pair: FactorPair) -> str:
        side, frozen = ("B", "A") if self._at(pair.b).requires_grad else ("A", "B")
        return (
            f"of {pair.name} only {side} is trained and {frozen} is frozen, but new bases set both anew: train both or freeze both "
            "(requires_grad_), or train it with AdamW"
        )

    def _decoupled_after(self, pair: FactorPair, step: int) -> bool:
        """Whether a pair is decoupled after ``step`` steps."""
        group = self.param_groups[pair.a[0]]
        return self._is_decoupled(group, step) and pair.a[1] not in group[STILL_PLAIN]

    def _mark_plain(self, some: list[FactorPair], plain: bool) -> None:
        """Note in the groups, and so in checkpoints, which pairs stayed plain when the others were decoupled: the places of their As."""
        for group_index in {pair.a[0] for pair in some}:
            group, indices = self.param_groups[group_index], {pair.a[1] for pair in some if pair.a[0] == group_index}
            marked = set(group[STILL_PLAIN])
            group[STILL_PLAIN] = sorted(marked | indices if plain else marked - indices)  # a new list: a step may be undone

    def _sorted(self) -> _Sorted:
        """The pairs as they are sorted now; done anew where pairs were added, or taken back after an error."""
        found: _Sorted | None = self.__dict__.get("_last_sorted")
        if found is None or found.pairs is not self._pairs or found.known != len(self._pairs):
            factors: list[list[int]] = [[] for _ in self.param_groups]
            for pair in self._pairs:
                for group_index, index in (pair.a,) if pair.holds_bases else (pair.a, pair.b):
                    factors[group_index].append(index)
            foreign = [pair for pair in self._pairs if not pair.holds_bases]
            found = self._last_sorted = _Sorted(self._pairs, len(self._pairs), foreign, factors)
        return found

    def _all_train(self) -> bool:
        """Whether no layer is frozen, and of foreign ones no factor is, which hold the bases."""
        groups = zip(self.param_groups, self._sorted().factors, strict=False)
        return all(all(map(_requires_grad, map(group["params"].__getitem__, indices))) for group, indices in groups)

    def _refresh(self, due: list[FactorPair]) -> None:
        """Bases of the factors' ranges anew: ``Aᵀ = Q_A R_A``, ``B = Q_B R_B`` with the signs of the old bases, or polar factors."""
        ranks = self._ranks()
        for pairs in self._all_alike() if len(due) == len(self._pairs) else self._alike(due):
            factors, bases = self._tall(pairs)
            polar = self.param_groups[pairs[0].a[0]]["basis"] == "polar"
            self._begin_writing()
            if ranks is None:
                _renew(factors, bases, polar)
                continue
            doers = assign_ranks([factor.numel() for factor in factors.stored], ranks.size)
            mine = ranks.own(doers)
            _renew([factors[i] for i in mine], [bases[i] for i in mine], polar)
            exchange(list(bases), doers, ranks.group)

    def _ranks(self) -> DataParallelGroup | None:
        """The ranks among which the making of bases is divided, None if each makes all."""
        return data_parallel_group(self._process_group) if self._split_work else None

    def _tall(self, pairs: LikePairs) -> tuple[Tall, Tall]:
        """Of decoupled pairs Aᵀ and B (d, r), whole ones of sharded factors, and Q_A and Q_B."""
        (group_a, _), (group_b, _) = pairs[0].a, pairs[0].b
        params_a, params_b = self.param_groups[group_a]["params"], self.param_groups[group_b]["params"]
        a, b = list(map(params_a.__getitem__, pairs.indices["A"])), list(map(params_b.__getitem__, pairs.indices["B"]))
        bases = self._held_bases(pairs, a)
        if bases is None:
            layers = owners()
            a, b, *bases = map(list, zip(*(self._views(pair, layers, decoupled=True) for pair in pairs), strict=True))
        return located(Tall(all_gathered(a + b), len(pairs))), located(Tall(bases[0] + bases[1], len(pairs)))

    def _held_bases(self, pairs: LikePairs, factors_a: list[Tensor]) -> Sequence[list[Tensor]] | None:
        """Q_Aᵀ and Q_B of layers of ours; None if not all pairs have one that holds its A as a parameter.

        Which layers these are is kept, and looked up anew where one no longer holds the A that is trained.
        """
        if "layers" not in pairs.kept:
            pairs.kept["layers"] = [] if all(pair.holds_bases for pair in pairs) else None
        layers: list[weakref.ref[nn.Module]] | None = pairs.kept["layers"]
        if layers is None:
            return None
        for found_anew in (False, True):
            if found_anew:
                live = owners()
                layers = [weakref.ref(self._layer(pair, live)) for pair in pairs]
            found = held(layers, _HELD) if layers else None
            if found is not None and all(map(is_, found[0], factors_a)):
                pairs.kept["layers"] = layers
                return found[1:]
        return None

    def _layer(self, pair: FactorPair, layers: dict[int, nn.Module]) -> nn.Module:
        """The layer of ours that holds a pair."""
        layer = layers.get(id(self._at(pair.a)))
        if layer is None:
            name = type(self).__name__
            raise RuntimeError(f"{name}: the adapter layer of {pair.name} is gone; build the optimizer from the model that is trained")
        return layer

    def _reparametrize(self, due: list[FactorPair]) -> None:
        """``ΔW ≈ sUΣVᵀ`` of rank r; ``A = ΣVᵀ/2``, ``B = UΣ/2``, ``Q_A = V``, ``Q_B = U``: Eq. 8 of SDS-LoRA, Eq. 5 of OD-LoRA.

        (The papers take the SVD of ΔW itself and divide by 2s: s cancels.) Exact where ΔW has rank r, as after plain LoRA.
        """
        for new, u, sigma, v in self._truncated_svds(due):
            assign(new.a, sigma[:, None] / 2 * v.mT)
            assign(new.b, u * (sigma / 2))
        self._clear_factor_state(due)

    def _restart(self, due: list[FactorPair]) -> None:
        """Back at W0 with the bases that ΔW has found: ``Q_A = V_r``, ``Q_B = U_r``, ``A = B = 0`` (Algorithm 1 of OD-LoRA)."""
        for new, *_ in self._truncated_svds(due):
            new.a.zero_()
            new.b.zero_()
        self._clear_factor_state(due)

    def _clear_factor_state(self, due: list[FactorPair]) -> None:
        """Zero the moments of these pairs and restart their bias correction; those of frozen ones stay, until it is their turn."""
        positions = {position for pair in due for position in (pair.a, pair.b)}
        for group_index in {group_index for group_index, _ in positions}:
            group, factors = self.param_groups[group_index], self._factors[group_index]
            states = {index: self.state.get(group["params"][index], {}) for index in factors}
            cleared = {index for index in factors if (group_index, index) in positions}
            if values := [value for index in cleared for value in states[index].values()]:
                torch._foreach_zero_(values)
            if any(states[index] for index in factors - cleared):
                group["missed"].update({index: int(self._updates_due(group_index, index)) for index in cleared})
            else:
                group["cleared_at"], group["missed"] = group["step"], {i: n for i, n in group["missed"].items() if i not in factors}

    def _truncated_svds(self, due: list[FactorPair]) -> Iterator[tuple[DecoupledFactors, Tensor, Tensor, Tensor]]:
        """Makes the pairs decoupled with ``Q_A = V_r``, ``Q_B = U_r`` of their ΔW = sUΣVᵀ (from thin factors, d_out × d_in is
        never formed), and hands back their views and ``U_r, Σ_r, V_r``; A and B are the caller's to write.

        All in the dtype of the state: what is written into 16-bit factors and bases is rounded then, and once.
        """
        layers = owners()
        by_form = partition(due, lambda pair: self._decoupled_after(pair, self.param_groups[pair.a[0]]["step"] - 1))
        for decoupled, pairs in [(form, alike) for form, some in by_form.items() for alike in self._alike(some)]:
            old = [self._views(pair, layers, decoupled) for pair in pairs]
            whole = all_gathered([v.a for v in old] + [v.b for v in old])
            lefts, rights = whole[len(old) :], [a.mT for a in whole[: len(old)]]
            if decoupled:
                lefts = [torch.cat([v.q_b, b], dim=1) for v, b in zip(old, lefts, strict=True)]
                rights = [torch.cat([a, v.q_a.mT], dim=1) for v, a in zip(old, rights, strict=True)]
            wide = compute_dtype(lefts[0].dtype)
            thin = [_no_wider_than_tall(left.to(wide), right.to(wide)) for left, right in zip(lefts, rights, strict=True)]
            found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
            for some in partition(enumerate(thin), lambda item: item[1][0].shape[1]).values():
                members, (lefts, rights) = [i for i, _ in some], map(list, zip(*(factors for _, factors in some), strict=True))
                found.update(zip(members, zip(*self._svd_products(lefts, rights, self._rank(pairs[0])), strict=True), strict=True))
            for index, pair in enumerate(pairs):
                u, sigma, v = found[index]
                new = self._views(pair, layers, decoupled=True)
                self._begin_writing()
                new.q_a.copy_(v.mT)
                new.q_b.copy_(u)
                if pair.holds_bases:
                    layers[id(self._at(pair.a))].decoupled = True  # type: ignore[assignment]
                yield new, u, sigma, v

    def _svd_products(self, lefts: list[Tensor], rights: list[Tensor], rank: int) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """``grouped_svd_product``, divided among the ranks if that was asked for."""
        ranks = self._ranks()
        if ranks is None:
            return grouped_svd_product(lefts, rights, rank)
        doers = assign_ranks([left.numel() + right.numel() for left, right in zip(lefts, rights, strict=True)], ranks.size)
        us, vs = ([x.new_empty(len(x), rank) for x in side] for side in (lefts, rights))
        ss = torch.zeros(len(lefts), rank, dtype=compute_dtype(lefts[0].dtype), device=lefts[0].device)
        mine = ranks.own(doers)
        if mine:
            its_us, ss[mine], its_vs = grouped_svd_product([lefts[i] for i in mine], [rights[i] for i in mine], rank)
            for i, u, v in zip(mine, its_us, its_vs, strict=True):
                us[i], vs[i] = u, v
        exchange([*us, *vs, *ss], doers * 3, ranks.group)
        return us, ss, vs

    def _before_update(self) -> None:
        self._hook_idle_halves()
        if self._agreed_at != switch_count():
            self._check_agreement()
            self._agreed_at = switch_count()  # the check may find that a layer has switched
        self._due = self._actions_due()

    def _check_agreement(self) -> None:
        """Refuse a model that is not as the optimizer's counters say."""
        name = type(self).__name__
        layers = owners()
        for pair in self._pairs:
            group = self.param_groups[pair.a[0]]
            decoupled = self._decoupled_after(pair, group["step"])
            frozen = not (self._at(pair.a).requires_grad or self._at(pair.b).requires_grad)
            without = "; or, since it is frozen, leave it out of the parameters" if frozen and not pair.holds_bases else ""
            if pair.holds_bases:
                agrees = frozen or self._layer(pair, layers).decoupled == decoupled
            else:  # later their counters are all there is to tell the halves apart
                agrees = group["step"] > 0 or not decoupled or halves_are_bases(*all_gathered([self._at(pair.a), self._at(pair.b)]))
            if not agrees and decoupled and not group["step"]:
                raise RuntimeError(
                    f"{name}: warmup_steps=0 continues with layers that are decoupled already, and {pair.name} is plain LoRA; "
                    f"give it warm-up steps (1 or more), or load the model that it is to continue with{without}"
                )
            if not agrees:
                states = ("plain LoRA", "decoupled")
                raise RuntimeError(
                    f"{name}: after {group['step']} steps {pair.name} should be {states[decoupled]}, but it is "
                    f"{states[not decoupled]}: model and optimizer come from different steps; load both from one checkpoint"
                )
            rest = _half(False, self._rank(pair), False, idle=True)
            if not (pair.holds_bases or decoupled or group["step"]) and self._at(pair.b)[rest].any():
                raise RuntimeError(
                    f"{name}: {pair.name}: the second half of lora_B must be zero at the start (half of a rank-2r LoRA layer becomes "
                    "the frozen basis). Start from LoRA's default initialization (B = 0), or load the optimizer's state as well, or, if "
                    f"it is decoupled, continue with SDSLoRA(…, warmup_steps=0){without}"
                )

    # ---------------------------------------------------------------- the two kinds of layers

    def _rank(self, pair: FactorPair) -> int:
        rows = self._at(pair.a).shape[0]
        return rows if pair.holds_bases else rows // 2

    def _views(self, pair: FactorPair, layers: dict[int, nn.Module], decoupled: bool) -> DecoupledFactors:
        a, b = self._at(pair.a), self._at(pair.b)
        if pair.holds_bases:
            bases = layers[id(a)]._buffers
            return DecoupledFactors(a, b, bases["q_a"], bases["q_b"])  # type: ignore[arg-type]
        rank = self._rank(pair)
        trained = _half(False, rank, decoupled, idle=False)
        return DecoupledFactors(a[:rank], b[trained], a[rank:], b[:, :rank])

    def _half_of(self, pair: FactorPair, position: Position, step: int, *, idle: bool) -> tuple[slice, ...]:
        return _half(position == pair.a, self._rank(pair), self._decoupled_after(pair, step), idle)

    def _trained_parts(self, group_index: int) -> dict[int, tuple[slice, ...]]:
        # The gradients at hand were computed before this step's counter moved.
        step = max(self.param_groups[group_index]["step"] - 1, 0)
        parts: dict[int, tuple[slice, ...]] = {}
        for pair in self._sorted().foreign:
            (group_a, index_a), (group_b, index_b) = pair.a, pair.b
            if group_index in (group_a, group_b):
                decoupled, rank = self._decoupled_after(pair, step), self._rank(pair)
                if group_a == group_index:
                    parts[index_a] = _half(True, rank, decoupled, False)
                if group_b == group_index:
                    parts[index_b] = _half(False, rank, decoupled, False)
        return parts

    def _accept_sharded(self, pair: FactorPair) -> None:
        # The bases are whole on every rank, and are made from factors that are gathered when that is due, as FSDP2 itself does in every
        # forward pass.
        name = type(self).__name__
        if not pair.holds_bases:
            raise RuntimeError(
                f"{name}: {pair.name} is sharded (a DTensor) and a plain LoRA layer of twice the rank, of which the idle half's gradient "
                f"cannot be held back under FSDP2. Adapt the model with method='sds'; or {KEEP_WHOLE}"
            )
        for factor in (self._at(pair.a), self._at(pair.b)):
            if is_sharded(factor) and len(shard_dims(factor)) > 1:
                raise RuntimeError(f"{name}: {pair.name} is sharded along several mesh dimensions; {KEEP_WHOLE}")

    def _accept_pairs(self) -> None:
        self._agreed_at = None
        name = type(self).__name__
        for half in self._pairing.halves:
            raise ValueError(
                f"{name}: {half.why}. New bases set both factors of a layer anew: pass and train both or neither (frozen, or AdamW's), and "
                "untie shared ones"
            )
        for pair in self._pairs:
            a, b = self._at(pair.a), self._at(pair.b)
            if a.requires_grad != b.requires_grad:
                raise ValueError(f"{name}: {self._half_frozen(pair)}")
            if not pair.holds_bases and a.shape[0] % 2:
                raise ValueError(
                    f"{name}: {pair.name} is a plain LoRA layer of rank {a.shape[0]}; half of each factor becomes the frozen basis, so "
                    "its rank must be even: give it rank 2r to train at rank r (or adapt with method='sds')"
                )
            if self._rank(pair) > min(a.shape[1], b.shape[0]):
                raise ValueError(
                    f"{name}: {pair.name} would train rank {self._rank(pair)}, more than its {b.shape[0]} × {a.shape[1]} allow"
                )
        self._tell_of_halves()
        self._hook_idle_halves()

    def _tell_of_halves(self) -> None:
        """Say once at which rank foreign layers are trained, unless their configuration is one that asked for it."""
        foreign = self._sorted().foreign
        model = None if self._model is None else self._model()
        configs = [] if model is None else [c for m in model.modules() for c in getattr(m, "peft_config", {}).values()]
        if not foreign or self._told_of_halves or any(getattr(config, "of_twice_the_rank", False) for config in configs):
            return
        self._told_of_halves = True
        pair = max(foreign, key=self._rank)
        rank = self._rank(pair)
        warn(
            f"{type(self).__name__}: {len(foreign)} plain LoRA layer(s) train at half their rank ({pair.name}: {rank} of {2 * rank}), "
            f"since the other half of each factor becomes the frozen basis. To train at rank {2 * rank}, give them rank {4 * rank}, or use "
            f"adapt(model, method='sds', rank={2 * rank})"
        )

    def _begin_hooking(self) -> None:
        self._idle_hooks: dict[Position, IdleHalf] = {}
        weakref.finalize(self, remove_all, self._idle_hooks).atexit = False

    def _hook_idle_halves(self) -> None:
        """Zero the gradients of untrained halves of foreign layers as they arrive, so that clipping sees what it sees with ours.

        Called when pairs are found and in every step: the parameters are those of the optimizer that was made, or has stepped, last.
        """
        for pair in self._sorted().foreign:
            for position in (pair.a, pair.b):
                parameter, hooked = self._at(position), self._idle_hooks.get(position)
                if hooked is not None and hooked.active and hooked.parameter() is parameter:
                    continue
                if not parameter.requires_grad and owner(parameter) is not None:
                    continue  # another adapter's optimizer, which rests as the adapter does

                def idle(self: DecoupledOptimizer, pair: FactorPair = pair, position: Position = position) -> tuple[slice, ...]:
                    return self._half_of(pair, position, self.param_groups[position[0]]["step"], idle=True)

                if hooked is not None:
                    hooked.remove()
                self._idle_hooks[position] = IdleHalf(parameter, self, position[0], idle)

    def _written(self) -> list[Tensor]:
        layers = owners()
        held = [layers[id(self._at(pair.a))] for pair in self._pairs if pair.holds_bases]
        return [*super()._written(), *(buffer for layer in held for buffer in layer.buffers(recurse=False))]

    def _after_undo(self) -> None:
        layers = owners()
        for pair in self._pairs:
            layer = layers.get(id(self._at(pair.a)))
            if pair.holds_bases and layer is not None:
                layer.decoupled = bool(layer.is_decoupled.item())  # type: ignore[assignment,operator]
        self._agreed_at = None

    def __getstate__(self) -> dict[str, Any]:
        kept = {"_split_work": self._split_work, "_process_group": group_of_a_copy(self._process_group)}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_idle_hooks" not in self.__dict__:  # a copy
            self._begin_hooking()
        self.__dict__.setdefault("_told_of_halves", True)
        self._agreed_at = None
        self._hook_idle_halves()
        for hook in self._idle_hooks.values():
            hook.forget()

    def _example_calls(self) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
        yield from super()._example_calls()
        for pairs in self._alike(self._pairs):
            # By their shapes, those of whole factors: sharded ones would have to be gathered, which needs all ranks.
            factor, rank, count = self._at(pairs[0].a), self._rank(pairs[0]), len(pairs)
            device, wide = factor.device, compute_dtype(factor.dtype)
            widths, heights = [self._at(pair.a).shape[1] for pair in pairs], [self._at(pair.b).shape[0] for pair in pairs]
            (rights, lefts), (thin_a, thin_b) = (
                (
                    [torch.empty(rank, width, dtype=dtype, device=device).mT for width in widths],
                    [torch.empty(height, rank, dtype=dtype, device=device) for height in heights],
                )
                for dtype in (wide, factor.dtype)
            )
            rs, ss = (torch.empty(shape, dtype=wide, device=device) for shape in ((2 * count, rank, rank), (count, rank)))
            thin = thin_a + thin_b
            yield "grouped_qr", device.type, (thin, thin, thin, rs)
            yield "grouped_svd_product", device.type, (lefts, rights, lefts, ss, rights)
