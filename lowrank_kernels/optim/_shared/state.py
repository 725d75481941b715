"""The state of a parameter: its dtype, moments of zero, and whether state, a checkpoint's or the optimizer's own, fits the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...backends.dtypes import compute_dtype
from ...backends.lists import PLAIN
from .pairing import Position, name_at
from .shards import is_sharded

#: From a group's index and hyperparameters to what the state of each of its parameters should hold, as tensors without memory.
ExpectedStates: TypeAlias = Callable[[int, dict[str, Any]], Iterable[tuple[Position, dict[str, Tensor]]]]


def may_step(p: Tensor) -> bool:
    """Whether a step may move the parameter: as torch's optimizers have it, also one that was frozen with a ``.grad`` left over."""
    return p.requires_grad or p.grad is not None


def moments(like: Tensor, *names: str) -> dict[str, Tensor]:
    """Zero moments of a parameter, sharded as it is."""
    if type(like) not in PLAIN:  # a DTensor
        return {name: torch.zeros_like(like, dtype=compute_dtype(like.dtype)) for name in names}
    return {name: torch.zeros(like.shape, dtype=compute_dtype(like.dtype), device=like.device) for name in names}


def misfit(groups: Sequence[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]], expected_states: ExpectedStates) -> str | None:
    """After a step that raised: which gradient or state does not fit its parameter, in words."""
    for g, group in enumerate(groups):
        for position, expected_state in expected_states(g, group):
            p = group["params"][position[1]]
            what, grad = f"{name_at(groups, position)} is {p.dtype} of shape {tuple(p.shape)}", p.grad
            if grad is not None and (grad.shape, grad.dtype) != (p.shape, p.dtype):
                return f"{what}, its gradient {grad.dtype} of shape {tuple(grad.shape)}"
            for key, value in state.get(p, {}).items():
                expected = expected_state.get(key)
                if expected is not None and (value.shape, value.dtype) != (expected.shape, expected.dtype):
                    return (
                        f"{what}, but its {key} {value.dtype} of shape {tuple(value.shape)}: it was cast or given other data after "
                        "its state was made; do that before, or make a new optimizer"
                    )
    return None


def check_is_state_dict(name: str, state_dict: Any) -> None:
    """Refuse what has not the form of a checkpoint."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"{name}: state_dict must be what state_dict() returned, with 'state' and 'param_groups'")


def check_state_dict(
    name: str, state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], needed: Iterable[str], expected_states: ExpectedStates
) -> None:
    """Refuse a checkpoint of another method, or of parameters of other numbers or shapes; ``needed``: what each of its groups must hold."""
    check_is_state_dict(name, state_dict)
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError(f"{name}: the checkpoint has {len(saved_groups)} parameter groups, this optimizer {len(groups)}")
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if saved.get("method") != name:
            raise ValueError(
                f"{name}: param_groups[{index}] of the checkpoint was saved by {saved.get('method', 'another optimizer')}, "
                f"not by {name}; resume with the same optimizer, or start this one without the checkpoint"
            )
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"{name}: param_groups[{index}] of the checkpoint has {len(saved['params'])} parameters, here {len(group['params'])}"
            )
        names, saved_names = group.get("param_names"), saved.get("param_names")
        if names and saved_names and set(names) == set(saved_names) and list(names) != list(saved_names):
            first = next((here, there) for here, there in zip(names, saved_names, strict=True) if here != there)
            raise ValueError(
                f"{name}: param_groups[{index}] of the checkpoint holds the same parameters in another order ({first[1]} where {first[0]} "
                "stands here), and state is matched by order; make the optimizer with the parameters in the checkpoint's order"
            )
        missing = sorted(set(needed) - saved.keys())
        if missing or not isinstance(saved["step"], (Real, Tensor)):
            what = f"lacks {', '.join(missing)}" if missing else f"has step {saved['step']!r}"
            raise ValueError(f"{name}: param_groups[{index}] of the checkpoint {what}; it is damaged or of another version")
        for key, (position, expected) in zip(saved["params"], expected_states(index, {**group, **saved}), strict=True):
            if key in state_dict["state"]:
                _check_saved_state(name, name_at(groups, position), group["params"][position[1]], state_dict["state"][key], expected)


def _check_saved_state(name: str, which: str, p: Tensor, saved: dict[str, Any], expected_state: dict[str, Tensor]) -> None:
    """Refuse the saved state of one parameter if a key is missing or a shape is another."""
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
