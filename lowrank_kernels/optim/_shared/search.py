"""How the factors of one layer are found among the parameters that an optimizer was given.

``lowrank_kernels.pairs`` knows the factors of a model; here they are found again: among these, among our live layers', and by name. Where
there are none, ``unpaired`` says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ..._checks import first_few
from ...pairs import Pair, is_adapter_parameter, live_layers, own_pair, pairs_by_name
from ...parallel.shards import FLATTENED, PARTITIONED, made_by_zero
from .pairing import Core, FactorPair, Method, Pairing, factor_positions, name_at
from .unpaired import Given, lone_halves, why_no_pair


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
    refused = {id(p) for p in never}
    named_alike = {(g, i) for g, group in enumerate(groups) for i, p in enumerate(group["params"]) if id(p) in refused}
    unpairable = before.never | (named_alike - factor_positions(before.pairs, before.cores))
    ours = [own_pair("", layer) for layer in live_layers()]  # type: ignore[arg-type]
    search = _Search(method, Given(groups, known, ours, unpairable), before, scale)
    lr_ratio = next((group["lr_ratio"] for group in groups if group["lr_ratio"] != 1.0), None)
    if (method.requires_pairs or lr_ratio is not None) and made_by_zero():
        raise ValueError(f"{search.name}: {PARTITIONED}")
    search.match_all()
    search.refuse_flattened()
    search.refuse_none(lr_ratio)
    found = search.pairing()
    return found, [*search.about_scales(), *search.about_lone(found, since_group)] if method.requires_pairs else []


class _Search:
    """What is looked at, and what has been found.

    Attributes:
        free: where the parameters stand that may become factors yet, by id.
        scale_unknown: whether a pair has no s of its own, and none was given.
        unlike: which pair's s is not the one that was given; "" if none.
    """

    def __init__(self, method: Method, given: Given, before: Pairing, scale: float | None) -> None:
        self.method, self.given, self.scale, self.name = method, given, scale, type(method).__name__
        self.pairs, self.cores = list(before.pairs), list(before.cores)
        settled = factor_positions(self.pairs, self.cores) | given.never
        self.free = {p: position for p, position in given.positions.items() if position not in settled}
        self.scale_unknown, self.unlike = False, ""

    def match_all(self) -> None:
        """Take every candidate whose factors the method trains and are free."""
        for pair in (*self.given.layers, *pairs_by_name(self.given.named)):
            if pair.core is not None:
                self._match_core(pair, pair.core)
            elif self.method.trains_pairs and (pair.A.ndim != 2 or len(pair.A)):  # of rank 0: nothing to train
                self._match_pair(pair)

    def _match_core(self, pair: Pair, core: Tensor) -> None:
        position = self.free.get(id(core))
        if position is not None and self.method.trains_cores:
            assert pair.scale is not None
            self.cores.append(Core(pair.name or name_at(self.given.groups, position), pair.scale, position))
            del self.free[id(core)]

    def _match_pair(self, pair: Pair) -> None:
        a, b, groups = self.free.get(id(pair.A)), self.free.get(id(pair.B)), self.given.groups
        if a is None or b is None:
            return
        name, scale = pair.name or name_at(groups, a), self.scale if pair.scale is None else pair.scale
        if scale == 0 and self.method.requires_pairs:
            raise ValueError(f"{self.name}: {name} has s = 0 (alpha 0), so that its factors do nothing; freeze them or give it an alpha")
        self.scale_unknown |= scale is None
        if self.scale is not None and scale != self.scale:
            self.unlike = self.unlike or f"{name} has s = {scale:g}"
        if self.method.requires_pairs and groups[a[0]]["step"] != groups[b[0]]["step"]:
            # Whose turn it is, and which phase, is a pair's; and AdamW's moments of a lone factor are those of another gradient.
            raise ValueError(
                f"{self.name}: A and B of {name} were added at different steps; add both in one add_param_group, or make a new optimizer"
            )
        self.pairs.append(FactorPair(name, 1.0 if scale is None else scale, a, b, hasattr(pair.layer, "q_a")))
        del self.free[id(pair.A)], self.free[id(pair.B)]

    def refuse_flattened(self) -> None:
        """Refuse parameters that FSDP1 has made one of."""
        params = (p for group in self.given.groups for p in group["params"])
        flat = any(type(p).__name__ == "FlatParameter" or hasattr(p, "_is_flat_param") for p in params)
        if flat or any("_fsdp_wrapped_module" in n or "_flat_param" in n for n, _ in self.given.named):
            raise ValueError(f"{self.name}: {FLATTENED}")

    def refuse_none(self, lr_ratio: float | None) -> None:
        """Refuse parameters without pairs, for a method that needs them, or an ``lr_ratio`` that does."""
        if self.method.requires_pairs and not (self.pairs or self.cores):
            if not self.method.trains_pairs:
                raise ValueError(
                    f"{self.name}: found no core lora_R among the {sum(len(g['params']) for g in self.given.groups)} parameters; "
                    "adapt the model with method='xs', and pass it or its parameters"
                )
            raise ValueError(f"{self.name}: {why_no_pair(self.given, self.method)}")
        if lr_ratio is not None and self.method.trains_pairs and not self.pairs:
            raise ValueError(f"{self.name}: lr_ratio={lr_ratio} is the lr of B over that of A, but {why_no_pair(self.given, self.method)}")

    def pairing(self) -> Pairing:
        """What was found, and what else belongs to adapters."""
        given, taken = self.given, factor_positions(self.pairs, self.cores)
        factors = (tensor for pair in given.layers for tensor in (pair.A, pair.B, pair.core))
        lone = {position for tensor in factors if (position := self.free.get(id(tensor))) is not None}
        left = {given.positions[id(p)] for n, p in given.named if is_adapter_parameter(n)} - taken
        halves = lone_halves(given, self.pairs) if self.method.trains_pairs else []
        return Pairing(self.pairs, self.cores, lone | left, [len(group["params"]) for group in given.groups], given.never, halves)

    def about_scales(self) -> list[str]:
        """Notices about s."""
        notices = []
        if self.scale_unknown:
            notices.append(
                f"{self.name}: the adapters' scale is not known from parameters alone, taking scale=1. Pass the model, or scale=…"
            )
        if self.unlike:
            notices.append(
                f"{self.name}: scale={self.scale} is for pairs whose layer is not known and goes unused where it is: {self.unlike}, "
                "from its layer"
            )
        return notices

    def about_lone(self, found: Pairing, since_group: int) -> list[str]:
        """The notice about adapter parameters that are no factors here, if there are any in the groups from this one on."""
        new = [(g, i) for g, lone in enumerate(found.lone_factors) if g >= since_group for i in sorted(lone)]
        if not new:
            return []
        kinds = f"convolutions{' in groups, transposed or 3-d' if self.method.trains_convolutions else ''}"
        left_out = [half.why for half in found.halves if half.left_out and half.position in new]
        return [
            f"{self.name}: {len(new)} adapter parameter(s) are no {'pair of matrices' if self.method.trains_pairs else 'cores'} "
            f"(embeddings, {kinds}, DoRA's magnitudes, lone factors, variants whose ΔW is not sBA) and get AdamW: "
            f"{first_few(name_at(self.given.groups, position) for position in new)}"
            f"{f'. {len(left_out)} of them for want of the other factor: {left_out[0]}; pass both' if left_out else ''}"
        ]
