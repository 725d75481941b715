"""What all optimizers of the package share: arguments, pairing, state rules, and the moment step.

A method is a subclass that says what happens to the factors of each pair; everything that is not a factor of a pair
(heads, norms, ``modules_to_save``) gets AdamW in the same ``step()``.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral, Real
from os.path import dirname, join
from typing import Any, Never, TypeAlias, TypedDict

import torch
from torch import Tensor, nn

from ..backends.lists import PLAIN, Gathered, first_sparse_gradient, gather, plain, signature
from ..backends.registry import call_counts
from ..ops import grouped_adamw_
from ..pairs import Pair, core_owners, is_adapter_parameter, own_pair, owners, pairs, pairs_by_name

ParamsT: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]] | nn.Module

Position: TypeAlias = tuple[int, int]

#: AdamW's weight decay, for parameters that are no factors, when the user does not give one. Factors get none (papers).
REST_WEIGHT_DECAY = 1e-2

#: All parameters are trained as a whole.
NO_PARTS: Mapping[int, tuple[slice, ...]] = {}
#: The hyperparameters of all methods that are numbers.
NUMBERS = ("lr", "eps", "weight_decay", "lr_ratio", "momentum", "damping", "proximal")
#: What may happen when a gradient is infinite or NaN.
NONFINITE_GRADS = ("keep", "skip", "raise")

#: Operations that make new tensors only. A step that failed before any other one began has changed nothing.
_PURE_OPERATIONS = frozenset(
    {
        "lora_linear",
        "lora_linear_backward",
        "dropout_mask",
        "grouped_damped_inverse",
        "grouped_eigh",
        "grouped_gram",
        "grouped_preconditioner",
        "grouped_solve",
    }
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


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Optimizer state is fp32 for bf16, fp16 and fp32 parameters, fp64 for fp64 ones."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def moments(like: Tensor, *names: str) -> dict[str, Tensor]:
    """Zero moments of a parameter, sharded as it is."""
    if type(like) not in PLAIN:  # a DTensor
        return {name: torch.zeros_like(like, dtype=state_dtype(like.dtype)) for name in names}
    return {name: torch.zeros(like.shape, dtype=state_dtype(like.dtype), device=like.device) for name in names}


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 makes parameters."""
    return type(tensor) not in PLAIN and hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local_parts(tensors: list[Tensor]) -> list[Tensor]:
    """What this rank holds of the tensors; plain ones are themselves."""
    if plain(tensors):
        return tensors
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]  # type: ignore[attr-defined]


def shard_dims(tensor: Tensor) -> list[tuple[int, int]]:
    """``(mesh dimension, tensor dimension)`` of every sharding of a DTensor; empty for a plain or replicated tensor."""
    if not is_sharded(tensor):
        return []
    return [(i, x.dim) for i, x in enumerate(tensor.placements) if x.is_shard()]  # type: ignore[attr-defined]


def shard_group(tensor: Tensor) -> Any:
    """The process group over which a DTensor is sharded (along one mesh dimension), None for a plain or replicated tensor."""
    dims = shard_dims(tensor)
    return tensor.device_mesh.get_group(dims[0][0]) if dims else None  # type: ignore[attr-defined]


#: Where no line of the user's stands.
_OUR_AND_TORCHS_CODE = (join(dirname(dirname(__file__)), ""), join(dirname(torch.__file__), ""))


