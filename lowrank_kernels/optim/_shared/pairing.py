"""Which parameters of an optimizer's groups are the factors of one layer, (A, B) or a core R, and why there are none where there are none.

``lowrank_kernels.pairs`` knows the factors of a model; here they are found again among the parameters that an optimizer was given.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from ..._checks import first_few
from ...backends.lists import partition
from ...pairs import Pair, halves_by_name, is_adapter_parameter, live_layers, own_pair, pairs_by_name
from ...parallel.shards import FLATTENED, PARTITIONED, made_by_zero

#: (group index, index within the group).
Position: TypeAlias = tuple[int, int]
#: ``(factors?, Bs with an lr of their own?, indices)`` of parameters of a group that agree in both and in weight decay.
Kind: TypeAlias = tuple[bool, bool, list[int]]


#: What to do about lone factors where a step reads a partner that it does not move.
AS_THEY_ARE = "Pass both, as model.named_parameters() does (frozen ones stay as they are)"
#: Said of four groups without names, which PEFT's ``create_loraplus_optimizer`` makes.
LORA_PLUS = "; in place of PEFT's create_loraplus_optimizer pass the model with lr_ratio=, which is LoRA+ here"


#: How PEFT names what its other tuners train.
_OTHER_TUNERS = re.compile(
    r"(^|\.)(vera|hada|lokr|ia3|oft|boft|hra|fourierft|randlora|vblora|delora|shira|prompt_encoder|prompt_embeddings)(_|\.)"
)


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
    #: Whose turn it is, or which phase: where the step decides about a pair, A and B must count the same steps.
    factors_share_steps = False
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


def find_pairs(
    method: Method,
    groups: Sequence[dict[str, Any]],
    before: Pairing,
    known: list[Pair],
    never: Iterable[Tensor],
    scale: float | None,
    since_group: int,
) -> tuple[Pairing, list[str]]:
    """Pair what ``before`` has not paired: by ``known`` (the model's pairs), by our live layers, then by name.

    Args:
        never: factors that are no pairs, although their names say so.
        scale: s of pairs whose module is not known.
        since_group: what is new, and may be worth a notice, are the groups from this one on.

    Returns:
        The new pairing, and notices for the user.
    """
    name, pairs, cores = type(method).__name__, list(before.pairs), list(before.cores)
    taken = factor_positions(pairs, cores)
    free = {id(p): (g, i) for g, group in enumerate(groups) for i, p in enumerate(group["params"]) if (g, i) not in taken}
    refused = {id(p) for p in never}
    unpairable = before.never | {position for p, position in free.items() if p in refused}
    free = {p: position for p, position in free.items() if position not in unpairable}
    named: list[tuple[str, Tensor]] = []
    for group in groups:
        named += zip(group.get("param_names", ()), group["params"], strict=False)
    ours = [own_pair("", layer) for layer in live_layers()]  # type: ignore[arg-type]
    lr_ratio = next((group["lr_ratio"] for group in groups if group["lr_ratio"] != 1.0), None)
    if (method.requires_pairs or lr_ratio is not None) and made_by_zero():
        raise ValueError(f"{name}: {PARTITIONED}")
    given = {id(p): (g, i) for g, group in enumerate(groups) for i, p in enumerate(group["params"])}
    notices = _match(method, groups, [*known, *ours, *pairs_by_name(named)], free, pairs, cores, scale)
    _refuse_flattened(name, groups, named)
    if method.requires_pairs and not (pairs or cores):
        if not method.trains_pairs:
            raise ValueError(
                f"{name}: found no core lora_R among the {sum(len(g['params']) for g in groups)} parameters; "
                "adapt the model with method='xs', and pass it or its parameters"
            )
        raise ValueError(f"{name}: {_why_no_pair(method, groups, known, ours, named, unpairable)}")
    if lr_ratio is not None and method.trains_pairs and not pairs:
        raise ValueError(
            f"{name}: lr_ratio={lr_ratio} is the lr of B over that of A, but {_why_no_pair(method, groups, known, ours, named, unpairable)}"
        )
    taken = factor_positions(pairs, cores)
    names = [((g, i), n) for g, group in enumerate(groups) for i, n in enumerate(group.get("param_names", ()))]
    left = {position: n for position, n in names if is_adapter_parameter(n) and position not in taken}
    lone = {p for pair in (*known, *ours) for tensor in (pair.A, pair.B, pair.core) if (p := free.get(id(tensor))) is not None}
    halves = _halves(groups, [*known, *ours], named, given, pairs, unpairable) if method.trains_pairs else []
    found = Pairing(pairs, cores, lone.union(left), [len(group["params"]) for group in groups], unpairable, halves)
    if new := [position for position in sorted(lone.union(left)) if position[0] >= since_group]:
        kinds = f"convolutions{' in groups, transposed or 3-d' if method.trains_convolutions else ''}"
        left_out = [half.why for half in halves if half.left_out and half.position in new]
        notices.append(
            f"{name}: {len(new)} adapter parameter(s) are no {'pair of matrices' if method.trains_pairs else 'cores'} "
            f"(embeddings, {kinds}, DoRA's magnitudes, lone factors, variants whose ΔW is not sBA) and get AdamW: "
            f"{first_few(left.get(position) or name_at(groups, position) for position in new)}"
            f"{f'. {len(left_out)} of them for want of the other factor: {left_out[0]}; pass both' if left_out else ''}"
        )
    return found, notices if method.requires_pairs else []


def _match(
    method: Method,
    groups: Sequence[dict[str, Any]],
    candidates: Iterable[Pair],
    free: dict[int, Position],
    pairs: list[FactorPair],
    cores: list[Core],
    scale: float | None,
) -> list[str]:
    """Take every candidate whose factors the method trains and are ``free`` (positions by id) into ``pairs`` or ``cores``.

    Returns:
        Notices about their scales.
    """
    name = type(method).__name__
    unknown, unlike = False, None
    for pair in candidates:
        if pair.core is not None:
            position = free.get(id(pair.core))
            if position is not None and method.trains_cores:
                assert pair.scale is not None
                cores.append(Core(pair.name or name_at(groups, position), pair.scale, position))
                del free[id(pair.core)]
            continue
        a, b = free.get(id(pair.A)), free.get(id(pair.B))
        if a is None or b is None or not method.trains_pairs:
            continue
        if pair.A.ndim == 2 and not len(pair.A):  # of rank 0: nothing to train
            continue
        its_name, its_scale = pair.name or name_at(groups, a), scale if pair.scale is None else pair.scale
        if its_scale == 0 and method.requires_pairs:
            raise ValueError(f"{name}: {its_name} has s = 0 (alpha 0), so that its factors do nothing; freeze them or give it an alpha")
        unknown |= its_scale is None
        if scale is not None and its_scale != scale:
            unlike = unlike or f"{its_name} has s = {its_scale:g}"
        if method.factors_share_steps and groups[a[0]]["step"] != groups[b[0]]["step"]:
            raise ValueError(f"{name}: A and B of {its_name} were added at different steps; add both in one add_param_group")
        pairs.append(FactorPair(its_name, 1.0 if its_scale is None else its_scale, a, b, hasattr(pair.layer, "q_a")))
        del free[id(pair.A)], free[id(pair.B)]
    notices = []
    if unknown:
        notices.append(f"{name}: the adapters' scale is not known from parameters alone, taking scale=1. Pass the model, or scale=…")
    if unlike:
        notices.append(f"{name}: scale={scale} is for pairs whose layer is not known and goes unused where it is: {unlike}, from its layer")
    return notices


def _halves(
    groups: Sequence[dict[str, Any]],
    layers: Iterable[Pair],
    named: list[tuple[str, Tensor]],
    given: dict[int, Position],
    pairs: Iterable[FactorPair],
    unpairable: frozenset[Position],
) -> list[Half]:
    """The trained factors that stand without a partner of their own: it was not given, or it is another layer's partner already."""
    at = [tuple(id(groups[g]["params"][i]) for g, i in (pair.a, pair.b)) for pair in pairs]
    matched, taken = set(at), {factor: pair.name for both, pair in zip(at, pairs, strict=True) for factor in both}
    found: dict[Position, Half] = {}
    seen: set[int] = set()
    for pair in layers:
        seen |= {id(pair.A), id(pair.B)}
        sides = {side: (p, given.get(id(p))) for side, p in (("A", pair.A), ("B", pair.B))}
        here = {side: position for side, (_, position) in sides.items() if position is not None and position not in unpairable}
        trained = any(p.requires_grad for side, (p, _) in sides.items() if side in here)
        if pair.core is not None or (id(pair.A), id(pair.B)) in matched or not here or not trained or not len(pair.A):
            continue
        shared = {side: taken[id(p)] for side, (p, _) in sides.items() if id(p) in taken}
        for side, others in shared.items():
            which = f"of {pair.name}" if pair.name else "of another layer"
            rest = next((position for other, position in here.items() if other != side), here[side])
            found.setdefault(rest, Half(rest, False, f"{side} {which} is also that of {others}: what is made of the one changes the other"))
        if len(here) == 1 and not shared:
            ((side, position),) = here.items()
            partner = sides["B" if side == "A" else "A"][0]
            state = "was left out" if partner.requires_grad else "is frozen and was left out"
            what = f"of {pair.name} only {side} is given" if pair.name else f"{name_at(groups, position)} is the {side} of a layer"
            found.setdefault(position, Half(position, partner.requires_grad, f"{what}, its partner {state}"))
    for name, factors in halves_by_name((n, p) for n, p in named if id(p) not in seen).items():
        if len(factors) == 1:
            ((side, factor),) = factors.items()
            position = given[id(factor)]
            if factor.ndim == 2 and len(factor) and factor.requires_grad and position not in unpairable:
                found.setdefault(position, Half(position, False, f"of {name} only {side} is given"))
    return list(found.values())


def _refuse_flattened(name: str, groups: Sequence[dict[str, Any]], named: list[tuple[str, Tensor]]) -> None:
    params = [p for group in groups for p in group["params"]]
    if any(type(p).__name__ == "FlatParameter" or hasattr(p, "_is_flat_param") for p in params):
        raise ValueError(f"{name}: {FLATTENED}")
    if any("_fsdp_wrapped_module" in n or "_flat_param" in n for n, _ in named):
        raise ValueError(f"{name}: {FLATTENED}")


def _why_no_pair(
    method: Method,
    groups: Sequence[dict[str, Any]],
    known: list[Pair],
    ours: list[Pair],
    named: list[tuple[str, Tensor]],
    unpairable: Iterable[Position],
) -> str:
    """What to say when there is none: where cores, frozen or lone factors are the reason, that."""
    held = {id(p) for group in groups for p in group["params"]}
    found = f"found no pair of low-rank factors among the {len(held)} parameters"
    layers = [*known, *ours]
    if cores := len({id(pair.core) for pair in layers if pair.core is not None} & held):
        return f"{found}: the model has {cores} cores between constant factors (method='xs'); train them with LoRASB, or plain AdamW"
    lone: dict[int, Pair] = {}
    for pair in layers:
        if (id(pair.A) in held) != (id(pair.B) in held):
            lone.setdefault(id(pair.A), pair)
    if lone:
        first = next(iter(lone.values()))
        which = first_few([pair.name or "one layer" for pair in lone.values()], 1)
        side, partner = ("A", first.B) if id(first.A) in held else ("B", first.A)
        return (
            f"{found}: of {which} only {side} is among them, its partner {'was left out' if partner.requires_grad else 'is frozen'}. "
            f"{'Train both, or freeze both' if method.moves_both_factors else AS_THEY_ARE}, or train lone factors with AdamW"
        )
    if known and not any(p.requires_grad for pair in known for p in (pair.A, pair.B, pair.core) if p is not None):
        return f"{found}: the model's {len(known)} pairs are frozen; call requires_grad_(True) on their factors first"
    if names := [name_at(groups, position) for position in sorted(unpairable)]:
        return (
            f"{found}: of {first_few(names)} ΔW is not the product sBA (a variant of LoRA: factors in "
            "blocks, the experts of one parameter, KaSA, …); train them with AdamW"
        )
    if left := [(n, p) for n, p in named if is_adapter_parameter(n)]:
        names = [n for n, _ in left]
        if all(p.ndim > 2 or "lora_embedding" in n for n, p in left):
            return (
                f"{found}: {first_few(names)} belong to convolutions or embeddings and are no pair of "
                "matrices. Adapt Linear layers; or train them with AdamW, or, 1-d and 2-d convolutions that are not in groups, with OPLoRA"
            )
        return (
            f"{found}: {first_few(names)} have no partner among them that fits. Pass the adapted "
            "model itself, or all of model.named_parameters(), frozen factors too; train variants whose ΔW is not sBA (AdaLoRA) with AdamW"
        )
    if others := [n for n, _ in named if _OTHER_TUNERS.search(n)]:
        return (
            f"{found}, but {first_few(others)}, of a method other than LoRA (VeRA, LoHa, IA3, OFT, "
            "prompt tuning, …); train them with this package's AdamW"
        )
    return (
        f"{found}. Pass the adapted model itself, or model.named_parameters() with names such as '….lora_A[.adapter].weight' and "
        "'….lora_B[.adapter].weight'; plain model.parameters() works for models adapted by lowrank_kernels.adapt, and for others with "
        "model=model beside it (in the Trainer's optimizer_cls_and_kwargs, too)"
        f"{LORA_PLUS if not known and len(groups) == 4 and not named else ''}"
    )
