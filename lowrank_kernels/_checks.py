"""What arguments must be that are no tensors: an error names the function, the argument, what came and what is taken.

And how messages list many names. Operations, too, check numbers, integers, flags and choices here: ``torch.compile`` must be able to trace
that.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import nn


def first_few(names: Iterable[object], most: int = 4, separator: str = ", ") -> str:
    """The first of many names, for a message, and how many there are beside them."""
    found = list(map(str, names))
    return separator.join([*found[:most], *([f"and {len(found) - most} more"] if len(found) > most else [])])


def check_module(function: str, model: object) -> None:
    """Refuse what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def as_flag(function: str, argument: str, value: Any, optional: bool = False) -> bool:
    """True or False, or 1 or 0, NumPy's too, as Python's; or None, as False, where it is ``optional``. Of "False" nobody knows."""
    if isinstance(value, (int, np.bool_)) and value in (0, 1):
        return bool(value)
    if not (optional and value is None):
        raise TypeError(f"{function}: {argument} must be True or False{' or None' if optional else ''}, got {value!r:.80}")
    return False


def check_choice(function: str, argument: str, value: object, choices: Iterable[object], hint: str = "") -> None:
    """Refuse what is none of ``choices``."""
    taken = tuple(choices)
    if not (value is None or isinstance(value, str)) or value not in taken:
        raise ValueError(f"{function}: {argument} must be one of {', '.join(map(repr, taken))}, got {value!r:.80}{hint}")


def as_integer(function: str, argument: str, value: Any, least: float = 1, most: float = 2**31 - 1) -> int:
    """An integer, NumPy's too, as Python's; what is none, or is out of bounds, is refused. Compiled code counts with 32 bits."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise TypeError(f"{function}: {argument} must be an integer, got {value!r:.80}")
    number = int(value)
    if not least <= number <= most:
        raise ValueError(f"{function}: {argument} must be {f'≥ {least}' if number < least else f'≤ {most}'}, got {value}")
    return number


def as_number(function: str, argument: str, value: Any, least: float = -math.inf, *, positive: bool = False) -> float:
    """A number, NumPy's too, as Python's float; what is none, or not finite in fp64, or below ``least`` or not positive, is refused."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{function}: {argument} must be a number, got {value!r:.80}")
    try:
        number = float(value)
    except OverflowError:
        number, value = math.inf, "a number beyond 1.8e308"
    if positive and not number > 0:
        raise ValueError(f"{function}: {argument} must be positive, got {value}")
    if least > -math.inf and not number >= least:
        raise ValueError(f"{function}: {argument} must be ≥ {least:g}, got {value}")
    if not -math.inf < number < math.inf:  # math.isfinite() does not take what a compiler traces
        raise ValueError(f"{function}: {argument} must be finite, got {value}")
    return number


def check_path(function: str, argument: str, path: object) -> None:
    """Refuse what names no file or folder."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise TypeError(f"{function}: {argument} must be a path, a str or os.PathLike of one, got {path!r:.80}")
    if not os.fspath(path):
        raise ValueError(f"{function}: {argument} is empty; name a file or folder")
    if "\0" in os.fspath(path):
        raise ValueError(f"{function}: {argument} holds a NUL character, which no file system takes, got {path!r:.80}")
