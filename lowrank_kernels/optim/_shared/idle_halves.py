"""Gradient hooks that zero the half of a foreign layer's factor that its optimizer does not train.

A parameter belongs to one optimizer at a time. What is kept alive after its run, by a scheduler or in a notebook, must not go on holding
back gradients of what others train.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Slices = tuple[slice, ...]

#: By their size, the integers that have the bits of floating-point numbers.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

#: By the parameter's id, the hook of the optimizer that trains it.
_owned: dict[int, IdleHalf] = {}


class IdleHalf:
    """A hook on one parameter, which takes it from the optimizer that had one there.

    Args:
        parameter: of the group ``optimizer.param_groups[group_index]``, whose ``step`` counts the optimizer's steps.
        idle: from the optimizer to the half that it does not train at the moment.
    """

    __slots__ = ("_group_index", "_handle", "_idle", "_key", "_seen", "_sum", "active", "optimizer", "parameter")

    def __init__(self, parameter: Tensor, optimizer: Optimizer, group_index: int, idle: Callable[[Any], Slices]) -> None:
        self.parameter, self.optimizer = weakref.ref(parameter), weakref.ref(optimizer)
        self._key, self._group_index, self._idle = id(parameter), group_index, idle
        self._seen: tuple[int, Any] | None = None
        self._sum: Tensor | None = None  # of the values then; None: others have written others since
        self.active = True
        if (other := owner(parameter)) is not None:
            other.remove()
        _owned[self._key] = self
        # torch hooks only what is trained at the moment, and the hook stays when that changes: a frozen one may be thawed.
        trained = parameter.requires_grad
        self._handle = parameter.requires_grad_(True).register_hook(self)
        parameter.requires_grad_(trained)

    def __call__(self, grad: Tensor) -> Tensor | None:
        optimizer, parameter = self.optimizer(), self.parameter()
        if optimizer is None or parameter is None:
            return None
        seen = parameter._version, optimizer.param_groups[self._group_index]["step"]
        if seen != self._seen:
            if self._seen is None or self._seen[1] != seen[1]:
                self._sum = _sum(parameter)
            # Written since the last gradient, and not by a step of this optimizer: where other values have come, by another one (torch's),
            # which trains both halves. The same ones were loaded, or an average of the model was swapped in and out.
            elif self._sum is None or _sum(parameter) != self._sum:
                self._sum = None
                return None
            self._seen = seen
        grad = grad.clone()
        grad[self._idle(optimizer)] = 0
        return grad

    def forget(self) -> None:
        """What was seen is of another state: one was loaded."""
        self._seen = None

    def remove(self) -> None:
        """Take the hook off its parameter."""
        self.active = False
        self._handle.remove()
        if _owned.get(self._key) is self:
            del _owned[self._key]


def _sum(parameter: Tensor) -> Tensor:
    """What tells values from others, in a launch and without a copy of them: of their bits, in which no step is rounded away."""
    return parameter.detach().view(_BITS[parameter.element_size()]).sum()


def owner(parameter: Tensor) -> IdleHalf | None:
    """The hook on this parameter."""
    found = _owned.get(id(parameter))
    return found if found is not None and found.parameter() is parameter else None


def take_over(optimizer: Optimizer, params: Iterable[Tensor]) -> None:
    """Remove other optimizers' hooks on what ``optimizer`` is about to train."""
    if _owned:
        for p in params:
            found = owner(p)
            if found is not None and p.requires_grad and found.optimizer() is not optimizer:
                found.remove()


def remove_all(hooks: dict[Any, IdleHalf]) -> None:
    """When their optimizer is collected."""
    for hook in hooks.values():
        hook.remove()
