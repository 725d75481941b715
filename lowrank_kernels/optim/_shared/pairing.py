"""Which parameters of an optimizer's groups are the factors of one layer, (A, B) or a core R: what ``search`` finds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ...backends.lists import partition

#: (group index, index within the group).
Position: TypeAlias = tuple[int, int]
#: ``(factors?, Bs with an lr of their own?, indices)`` of parameters of a group that agree in both and in weight decay.
Kind: TypeAlias = tuple[bool, bool, list[int]]


@dataclass(frozen=True)
class FactorPair:
    """Where the factors of one pair stand in ``param_groups``: positions, not references, since frameworks swap parameters.

    Attributes:
        name: the layer's name, or its position where names are unknown.
        scale: s.
        a, b: (group index, index within the group) of A (r, d_in) and of B (d_out, r).
        holds_bases: whether they belong to a layer of ours that keeps Q_A and Q_B (``adapt(method="sds")``).
    """

    name: str
    scale: float
    a: Position
    b: Position
    holds_bases: bool


class LikePairs(list[FactorPair]):
    """Pairs of one device, dtype, rank and parameter groups; ``indices`` are their factors' places within the groups, by side.

    ``kept`` is for what a method keeps from step to step; it goes when shapes, dtypes, devices or the pairs themselves change.
    """

    def __init__(self, pairs: Iterable[FactorPair]) -> None:
        super().__init__(pairs)
        self.indices = {"A": [pair.a[1] for pair in self], "B": [pair.b[1] for pair in self]}
        self.kept: dict[str, Any] = {}


@dataclass(frozen=True)
class Core:
    """Where the trained core R (r, r) of one ``ΔW = s·B R A`` stands in ``param_groups``."""

    name: str
    scale: float
    position: Position


@dataclass(frozen=True)
class Half:
    """A trained factor without its partner: a layer that no method of pairs can train as its paper says.

    Attributes:
        position: where the factor stands in ``param_groups``.
        left_out: whether the partner is trained, too, and merely was not given.
        why: "of … only A is given, …".
    """

    position: Position
    left_out: bool
    why: str


def factor_positions(pairs: Iterable[FactorPair], cores: Iterable[Core]) -> set[Position]:
    """Where all these factors stand."""
    return {position for pair in pairs for position in (pair.a, pair.b)} | {core.position for core in cores}


class Pairing:
    """What a method trains as factors, and so of what kind every parameter of every group is.

    Args:
        lone: positions of what belongs to an adapter and is no factor here: weight decay is the factors', the rest AdamW's.
        sizes: how many parameters each group has.
        never: positions of what is no factor of a pair although it is named like one.
        halves: see :class:`Half`.

    Attributes:
        pairs, cores: the factors.
        factors, second_factors, lone_factors: by group, the indices of all factors, of the Bs among them, and of the lone ones.
        kinds: by group, all parameters in lists of one kind, by whether Bs have an lr of their own.
    """

    def __init__(
        self,
        pairs: Iterable[FactorPair] = (),
        cores: Iterable[Core] = (),
        lone: Iterable[Position] = (),
        sizes: Sequence[int] = (),
        never: Iterable[Position] = (),
        halves: Iterable[Half] = (),
    ) -> None:
        self.pairs, self.cores, self.never, self.halves = list(pairs), list(cores), frozenset(never), list(halves)
        self.factors, self.second_factors, self.lone_factors = (
            [frozenset(i for g, i in positions if g == index) for index in range(len(sizes))]
            for positions in (factor_positions(self.pairs, self.cores), {pair.b for pair in self.pairs}, set(lone))
        )
        self.kinds = [{own_lr: self._by_kind(g, size, own_lr) for own_lr in (False, True)} for g, size in enumerate(sizes)]

    def _by_kind(self, group_index: int, size: int, second_has_own_lr: bool) -> list[Kind]:
        factors, second, lone = (of[group_index] for of in (self.factors, self.second_factors, self.lone_factors))
        kinds = partition(range(size), lambda index: (index in factors, second_has_own_lr and index in second, index in lone))
        return [(is_factor, is_second, members) for (is_factor, is_second, _), members in kinds.items()]


class Method:
    """What a method says of the factors that it takes; every optimizer is one."""

    #: A method that makes no sense without pairs refuses parameters in which there are none.
    requires_pairs = True
    #: What a method trains as factors: pairs (A, B), cores R between constant factors. Others get AdamW with the rest.
    trains_pairs, trains_cores = True, False
    #: Whether it takes the factors of convolutions, as matrices (r, d_in·k·k) and (d_out, r). Else AdamW trains them with the rest.
    trains_convolutions = False
    #: Whether a step moves both factors of a pair, so that both are trained or both frozen.
    moves_both_factors = False


def name_at(groups: Sequence[dict[str, Any]], position: Position) -> str:
    """The name of the parameter that stands there, or its position where it has none."""
    names = groups[position[0]].get("param_names")
    return names[position[1]] if names else f"param_groups[{position[0]}][{position[1]}]"
