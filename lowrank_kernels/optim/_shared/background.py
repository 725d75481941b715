"""Work on copies of tensors that runs beside the backward pass: in a worker thread on a CPU, on a side stream on a GPU.

The worker computes with as many threads as the rest (``torch.get_num_threads()``), at the same time: for moments there are more threads
than cores. One thread for the worker measured no better on two cores (8 layers 384², r = 8, 512 tokens, interleaved: medians 54 and 56 ms,
best 49 and 42), and torch can only be told so for the whole process.
"""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = tuple[list[Tensor], ...]

#: The thread that works, once there is one.
_workers: list[ThreadPoolExecutor] = []
_streams: dict[torch.device, torch.cuda.Stream] = {}

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.clear)  # a forked child has no threads but one


class EarlyWork:
    """What :func:`start` began, by a worker or on a stream; :meth:`result` waits for it."""

    def __init__(
        self, copies: Tensors, made_from: Sequence[object], work: Future[None] | torch.cuda.Stream, worker: ThreadPoolExecutor | None = None
    ) -> None:
        self.copies, self.made_from, self.work, self.worker = copies, made_from, work, worker

    def wait(self) -> None:
        """The current stream waits for the work. A thread is not waited for: it holds what it reads."""
        if isinstance(self.work, torch.cuda.Stream):
            torch.cuda.current_stream(self.work.device).wait_stream(self.work)

    def result(self, now: Sequence[object]) -> Tensors | None:
        """The changed copies; None if they were made from something else than ``now``, or were begun before this process was forked."""
        self.wait()
        if isinstance(self.work, Future):
            if self.worker not in _workers:
                return None
            self.work.result()
        return self.copies if all(bool(then == value) for then, value in zip(self.made_from, now, strict=True)) else None


def start(change: Callable[[Tensors], None], tensors: Tensors, made_from: Sequence[object], reads: Sequence[Tensor]) -> EarlyWork:
    """Begin ``change(copies of tensors)`` and return at once.

    Args:
        made_from: hyperparameters and versions on which the result depends.
        reads: what ``change`` reads beside the copies, apart from what outlives the step anyway.
    """
    made_from = [value.clone() if isinstance(value, Tensor) else value for value in made_from]  # they may be changed in place
    device = tensors[0][0].device
    if device.type != "cuda":
        copies = tuple([tensor.clone() for tensor in part] for part in tensors)
        if not _workers:
            _workers.append(ThreadPoolExecutor(1, thread_name_prefix="lowrank_kernels"))
        # In a copy of this thread's context: force() holds for the worker too.
        work = _workers[0].submit(contextvars.copy_context().run, _without_grad, change, copies)
        return EarlyWork(copies, made_from, work, _workers[0])
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    side, current = _streams[device], torch.cuda.current_stream(device)
    side.wait_stream(current)
    # Whoever frees these does not wait: a recorder that begins anew after model.zero_grad(), say.
    for tensor in (*reads, *(tensor for part in tensors for tensor in part)):
        tensor.record_stream(side)
    with torch.cuda.stream(side):
        copies = tuple([tensor.clone() for tensor in part] for part in tensors)
        change(copies)
    for part in copies:
        for tensor in part:
            tensor.record_stream(current)
    return EarlyWork(copies, made_from, side)


def _without_grad(change: Callable[[Tensors], None], copies: Tensors) -> None:
    with torch.no_grad():  # a thread's own setting
        change(copies)
