"""Pairs of low-rank factors: which parameters of a model, ours or another library's, are the A and the B of one layer."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ._checks import as_flag, check_module

#: How far ``QᵀQ`` may be from I, each entry, of bases that were saved in bf16 or trained in it: twice what rounding Q to it makes of I.
ROUNDED_BASES = 2 * torch.finfo(torch.bfloat16).eps


@dataclass(frozen=True, eq=False)
class Pair:
    """The factors of one adapted layer, ``ΔW = scale · B @ A`` (decoupled layers add their frozen halves; see ``core``).

    Attributes:
        name: the layer's name in the model (with ``.{adapter}`` behind it where a layer has several adapters).
        A: (r, d_in); of a convolution (r, d_in, *kernel).
        B: (d_out, r); of a convolution (d_out, r, 1, …).
        scale: s, as the module applies it; None when only names were known.
        layer: the module that owns the factors; None when only names were known.
        core: R (r, r) of ``ΔW = scale · B @ R @ A``, which is then what trains: A and B are constants. None otherwise.
    """

    name: str
    A: Tensor
    B: Tensor
    scale: float | None
    layer: nn.Module | None = None
    core: Tensor | None = None


@runtime_checkable
class HoldsPair(Protocol):
    """A module that holds one pair of factors: what our adapter layers look like to the rooms below ``adapters``."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float

    def delta_factors(self) -> tuple[Tensor, Tensor]:
        """(d_out, k) and (d_in, k) of ``ΔW = scale · left @ rightᵀ``."""


_live_layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_live_layers_lock = threading.Lock()  # a set that another thread adds to cannot be iterated over


def register_layer(layer: nn.Module) -> None:
    """Make one of our layers findable from its bare parameters (:func:`owners`); layers call it when they come to life."""
    with _live_layers_lock:
        _live_layers.add(layer)


_switches = 0


def count_switch() -> None:
    """Note that a layer of ours has become decoupled or plain, or was found to be; layers call it."""
    global _switches
    _switches += 1


def switch_count() -> int:
    """How often that was: as long as it stays the same, all layers are as they were."""
    return _switches


def owners() -> dict[int, nn.Module]:
    """``id(lora_A) → layer`` of every live layer of ours, read anew, since frameworks swap parameters."""
    return {id(_factor_a(layer)): layer for layer in live_layers()}


def _factor_a(layer: nn.Module) -> Tensor:
    """``layer.lora_A``, past ``nn.Module.__getattr__`` where that goes (not for buffers, nor for what FSDP1 left): it is asked often."""
    found = layer._parameters.get("lora_A")
    return layer.lora_A if found is None else found  # type: ignore[return-value]


def live_layers() -> list[nn.Module]:
    """Every live layer of ours; unlike :func:`owners` also those that share their A."""
    with _live_layers_lock:
        return list(_live_layers)


def core_owners() -> dict[int, nn.Module]:
    """``id(lora_R) → layer`` of every live layer of ours that has a core; as :func:`owners`."""
    return {id(layer.lora_R): layer for layer in live_layers() if "lora_R" in layer._parameters}


def own_pair(name: str, layer: HoldsPair) -> Pair:
    """The pair of one of our layers."""
    assert isinstance(layer, nn.Module)
    return Pair(name, layer.lora_A, layer.lora_B, layer.scale, layer, layer._parameters.get("lora_R"))


#: ``lora_A`` is a component of the name, not the end of one (DeLoRA's ``delora_A``), and has an adapter's name behind it only before
#: ``.weight`` (AdaLoRA, ``ΔW = B diag(E) A``, has not).
_FACTOR_NAME = re.compile(r"^(?:(?P<stem>.*)\.)?(?P<factor>lora_[AaBb])(?:(?:\.(?P<adapter>[^.]+))?\.weight)?$")


def _split_name(name: str) -> tuple[tuple[str, str], str] | None:
    """``("layer", adapter), "A" | "B"`` for a factor's parameter name, None for any other name."""
    match = _FACTOR_NAME.match(name)
    if match is None:
        return None
    return (match["stem"] or "", match["adapter"] or ""), match["factor"][-1].upper()


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter of the LoRA family: a factor of any kind, DoRA's magnitudes; no bias."""
    return re.search(r"(^|\.)lora_", name) is not None and not name.endswith(".bias")


