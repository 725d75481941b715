"""The two kinds of layers that train ``ΔW = s(Q_B A + B Q_Aᵀ)``: where A, B, Q_A and Q_B lie, and whether a layer is still plain LoRA.

Ours hold Q_A and Q_B as buffers. A foreign one is an unmodified LoRA layer of rank 2r of any
library, ``s [Q_B B] [A; Q_Aᵀ]``, of which the optimizer trains one half and overwrites the other (OD-LoRA, Eq. 4).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...backends.lists import Tall, held, located
from ...pairs import halves_are_bases, owners, switch_count
from ...parallel.shards import KEEP_WHOLE, all_gathered, is_sharded, shard_dims
from .base import LowRankOptimizer
from .idle_halves import IdleHalf, owner, remove_all
from .notices import warn
from .pairing import FactorPair, LikePairs, Position

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


def _half(pair_a: bool, rank: int, decoupled: bool, idle: bool) -> tuple[slice, ...]:
    """The trained (or the idle) half of ``lora_A`` (2r, d_in) or ``lora_B`` (d_out, 2r) of a foreign layer.

    ``lora_A = [A; Q_Aᵀ]`` always; ``lora_B`` is ``[B 0]`` while plain and ``[Q_B B]`` when decoupled.
    """
    first, last = slice(None, rank), slice(rank, None)
    if pair_a:
        return (last if idle else first,)
    return (slice(None), last if decoupled != idle else first)


class _Sorted(NamedTuple):
    """The first ``known`` of ``pairs``, sorted by what every step asks of them.

    foreign: those of foreign layers; factors: of each group, the indices of its As, and of the Bs of foreign layers.
    """

    pairs: list[FactorPair]
    known: int
    foreign: list[FactorPair]
    factors: list[list[int]]


class DecoupledLayersOptimizer(LowRankOptimizer):
    """Finds the factors and bases of each pair, and lets the idle halves of foreign layers rest; a subclass decouples the pairs."""

    counts = positions = frozenset({STILL_PLAIN})
    #: ``switch_count()`` when model and optimizer were last found to come from one step, unless one was loaded since then.
    _agreed_at: int | None = None
    #: Whether it was said that foreign layers train at half their rank.
    _told_of_halves = False

    def __init__(self, *args: Any, **options: Any) -> None:
        self._begin_hooking()
        super().__init__(*args, **options)

    # ---------------------------------------------------------------- plain LoRA or decoupled

    def _is_decoupled(self, group: dict[str, Any], step: int) -> bool:
        """Whether pairs of ``group`` are decoupled after ``step`` steps (else they are plain LoRA)."""
        raise NotImplementedError

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

    def _before_update(self) -> None:
        self._hook_idle_halves()
        if self._agreed_at != switch_count():
            self._check_agreement()
            self._agreed_at = switch_count()  # the check may find that a layer has switched

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

    # ---------------------------------------------------------------- where factors and bases lie

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

    # ---------------------------------------------------------------- which layers are taken

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

    def _half_frozen(self, pair: FactorPair) -> str:
        side, frozen = ("B", "A") if self._at(pair.b).requires_grad else ("A", "B")
        return (
            f"of {pair.name} only {side} is trained and {frozen} is frozen, but new bases set both anew: train both or freeze both "
            "(requires_grad_), or train it with AdamW"
        )

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

    # ---------------------------------------------------------------- the idle halves of foreign layers

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

                def idle(self: DecoupledLayersOptimizer, pair: FactorPair = pair, position: Position = position) -> tuple[slice, ...]:
                    return self._half_of(pair, position, self.param_groups[position[0]]["step"], idle=True)

                if hooked is not None:
                    hooked.remove()
                self._idle_hooks[position] = IdleHalf(parameter, self, position[0], idle)

    # ---------------------------------------------------------------- undoing, copying

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

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_idle_hooks" not in self.__dict__:  # a copy
            self._begin_hooking()
            self._told_of_halves = True
        self._agreed_at = None
        self._hook_idle_halves()
        for hook in self._idle_hooks.values():
            hook.forget()
