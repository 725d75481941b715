"""What all optimizers of the package share: arguments, pairing, state rules, and the moment step.

A method is a subclass that says what happens to the factors of each pair; everything that is not a factor of a pair
(heads, norms, ``modules_to_save``) gets AdamW in the same ``step()``.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor, nn

from ..ops import grouped_adamw_
from ..pairs import Pair, is_adapter_parameter, owners, pairs, pairs_by_name

ParamsT: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]] | nn.Module

Position: TypeAlias = tuple[int, int]

#: AdamW's weight decay, for parameters that are no factors, when the user does not give one. Factors get none (papers).
REST_WEIGHT_DECAY = 1e-2


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


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Optimizer state is fp32 for bf16, fp16 and fp32 parameters, fp64 for fp64 ones."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def moments(like: Tensor, *names: str) -> dict[str, Tensor]:
    """Zero moments of a parameter."""
    return {name: torch.zeros(like.shape, dtype=state_dtype(like.dtype), device=like.device) for name in names}


class AdamWOptions(TypedDict, total=False):
    """The keyword-only arguments that every optimizer here shares; see :class:`LowRankOptimizer`."""

    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | None
    scale: float | None
    lr_ratio: float


class LowRankOptimizer(torch.optim.Optimizer):
    """Base of all optimizers here: ``torch.optim.AdamW``'s leading arguments, pairing, lazily created fp32 state.

    Args:
        params: what ``torch.optim.AdamW`` takes (tensors, dicts of groups, named parameters), or the model itself
            (then its trainable parameters). Factors are paired by our adapters or by name; s is read from the module
            when the model is given. Adapter parameters that are no pair of matrices (LoRA on embeddings and convolutions,
            DoRA's magnitudes) get AdamW; one warning names them.
        lr, betas, eps, maximize: as ``torch.optim.AdamW``.
        capturable: ``step()`` reads nothing on the host and can be captured in a CUDA graph, after one ordinary step, which makes the
            state and the device tables. The graph keeps what the host knew when it was captured: numbers (an lr to be scheduled must be
            a tensor on the device, changed in place), and which parameters have a gradient.
        weight_decay: decoupled, multiplied by lr. None means 0 for factors and AdamW's 0.01 for everything else; a
            number holds for both. In a group they stand as ``factor_weight_decay`` and ``weight_decay``.
        amsgrad, differentiable: not supported; True is an error.
        foreach, fused: accepted as ``torch.optim.AdamW`` accepts them; there is one, fused, implementation.
        scale: s of every pair whose module is not known (only tensors or names were given).
        lr_ratio: the learning rate of every B over that of its A (LoRA+, Hayou et al. 2024); 1 is AdamW's.

    State, one dictionary per parameter, tensors only, created by the first ``step()``: ``exp_avg`` and ``exp_avg_sq``
    in fp32 (fp64 for fp64 parameters). The step counter is one per group, ``group["step"]`` (a device tensor when
    ``capturable``); ``group["missed"]`` counts, by position, the steps in which a parameter had no gradient.
    """

    #: A method that makes no sense without pairs refuses parameters in which there are none.
    requires_pairs = True

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
        method_defaults: dict[str, Any] | None = None,
    ) -> None:
        name = type(self).__name__
        if amsgrad:
            raise ValueError(f"{name}: amsgrad=True is not supported; leave it out")
        if differentiable:
            raise ValueError(f"{name}: differentiable=True is not supported; step() is not differentiated through")
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        for key, value in (("scale", scale), ("lr_ratio", lr_ratio)):
            if value is not None and not value > 0:
                raise ValueError(f"{name}: {key} must be positive, got {value}")
        self._pairs: list[FactorPair] = []
        self._factors: list[frozenset[int]] = []
        self._second_factors: list[frozenset[int]] = []
        self._scale = scale
        self._constructed = False
        known = pairs(params) if isinstance(params, nn.Module) else []
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
        super().__init__(self._groups_of(params), defaults)
        self._constructed = True
        self._find_pairs(known, since_group=0)

    # ---------------------------------------------------------------- arguments

    def _groups_of(self, params: ParamsT) -> list[Any]:
        name = type(self).__name__
        if isinstance(params, nn.Module):
            trainable = [(n, p) for n, p in params.named_parameters() if p.requires_grad]
            if not trainable:
                raise ValueError(f"{name}: the model has no parameter with requires_grad=True; adapt(model, …) first")
            return [{"params": trainable}]
        if isinstance(params, (Tensor, dict)):
            raise TypeError(f"{name}: params must be an iterable of tensors or dicts, or a model, got {type(params).__name__}")
        return list(params)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; pairs among the new parameters (and with unpaired older ones) are found."""
        self._check_hyperparameters({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        decay = group["weight_decay"]
        group["factor_weight_decay"] = 0.0 if decay is None else decay
        group["weight_decay"] = REST_WEIGHT_DECAY if decay is None else decay
        group["step"], group["cleared_at"], group["missed"] = 0, 0, {}
        if self._constructed:
            self._find_pairs([], since_group=len(self.param_groups) - 1)

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        """``torch.optim.AdamW``'s checks, in its words."""
        lr, betas, decay = group["lr"], group["betas"], group["weight_decay"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1:
                raise ValueError("Tensor lr must be 1-element")
        elif not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
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
        taken = {position for pair in self._pairs for position in (pair.a, pair.b)}
        positions = {
            id(p): (g, i) for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"]) if (g, i) not in taken
        }
        named: list[tuple[str, Tensor]] = []
        for group in self.param_groups:
            named += zip(group.get("param_names", ()), group["params"], strict=False)
        ours = [Pair("", layer.lora_A, layer.lora_B, layer.scale, layer) for layer in owners().values()]  # type: ignore[arg-type]
        unknown_scale = False
        for pair in [*known, *ours, *pairs_by_name(named)]:
            a, b = positions.get(id(pair.A)), positions.get(id(pair.B))
            if a is None or b is None:
                continue
            scale = pair.scale if pair.scale is not None else self._scale
            unknown_scale |= scale is None
            holds_bases = hasattr(pair.layer, "q_a")
            self._pairs.append(FactorPair(pair.name or self._name_at(a), 1.0 if scale is None else scale, a, b, holds_bases))
            del positions[id(pair.A)], positions[id(pair.B)]
        name = type(self).__name__
        if self.requires_pairs and not self._pairs:
            raise ValueError(
                f"{name}: found no pair of low-rank factors among the {sum(len(g['params']) for g in self.param_groups)} parameters. "
                "Pass the adapted model itself, or model.named_parameters() with names such as '….lora_A[.adapter].weight' and "
                "'….lora_B[.adapter].weight'; plain model.parameters() works for models adapted by lowrank_kernels.adapt"
            )
        positions_of_factors = [position for pair in self._pairs for position in (pair.a, pair.b)]
        groups = range(len(self.param_groups))
        self._factors = [frozenset(i for g, i in positions_of_factors if g == index) for index in groups]
        self._second_factors = [frozenset(pair.b[1] for pair in self._pairs if pair.b[0] == index) for index in groups]
        self._accept_pairs()
        if unknown_scale and self.requires_pairs:
            warnings.warn(
                f"{name}: the adapters' scale is not known from parameters alone, taking scale=1. Pass the model, or scale=…",
                stacklevel=4,
            )
        if self.requires_pairs:
            self._notice_unpaired(range(since_group, len(self.param_groups)))

    def _notice_unpaired(self, groups: Iterable[int]) -> None:
        """Say once, by name, which adapter parameters the method does not reach."""
        left = [
            parameter_name
            for g in groups
            for i, parameter_name in enumerate(self.param_groups[g].get("param_names", ()))
            if i not in self._factors[g] and is_adapter_parameter(parameter_name)
        ]
        if left:
            warnings.warn(
                f"{type(self).__name__}: {len(left)} adapter parameter(s) are no pair of matrices (embeddings, convolutions, DoRA's "
                f"magnitudes, lone factors) and get AdamW: {', '.join(left[:4])}{', …' if len(left) > 4 else ''}",
                stacklevel=5,
            )

    def _name_at(self, position: Position) -> str:
        group = self.param_groups[position[0]]
        names = group.get("param_names")
        return names[position[1]] if names else f"param_groups[{position[0]}][{position[1]}]"

    def _accept_pairs(self) -> None:
        """A method refuses here the pairs that it cannot train; called whenever pairs were found."""

    def _at(self, position: Position) -> Tensor:
        return self.param_groups[position[0]]["params"][position[1]]

    def _rank(self, pair: FactorPair) -> int:
        """The trained rank r."""
        return self._at(pair.a).shape[0]

    def _alike(self, pairs: Iterable[FactorPair]) -> Iterator[list[FactorPair]]:
        """The pairs in lists of one device, dtype, rank and parameter groups: what one call of an operation takes."""
        buckets: defaultdict[Any, list[FactorPair]] = defaultdict(list)
        for pair in pairs:
            a = self._at(pair.a)
            buckets[a.device, a.dtype, self._rank(pair), pair.a[0], pair.b[0]].append(pair)
        yield from buckets.values()

    # ---------------------------------------------------------------- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the whole schedule of the method lives here.

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
        self._before_update()
        self._create_state()
        for group in self.param_groups:
            group["step"] += 1
        self._update()
        return loss

    def _is_probe(self) -> bool:
        """Whether this is ``torch.distributed.checkpoint`` asking for empty state: lr 0 and all gradients zero."""
        if any(isinstance(g["lr"], Tensor) or g["lr"] != 0 for g in self.param_groups):
            return False
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        return bool(grads) and not any(grad.any() for grad in grads)

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

    def _create_state(self) -> None:
        """Every key of every parameter's state, at once, in its final shape."""
        if len(self.state) == sum(len(group["params"]) for group in self.param_groups):
            return
        for group_index, group in enumerate(self.param_groups):
            if group["capturable"] and not isinstance(group["step"], Tensor):
                group["step"] = torch.tensor(float(group["step"]), device=group["params"][0].device)
            parts = None
            for index, p in enumerate(group["params"]):
                if p.requires_grad and p not in self.state:
                    if due := int(self._updates_due(group_index, index)):
                        group["missed"][index] = due
                    parts = self._trained_parts(group_index) if parts is None else parts
                    part = p[parts[index]] if index in parts else p
                    is_factor = index in self._factors[group_index]
                    self.state[p] = self._factor_state(group, part) if is_factor else moments(part, "exp_avg", "exp_avg_sq")

    def _updates_due(self, group_index: int, index: int) -> int | Tensor:
        """How many updates, counted since its moments were zero, the parameter has had if it always had a gradient."""
        group = self.param_groups[group_index]
        return group["step"] - group["cleared_at"] if index in self._factors[group_index] else group["step"]

    def _moment_step(self, group_index: int, indices: Iterable[int] | None = None) -> None:
        """AdamW on those parameters of the group (all, if not told) that have a gradient: one call per device, dtype and kind."""
        group, factors = self.param_groups[group_index], self._factors[group_index]
        second = self._second_factors[group_index] if group["lr_ratio"] != 1.0 else ()
        params = group["params"]
        buckets: defaultdict[tuple[bool, bool, int, torch.dtype], list[int]] = defaultdict(list)
        for index in range(len(params)) if indices is None else indices:
            p = params[index]
            if p.grad is None:
                self._miss(group, index)
            else:
                buckets[index in factors, index in second, p.get_device(), p.dtype].append(index)
        for (is_factor, is_second, _, _), members in buckets.items():
            self._adamw(group_index, members, is_factor=is_factor, is_second=is_second)

    def _miss(self, group: dict[str, Any], index: int) -> None:
        """Note that a parameter does not take this step: its bias correction lags behind by one."""
        if group["params"][index] in self.state:
            group["missed"][index] = group["missed"].get(index, 0) + 1

    @staticmethod
    def _lr(group: dict[str, Any], is_second: bool) -> float | Tensor:
        """The learning rate of a group, or of the Bs in it."""
        return group["lr"] * group["lr_ratio"] if is_second and group["lr_ratio"] != 1.0 else group["lr"]

    def _adamw(self, group_index: int, members: list[int], *, is_factor: bool, is_second: bool, **options: Any) -> None:
        """One call of ``grouped_adamw_`` on parameters that all have a gradient; ``options`` replace what AdamW would pass."""
        group, parts = self.param_groups[group_index], self._trained_parts(group_index)
        params = [group["params"][index] for index in members]
        grads = [p.grad for p in params]
        states = [self.state[p] for p in params]
        if any(grad.is_sparse for grad in grads):
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        if parts:
            slices = [parts.get(index) for index in members]
            params = [p if part is None else p[part] for p, part in zip(params, slices, strict=True)]
            grads = [grad if part is None else grad[part] for grad, part in zip(grads, slices, strict=True)]
        missed = [group["missed"].get(index, 0) for index in members] if group["missed"] else []
        arguments: dict[str, Any] = {
            "lr": self._lr(group, is_second),
            "betas": group["betas"],
            "eps": group["eps"],
            "weight_decay": group["factor_weight_decay" if is_factor else "weight_decay"],
            "step": self._updates_due(group_index, members[0]),
            "missed": missed if any(missed) else (),
            "maximize": group["maximize"],
            "check": False,
        }
        exp_avgs, exp_avg_sqs = ([s[key] for s in states if key in s] for key in ("exp_avg", "exp_avg_sq"))
        grouped_adamw_(params, grads, exp_avgs, exp_avg_sqs, **{**arguments, **options})

    def _clear_factor_state(self, cleared: list[FactorPair]) -> None:
        """Zero the factors' moments in the groups of these pairs and restart their bias correction; other state stays."""
        for group_index in {position[0] for pair in cleared for position in (pair.a, pair.b)}:
            group, factors = self.param_groups[group_index], self._factors[group_index]
            torch._foreach_zero_([value for i in factors for value in self.state[group["params"][i]].values()])
            group["cleared_at"] = group["step"].clone() if isinstance(group["step"], Tensor) else group["step"]
            group["missed"] = {i: n for i, n in group["missed"].items() if i not in factors}

    # ---------------------------------------------------------------- saving, loading, copying

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps the dtype it was saved in (torch casts it down to the parameter's).

        Raises:
            ValueError: the checkpoint is of another method, or its shapes do not fit; nothing was changed.
        """
        self._check_state_dict(state_dict)
        saved_state = state_dict["state"]
        super().load_state_dict(state_dict)
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if isinstance(group["step"], Tensor):
                group["step"] = group["step"].to(group["params"][0].device)
            for p, key in zip(group["params"], saved_group["params"], strict=True):
                for name, value in saved_state.get(key, {}).items():
                    if isinstance(value, Tensor):
                        self.state[p][name] = value.to(device=p.device, copy=True)

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        name = type(self).__name__
        saved_groups = state_dict.get("param_groups", [])
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
            parts = self._trained_parts(index)
            for position, (p, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
                shape = (p[parts[position]] if position in parts else p).shape
                for state_name, value in state_dict["state"].get(key, {}).items():
                    if state_name in ("exp_avg", "exp_avg_sq") and value.shape != shape:
                        raise ValueError(
                            f"{name}: {state_name} of {self._name_at((index, position))} has shape {tuple(value.shape)} in the "
                            f"checkpoint, {tuple(shape)} here; was it saved with another rank?"
                        )

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_pairs", "_factors", "_second_factors", "_scale", "_constructed")
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
