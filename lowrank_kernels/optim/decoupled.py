"""What SDS-LoRA and OD-LoRA share: AdamW on A and B of decoupled layers, and when and how their bases Q_A and Q_B are made anew.

What these layers are, and where their factors and bases lie, is in ``_shared.decoupled_layers``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any, TypeAlias, Unpack

import torch
from torch import Tensor

from .._checks import as_flag, as_integer, check_choice
from ..backends.dtypes import compute_dtype
from ..backends.lists import partition
from ..ops import grouped_polar, grouped_qr, grouped_svd_product
from ..pairs import owners
from ..parallel.ranks import DataParallelGroup, assign_ranks, check_process_group, data_parallel_group, exchange, group_of_a_copy
from ..parallel.shards import all_gathered, assign
from ._shared.arguments import AdamWOptions, ParamsT
from ._shared.decoupled_layers import STILL_PLAIN, DecoupledFactors, DecoupledLayersOptimizer
from ._shared.pairing import FactorPair

Action: TypeAlias = Callable[[list[FactorPair]], None]

_requires_grad = attrgetter("requires_grad")


def refresh_due(t: int, total: int, phases: int) -> bool:
    """The phased schedule: after main step t (from 1) of ``total``, refresh if ``t mod ⌈phases·t/total⌉ = 0``.

    So the run has ``phases`` phases with intervals 1, 2, …, ``phases``; beyond ``total`` the interval stays ``phases``.
    """
    interval = min(-(-phases * t // total), phases)
    return t % interval == 0


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


class DecoupledOptimizer(DecoupledLayersOptimizer):
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
        super()._before_update()
        self._due = self._actions_due()

    def __getstate__(self) -> dict[str, Any]:
        kept = {"_split_work": self._split_work, "_process_group": group_of_a_copy(self._process_group)}
        return {**super().__getstate__(), **kept}

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
