"""What is said of factors that make no pair: which halves stand alone, and why there is no pair at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ..._checks import first_few
from ...pairs import Pair, halves_by_name, is_adapter_parameter
from .pairing import FactorPair, Half, Method, Position, name_at

#: What to do about lone factors where a step reads a partner that it does not move.
_AS_THEY_ARE = "Pass both, as model.named_parameters() does (frozen ones stay as they are)"
#: Said of four groups without names, which PEFT's ``create_loraplus_optimizer`` makes.
_LORA_PLUS = "; in place of PEFT's create_loraplus_optimizer pass the model with lr_ratio=, which is LoRA+ here"
#: How PEFT names what its other tuners train.
_OTHER_TUNERS = re.compile(
    r"(^|\.)(vera|hada|lokr|ia3|oft|boft|hra|fourierft|randlora|vblora|delora|shira|prompt_encoder|prompt_embeddings)(_|\.)"
)


@dataclass(frozen=True)
class Given:
    """Where pairs are looked for.

    Attributes:
        groups: the optimizer's.
        known: the model's pairs, where it is known.
        ours: those of our live layers, of any model.
        never: positions of what is no factor of a pair although it is named like one.
    """

    groups: Sequence[dict[str, Any]]
    known: list[Pair]
    ours: list[Pair]
    never: frozenset[Position]

    @cached_property
    def layers(self) -> list[Pair]:
        """All pairs of which more than the names is known."""
        return [*self.known, *self.ours]

    @cached_property
    def named(self) -> list[tuple[str, Tensor]]:
        """The parameters that have names."""
        return [named for group in self.groups for named in zip(group.get("param_names", ()), group["params"], strict=False)]

    @cached_property
    def positions(self) -> dict[int, Position]:
        """Where each parameter stands, by its id."""
        return {id(p): (g, i) for g, group in enumerate(self.groups) for i, p in enumerate(group["params"])}


def lone_halves(given: Given, pairs: Iterable[FactorPair]) -> list[Half]:
    """The trained factors that stand without a partner of their own: it was not given, or it is another layer's partner already."""
    groups, positions = given.groups, given.positions
    at = [tuple(id(groups[g]["params"][i]) for g, i in (pair.a, pair.b)) for pair in pairs]
    matched, taken = set(at), {factor: pair.name for both, pair in zip(at, pairs, strict=True) for factor in both}
    found: dict[Position, Half] = {}
    seen: set[int] = set()
    for pair in given.layers:
        seen |= {id(pair.A), id(pair.B)}
        sides = {side: (p, positions.get(id(p))) for side, p in (("A", pair.A), ("B", pair.B))}
        here = {side: position for side, (_, position) in sides.items() if position is not None and position not in given.never}
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
    for name, factors in halves_by_name((n, p) for n, p in given.named if id(p) not in seen).items():
        if len(factors) == 1:
            ((side, factor),) = factors.items()
            position = positions[id(factor)]
            if factor.ndim == 2 and len(factor) and factor.requires_grad and position not in given.never:
                found.setdefault(position, Half(position, False, f"of {name} only {side} is given"))
    return list(found.values())


def why_no_pair(given: Given, method: Method) -> str:
    """What to say when there is none: where cores, frozen or lone factors are the reason, that."""
    groups, named, held = given.groups, given.named, given.positions.keys()
    found = f"found no pair of low-rank factors among the {len(held)} parameters"
    if cores := len({id(pair.core) for pair in given.layers if pair.core is not None} & held):
        return f"{found}: the model has {cores} cores between constant factors (method='xs'); train them with LoRASB, or plain AdamW"
    lone: dict[int, Pair] = {}
    for pair in given.layers:
        if (id(pair.A) in held) != (id(pair.B) in held):
            lone.setdefault(id(pair.A), pair)
    if lone:
        first = next(iter(lone.values()))
        which = first_few([pair.name or "one layer" for pair in lone.values()], 1)
        side, partner = ("A", first.B) if id(first.A) in held else ("B", first.A)
        return (
            f"{found}: of {which} only {side} is among them, its partner {'was left out' if partner.requires_grad else 'is frozen'}. "
            f"{'Train both, or freeze both' if method.moves_both_factors else _AS_THEY_ARE}, or train lone factors with AdamW"
        )
    if given.known and not any(p.requires_grad for pair in given.known for p in (pair.A, pair.B, pair.core) if p is not None):
        return f"{found}: the model's {len(given.known)} pairs are frozen; call requires_grad_(True) on their factors first"
    if names := [name_at(groups, position) for position in sorted(given.never)]:
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
        f"{_LORA_PLUS if not given.known and len(groups) == 4 and not named else ''}"
    )