def _warn(message: str) -> None:
    """Warn at the line of the user's code that has led here: how many of ours and of torch's lie between depends on the method."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OUR_AND_TORCHS_CODE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def pythons_number(value: Any) -> Any:
    """A number of another library (NumPy's) as Python's, which checkpoints can hold; anything else as it is."""
    if type(value) in (int, float, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


_FLAT = (
    "FSDP1 (FullyShardedDataParallel) and DeepSpeed ZeRO flatten parameters, and a factor that is no matrix cannot be paired; "
    "use FSDP2 (torch.distributed.fsdp.fully_shard) or DDP"
)


def _writes_begun() -> int:
    """How many calls of operations that write into their arguments this process has begun."""
    return sum(count for (operation, _), count in call_counts().items() if operation not in _PURE_OPERATIONS)


def first_nonfinite(grads: list[Tensor]) -> int | None:
    """The index of the first gradient that is not finite, None if all are; one wait for the device per device."""
    by_device: defaultdict[torch.device, list[int]] = defaultdict(list)
    for index, grad in enumerate(grads):
        if grad.numel():
            by_device[grad.device].append(index)
    found = []
    for indices in by_device.values():
        # The largest absolute value is finite if and only if all are, and no dtype overflows on the way.
        finite = torch.stack(torch._foreach_norm([grads[i] for i in indices], float("inf"))).isfinite()
        if not finite.all():
            found.append(indices[int((~finite).nonzero()[0])])
    return min(found, default=None)


class AdamWOptions(TypedDict, total=False):
    """The keyword-only arguments that every optimizer here shares; see :class:`LowRankOptimizer`."""

    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | None
    scale: float | None
    lr_ratio: float
    nonfinite_grads: str
    atomic: bool


class LowRankOptimizer(torch.optim.Optimizer):
    """Base of all optimizers here: ``torch.optim.AdamW``'s leading arguments, pairing, lazily created fp32 state.

    Args:
        params: what ``torch.optim.AdamW`` takes (tensors, dicts of groups, named parameters), or the model itself
            (then its trainable parameters). Factors are paired by our adapters or by name; s is read from the module
            when the model is given. Adapter parameters that are no pair of matrices (LoRA on embeddings and convolutions,
            DoRA's magnitudes) and lone factors get AdamW, with the factors' weight decay; one warning names them.
        lr, betas, eps, maximize: as ``torch.optim.AdamW``.
        capturable: ``step()`` reads nothing on the host and can be captured in a CUDA graph, after one ordinary step, which makes the
            state and the device tables. The graph keeps what the host knew when it was captured: numbers (an lr to be scheduled must be
            a tensor on the device, changed in place), and which parameters have a gradient.
        weight_decay: decoupled, multiplied by lr. None means 0 for adapters and AdamW's 0.01 for everything else; a
            number holds for both. In a group, ``weight_decay`` is that of everything else, and of factors too where
            ``factor_weight_decay`` is None, which a number makes it; a number there is that of factors. Both may be edited.
        amsgrad, differentiable: not supported; True is an error.
        foreach, fused: accepted as ``torch.optim.AdamW`` accepts them; there is one, fused, implementation.
        scale: s of every pair whose module is not known (only tensors or names were given). Where it is known, its s is taken; a
            warning says so if that is another.
        lr_ratio: the learning rate of every B over that of its A (LoRA+, Hayou et al. 2024); 1 is AdamW's.
        nonfinite_grads: what a step does that meets an infinite or NaN gradient: "keep" computes with it, as torch does, and looks at
            nothing; "skip" changes nothing, neither parameters nor state nor counters, counts it in ``skipped_steps``, and warns the
            first time; "raise" raises ``FloatingPointError`` with the parameter's name, everything unchanged. Both read one flag from
            the device, which ``capturable`` forbids. With sharded parameters all ranks decide alike.
        atomic: keep a copy of parameters and state during the step, and put it back if the step raises (out of memory, an interrupt).
            Without it, a step that fails before it has written anything leaves everything as it was, too; one that fails later leaves
            an optimizer that refuses ``step()`` and ``state_dict()`` until a checkpoint is loaded.

    State, one dictionary per parameter, tensors only, created by the first ``step()``: ``exp_avg`` and ``exp_avg_sq``
    in fp32 (fp64 for fp64 parameters). The step counter is one per group, ``group["step"]`` (a device tensor when
    ``capturable``); ``group["missed"]`` counts, by position, the steps in which a parameter had no gradient.
    """

    #: A method that makes no sense without pairs refuses parameters in which there are none.
    requires_pairs = True
    #: Whose turn it is, or which phase: where the step decides about a pair, A and B must count the same steps.
    factors_share_steps = False
    #: What a method trains as factors: pairs (A, B), cores R between constant factors. Others get AdamW with the rest.
    trains_pairs, trains_cores = True, False
    #: Whether it takes the factors of convolutions, as matrices (r, d_in·k·k) and (d_out, r). Else AdamW trains them with the rest.
    trains_convolutions = False
    #: The pairs as :meth:`_alike` has them, and of which parameters.
    _buckets: tuple[object, list[LikePairs]] = (None, [])

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        scale: float | None = None,
        lr_ratio: float = 1.0,
        nonfinite_grads: str = "keep",
        atomic: bool = False,
        model: nn.Module | None = None,
        method_defaults: dict[str, Any] | None = None,
        **unknown: Never,
    ) -> None:
        name = type(self).__name__
        if unknown:
            given = next(iter(unknown))
            taken = {*inspect.signature(type(self)).parameters, *AdamWOptions.__annotations__}
            meant = "".join(f"; did you mean {close}?" for close in get_close_matches(given, taken, 1))
            raise TypeError(f"{name}() got an unexpected keyword argument {given!r}{meant}")
        if amsgrad:
            raise ValueError(f"{name}: amsgrad=True is not supported; leave it out")
        if differentiable:
            raise ValueError(f"{name}: differentiable=True is not supported; step() is not differentiated through")
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if scale is not None and not (isinstance(scale, Real) and scale > 0):
            raise ValueError(f"{name}: scale must be positive, got {scale!r}")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}")
        if nonfinite_grads not in NONFINITE_GRADS:
            raise ValueError(f"{name}: nonfinite_grads must be 'keep', 'skip' or 'raise', got {nonfinite_grads!r}")
        if capturable and (nonfinite_grads != "keep" or atomic):
            raise ValueError(
                f"{name}: capturable=True takes neither nonfinite_grads={nonfinite_grads!r} nor atomic: both wait for the device"
            )
        self._nonfinite_grads, self._atomic = nonfinite_grads, bool(atomic)
        #: How many steps ``nonfinite_grads="skip"`` has left out in this process.
        self.skipped_steps = 0
        #: Why this optimizer cannot go on: a step failed half-way.
        self._torn: str | None = None
        self._pairs: list[FactorPair] = []
        self._cores: list[Core] = []
        self._factors: list[frozenset[int]] = []
        self._second_factors: list[frozenset[int]] = []
        #: What belongs to an adapter and is no factor here: weight decay is the factors', the rest AdamW's.
        self._lone_factors: list[frozenset[int]] = []
        self._kinds: list[dict[bool, list[tuple[bool, bool, list[int]]]]] = []
        self._scale = scale
        self._constructed = False
        model = params if isinstance(params, nn.Module) else model
        known = [] if model is None else pairs(model, self.trains_convolutions)
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            fused=fused,
            lr_ratio=lr_ratio,
            method=name,
            **(method_defaults or {}),
        )
        super().__init__(self._groups_of(params), {key: pythons_number(value) for key, value in defaults.items()})
        self._constructed = True
        self._find_pairs(known, since_group=0)

    # ---------------------------------------------------------------- arguments

    def _groups_of(self, params: ParamsT) -> list[Any]:
        name = type(self).__name__
        if isinstance(params, nn.Module):
            flat = next((m for m in params.modules() if type(m).__name__ == "FullyShardedDataParallel"), None)
            if flat is not None:
                raise ValueError(f"{name}: {_FLAT}")
            trainable = [(n, p) for n, p in params.named_parameters() if p.requires_grad]
            if not trainable:
                raise ValueError(f"{name}: the model has no parameter with requires_grad=True; adapt(model, …) first")
            return [{"params": trainable}]
        if isinstance(params, (Tensor, dict)):
            raise TypeError(f"{name}: params must be an iterable of tensors or dicts, or a model, got {type(params).__name__}")
        if not isinstance(params, Iterable):
            raise TypeError(f"{name}: params must be an iterable of tensors or dicts, or a model, got {type(params).__name__}")
        return list(params)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; pairs among the new parameters (and with unpaired older ones) are found. If it raises, nothing was added.

        Parameters without names are taken beside named ones (a model's have names), and are named by their positions.
        """
        if isinstance(param_group, dict):  # torch says what is wrong with anything else
            for key, value in param_group.items():
                param_group[key] = pythons_number(value)
            self._check_hyperparameters({**self.defaults, **param_group})
            if isinstance(param_group.get("params"), nn.Module):
                raise TypeError(f"{type(self).__name__}: params of a group must be tensors, got a module; pass its parameters()")
            param_group = self._named_as_the_others(param_group)
        before = list(self._pairs), list(self._cores), self._factors, self._second_factors, self._lone_factors, self._kinds
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            self._check_parameters(group)
            decay = group["weight_decay"]
            group["factor_weight_decay"] = 0.0 if decay is None else None  # None: as everything else
            group["weight_decay"] = REST_WEIGHT_DECAY if decay is None else decay
            group["step"], group["cleared_at"], group["missed"] = 0, 0, {}
            if self._constructed:
                self._find_pairs([], since_group=len(self.param_groups) - 1)
        except BaseException:
            self.param_groups.pop()
            self._pairs, self._cores, self._factors, self._second_factors, self._lone_factors, self._kinds = before
            self._buckets = (None, [])
            raise

    def _named_as_the_others(self, param_group: dict[str, Any]) -> dict[str, Any]:
        """The group, its parameters with names if those of the other groups have names, which torch wants of all or none."""
        params = param_group.get("params")
        if not (self.param_groups and "param_names" in self.param_groups[0]) or "param_names" in param_group or isinstance(params, set):
            return param_group
        params = [params] if isinstance(params, Tensor) else list(params or ())
        if not all(isinstance(p, Tensor) for p in params):
            return {**param_group, "params": params}
        number = len(self.param_groups)
        return {**param_group, "params": [(f"param_groups[{number}][{index}]", p) for index, p in enumerate(params)]}

    def _check_parameters(self, group: dict[str, Any]) -> None:
        """Refuse parameters that no step can train."""
        name, seen = type(self).__name__, set()
        for index, p in enumerate(group["params"]):
            which = group["param_names"][index] if "param_names" in group else f"params[{index}]"
            if id(p) in seen:
                raise ValueError(f"{name}: {which} is in the group twice; each parameter takes one update per step")
            seen.add(id(p))
            if p.requires_grad and p.is_complex():
                raise TypeError(f"{name}: {which} is {p.dtype}; complex parameters are not supported, train torch.view_as_real of it")
            if any(stride == 0 and size > 1 for size, stride in zip(p.shape, p.stride(), strict=True)):
                raise ValueError(f"{name}: {which} is expanded, several of its elements are one number in memory; clone() it first")

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        """``torch.optim.AdamW``'s checks, in its words, and that numbers are numbers."""
        name = type(self).__name__
        lr, betas, decay = group["lr"], group["betas"], group["weight_decay"]
        if not (isinstance(betas, (tuple, list)) and len(betas) == 2):
            raise ValueError(f"{name}: betas must be two numbers, got {betas!r}")
        for key, value in [*((key, group.get(key, 0.0)) for key in NUMBERS), *(("betas", beta) for beta in betas)]:
            if not (isinstance(value, (Real, Tensor)) or (key == "weight_decay" and value is None)):
                raise TypeError(f"{name}: {key} must be a number, got {value!r}")
        for key in ("amsgrad", "differentiable"):
            if group.get(key):
                raise ValueError(f"{name}: {key}=True is not supported; leave it out")
        if not isinstance(group["maximize"], (bool, int)):
            raise TypeError(f"{name}: maximize must be True or False, got {group['maximize']!r}")
        if not group["lr_ratio"] > 0:
            raise ValueError(f"{name}: lr_ratio must be positive, got {group['lr_ratio']}")
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {float(lr)}")
        if not group["eps"] >= 0.0:
            raise ValueError(f"Invalid epsilon value: {group['eps']}")
        for index, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
        if decay is not None and not decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {decay}")

    def _find_pairs(self, known: list[Pair], since_group: int) -> None:
        """Pair what is not paired yet: by ``known`` (the model's pairs), by our live layers, then by name.

        What is new, and may be worth a notice, are the groups from ``since_group`` on.
        """
        taken = {position for pair in self._pairs for position in (pair.a, pair.b)} | {core.position for core in self._cores}
        positions = {
            id(p): (g, i) for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"]) if (g, i) not in taken
        }
        named: list[tuple[str, Tensor]] = []
        for group in self.param_groups:
            named += zip(group.get("param_names", ()), group["params"], strict=False)
        ours = [own_pair("", layer) for layer in owners().values()]  # type: ignore[arg-type]
        unknown_scale, unlike = False, None
        for pair in [*known, *ours, *pairs_by_name(named)]:
            if pair.core is not None:
                position = positions.get(id(pair.core))
                if position is not None and self.trains_cores:
                    assert pair.scale is not None
                    self._cores.append(Core(pair.name or self._name_at(position), pair.scale, position))
                    del positions[id(pair.core)]
                continue
            if not self.trains_pairs:
                continue
            a, b = positions.get(id(pair.A)), positions.get(id(pair.B))
            if a is None or b is None:
                continue
            scale = pair.scale if pair.scale is not None else self._scale
            unknown_scale |= scale is None
            if self._scale is not None and scale != self._scale:
                unlike = unlike or f"{pair.name or self._name_at(a)} has s = {scale:g}"
            holds_bases, name = hasattr(pair.layer, "q_a"), pair.name or self._name_at(a)
            if self.factors_share_steps and self.param_groups[a[0]]["step"] != self.param_groups[b[0]]["step"]:
                raise ValueError(f"{type(self).__name__}: A and B of {name} were added at different steps; add both in one add_param_group")
            self._pairs.append(FactorPair(name, 1.0 if scale is None else scale, a, b, holds_bases))
            del positions[id(pair.A)], positions[id(pair.B)]
        name = type(self).__name__
        if any(type(p).__name__ == "FlatParameter" or hasattr(p, "_is_flat_param") for group in self.param_groups for p in group["params"]):
            raise ValueError(f"{name}: {_FLAT}")
        if any("_fsdp_wrapped_module" in n or "_flat_param" in n for n, _ in named):
            raise ValueError(f"{name}: {_FLAT}")
        if self.requires_pairs and not (self._pairs or self._cores):
            if not self.trains_pairs:
                raise ValueError(
                    f"{name}: found no core lora_R among the {sum(len(g['params']) for g in self.param_groups)} parameters; "
                    "adapt the model with method='xs', and pass it or its parameters"
                )
            raise ValueError(f"{name}: {self._why_no_pair(known, ours, named)}")
        ratio = next((group["lr_ratio"] for group in self.param_groups if group["lr_ratio"] != 1.0), None)
        if ratio is not None and self.trains_pairs and not self._pairs:
            raise ValueError(f"{name}: lr_ratio={ratio} is the lr of B over that of A, but {self._why_no_pair(known, ours, named)}")
        positions_of_factors = [position for pair in self._pairs for position in (pair.a, pair.b)]
        positions_of_factors += [core.position for core in self._cores]
        groups = range(len(self.param_groups))
        self._factors = [frozenset(i for g, i in positions_of_factors if g == index) for index in groups]
        self._second_factors = [frozenset(pair.b[1] for pair in self._pairs if pair.b[0] == index) for index in groups]
        lone = {p for x in (*known, *ours) for tensor in (x.A, x.B, x.core) if (p := positions.get(id(tensor))) is not None}
        names = [group.get("param_names", ()) for group in self.param_groups]
        lone |= {(g, i) for g in groups for i, name_ in enumerate(names[g]) if is_adapter_parameter(name_) and i not in self._factors[g]}
        self._lone_factors = [frozenset(i for g, i in lone if g == index) for index in groups]
        self._kinds = [{own_lr: self._by_kind(index, own_lr) for own_lr in (False, True)} for index in groups]
        self._buckets = (None, [])
        self._accept_pairs()
        if unknown_scale and self.requires_pairs:
            _warn(f"{name}: the adapters' scale is not known from parameters alone, taking scale=1. Pass the model, or scale=…")
        if unlike and self.requires_pairs:
            _warn(
                f"{name}: scale={self._scale} is for pairs whose layer is not known and goes unused where it is: {unlike}, from its layer"
            )
        if self.requires_pairs:
            self._notice_unpaired(range(since_group, len(self.param_groups)))

    def _why_no_pair(self, known: list[Pair], ours: list[Pair], named: list[tuple[str, Tensor]]) -> str:
        """What to say when there is none: where cores, frozen or lone factors are the reason, that."""
        held = {id(p) for group in self.param_groups for p in group["params"]}
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
            which = f"{first.name or 'one layer'}{f' and {len(lone) - 1} more' if len(lone) > 1 else ''}"
            side, partner = ("A", first.B) if id(first.A) in held else ("B", first.A)
            return (
                f"{found}: of {which} only {side} is among them, its partner {'was left out' if partner.requires_grad else 'is frozen'}. "
                "Pass both, as model.named_parameters() does (frozen ones stay as they are), or train lone factors with AdamW"
            )
        if known and not any(p.requires_grad for pair in known for p in (pair.A, pair.B, pair.core) if p is not None):
            return f"{found}: the model's {len(known)} pairs are frozen; call requires_grad_(True) on their factors first"
        if left := [n for n, _ in named if is_adapter_parameter(n)]:
            return (
                f"{found}: {', '.join(left[:4])}{', …' if len(left) > 4 else ''} have no partner among them that fits. Pass the adapted "
                "model itself, or all of model.named_parameters(), frozen factors too"
            )
        return (
            f"{found}. Pass the adapted model itself, or model.named_parameters() with names such as '….lora_A[.adapter].weight' and "
            "'….lora_B[.adapter].weight'; plain model.parameters() works for models adapted by lowrank_kernels.adapt"
        )

    def _by_kind(self, group_index: int, second_has_own_lr: bool, among: Iterable[int] | None = None) -> list[tuple[bool, bool, list[int]]]:
        """``(factors?, Bs with an lr of their own?, indices)`` of the parameters of a group that agree in both and in weight decay."""
        factors, second, lone = (of[group_index] for of in (self._factors, self._second_factors, self._lone_factors))
        kinds: defaultdict[tuple[bool, bool, bool], list[int]] = defaultdict(list)
        for index in range(len(self.param_groups[group_index]["params"])) if among is None else among:
            kinds[index in factors, second_has_own_lr and index in second, index in lone].append(index)
        return [(is_factor, is_second, members) for (is_factor, is_second, _), members in kinds.items()]

    def _notice_unpaired(self, groups: Iterable[int]) -> None:
        """Say once, by name, which adapter parameters the method does not reach."""
        left = [
            parameter_name
            for g in groups
            for i, parameter_name in enumerate(self.param_groups[g].get("param_names", ()))
            if i not in self._factors[g] and is_adapter_parameter(parameter_name)
        ]
        if left:
            kinds = f"convolutions{' in groups, transposed or 3-d' if self.trains_convolutions else ''}"
            _warn(
                f"{type(self).__name__}: {len(left)} adapter parameter(s) are no {'pair of matrices' if self.trains_pairs else 'cores'} "
                f"(embeddings, {kinds}, DoRA's magnitudes, lone factors) and get AdamW: "
                f"{', '.join(left[:4])}{', …' if len(left) > 4 else ''}"
            )

    def _name_at(self, position: Position) -> str:
        group = self.param_groups[position[0]]
        names = group.get("param_names")
        return names[position[1]] if names else f"param_groups[{position[0]}][{position[1]}]"

    def _accept_as_given(self) -> None:
        """Refuse parameters that a framework has flattened or sharded in a way that the method cannot train. Before the first step."""
        name = type(self).__name__
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.is_meta and p.requires_grad:
                    raise RuntimeError(
                        f"{name}: {self._name_at((g, i))} is on the meta device and holds no values; give the model memory and values "
                        "(to_empty, load_state_dict), which may replace its parameters, and make the optimizer after that"
                    )
        for pair in self._pairs:
            for position in (pair.a, pair.b):
                params = self.param_groups[position[0]]["params"]
                if position[1] >= len(params) or params[position[1]].ndim < 2:
                    raise RuntimeError(f"{name}: {pair.name} was a pair of matrices and is none any more: {_FLAT}")
            a, b = self._at(pair.a), self._at(pair.b)
            if a.dtype != b.dtype and self.requires_pairs:
                raise RuntimeError(f"{name}: A of {pair.name} is {a.dtype} and B is {b.dtype}; cast both to one dtype")
            if is_sharded(self._at(pair.a)) or is_sharded(self._at(pair.b)):
                self._accept_sharded(pair)

    def _accept_sharded(self, pair: FactorPair) -> None:
        """Refuse a pair of DTensors. Here: AdamW's arithmetic is elementwise, any sharding will do."""

    def _accept_pairs(self) -> None:
        """A method refuses here the pairs that it cannot train; called whenever pairs were found."""

    def _refuse_decoupled(self) -> None:
        layers = owners()
        for pair in self._pairs:
            if pair.holds_bases and getattr(layers.get(id(self._at(pair.a))), "decoupled", False):
                raise ValueError(
                    f"{type(self).__name__}: {pair.name} is decoupled, ΔW = s(Q_B A + B Q_Aᵀ); this method trains plain LoRA, "
                    "ΔW = sBA. Train it with SDSLoRA, or adapt the model with method='lora'"
                )

    def _at(self, position: Position) -> Tensor:
        return self.param_groups[position[0]]["params"][position[1]]

    def _rank(self, pair: FactorPair) -> int:
        """The trained rank r."""
        return self._at(pair.a).shape[0]

    def _alike(self, pairs: Iterable[FactorPair]) -> Iterator[LikePairs]:
        """The pairs in lists of one device, dtype, rank and parameter groups: what one call of an operation takes."""
        buckets: defaultdict[Any, list[FactorPair]] = defaultdict(list)
        groups = [group["params"] for group in self.param_groups]
        for pair in pairs:
            (group_a, index), (group_b, _) = pair.a, pair.b
            a = groups[group_a][index]
            mesh = None if type(a) in PLAIN else getattr(a, "device_mesh", None)
            buckets[a.device, a.dtype, self._rank(pair), group_a, group_b, mesh].append(pair)
        yield from map(LikePairs, buckets.values())

    def _all_alike(self) -> list[LikePairs]:
        """:meth:`_alike` of all pairs; kept from step to step while the parameters' dtypes, devices and shapes stay as they are."""
        seen = [signature(group["params"]) for group in self.param_groups]
        if None in seen or seen != self._buckets[0]:
            self._buckets = (seen, list(self._alike(self._pairs)))
        return self._buckets[1]

    # ---------------------------------------------------------------- the step

    # Traced, the counters and schedules would be guards, one compilation for each of their values; the work is in few large operations.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the whole schedule of the method lives here. In a function that ``torch.compile`` compiles it runs outside the graph.

        Args:
            closure: re-evaluates the model and returns the loss (optional).
        """
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing() and not all(g["capturable"] for g in self.param_groups):
            raise RuntimeError(f"{type(self).__name__}: step() is being captured in a CUDA graph; make the optimizer with capturable=True")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.state and self._is_probe():
            self._create_state()
            return loss
        self._refuse_if_torn("step()")
        if not self.state:
            self._accept_as_given()
        self._check_groups()
        if self._nonfinite_grads != "keep" and self._skips_nonfinite():
            return loss
        if self._cores and not self.state:
            self._check_cores()
        self._before_update()
        self._create_state()
        # The shallow copies hold what the host counts; what the device counts is counted back.
        before = [{**group, "missed": dict(group["missed"])} for group in self.param_groups]
        copies = [(tensor, tensor.clone()) for tensor in self._written()] if self._atomic else None
        held = [(state, dict(state)) for state in self.state.values()] if self._atomic else []
        begun = _writes_begun()
        try:
            for group in self.param_groups:
                group["step"] += 1
            self._update()
        except BaseException as error:
            for state, tensors in held:  # a step may put other tensors into the state
                state.update(tensors)
            self._undo(before, copies, begun, error)
            if isinstance(error, Exception) and (misfit := self._misfit()):
                raise RuntimeError(f"{type(self).__name__}: {misfit}") from error
            raise
        return loss

    def _check_groups(self) -> None:
        """Refuse groups that were edited since pairs were found, and sparse gradients (which come from embeddings, never from factors)."""
        name = type(self).__name__
        sizes = [len(group["params"]) for group in self.param_groups]
        known = [sum(len(members) for _, _, members in kinds[False]) for kinds in self._kinds]
        if sizes != known:
            raise RuntimeError(
                f"{name}: param_groups hold {sizes} parameters, but {known} when their pairs were found; change them by "
                "add_param_group, or make a new optimizer"
            )
        for g, kinds in enumerate(self._kinds):
            params = self.param_groups[g]["params"]
            for is_factor, _, members in kinds[False]:
                if not is_factor and (index := first_sparse_gradient(params, members)) is not None:
                    raise RuntimeError(
                        f"{name} does not support sparse gradients, as {self._name_at((g, index))} has one; use sparse=False, or "
                        "another optimizer for it; nothing was changed"
                    )

    def _misfit(self) -> str | None:
        """After a step that raised: which gradient or state does not fit its parameter, in words."""
        for g, group in enumerate(self.param_groups):
            for position, expected_state in self._expected_states(g, group):
                p = self._at(position)
                what, grad = f"{self._name_at(position)} is {p.dtype} of shape {tuple(p.shape)}", p.grad
                if grad is not None and (grad.shape, grad.dtype) != (p.shape, p.dtype):
                    return f"{what}, its gradient {grad.dtype} of shape {tuple(grad.shape)}"
                for key, value in self.state.get(p, {}).items():
                    expected = expected_state.get(key)
                    if expected is not None and (value.shape, value.dtype) != (expected.shape, expected.dtype):
                        return (
                            f"{what}, but its {key} {value.dtype} of shape {tuple(value.shape)}: it was cast or given other data after "
                            "its state was made; do that before, or make a new optimizer"
                        )
        return None

    def _skips_nonfinite(self) -> bool:
        """Whether this step is to be left out for a gradient that is not finite.

        Raises:
            FloatingPointError: if that is what was asked for.
        """
        named = [
            (self._name_at((g, i)), p.grad)
            for g, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
            if p.grad is not None
        ]
        grads = [grad for _, grad in named]
        bad = first_nonfinite(local_parts(grads))
        groups = {id(group): group for grad in grads if (group := shard_group(grad)) is not None}
        if groups:  # one decision for all ranks: each sees its own shards only
            flag = torch.tensor(float(bad is not None), device=grads[0].device)
            for group in groups.values():
                torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=group)
            bad = -1 if bad is None and flag else bad
        if bad is None:
            return False
        which = f"the gradient of {named[bad][0]}" if bad >= 0 else "a gradient on another rank"
        if self._nonfinite_grads == "raise":
            raise FloatingPointError(f"{type(self).__name__}: {which} is infinite or NaN; nothing was changed")
        if not self.skipped_steps:
            _warn(f"{type(self).__name__}: {which} is infinite or NaN; such steps are skipped")
        self.skipped_steps += 1
        return True

    def _refuse_if_torn(self, what: str) -> None:
        if self._torn is not None:
            raise RuntimeError(
                f"{type(self).__name__}: {what} after a step that failed half-way ({self._torn}): some parameters are updated, others not. "
                "Load a checkpoint of model and optimizer; atomic=True keeps a copy during each step and undoes one that fails"
            )

    def _written(self) -> list[Tensor]:
        """All tensors that a step may write, apart from the counters."""
        params = [p for group in self.param_groups for p in group["params"] if p in self.state]
        return [*params, *(value for p in params for value in self.state[p].values())]

    def _undo(self, before: list[dict[str, Any]], copies: list[tuple[Tensor, Tensor]] | None, begun: int, error: BaseException) -> None:
        """After a step that raised: counters as before, tensors too if there are copies; else note whether some may be written."""
        for group, old in zip(self.param_groups, before, strict=True):
            if isinstance(old["step"], Tensor) and group["step"] is old["step"]:
                old["step"].sub_(1)  # counted up in place
            group.update(old)
        if copies is not None:
            for tensor, copy in copies:
                tensor.copy_(copy)
        elif _writes_begun() != begun:
            self._torn = f"{type(error).__name__}: {error}"
        self._after_undo()

    def _after_undo(self) -> None:
        """What a method keeps elsewhere and derives from counters and tensors is derived anew here."""

    def _is_probe(self) -> bool:
        """Whether this is ``torch.distributed.checkpoint`` asking for empty state: lr 0 and all gradients zero."""
        if any(isinstance(g["lr"], Tensor) or g["lr"] != 0 for g in self.param_groups):
            return False
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        return bool(grads) and not any(grad.any() for grad in grads)

    def _check_cores(self) -> None:
        """Refuse cores between zero factors, which would never get a gradient."""
        layers = core_owners()
        for core in self._cores:
            layer = layers.get(id(self._at(core.position)))
            if layer is not None and not (layer.lora_A.any() and layer.lora_B.any()):  # type: ignore[operator]
                raise ValueError(
                    f"{type(self).__name__}: the constant factors of {core.name} are zero, so its core cannot learn; "
                    "call lora_sb_init(model, …) or initialize(model, 'svd') first, or load a checkpoint"
                )

    def _before_update(self) -> None:
        """Checks that must fail before anything has changed."""

    def _update(self) -> None:
        """What a step does, once ``group["step"]`` counts it. Here: AdamW for all."""
        for group_index in range(len(self.param_groups)):
            self._moment_step(group_index)

    def _trained_parts(self, group_index: int) -> dict[int, tuple[slice, ...]]:
        """For parameters of which only a part is trained: position → the slice that is."""
        return {}

    def _factor_state(self, group: dict[str, Any], part: Tensor) -> dict[str, Tensor]:
        """The initial state of a factor, of which ``part`` is trained."""
        return moments(part, "exp_avg", "exp_avg_sq")

    def _create_state(self) -> bool:
        """Every key of every parameter's state, at once, in its final shape; whether any was missing."""
        if len(self.state) == sum(len(group["params"]) for group in self.param_groups) and all(self.state.values()):
            return False
        created, wanted = False, self._reads_of_frozen()
        for group_index, group in enumerate(self.param_groups):
            if group["capturable"] and not isinstance(group["step"], Tensor):
                group["step"] = torch.tensor(float(group["step"]), device=group["params"][0].device)
            parts = None
            for index, p in enumerate(group["params"]):
                # Asked for what it lacks, torch's defaultdict has an empty state, which is none, unless the method keeps none.
                if not self.state.get(p) and (p.requires_grad or (group_index, index) in wanted):
                    parts = self._trained_parts(group_index) if parts is None else parts
                    part = p[parts[index]] if index in parts else p
                    is_factor = index in self._factors[group_index]
                    state = self._factor_state(group, part) if is_factor else moments(part, "exp_avg", "exp_avg_sq")
                    if state or p not in self.state:
                        if due := int(self._updates_due(group_index, index)):
                            group["missed"][index] = due
                        self.state[p], created = state, True
        return created

    def _reads_of_frozen(self) -> frozenset[Position]:
        """Factors that get state though they may be frozen, since a step of their partners reads or writes it."""
        return frozenset()

    def _updates_due(self, group_index: int, index: int) -> int | Tensor:
        """How many updates, counted since its moments were zero, the parameter has had if it always had a gradient."""
        group = self.param_groups[group_index]
        return group["step"] - group["cleared_at"] if index in self._factors[group_index] else group["step"]

    def _moment_step(self, group_index: int, indices: Iterable[int] | None = None) -> None:
        """AdamW on those parameters of the group (all, if not told) that have a gradient: one call per device, dtype and kind."""
        group, parts = self.param_groups[group_index], self._trained_parts(group_index)
        own_lr = group["lr_ratio"] != 1.0
        kinds = self._kinds[group_index][own_lr] if indices is None else self._by_kind(group_index, own_lr, indices)
        for is_factor, is_second, of_kind in kinds:
            kind: dict[str, Any] = {"is_factor": is_factor, "is_second": is_second, "parts": parts}
            found = gather(group["params"], of_kind, self.state)
            for index in found.idle:
                self._miss(group, index)
            if found.layout is not None:
                self._adamw(group_index, found.members, **kind, found=found)
                continue
            by_place: defaultdict[Any, list[int]] = defaultdict(list)
            for index, p in zip(found.members, found.params, strict=True):
                by_place[p.device, p.dtype].append(index)
            for members in by_place.values():
                self._adamw(group_index, members, **kind)

    def _miss(self, group: dict[str, Any], index: int) -> None:
        """Note that a parameter does not take this step: its bias correction lags behind by one."""
        if group["params"][index] in self.state:
            group["missed"][index] = group["missed"].get(index, 0) + 1

    @staticmethod
    def _lr(group: dict[str, Any], is_second: bool) -> float | Tensor:
        """The learning rate of a group, or of the Bs in it."""
        return group["lr"] * group["lr_ratio"] if is_second and group["lr_ratio"] != 1.0 else group["lr"]

    @staticmethod
    def _factor_decay(group: dict[str, Any]) -> float | Tensor:
        """The weight decay of the factors of a group."""
        return group["weight_decay"] if group["factor_weight_decay"] is None else group["factor_weight_decay"]

    def _adamw(
        self,
        group_index: int,
        members: list[int],
        *,
        is_factor: bool,
        is_second: bool,
        found: Gathered | None = None,
        grads: list[Tensor] | None = None,
        parts: Mapping[int, tuple[slice, ...]] = NO_PARTS,
        **options: Any,
    ) -> None:
        """One call of ``grouped_adamw_`` on parameters of which ``parts`` are trained; ``found``: all that is needed of them, where the
        caller has read it; ``grads`` in place of their own; ``options`` replace what AdamW would pass."""
        group, lone = self.param_groups[group_index], self._lone_factors[group_index]
        found = gather(group["params"], members, self.state) if found is None else found
        layout, params, grads = found.layout, found.params, found.grads if grads is None else grads
        if parts:
            slices = [parts.get(index) for index in members]
            params = [p if part is None else p[part] for p, part in zip(params, slices, strict=True)]
            grads = [grad if part is None else grad[part] for grad, part in zip(grads, slices, strict=True)]
        tensors = (params, grads, found.exp_avgs, found.exp_avg_sqs)
        if layout is None or parts or grads is not found.grads:
            layout, tensors = None, tuple(map(local_parts, tensors))  # type: ignore[assignment]
        missed = [group["missed"].get(index, 0) for index in members] if group["missed"] else []
        arguments: dict[str, Any] = {
            "lr": self._lr(group, is_second),
            "betas": group["betas"],
            "eps": group["eps"],
            "weight_decay": self._factor_decay(group) if is_factor or members[0] in lone else group["weight_decay"],
            "step": self._updates_due(group_index, members[0]),
            "missed": missed if any(missed) else (),
            "maximize": group["maximize"],
            "layout": layout,
        }
        grouped_adamw_(*tensors, **{**arguments, **options})

    def _clear_factor_state(self, cleared: list[FactorPair]) -> None:
        """Zero the factors' moments in the groups of these pairs and restart their bias correction; other state stays."""
        for group_index in {position[0] for pair in cleared for position in (pair.a, pair.b)}:
            group, factors = self.param_groups[group_index], self._factors[group_index]
            values = [value for i in factors for value in self.state.get(group["params"][i], {}).values()]
            if values:  # none, where all were frozen so far
                torch._foreach_zero_(values)
            group["cleared_at"] = group["step"].clone() if isinstance(group["step"], Tensor) else group["step"]
            group["missed"] = {i: n for i, n in group["missed"].items() if i not in factors}

    # ---------------------------------------------------------------- saving, loading, copying

    def state_dict(self) -> dict[str, Any]:
        """As torch's.

        Raises:
            RuntimeError: a step failed half-way; what would be saved is of two different moments.
        """
        self._refuse_if_torn("state_dict()")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps the dtype it was saved in (torch casts it down to the parameter's).

        Raises:
            ValueError: the checkpoint is of another method, or its shapes do not fit; nothing was changed.
        """
        self._check_state_dict(state_dict)
        saved_state = state_dict["state"]
        super().load_state_dict(state_dict)
        self._torn = None
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if isinstance(group["step"], Tensor):
                group["step"] = group["step"].to(group["params"][0].device)
            for p, key in zip(group["params"], saved_group["params"], strict=True):
                for name, value in saved_state.get(key, {}).items():
                    if isinstance(value, Tensor):
                        dtype = state_dtype(p.dtype) if value.is_floating_point() else value.dtype
                        self.state[p][name] = value.to(p.device, dtype, copy=True)

    def _expected_states(self, group_index: int, group: dict[str, Any]) -> Iterator[tuple[Position, dict[str, Tensor]]]:
        """What the state of each parameter holds under the hyperparameters of ``group``, as tensors without memory."""
        parts, factors = self._trained_parts(group_index), self._factors[group_index]
        for index, p in enumerate(self.param_groups[group_index]["params"]):
            shape = (p[parts[index]] if index in parts else p).shape
            like = torch.empty(shape, dtype=p.dtype, device="meta")
            yield (group_index, index), self._factor_state(group, like) if index in factors else moments(like, "exp_avg", "exp_avg_sq")

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        name = type(self).__name__
        if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(f"{name}: state_dict must be what state_dict() returned, with 'state' and 'param_groups'")
        saved_groups = state_dict["param_groups"]
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(f"{name}: the checkpoint has {len(saved_groups)} parameter groups, this optimizer {len(self.param_groups)}")
        for index, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            if saved.get("method") != name:
                raise ValueError(
                    f"{name}: param_groups[{index}] of the checkpoint was saved by {saved.get('method', 'another optimizer')}, "
                    f"not by {name}; resume with the same optimizer, or start this one without the checkpoint"
                )
            if len(saved["params"]) != len(group["params"]):
                raise ValueError(
                    f"{name}: param_groups[{index}] of the checkpoint has {len(saved['params'])} parameters, here {len(group['params'])}"
                )
            # torch puts "differentiable" into the defaults of an optimizer that was unpickled or loaded.
            needed = self.defaults.keys() - {"differentiable"} | {"factor_weight_decay", "step", "cleared_at", "missed"}
            missing = sorted(needed - saved.keys())
            if missing or not isinstance(saved["step"], (Real, Tensor)):
                what = f"lacks {', '.join(missing)}" if missing else f"has step {saved['step']!r}"
                raise ValueError(f"{name}: param_groups[{index}] of the checkpoint {what}; it is damaged or of another version")
            for key, (position, expected) in zip(saved["params"], self._expected_states(index, {**group, **saved}), strict=True):
                if key in state_dict["state"]:
                    self._check_saved_state(position, state_dict["state"][key], expected)

    def _check_saved_state(self, position: Position, saved: dict[str, Any], expected_state: dict[str, Tensor]) -> None:
        """Refuse the saved state of one parameter if a key is missing or a shape is another."""
        name, p, which = type(self).__name__, self._at(position), self._name_at(position)
        for key, expected in expected_state.items():
            value = saved.get(key)
            if not isinstance(value, Tensor):
                found = "is missing in" if value is None else f"is a {type(value).__name__}, not a tensor, in"
                raise ValueError(f"{name}: {key} of {which} {found} the checkpoint; it is damaged or of another version")
            if key.startswith("exp_avg") and is_sharded(value) != is_sharded(p):
                raise ValueError(
                    f"{name}: {key} of {which} is a {type(value).__name__} in the checkpoint, its parameter a {type(p).__name__}; "
                    "load it by torch.distributed.checkpoint's set_optimizer_state_dict"
                )
            if value.shape != expected.shape:
                raise ValueError(
                    f"{name}: {key} of {which} has shape {tuple(value.shape)} in the checkpoint, {tuple(expected.shape)} here; "
                    "was it saved with another rank?"
                )

    def __getstate__(self) -> dict[str, Any]:
        pairing = ("_pairs", "_cores", "_factors", "_second_factors", "_lone_factors", "_kinds", "_scale", "_constructed")
        kept = (*pairing, "_nonfinite_grads", "_atomic", "skipped_steps", "_torn")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}}

    # ---------------------------------------------------------------- explain()

    def _example_calls(self) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
        """``(operation, device type, arguments)`` as ``step()`` will make them, for ``explain()``; no data is read."""
        for group_index, group in enumerate(self.param_groups):
            parts = self._trained_parts(group_index)
            buckets: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
            for index, p in enumerate(group["params"]):
                buckets[p.device, p.dtype].append(p.detach()[parts[index]] if index in parts else p.detach())
            for (device, _), tensors in buckets.items():
                maps: tuple[Any, ...] = (None, None, None, None, [], None)
                hyperparameters = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], 1, [], True, group["maximize"])
                yield "grouped_adamw_", device.type, (tensors, tensors, [], [], *maps, *hyperparameters)
