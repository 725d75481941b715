"""The state of a parameter: its dtype, moments of zero, and whether state, a checkpoint's or the optimizer's own, fits the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...backends.dtypes import compute_dtype
from ...backends.lists import PLAIN
from ...parallel.shards import is_sharded
from .pairing import Position, name_at

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


def as_saved(group: Mapping[str, Any], positions: Iterable[str], due: Sequence[int]) -> dict[str, Any]:
    """What a group counts by position, as a checkpoint has it: lists with an entry for every parameter.

    ``torch.distributed.checkpoint`` flattens groups to keys. An empty list or dictionary leaves none there, keys become strings, and what
    is on disk is read under the keys alone that a new optimizer has; so these must not depend on what was counted.

    Args:
        positions: the entries that are lists of positions; saved are bools.
        due: of each parameter that has no state, how many updates it might have had, all of which it missed; of the others 0.
    """
    count = len(group["params"])
    marked = {key: set(group[key]) for key in positions}
    return {
        "missed": [due[i] or group["missed"].get(i, 0) for i in range(count)],
        **{key: [i in marked[key] for i in range(count)] for key in marked},
    }


def _by_position(name: str, which: str, saved: Mapping[str, Any], positions: Iterable[str]) -> dict[str, Any]:
    """A group of a checkpoint, with what :func:`as_saved` did undone."""
    count, found = len(saved["params"]), dict(saved)
    for key in ("missed", *positions):
        value = saved[key]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name}: {which} of the checkpoint has {key} {value!r:.80}, no list; it is damaged")
        if key == "missed":
            entries = {i: number for i, number in enumerate(value) if not (type(number) is int and number == 0)}
        else:
            wrong = [mark for mark in value if not isinstance(mark, bool)]
            if wrong:
                raise ValueError(f"{name}: {which} of the checkpoint has {key} with {wrong[0]!r:.80}, no bool; it is damaged")
            entries = {i: mark for i, mark in enumerate(value) if mark}
        # Of a group that torch has put together anew (flattened, on other ranks), the list is that of one it was made of.
        if len(value) != count and entries:
            raise ValueError(
                f"{name}: {which} of the checkpoint has {key} of {len(value)} parameters, and {count} parameters; it is damaged, or its "
                "parameters were in other groups when it was saved"
            )
        found[key] = entries if key == "missed" else list(entries)
    return found


#: No run takes more steps, and compiled code counts with 32 bits.
MOST_STEPS = 2**31 - 1


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
    for position, count in saved["missed"].items():
        due = updates_due(position)
        if isinstance(count, Tensor) or (whole := whole_number(count)) is None or whole > due:
            raise ValueError(
                f"{name}: {which} of the checkpoint has missed[{position}] {count!r:.80}, no whole number from 0 to the {due} updates that "
                "were due; it is damaged"
            )


def checked_state_dict(
    name: str,
    state_dict: Mapping[str, Any],
    groups: Sequence[dict[str, Any]],
    needed: Iterable[str],
    positions: Iterable[str],
    check_hyperparameters: Callable[[dict[str, Any]], None],
    expected_states: ExpectedStates,
    updates_due: Callable[[int, int, dict[str, Any]], int | Tensor],
) -> dict[str, Any]:
    """A checkpoint with its groups as an optimizer has them. Refuses one of another method, or of parameters of other numbers or shapes.

    Args:
        needed: what each of its groups must hold.
        positions: which entries of a group are lists of positions.
        check_hyperparameters: refuses those of a group; before anything is derived from them, the shapes of states and whose turn it was.
        updates_due: from a group's index, a position in it and its hyperparameters to how many updates a parameter may have had.
    """
    check_is_state_dict(name, state_dict)
    saved_groups, state, taken = state_dict["param_groups"], dict(state_dict["state"]), []
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
        if not saved["params"]:  # lists of which torch.distributed.checkpoint has left nothing
            saved = {**dict.fromkeys(("missed", *positions), ()), **saved}
        missing = sorted(set(needed) - saved.keys())
        if missing:
            raise ValueError(
                f"{name}: param_groups[{index}] of the checkpoint lacks {', '.join(missing)}; it is damaged or of another version"
            )
        if len(set(saved["params"])) != len(saved["params"]):
            raise ValueError(f"{name}: param_groups[{index}] of the checkpoint names a parameter twice; it is damaged")
        saved = _by_position(name, f"param_groups[{index}]", saved, positions)
        taken.append(saved)
        merged = {**group, **saved}
        check_hyperparameters(merged)

        def due(position: int, index: int = index, merged: dict[str, Any] = merged) -> int:
            return int(updates_due(index, position, merged))

        check_counters(name, f"param_groups[{index}]", saved, due)
        for key, (position, expected) in zip(saved["params"], expected_states(index, merged), strict=True):
            never = due(position[1]) == saved["missed"].get(position[1], 0)
            if key not in state and not expected and not never:
                state[key] = {}  # torch.distributed.checkpoint keeps nothing of it
            elif key not in state:  # it gets its state, and the count that this takes, by a step
                saved["missed"].pop(position[1], None)
            else:
                which, of_parameter = name_at(groups, position), state[key]
                _check_saved_state(name, which, group["params"][position[1]], of_parameter, expected)
                moved = [k for k in expected if never and k.startswith("exp_avg") and bool((of_parameter[k] != 0).any())]
                if moved:
                    raise ValueError(
                        f"{name}: by the counters of the checkpoint {which} was never updated, but its {moved[0]} is not zero; "
                        "it is damaged"
                    )
    return {**state_dict, "state": state, "param_groups": taken}


def _check_saved_state(name: str, which: str, p: Tensor, saved: dict[str, Any], expected_state: dict[str, Tensor]) -> None:
    """Refuse the saved state of one parameter if a key is missing, or a shape is another, or a value is none that moments may have."""
    if not isinstance(saved, Mapping):
        raise ValueError(f"{name}: the state of {which} is a {type(saved).__name__} in the checkpoint, no dictionary; it is damaged")
    if "exp_avg_sq" in saved and "exp_avg_sq" not in expected_state:  # a step would divide by their root
        raise ValueError(f"{name}: {which} has exp_avg_sq in the checkpoint, and no second moments here; it is damaged or another method's")
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
