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
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping):
        raise ValueError(f"{name}: 'state' of the checkpoint must be a dictionary, got {type(state).__name__}; it is damaged")
    if not isinstance(groups, (list, tuple)):
        raise ValueError(f"{name}: 'param_groups' of the checkpoint must be a list, got {type(groups).__name__}; it is damaged")
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            found = f"params {group.get('params')!r:.80}" if isinstance(group, Mapping) else f"a {type(group).__name__}"
            raise ValueError(f"{name}: param_groups[{index}] of the checkpoint must be a dictionary with a list of params, got {found}")


#: No run takes more steps, and what compiled code counts with has room for it.
MOST_STEPS = 2**53


def whole_number(value: Any) -> int | None:
    """A counter of a checkpoint, a number or a tensor of one element, as Python's; None if it is no whole number from 0 on."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_meta or value.is_complex():
            return None
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    number: Any = value
    return int(number) if 0 <= number <= MOST_STEPS and number == int(number) else None


def check_counters(name: str, which: str, saved: Mapping[str, Any], updates_due: Callable[[int], int]) -> None:
    """Refuse counters of a group that cannot have counted; ``updates_due``: from a position in the group, how many updates it may count."""
    counted = {key: whole_number(saved[key]) for key in ("step", "cleared_at")}
    for key, value in counted.items():
        if value is None:
            raise ValueError(f"{name}: {which} of the checkpoint has {key} {saved[key]!r:.80}, no whole number ≥ 0; it is damaged")
    step, cleared_at = counted["step"], counted["cleared_at"]
    assert step is not None and cleared_at is not None
    if cleared_at > step:
        raise ValueError(f"{name}: {which} of the checkpoint has cleared_at {cleared_at} after only {step} steps; it is damaged")
    missed = saved["missed"]
    if not isinstance(missed, Mapping):
        raise ValueError(f"{name}: {which} of the checkpoint has missed {missed!r:.80}, no dictionary; it is damaged")
    for position, count in missed.items():
        if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position < len(saved["params"]):
            raise ValueError(
                f"{name}: {which} of the checkpoint has missed[{position!r:.80}], no position of its parameters; it is damaged"
            )
        due = updates_due(position)
        if isinstance(count, Tensor) or (whole := whole_number(count)) is None or whole > due:
            raise ValueError(
                f"{name}: {which} of the checkpoint has missed[{position}] {count!r:.80}, no whole number from 0 to the {due} updates that "
                "were due; it is damaged"
            )


def check_state_dict(
    name: str,
    state_dict: dict[str, Any],
    groups: Sequence[dict[str, Any]],
    needed: Iterable[str],
    expected_states: ExpectedStates,
    updates_due: Callable[[int, int, dict[str, Any]], int | Tensor],
) -> None:
    """Refuse a checkpoint of another method, or of parameters of other numbers or shapes; ``needed``: what each of its groups must hold;
    ``updates_due``: from a group's index, a position in it and its hyperparameters to how many updates a parameter may have had."""
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
        if missing:
            raise ValueError(
                f"{name}: param_groups[{index}] of the checkpoint lacks {', '.join(missing)}; it is damaged or of another version"
            )
        if len(set(saved["params"])) != len(saved["params"]):
            raise ValueError(f"{name}: param_groups[{index}] of the checkpoint names a parameter twice; it is damaged")
        merged = {**group, **saved}

        def due(position: int, index: int = index, merged: dict[str, Any] = merged) -> int:
            return int(updates_due(index, position, merged))

        check_counters(name, f"param_groups[{index}]", saved, due)
        for key, (position, expected) in zip(saved["params"], expected_states(index, merged), strict=True):
            if key in state_dict["state"]:
                which, of_parameter = name_at(groups, position), state_dict["state"][key]
                _check_saved_state(name, which, group["params"][position[1]], of_parameter, expected)
                never = due(position[1]) == saved["missed"].get(position[1], 0)
                moved = [k for k in expected if never and k.startswith("exp_avg") and bool((of_parameter[k] != 0).any())]
                if moved:
                    raise ValueError(
                        f"{name}: by the counters of the checkpoint {which} was never updated, but its {moved[0]} is not zero; "
                        "it is damaged"
                    )


def _check_saved_state(name: str, which: str, p: Tensor, saved: dict[str, Any], expected_state: dict[str, Tensor]) -> None:
    """Refuse the saved state of one parameter if a key is missing, or a shape is another, or a value is none that moments may have."""
    if not isinstance(saved, Mapping):
        raise ValueError(f"{name}: the state of {which} is a {type(saved).__name__} in the checkpoint, no dictionary; it is damaged")
    for key, expected in expected_state.items():
        value = saved.get(key)
        if not isinstance(value, Tensor):
            found = "is missing in" if value is None else f"is a {type(value).__name__}, not a tensor, in"
            raise ValueError(f"{name}: {key} of {which} {found} the checkpoint; it is damaged or of another version")
        if not value.is_floating_point() or value.layout is not torch.strided:
            raise ValueError(
                f"{name}: {key} of {which} is {value.dtype}, {value.layout} in the checkpoint, and not a dense tensor of floating-point "
                "numbers; it is damaged"
            )
        if value.is_meta and not p.is_meta:
            raise ValueError(
                f"{name}: {key} of {which} is on the meta device in the checkpoint and holds no values; load it with its values"
            )
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
