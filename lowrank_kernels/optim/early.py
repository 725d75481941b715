"""Work on copies of tensors that runs beside the backward pass: in a worker thread on a CPU, on a side stream on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = tuple[list[Tensor], ...]

_workers: list[ThreadPoolExecutor] = []
_streams: dict[torch.device, torch.cuda.Stream] = {}


class EarlyWork:
    """What :func:`start` began; :meth:`result` waits for it."""

    def __init__(self, copies: Tensors, lr: object, work: Future[None] | torch.cuda.Stream) -> None:
        self.copies, self.lr, self.work = copies, lr, work

    def wait(self) -> None:
        """Let what the work reads be freed: the current stream waits for it. A thread holds what it reads itself."""
        if isinstance(self.work, torch.cuda.Stream):
            torch.cuda.current_stream(self.work.device).wait_stream(self.work)

    def result(self, lr: object) -> Tensors | None:
        """The changed copies, or None if they were made with another lr."""
        self.wait()
        if isinstance(self.work, Future):
            self.work.result()
        return self.copies if bool(self.lr == lr) else None


def start(change: Callable[[Tensors], None], tensors: Tensors, lr: object) -> EarlyWork:
    """Begin ``change(copies of tensors)`` and return at once. ``lr`` says with which learning rate."""
    lr = lr.clone() if isinstance(lr, Tensor) else lr  # it may be changed in place
    device = tensors[0][0].device
    if device.type != "cuda":
        copies = tuple([tensor.clone() for tensor in part] for part in tensors)
        if not _workers:
            _workers.append(ThreadPoolExecutor(1, thread_name_prefix="lowrank_kernels"))
        return EarlyWork(copies, lr, _workers[0].submit(_without_grad, change, copies))
    side, current = _streams.setdefault(device, torch.cuda.Stream(device)), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        copies = tuple([tensor.clone() for tensor in part] for part in tensors)
        change(copies)
    for part in copies:
        for tensor in part:
            tensor.record_stream(current)
    return EarlyWork(copies, lr, side)


def _without_grad(change: Callable[[Tensors], None], copies: Tensors) -> None:
    with torch.no_grad():  # a thread's own setting
        change(copies)
