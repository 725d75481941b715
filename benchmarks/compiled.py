"""``torch.compile`` as a provider, within a time limit."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lowrank_kernels.backends import BackendError


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TimeoutError`` inside the block after ``seconds``; in the main thread of a POSIX system."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    # Again every second: one that strikes while the compiler cleans up is swallowed there.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compiled(function: Callable[..., Any], seconds: float, warm_up: Callable[[Callable[..., Any]], object]) -> Callable[..., Any]:
    """``torch.compile(function)``, compiled by ``warm_up(compiled function)``.

    Raises:
        BackendError: it does not compile, or not within ``seconds``; the row of the benchmark says which.
    """
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    call = torch.compile(function, dynamic=False)
    try:
        # In this process: a pool of compilers would outlive the limit, and disturb what is timed next.
        with inductor.patch(compile_threads=1), time_limit(seconds):
            warm_up(call)
    except Exception as error:
        torch._dynamo.reset()
        # The alarm arrives anywhere inside the compiler, which wraps it in errors of its own.
        if _caused_by_timeout(error):
            raise BackendError(f"torch.compile took more than {seconds:g} s") from error
        raise BackendError(f"torch.compile: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    return call


def _caused_by_timeout(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, TimeoutError) or "TimeoutError" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
