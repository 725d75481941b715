"""How things are timed.

All providers of a case are built first and judged against fp64. Those that are right are then timed in turn, one call
each per round, the order rotating: what disturbs the machine disturbs all of them, and each call finds the caches as
the others left them, as the optimizer finds them after a backward pass. A provider that is wrong, or cannot run here,
gets a row that says so and shows no time.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from lowrank_kernels.backends import BackendError, launch_count

from .ceilings import Ceilings
from .results import Row


@dataclass(frozen=True)
class Trial:
    """One provider, ready on inputs of its own.

    Attributes:
        run: one call; what is timed.
        check: after the very first ``run()``: (error against fp64, tolerance).
        context: entered around each turn, outside of the clock (to force a backend).
        ours: whether the launches of this package are to be counted.
        state: after the first ``run()``: how many bytes are kept from call to call (of an optimizer).
    """

    run: Callable[[], object]
    check: Callable[[], tuple[float, float]]
    context: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    ours: bool = False
    state: Callable[[], int] | None = None


@dataclass(frozen=True)
class Case:
    """One operation on one set of inputs, and who offers it.

    Attributes:
        op: the operation.
        shapes: "minilm/qv", as in the CSV.
        bytes: what must move if everything is read and written once.
        tensors: how many tensors (or matrices) the call is about.
        providers: name → builder; the baseline is called "naive". Every builder makes the same inputs anew.
        rival: the provider that is the best one can have without this package.
        flops: of the matrix products that cannot be avoided, by the dtype that they are computed in.
        tokens: rows of the activations, where there are any.
    """

    op: str
    shapes: str
    rank: int
    dtype: torch.dtype
    device: torch.device
    bytes: int
    tensors: int
    providers: Mapping[str, Callable[[], Trial]]
    rival: str = "naive"
    flops: Mapping[torch.dtype, int] = field(default_factory=dict)
    tokens: int | None = None


@dataclass(frozen=True)
class Budget:
    """How long to measure a case: at least ``min_rounds`` rounds of all providers, then until ``seconds`` or ``max_rounds`` are
    reached. Where that would take more than four times ``seconds``, one round to warm up and three to measure are enough."""

    seconds: float = 5.0
    warmup: int = 3
    min_rounds: int = 7
    max_rounds: int = 300


#: name of a provider → one list of milliseconds per column
Times = dict[str, dict[str, list[float]]]


def worst(judgements: list[tuple[float, float]]) -> tuple[float, float]:
    """Of several (error, tolerance) the one that fails most; NaN fails most of all."""
    return max(judgements, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0] / pair[1])


def failures() -> tuple[type[Exception], ...]:
    """What a provider may raise that must not end the run: torch's errors, out of memory too, and Triton's, which are of no such kind."""
    try:
        import triton
    except ImportError:
        return (RuntimeError,)
    return RuntimeError, triton.TritonError


def passes(error: float, tolerance: float) -> bool:
    """Whether an error is within its tolerance (NaN is not)."""
    return error <= tolerance


def interleave(calls: Mapping[str, Callable[[], dict[str, float]]], budget: Budget) -> Times:
    """Call everything in turn, ``budget.warmup`` rounds unrecorded first; each call answers its measured columns.

    Round i starts with provider i mod n, so that nobody always follows the same neighbour's state of the caches.
    """
    names = list(calls)
    times: Times = {name: {} for name in names}
    if not names:
        return times
    warmup = budget.warmup
    started = time.perf_counter()
    for index in itertools.count():
        elapsed = time.perf_counter() - started
        if index == 1 and elapsed * (budget.warmup + budget.min_rounds) > 4 * budget.seconds:
            warmup = 1
        if index == warmup:
            started, elapsed = time.perf_counter(), 0.0
        recorded = index - warmup
        limit = budget.seconds if recorded >= budget.min_rounds else 4 * budget.seconds
        if recorded >= budget.max_rounds or (recorded >= min(3, budget.min_rounds) and elapsed > limit):
            break
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            measured = calls[name]()
            if recorded >= 0:
                for column, milliseconds in measured.items():
                    times[name].setdefault(column, []).append(milliseconds)
    return times


def _cpu_clock(trial: Trial) -> Callable[[], dict[str, float]]:
    def measure() -> dict[str, float]:
        with trial.context():
            start = time.perf_counter()
            trial.run()
            return {"main": 1e3 * (time.perf_counter() - start)}

    return measure


def _cuda_clock(trial: Trial, device: torch.device) -> Callable[[], dict[str, float]]:
    """Event time, replay time and wall time of one call each.

    Before the events, the device is kept busy for longer than the host needs to issue the call: what lies between the
    events is then device time, not the host's.
    """
    graph = _capture(trial, device)
    last_wall = [1e-3]
    cycles_per_second = 2e9  # no current GPU clocks faster; a slower one only waits longer

    def between_events(call: Callable[[], object], head_start: float) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if head_start:
            torch.cuda._sleep(int(min(head_start, 0.05) * cycles_per_second))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def measure() -> dict[str, float]:
        with trial.context(), torch.cuda.device(device):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            trial.run()
            torch.cuda.synchronize(device)
            last_wall[0] = time.perf_counter() - start
            columns = {"wall": 1e3 * last_wall[0], "main": between_events(trial.run, 1.5 * last_wall[0])}
            if graph is not None:
                columns["graph"] = between_events(graph.replay, 1e-4)
            return columns

    return measure


#: Graphs whose capture failed. torch's allocator goes on asking them which streams they capture, so they must not be freed.
_failed_captures: list[torch.cuda.CUDAGraph] = []


def _capture(trial: Trial, device: torch.device) -> torch.cuda.CUDAGraph | None:
    """A CUDA graph of one call; None where the call cannot be captured (it synchronizes, or calls cuSOLVER)."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        with trial.context(), torch.cuda.device(device):
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(3):
                    trial.run()
            torch.cuda.current_stream(device).wait_stream(side)
            with torch.cuda.graph(graph):
                trial.run()
            graph.replay()
            torch.cuda.synchronize(device)
    except failures():
        _failed_captures.append(graph)
        _recover_from_capture(device, stream)
        return None
    return graph


