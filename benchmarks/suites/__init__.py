"""Suites: each yields cases for one model's shapes. A new one is a file here with a function under ``@suite(name, *operations)``."""

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
    """What a suite makes its cases for.

    Attributes:
        tokens: rows of the activations, in suites that have any.
        compile_seconds: how long ``torch.compile`` may take; 0 leaves that provider out.
    """

    model: str
    choice: str
    rank: int
    dtype: torch.dtype
    device: torch.device
    tokens: int = 256
    compile_seconds: float = 0.0

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
#: Suite → the operations of its cases, which are known before any inputs are made. Which of them there are is the setting's.
OPERATIONS: dict[str, tuple[str, ...]] = {}
#: Those whose cases do not depend on the model and the rank: once for each dtype is enough.
WITHOUT_MODEL: set[str] = set()


def suite(
    name: str, *operations: str, per_model: bool = True
) -> Callable[[Callable[[Setting], Iterator[Case]]], Callable[[Setting], Iterator[Case]]]:
    """Register the decorated function as the suite ``name``, whose cases are of these operations."""

    def register(function: Callable[[Setting], Iterator[Case]]) -> Callable[[Setting], Iterator[Case]]:
        SUITES[name], OPERATIONS[name] = function, operations
        if not per_model:
            WITHOUT_MODEL.add(name)
        return function

    return register


def on(backend: str) -> Callable[[], AbstractContextManager[object]]:
    """A context that forces a backend; "auto" leaves the choice to the registry."""
    return contextlib.nullcontext if backend == "auto" else lambda: force(backend)


from . import forward, init, linalg, memory, optimizer, scaling, step  # noqa: E402, F401  (they register themselves)
