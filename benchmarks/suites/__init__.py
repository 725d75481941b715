"""Suites: each yields cases for one model's shapes. A new one is a file here with a function under ``@suite(name)``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from lowrank_kernels.backends import force

from ..harness import Case
from ..shapes import Shape, layers


@dataclass(frozen=True)
class Setting:
    """What a suite makes its cases for."""

    model: str
    choice: str
    rank: int
    dtype: torch.dtype
    device: torch.device

    @property
    def shapes(self) -> str:
        """As in the CSV: "minilm/qv"."""
        return f"{self.model}/{self.choice}"

    @property
    def layers(self) -> list[Shape]:
        """(d_out, d_in) of the adapted layers."""
        return layers(self.model, self.choice)

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that could run on this device."""
        return ("reference", "native", "triton") if self.device.type == "cuda" else ("reference", "native")

    def generator(self, seed: int = 0) -> torch.Generator:
        """Random numbers on the device: every provider that asks gets the same inputs."""
        return torch.Generator(self.device).manual_seed(seed)


SUITES: dict[str, Callable[[Setting], Iterator[Case]]] = {}


def suite(name: str) -> Callable[[Callable[[Setting], Iterator[Case]]], Callable[[Setting], Iterator[Case]]]:
    """Register the decorated function as the suite ``name``."""

    def register(function: Callable[[Setting], Iterator[Case]]) -> Callable[[Setting], Iterator[Case]]:
        SUITES[name] = function
        return function

    return register


def on(backend: str) -> Callable[[], AbstractContextManager[object]]:
    """A context that forces a backend; "auto" leaves the choice to the registry."""
    return contextlib.nullcontext if backend == "auto" else lambda: force(backend)


from . import linalg, optimizer  # noqa: E402, F401  (they register themselves)