def pairs_by_name(named: Iterable[tuple[str, Tensor]]) -> list[Pair]:
    """Pair named parameters: ``….lora_A[.adapter].weight`` with ``….lora_B[.adapter].weight`` (PEFT), ``lora_a`` /
    ``lora_b`` (torchtune), ``….lora_A`` / ``….lora_B`` (ours). Only matrices that fit together make a pair."""
    found = []
    for name, factors in halves_by_name(named).items():
        a, b = factors.get("A"), factors.get("B")
        if a is not None and b is not None and a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]:
            found.append(Pair(name, a, b, None))
    return found


def halves_by_name(named: Iterable[tuple[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """What is named like factors, by the layer's name (with the adapter's behind it) and side: "A", "B"."""
    halves: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, tensor in named:
        split = _split_name(name)
        if split is not None:
            halves.setdefault(split[0], {})[split[1]] = tensor
    return {".".join(filter(None, names)): factors for names, factors in halves.items()}


def _module_scale(layer: nn.Module, adapter: str) -> float | None:
    """The scale that ``layer`` applies: PEFT keeps ``scaling[adapter]``, torchtune ``alpha / rank``."""
    scaling = getattr(layer, "scaling", None)
    if isinstance(scaling, Mapping) and adapter in scaling:
        return float(scaling[adapter])
    alpha, rank = getattr(layer, "alpha", None), getattr(layer, "rank", None)
    if isinstance(alpha, (int, float)) and isinstance(rank, int):
        return float(alpha) / rank
    return None


#: PEFT's variants of a layer in which ΔW = sBA holds, or would without what the variant adds to it (DoRA's magnitudes).
_VARIANTS_WITH_PAIRS = re.compile(r"_?(Dora|ALora|Arrow|MiCA|QALora|Velora)")


def _layer_pairs(name: str, layer: nn.Module, convolutions: bool) -> Iterator[tuple[Pair, bool]]:
    """The factors of a layer two by two, and whether they are a pair: whether ΔW is sBA, or something else of them."""
    if isinstance(layer, HoldsPair) and layer in _live_layers:
        yield own_pair(name, layer), True
        return
    for a_name, b_name in (("lora_A", "lora_B"), ("lora_a", "lora_b")):
        a, b = getattr(layer, a_name, None), getattr(layer, b_name, None)
        if isinstance(a, nn.ModuleDict) and isinstance(b, nn.ModuleDict):
            for adapter in a:
                if adapter in b:
                    yield from _weights_pair(f"{name}.{adapter}", a[adapter], b[adapter], layer, adapter, convolutions)
        elif isinstance(a, nn.Module) and isinstance(b, nn.Module):
            yield from _weights_pair(name, a, b, layer, "", convolutions)


def _weights_pair(name: str, a: nn.Module, b: nn.Module, layer: nn.Module, adapter: str, convolutions: bool) -> Iterator[tuple[Pair, bool]]:
    a_weight, b_weight = getattr(a, "weight", None), getattr(b, "weight", None)
    if not (isinstance(a_weight, Tensor) and isinstance(b_weight, Tensor)):
        return
    matrices = a_weight.ndim == b_weight.ndim == 2
    if matrices or (convolutions and _is_convolution_pair(a, b)):
        fits = not matrices or (_is_matrix(a) and _is_matrix(b) and a_weight.shape[0] == b_weight.shape[1])
        variants, experts = getattr(layer, "lora_variant", {}), getattr(layer, "num_experts", 1)
        plain = adapter not in variants or _VARIANTS_WITH_PAIRS.match(type(variants[adapter]).__name__) is not None
        yield Pair(name, a_weight, b_weight, _module_scale(layer, adapter), layer), fits and plain and experts == 1


def _is_matrix(module: nn.Module) -> bool:
    """Whether the module's weight is the matrix that it multiplies with, not blocks of it."""
    weight: Any = module.weight
    features = (getattr(module, "out_features", len(weight)), getattr(module, "in_features", weight.shape[1]))
    return tuple(weight.shape) == features


def _is_convolution_pair(a: nn.Module, b: nn.Module) -> bool:
    """Whether B follows A position by position, so that both are one product ``BA`` with the kernel as a matrix (d_out, d_in·k·k)."""
    if not (isinstance(a, (nn.Conv1d, nn.Conv2d)) and isinstance(b, (nn.Conv1d, nn.Conv2d)) and type(a) is type(b)):
        return False
    pointwise = {*b.kernel_size, *b.stride} == {1} and b.padding in ((0,) * len(b.kernel_size), "valid")
    return pointwise and a.groups == b.groups == 1


def pairs(model: nn.Module, convolutions: bool = False) -> list[Pair]:
    """Every pair of low-rank factors in ``model``, frozen ones too: our adapters', PEFT's ``LoraLayer``, torchtune's.

    With ``convolutions`` also those of 1-d and 2-d convolutions, of which A is one and B a pointwise one, neither in groups.
    The scale is read from the module that applies it. A pair that two names share (a tied layer) is listed once. Factors of which ΔW is
    not the product sBA (PEFT's block-diagonal ones, experts of one parameter, KaSA, MonteCLoRA) are no pair.

    Raises:
        TypeError: ``model`` is no module, or ``convolutions`` neither true nor false.
    """
    check_module("pairs", model)
    as_flag("pairs", "convolutions", convolutions)
    return factors_of(model, convolutions)[0]


def factors_of(model: nn.Module, convolutions: bool = False) -> tuple[list[Pair], list[Tensor]]:
    """:func:`pairs`, and the factors that stand as pairs do and are none: block-diagonal ones, the experts of one parameter together,
    variants of LoRA whose ΔW is not sBA."""
    found: dict[tuple[int, int], Pair] = {}
    others: list[Tensor] = []
    for name, module in model.named_modules():
        for pair, is_pair in _layer_pairs(name, module, convolutions):
            if is_pair:
                found.setdefault((id(pair.A), id(pair.B)), pair)
            else:
                others += (pair.A, pair.B)
    return list(found.values()), others


def halves_are_bases(a: Tensor, b: Tensor) -> bool:
    """Whether the factors (2r, d_in) and (d_out, 2r) of a foreign layer are ``[A; Q_Aᵀ]`` and ``[Q_B B]`` of a decoupled one: whether these
    halves are orthonormal, as far as bf16 can hold such."""
    rank, wide = len(a) // 2, torch.promote_types(a.dtype, torch.float32)
    bases = torch.stack([q.mT @ q for q in (a[rank:].mT.to(wide), b[:, :rank].to(wide))])
    off = bases - torch.eye(rank, dtype=wide, device=bases.device)
    return bool((off.abs() <= ROUNDED_BASES).all())


def uncalled_projections(model: nn.Module) -> list[nn.Module]:
    """The ``out_proj`` of every ``nn.MultiheadAttention`` that reads its weight and never calls it."""
    plain = (m for m in model.modules() if isinstance(m, nn.MultiheadAttention) and type(m).forward is nn.MultiheadAttention.forward)
    return [attention.out_proj for attention in plain]


def shard_placement(model: nn.Module) -> Callable[[nn.Parameter], Any]:
    """``shard_placement_fn`` for FSDP2: every A (r, d_in) is sharded along d_in, everything else along its first dimension (FSDP2's rule).

    ``placement = shard_placement(model)``, and then ``fully_shard(block, shard_placement_fn=placement)`` for every block and the model.
    Gram matrices then cost one all-reduce of r×r sums. FSDP2 asks that d_in be divisible by the number of ranks.

    Raises:
        TypeError: ``model`` is no module.
    """
    check_module("shard_placement", model)
    from torch.distributed.tensor import Shard

    found = [weakref.ref(pair.A) for pair in pairs(model)]
    first_factors = {id(ref()): ref for ref in found}

    def placement(parameter: nn.Parameter) -> Any:
        # By reference: sharding frees parameters while it goes on, and a new one may get the id of an old one.
        ref = first_factors.get(id(parameter))
        return Shard(1) if ref is not None and ref() is parameter else None

    return placement
