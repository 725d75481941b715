"""What all optimizers of the package take, ``torch.optim.AdamW``'s arguments and a few more, and what they refuse."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, TypeAlias, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from ..._checks import as_flag, as_number, check_choice, check_module
from ...pairs import pairs
from ...parallel.shards import FLATTENED

ParamsT: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]] | nn.Module

#: The largest that one may be, a float and an integer: more, torch multiplies no fp32 tensor by, and adds to none.
LARGEST, LARGEST_INTEGER = torch.finfo(torch.float32).max, torch.iinfo(torch.int64).max
#: Those that may be None.
OPTIONAL = ("weight_decay", "factor_weight_decay")
#: How far below zero the lr of a group that is made may be.
ROUNDING = 1e-9
#: What may happen when a gradient is infinite or NaN.
NONFINITE_GRADS = ("keep", "skip", "raise")


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
    model: nn.Module | None


def pythons_number(value: Any) -> Any:
    """A number of another library (NumPy's, arrays of one or two too) as Python's, which checkpoints can hold, or several (betas); anything
    else as it is."""
    if type(value) in (int, float, bool):
        return value
    if isinstance(value, np.ndarray) and value.ndim < 2:
        value = value.tolist()
    if type(value) in (tuple, list):
        return type(value)(map(pythons_number, value))
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def pythons_hyperparameter(key: str, value: Any, numbers: Sequence[str]) -> Any:
    """:func:`pythons_number`, and an integer among the ``numbers`` as a float."""
    value = pythons_number(value)
    return float(value) if key in numbers and type(value) is int and abs(value) <= LARGEST else value


def refuse_adams(method: type, options: Mapping[str, Any]) -> None:
    """Refuse betas and eps for a method whose factors have a momentum alone: they would be those of the other parameters, silently."""
    for given in ("betas", "eps"):
        if given in options:
            raise TypeError(
                f"{method.__name__}: {given} is AdamW's, which steps only what is no factor here; the factors take momentum=. For the "
                f"other parameters, give {given} in a group of theirs: {{'params': others, '{given}': {options[given]!r}}}"
            )


def refuse_unknown(method: type, unknown: Mapping[str, Any]) -> None:
    """As Python refuses a keyword argument that nobody takes, with the one that may be meant."""
    if unknown:
        given = next(iter(unknown))
        taken = {*inspect.signature(method).parameters, *AdamWOptions.__annotations__}
        meant = "".join(f"; did you mean {close}?" for close in get_close_matches(given, taken, 1))
        raise TypeError(f"{method.__name__}() got an unexpected keyword argument {given!r}{meant}")


def check_options(
    name: str,
    *,
    amsgrad: bool,
    differentiable: bool,
    foreach: bool | None,
    fused: bool | None,
    scale: float | None,
    model: Any,
    capturable: bool,
    nonfinite_grads: str,
    atomic: bool,
) -> None:
    """Refuse what no optimizer here does, and options that exclude each other. (Hyperparameters are checked group by group.)"""
    for key, value, optional in (
        ("amsgrad", amsgrad, False),
        ("differentiable", differentiable, False),
        ("foreach", foreach, True),
        ("fused", fused, True),
        ("capturable", capturable, False),
        ("atomic", atomic, False),
    ):
        as_flag(name, key, value, optional)
    if amsgrad:
        raise ValueError(f"{name}: amsgrad=True is not supported; leave it out")
    if differentiable:
        raise ValueError(f"{name}: differentiable=True is not supported; step() is not differentiated through")
    if fused and foreach:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if scale is not None:
        as_number(name, "scale", scale, positive=True)
    if model is not None:
        check_module(name, model)
    check_choice(name, "nonfinite_grads", nonfinite_grads, NONFINITE_GRADS)
    if capturable and (nonfinite_grads != "keep" or atomic):
        raise ValueError(f"{name}: capturable=True takes neither nonfinite_grads={nonfinite_grads!r} nor atomic: both wait for the device")


def groups_of(name: str, params: ParamsT, with_partners: bool) -> list[Any]:
    """What ``torch.optim.Optimizer`` takes, of what the user gave: of a model its trainable parameters, with names.

    And ``with_partners`` the frozen factors of pairs of which the other is trained.
    """
    if isinstance(params, nn.Module):
        flat = next((m for m in params.modules() if type(m).__name__ == "FullyShardedDataParallel"), None)
        if flat is not None:
            raise ValueError(f"{name}: {FLATTENED}")
        partners = set()
        for pair in pairs(params) if with_partners else ():
            if pair.core is None and pair.A.requires_grad != pair.B.requires_grad:
                partners.add(id(pair.B if pair.A.requires_grad else pair.A))
        wanted = [(n, p) for n, p in params.named_parameters() if p.requires_grad or id(p) in partners]
        if not any(p.requires_grad for _, p in wanted):
            raise ValueError(f"{name}: the model has no parameter with requires_grad=True; adapt(model, …) first")
        return [{"params": wanted}]
    if isinstance(params, (Tensor, dict)) or not isinstance(params, Iterable):
        raise TypeError(f"{name}: params must be an iterable of tensors or dicts, or a model, got {type(params).__name__}")
    return list(params)


def named_as_the_others(groups: Sequence[dict[str, Any]], new: dict[str, Any]) -> dict[str, Any]:
    """The new group, its parameters with names if those of the others have names, which torch wants of all or none."""
    params = new["params"]
    if not (groups and "param_names" in groups[0]) or "param_names" in new or isinstance(params, set):
        return new
    params = [params] if isinstance(params, Tensor) else list(params)
    if not all(isinstance(p, Tensor) for p in params):
        return {**new, "params": params}
    return {**new, "params": [(f"param_groups[{len(groups)}][{index}]", p) for index, p in enumerate(params)]}


def check_parameters(name: str, group: dict[str, Any]) -> None:
    """Refuse parameters that no step can train."""
    seen = set()
    for index, p in enumerate(group["params"]):
        which = group["param_names"][index] if "param_names" in group else f"params[{index}]"
        if id(p) in seen:
            raise ValueError(f"{name}: {which} is in the group twice; each parameter takes one update per step")
        seen.add(id(p))
        if p.requires_grad and p.is_complex():
            raise TypeError(f"{name}: {which} is {p.dtype}; complex parameters are not supported, train torch.view_as_real of it")
        if any(stride == 0 and size > 1 for size, stride in zip(p.shape, p.stride(), strict=True)):
            raise ValueError(f"{name}: {which} is expanded, several of its elements are one number in memory; clone() it first")


def check_hyperparameters(name: str, group: dict[str, Any], numbers: Sequence[str]) -> None:
    """``torch.optim.AdamW``'s checks, in its words, and that the ``numbers`` are numbers."""
    lr, betas = group["lr"], group["betas"]
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2):
        raise ValueError(f"{name}: betas must be two numbers, got {betas!r}")
    for key, value in [*((key, group.get(key, 0.0)) for key in numbers), *(("betas", beta) for beta in betas)]:
        if type(value) is float and abs(value) <= LARGEST:
            continue
        # In a group that is made, weight_decay is a number.
        optional = key in OPTIONAL and (key == "factor_weight_decay" or "factor_weight_decay" not in group)
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not (number or (key == "lr" and isinstance(value, Tensor)) or (optional and value is None)):
            hint = "; of the hyperparameters only lr may be a tensor, pass float(…)" if isinstance(value, Tensor) else ""
            raise TypeError(f"{name}: {key} must be a number, got {value!r}{hint}")
        if number and abs(value) > (LARGEST_INTEGER if isinstance(value, Integral) else LARGEST):
            raise ValueError(f"{name}: {key} must be finite, and within the range of fp32, got {value!r:.80}")
    for key in ("amsgrad", "differentiable"):
        if group.get(key):
            raise ValueError(f"{name}: {key}=True is not supported; leave it out")
    for key in ("maximize", "capturable"):
        as_flag(name, key, group[key])
    if not group["lr_ratio"] > 0:
        raise ValueError(f"{name}: lr_ratio must be positive, got {group['lr_ratio']}")
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if lr.dtype is torch.bool or lr.is_complex() or lr.is_meta:
            raise TypeError(f"{name}: lr must be a number or a real tensor that has a value, got {lr.dtype} on {lr.device}")
        if lr.isinf():
            raise ValueError(f"{name}: lr must be finite, got {lr.item()}")
    # A schedule may end a rounding error below zero.
    if not lr >= (-ROUNDING if "factor_weight_decay" in group else 0.0):
        raise ValueError(f"Invalid learning rate: {float(lr)}")
    if not group["eps"] >= 0.0:
        raise ValueError(f"Invalid epsilon value: {group['eps']}")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if not 0.0 <= group.get("momentum", 0.0) < 1.0:
        raise ValueError(f"Invalid momentum value: {group['momentum']}")
    for key in OPTIONAL:
        decay = group.get(key)
        if decay is not None and not decay >= 0.0:
            raise ValueError(f"Invalid {key} value: {decay}")
