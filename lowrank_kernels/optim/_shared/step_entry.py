"""Wraps ``step()``: through torch's hooks and profiler when any are active, otherwise by a shorter path that saves 0.2 ms.

That is what torch's own wrapper takes after a backward pass, when none of its code is in the caches: more than the arithmetic of a small
model's step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

_P = ParamSpec("_P")
_R = TypeVar("_R")


def entered(step: Callable[_P, _R]) -> Callable[_P, _R]:
    """``step`` without gradients, with torch's step hooks and its record for the profiler, and outside of what ``torch.compile`` traces:
    its counters and schedules would be guards, one compilation for each of their values, and the work is in few large operations."""

    @functools.wraps(step)
    def without_grad(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            return step(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(enabled)

    observed = Optimizer.profile_hook_step(without_grad)

    @torch._disable_dynamo
    @functools.wraps(step)
    def entry(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # Where a subclass has a step of its own, torch has wrapped that.
        looked_at = _is_observed(args[0]) and type(args[0]).step is entry  # type: ignore[attr-defined]
        return observed(*args, **kwargs) if looked_at else without_grad(*args, **kwargs)

    entry.hooked = True  # type: ignore[attr-defined]  # else torch wraps it
    return entry


def _is_observed(self: Any) -> bool:
    """Whether there are hooks around its step, or a profiler is at work."""
    return bool(
        self._optimizer_step_pre_hooks
        or self._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or torch.autograd._profiler_enabled()
    )