def _recover_from_capture(device: torch.device, stream: torch.cuda.Stream) -> None:
    """Undo what a failed capture leaves behind where ending it failed too: its stream is still the current one, and the generator of
    the device takes itself to be captured, which makes an error of every later random number, until a capture succeeds."""
    with torch.cuda.device(device):
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize(device)
        with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device=device)
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize(device)


def peak_temporary_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak of what torch allocated during the call and had not yet freed. Scratch of compiled code on a CPU is not seen."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    # Not profiler.events(): those leave out what was allocated inside an operator.
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Some builds of the profiler log every start and stop to file descriptor 2."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor with its vector instructions: in a virtual machine one name has several."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


@functools.cache
def _commit() -> str:
    def git(*arguments: str) -> str:
        options: Any = {"cwd": Path(__file__).parents[1], "capture_output": True, "text": True, "timeout": 10, "check": True}
        return subprocess.run(["git", *arguments], **options).stdout.strip()

    try:
        edited = git("status", "--porcelain", "--untracked-files=no", "--", "lowrank_kernels", "csrc")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if edited else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def run_case(case: Case, ceilings: Ceilings, budget: Budget, providers: Sequence[str] | None = None) -> list[Row]:
    """Judge and time the providers of a case (those whose name begins with one of ``providers``, or all); one row each."""
    rows: dict[str, Row] = {}
    trials: dict[str, Trial] = {}
    for name, build in case.providers.items():
        if providers and not name.startswith(tuple(providers)):
            continue
        rows[name] = row = Row(
            case.op, name, case.shapes, case.rank, str(case.dtype).removeprefix("torch."), case.device.type,
            device_name(case.device), torch.get_num_threads(), case.tokens, tensors=case.tensors, bytes=case.bytes,
            flops=sum(case.flops.values()), copy_gb_s=ceilings.copy_bandwidth / 1e9, gemm_gflop_s=ceilings.gemm_flops[case.dtype] / 1e9,
            torch=torch.__version__, triton=_triton_version(), python=platform.python_version(), date=date.today().isoformat(),
            commit=_commit(),
        )  # fmt: skip
        try:
            trial = build()
            with trial.context():
                launches = launch_count()
                trial.run()
                row.launches = launch_count() - launches if trial.ours else None
                row.error, row.tolerance = trial.check()
                row.state_mib = trial.state() / 2**20 if trial.state else None
        except BackendError as error:
            row.note = f"not available: {error}"
            continue
        except failures() as error:
            row.note = f"failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            continue
        if not passes(row.error, row.tolerance):
            row.note = f"wrong: error {row.error:.3g} exceeds {row.tolerance:.3g}"
            continue
        trials[name] = trial
    clock = _cpu_clock if case.device.type == "cpu" else lambda trial: _cuda_clock(trial, case.device)
    times = interleave({name: clock(trial) for name, trial in trials.items()}, budget)
    for name, trial in trials.items():
        _fill_times(rows[name], times, name, case.rival, ceilings.seconds(case.bytes, case.flops))
        with trial.context():
            rows[name].peak_mib = peak_temporary_bytes(trial.run, case.device) / 2**20
    return list(rows.values())


def _fill_times(row: Row, times: Times, name: str, rival: str, floors: tuple[float, float]) -> None:
    main = times[name]["main"]
    row.rounds = len(main)
    row.median_ms = statistics.median(main)
    row.p20_ms, *_, row.p80_ms = statistics.quantiles(main, n=5) if len(main) > 1 else (main[0], main[0])
    for column, attribute in (("graph", "graph_ms"), ("wall", "wall_ms")):
        if column in times[name]:
            setattr(row, attribute, statistics.median(times[name][column]))
    for baseline, attribute in (("naive", "ratio_to_naive"), (rival, "ratio_to_rival")):
        if baseline in times:
            # A naive loop's thousands of launches do not fit the device's queue, and are issued at the host's pace: replays are compared
            # where both have them.
            column = "graph" if "graph" in times[name] and "graph" in times[baseline] else "main"
            pairs = zip(times[name][column], times[baseline][column], strict=True)
            setattr(row, attribute, statistics.median(own / other for own, other in pairs))
    row.copy_share, row.roofline_share = floors[0] / (1e-3 * row.median_ms), max(floors) / (1e-3 * row.median_ms)
