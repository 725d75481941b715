"""``explain()``: which backend each operation runs on, why, and what actually ran so far."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import first_few
from .backends import registry
from .optim._shared.base import LowRankOptimizer


@dataclass(frozen=True)
class Choice:
    """One operation on one kind of call: the backend that takes it, and every backend's answer."""

    operation: str
    device: str
    what: str
    backend: str
    reasons: dict[str, str]


@dataclass(frozen=True, repr=False)
class Explanation:
    """What :func:`explain` found; its ``str`` is the report, and its ``repr``, which a notebook shows beside what was printed, is short."""

    choices: list[Choice]
    unavailable: dict[str, str]
    calls: dict[tuple[str, str], int]
    libraries: list[str] = field(default_factory=list)
    forced: str = field(default_factory=lambda: os.environ.get(registry.ENVIRONMENT_VARIABLE, ""))
    asked: bool = True

    def _lines(self) -> Iterator[str]:
        yield f"lowrank_kernels, torch {torch.__version__}, {torch.get_num_threads()} CPU threads, CUDA {torch.cuda.is_available()}"
        if self.forced:
            yield f"forced by {registry.ENVIRONMENT_VARIABLE}={self.forced}"
        for backend, cause in self.unavailable.items():
            yield f"backend {backend} is not available: {cause}"
        for line in self.libraries:
            yield f"CUDA libraries of the native backend: {line}"
        for (operations, device, backend, reasons), kinds in _grouped(self.choices).items():
            yield f"{', '.join(operations)} on {device} ({first_few(kinds, separator='; ')}): {backend}"
            for name, reason in reasons:
                yield f"    {name}: {reason}"
        if not self.choices:
            nothing = "what was passed calls no operation of this package; adapt() it, or use PEFT's with_kernels()"
            yield nothing if self.asked else "pass a model or an optimizer to see what its calls run on"
        for (operation, backend), count in sorted(self.calls.items()):
            yield f"ran so far: {operation} on {backend}, {count} calls"

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def __repr__(self) -> str:
        return f"<Explanation of {len(self.choices)} calls; print it for the report>"


def _grouped(choices: list[Choice]) -> dict[tuple[tuple[str, ...], str, str, tuple[tuple[str, str], ...]], list[str]]:
    """Operations, device, backend and reasons → the kinds of calls of which all that is true."""
    calls: dict[tuple[str, str, str, tuple[tuple[str, str], ...]], list[str]] = {}
    for choice in choices:
        calls.setdefault((choice.operation, choice.device, choice.backend, tuple(choice.reasons.items())), []).append(choice.what)
    operations: dict[tuple[object, ...], list[str]] = {}
    for (operation, *rest), kinds in calls.items():
        operations.setdefault((*rest, tuple(kinds)), []).append(operation)
    return {(tuple(operations[*rest, tuple(kinds)]), *rest): kinds for (_, *rest), kinds in calls.items()}  # type: ignore[misc]


def _cuda_libraries() -> list[str]:
    """Where the native backend finds cuSOLVER and cuBLAS, or why it does not; nothing without that backend or CUDA."""
    if torch.version.cuda is None or "native" in registry.unavailable():
        return []
    from .backends.native.cuda_libraries import report

    return report()


def _count(taken: Any) -> int:
    """Of how many matrices a call is, by what it takes first: a list, a stack, or a tuple of such."""
    while not isinstance(taken, Tensor) and not isinstance(taken[0], Tensor):
        taken = taken[0]
    return len(taken)


def explain(
    model: nn.Module | torch.optim.Optimizer | None = None, optimizer: nn.Module | torch.optim.Optimizer | None = None
) -> Explanation:
    """Print and return which backend the operations of ``model`` and ``optimizer`` run on, with each backend's reason.

    Args:
        model: a model with our adapters; or an optimizer alone; or nothing.
        optimizer: an optimizer of this package. (In the other order they are taken, too.)

    The report also counts what ran in this process so far: "was the fast path used at all?".

    Raises:
        TypeError: something that is no model, or an optimizer that is not one of ours.
        BackendError: a forced backend cannot take one of the calls.
    """
    if isinstance(model, torch.optim.Optimizer) or isinstance(optimizer, nn.Module):
        model, optimizer = optimizer, model
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"explain: model must be a module, got {type(model).__module__}.{type(model).__name__}; pass one of each at most")
    if optimizer is not None and not isinstance(optimizer, LowRankOptimizer):
        raise TypeError(f"explain: optimizer must be one of lowrank_kernels, got {type(optimizer).__module__}.{type(optimizer).__name__}")
    # Our adapter layers, and PEFT's with our kernels.
    telling = [] if model is None else [module for module in model.modules() if hasattr(module, "_example_calls")]
    calls = [call for module in telling for call in module._example_calls()]  # type: ignore[operator]
    if optimizer is not None:
        calls += [(op, device, f"{_count(args[0])} tensors", args) for op, device, args in optimizer._example_calls()]
    choices = []
    for operation, device, what, args in calls:
        selection = registry.select(operation, device, args)
        choice = Choice(operation, device, what, selection.implementation.backend, selection.reasons)
        if choice not in choices:  # a step says of A and of B the same, as a rule
            choices.append(choice)
    asked = model is not None or optimizer is not None
    explanation = Explanation(choices, registry.unavailable(), registry.call_counts(), _cuda_libraries(), asked=asked)
    print(explanation)
    return explanation
