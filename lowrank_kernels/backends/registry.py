"""The registry: which backend takes a call, and why the others do not.

An implementation is a function with the operation's backend signature (see the operation's file in ``ops/``) and a
``verify`` function of the same arguments that answers ``(ok, reason)`` without touching any data. The first one that
takes the call runs it, in the order of :data:`PREFERENCE`. ``LOWRANK_KERNELS_BACKEND`` (or :func:`force`) replaces the
choice: a forced backend that cannot take the call is an error, never a silent fallback.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from .dtypes import under_autocast

ENVIRONMENT_VARIABLE = "LOWRANK_KERNELS_BACKEND"
BACKENDS = ("triton", "native", "reference")
#: The order in which backends are asked, by device type. Anything else gets the reference.
PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")}

Verdict = tuple[bool, str]


class BackendError(RuntimeError):
    """A backend was forced that cannot take the call."""


@dataclass(frozen=True)
class Implementation:
    """One operation on one backend."""

    operation: str
    backend: str
    function: Callable[..., Any]
    verify: Callable[..., Verdict]


@dataclass(frozen=True)
class Selection:
    """The outcome of one choice: the implementation, and what every backend that was asked answered."""

    implementation: Implementation
    reasons: dict[str, str]


_implementations: dict[str, dict[str, Implementation]] = {}
_unavailable: dict[str, str] = {}
#: What :func:`force` asks for in this thread (or asynchronous task).
_forced: ContextVar[dict[str, str] | None] = ContextVar("lowrank_kernels_forced", default=None)
#: What it asks for in any thread, the newest last: for autograd's own threads, in which backward passes on a device run.
_forced_anywhere: list[dict[str, str]] = []
_loaded = False
_loading = threading.RLock()  # a backend that asks something while it is imported must not wait for itself
_calls: Counter[tuple[str, str]] = Counter()
_launches = 0


def implements(operation: str, backend: str, verify: Callable[..., Verdict]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as ``operation`` on ``backend``; ``verify(*args)`` says whether it takes a call."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _implementations.setdefault(operation, {})[backend] = Implementation(operation, backend, function, verify)
        return function

    return register


def implementations(operation: str) -> dict[str, Implementation]:
    """Every implementation of ``operation``, by backend.

    Raises:
        ValueError: there is no such operation.
    """
    _load()
    return dict(_of(operation))


def _of(operation: str) -> dict[str, Implementation]:
    try:
        return _implementations[operation]
    except (KeyError, TypeError):
        raise ValueError(f"there is no operation {operation!r:.80}; backends.registry.operations() returns the names of all") from None


def unavailable() -> dict[str, str]:
    """Backends that did not load on this machine, with the cause."""
    _load()
    return dict(_unavailable)


def operations() -> list[str]:
    """The names of all operations."""
    _load()
    return sorted(_implementations)


def _load() -> None:
    """Import the backends once. One that cannot be imported is remembered with its reason, not raised.

    Other threads wait until all are there: half a registry would refuse calls, or choose differently.
    """
    global _loaded
    if _loaded:
        return
    with _loading:
        if _loaded:
            return
        for backend in reversed(BACKENDS):
            try:
                importlib.import_module(f"{__package__}.{backend}")
            except ImportError as error:
                if backend == "reference":
                    raise
                _unavailable[backend] = f"{type(error).__name__}: {error}"
        _loaded = True
    if "native" in _unavailable:
        # Every machine can have this backend, so missing it is worth a word; Triton is not for every machine.
        warnings.warn(
            f"lowrank_kernels: the native backend is missing, its operations run on the slower reference: "
            f"{_unavailable['native'].partition(': ')[2]}",
            RuntimeWarning,
            stacklevel=2,
        )


def _parse_forced(text: str, said: str) -> dict[str, str]:
    """``"native"`` or ``"native,lora_linear=reference"``: a backend for all operations ("*"), and exceptions. ``said``: where it stands."""
    forced: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        operation, _, backend = part.rpartition("=")
        if backend not in BACKENDS or (operation and operation not in _implementations):
            raise BackendError(
                f"{said}: cannot read {part!r}; write one of {', '.join(BACKENDS)}, and for "
                f"exceptions operation=backend with an operation of {', '.join(sorted(_implementations))}"
            )
        forced[operation or "*"] = backend
    return forced


_environment_cache: tuple[str, dict[str, str]] = ("", {})
_KEY = os.environ.encodekey(ENVIRONMENT_VARIABLE)


def _environment() -> str:
    """What the variable says now. For one that is not set ``os.environ`` raises and catches two exceptions: 30 µs, out of the caches."""
    data = getattr(os.environ, "_data", None)
    return "" if data is not None and _KEY not in data else os.environ.get(ENVIRONMENT_VARIABLE, "")


def _forced_mapping() -> dict[str, str]:
    """The backends that are forced now: for operations, and for all others under "*"."""
    global _environment_cache
    mapping = _forced.get()
    if mapping is None and _forced_anywhere and isinstance(threading.current_thread(), threading._DummyThread):
        mapping = _forced_anywhere[-1]
    if mapping is None:
        text = _environment()
        if not text:
            return {}
        if _environment_cache[0] != text:
            _environment_cache = (text, _parse_forced(text, f"{ENVIRONMENT_VARIABLE}={text!r}"))
        mapping = _environment_cache[1]
    return mapping


def _forced_backend(operation: str) -> str | None:
    mapping = _forced_mapping()
    return mapping.get(operation, mapping.get("*")) if mapping else None


def _refused(operation: str, backend: str, why: str) -> BackendError:
    """The error of a forced backend that cannot take a call; where it was forced for all operations, with the exceptions to write."""
    mapping, hint = _forced_mapping(), ""
    if operation not in mapping and backend != "reference":
        base = operation.removesuffix("_backward")
        exceptions = {name: "reference" for name in (base, f"{base}_backward") if name in _implementations}
        rest = {name: value for name, value in mapping.items() if name != "*"} | exceptions
        hint = f"; write {','.join([backend, *(f'{name}={value}' for name, value in rest.items())])}"
    return BackendError(f"{operation}: backend {backend!r} was forced, but {why}{hint}")


@contextlib.contextmanager
def force(backends: str) -> Iterator[None]:
    """Within the context, operations run on the named backend (the syntax of ``LOWRANK_KERNELS_BACKEND``).

    It holds for the thread that enters it, and for autograd's threads, which run the backward passes of all.

    Raises:
        TypeError: ``backends`` is no string.
        BackendError: it cannot be read, or, at a call inside, the backend cannot take that.
    """
    if not isinstance(backends, str):
        raise TypeError(f"force: backends must be a string, such as 'reference' or 'native,grouped_qr=reference', got {backends!r:.80}")
    _load()
    mapping = _parse_forced(backends, f"force({backends!r})")
    token = _forced.set(mapping)
    _forced_anywhere.append(mapping)
    try:
        yield
    finally:
        _forced.reset(token)
        with _loading:  # another thread may leave at the same time
            del _forced_anywhere[next(i for i, entry in enumerate(_forced_anywhere) if entry is mapping)]


def select(operation: str, device_type: str, args: tuple[Any, ...]) -> Selection:
    """Choose the implementation of ``operation`` for a call with ``args`` on ``device_type``.

    Raises:
        ValueError: there is no such operation.
        BackendError: a backend is forced that is not built, does not have the operation, or refuses the call.
    """
    if not _loaded:
        _load()
    available = _of(operation)
    forced = _forced_backend(operation)
    if forced is not None:
        if forced not in available:
            why = _unavailable.get(forced, f"it does not implement {operation}")
            raise _refused(operation, forced, why)
        ok, reason = available[forced].verify(*args)
        if not ok:
            raise _refused(operation, forced, reason)
        return Selection(available[forced], {forced: f"forced; {reason}"})
    reasons: dict[str, str] = {}
    for backend in PREFERENCE.get(device_type, ("reference",)):
        if backend not in available:
            reasons[backend] = _unavailable.get(backend, "does not implement it")
            continue
        ok, reasons[backend] = available[backend].verify(*args)
        if ok:
            return Selection(available[backend], reasons)
    raise AssertionError(f"{operation}: the reference refused a call: {reasons}")  # pragma: no cover


def run(operation: str, device_type: str, *args: Any) -> Any:
    """Choose an implementation and run it, with autocast off inside: the operation has settled its dtypes before."""
    return call(select(operation, device_type, args).implementation, device_type, args)


def do_nothing() -> None:
    """The ``begin_writing`` of callers who need not know."""


def run_in_place(begin_writing: Callable[[], object], operation: str, device_type: str, *args: Any) -> Any:
    """:func:`run` of a call that writes into its arguments: ``begin_writing`` is called once the call is taken."""
    implementation = select(operation, device_type, args).implementation
    begin_writing()
    return call(implementation, device_type, args)


def whole(operation: str, parts: tuple[str, ...], device_type: str) -> Implementation | None:
    """Look for a fused implementation of an operation that is a composition of ``parts``.

    Returns the preferred (or forced) backend's, or None if it has none or if the parts would run on different backends. The arguments
    are not checked; call ``verify``.
    """
    if not _loaded:
        _load()
    backend = _preferred(device_type)
    if forced := _forced_mapping():
        backends = {forced.get(name, forced.get("*", backend)) for name in (operation, *parts)}
        if len(backends) > 1:
            return None
        (backend,) = backends
    return _implementations.get(operation, {}).get(backend)


def _preferred(device_type: str) -> str:
    for backend in PREFERENCE.get(device_type, ()):
        if backend not in _unavailable:
            return backend
    return "reference"


def call(implementation: Implementation, device_type: str, args: tuple[Any, ...]) -> Any:
    """Run an implementation that has been found to take these arguments, and count the call."""
    _calls[implementation.operation, implementation.backend] += 1
    if not under_autocast(device_type):
        return implementation.function(*args)
    # A sixth of the time of ``torch.autocast(…, enabled=False)``, which also counts its depth and looks after a cache of casts.
    torch.set_autocast_enabled(device_type, False)
    try:
        return implementation.function(*args)
    finally:
        torch.set_autocast_enabled(device_type, True)


def call_counts() -> dict[tuple[str, str], int]:
    """How often each ``(operation, backend)`` ran in this process: "was the fast path used at all?"."""
    return dict(_calls)


def count_launch() -> None:
    """Note one device kernel launch or one call into compiled code; the backends call this."""
    global _launches
    _launches += 1


def launch_count() -> int:
    """Kernel launches (Triton, cuSOLVER, cuBLAS) and calls into compiled code (CPU) in this process so far."""
    return _launches
