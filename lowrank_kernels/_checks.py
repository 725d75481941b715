"""What arguments must be, for the rooms above ``ops``: an error names the function, the argument, what came and what is taken."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import nn


def check_module(function: str, model: object) -> None:
    """Refuse what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def check_flag(function: str, argument: str, value: object, optional: bool = False) -> None:
    """Refuse what is neither true nor false: of "False" and other objects nobody knows."""
    if not (isinstance(value, (bool, int, np.bool_)) or (optional and value is None)):
        raise TypeError(f"{function}: {argument} must be True or False{' or None' if optional else ''}, got {value!r:.80}")


def check_choice(function: str, argument: str, value: object, choices: Iterable[object], hint: str = "") -> None:
    """Refuse what is none of ``choices``."""
    taken = tuple(choices)
    if not (value is None or isinstance(value, str)) or value not in taken:
        raise ValueError(f"{function}: {argument} must be one of {', '.join(map(repr, taken))}, got {value!r:.80}{hint}")


def as_integer(function: str, argument: str, value: Any, least: int = 1) -> int:
    """An integer, NumPy's too, as Python's; what is none, or is below ``least``, is refused."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{function}: {argument} must be an integer, got {value!r:.80}")
    if value < least:
        raise ValueError(f"{function}: {argument} must be at least {least}, got {value}")
    return int(value)


def as_number(function: str, argument: str, value: Any, least: float = -math.inf, *, positive: bool = False) -> float:
    """A number, NumPy's too, as Python's float; what is none, or is not finite, or is below ``least`` or not positive, is refused."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{function}: {argument} must be a number, got {value!r:.80}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and number >= least and (number > 0 or not positive)):
        bound = "positive and " if positive else f"≥ {least:g} and " if least > -math.inf else ""
        raise ValueError(f"{function}: {argument} must be {bound}finite, got {number:g}")
    return number


def check_path(function: str, argument: str, path: object) -> None:
    """Refuse what names no file or folder."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise TypeError(f"{function}: {argument} must be a path, a str or os.PathLike of one, got {path!r:.80}")
    if not os.fspath(path):
        raise ValueError(f"{function}: {argument} is empty; name a file or folder")
    if "\0" in os.fspath(path):
        raise ValueError(f"{function}: {argument} holds a NUL character, which no file system takes, got {path!r:.80}")
