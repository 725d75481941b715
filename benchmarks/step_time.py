"""``python -m benchmarks.step_time``: whole training steps of a real model, methods in turn on the same batches; optionally peak memory.

The first steps, past SDS-LoRA's warm-up and OD-LoRA's first round, run on short inputs and are not timed. So SDS-LoRA is measured where
it costs most (first phase: bases are refreshed in every step), OD-LoRA decoupled in its second round. Ratios are medians
over the steps of a method's time by the first method's for the same batch.

A method is one row of ``results/step_time.csv``. Times and memory may be measured by two commands (``--no-time --memory``): what
the second does not measure stays.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from finetune_text import METHODS, Run, cost_figures, cost_table, measure_peak_rss, parse, task_parser
from rich.console import Console
from tasks import TASKS

from lowrank_kernels.diagnostics import FullGradientProbe

from . import results
from .harness import device_name

UNTIMED_STEPS = 12
KEY = ("task", "method", "baseline", "layers", "rank", "batch_size", "max_length", "device_name", "threads")
COLUMNS = (
    *KEY, "timed_steps", "step_ms", "baseline_ms", "step_ratio", "optimizer_ms", "peak_rss_mib", "memory_ratio", "probed_ratio", "torch",
    "date",
)  # fmt: skip


def record(path: Path, args: argparse.Namespace, figures: dict[str, dict[str, Any]]) -> None:
    """Write what was measured of each method; the other columns of its row stay."""
    where = (device_name(torch.device(args.device)), torch.get_num_threads())
    now = {"torch": torch.__version__, "date": date.today().isoformat()}
    known = {tuple(row[name] for name in KEY): row for row in results.read(path)}
    rows = []
    for method, measured in figures.items():
        key = (args.task, method, args.methods[0], args.layers, args.rank, args.batch_size, args.max_length, *where)
        texts = {name: f"{x:.4g}" if isinstance(x, float) else str(x) for name, x in (dict(zip(KEY, key, strict=True)) | measured).items()}
        rows.append(known.get(tuple(texts[name] for name in KEY), {}) | texts | now)
    results.upsert_texts(path, rows, KEY, COLUMNS)


def main(argv: list[str] | None = None) -> None:
    parser = task_parser(__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["peft", "sds", "od"], help="whose steps to time")
    parser.add_argument("--timed", type=int, default=6, help="steps")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the adapters")
    parser.add_argument("--memory", action="store_true", help="peak RSS too, each method in a process of its own")
    parser.add_argument("--probe", choices=list(METHODS), help="also time one of the methods with a FullGradientProbe on every step")
    parser.add_argument("--no-time", dest="time", action="store_false", help="measure the memory only")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step_time.csv", help="the rows")
    parser.set_defaults(task="smollm2")
    args = parse(parser, argv)
    if args.probe and args.probe not in args.methods:
        parser.error(f"--probe {args.probe} is compared with the same method without it; name it in --methods too")
    args.lrs, args.seeds = [args.lr], [0]
    peaks = {name: measure_peak_rss(name, args) for name in args.methods} if args.memory else {}
    if peaks:
        first = peaks[args.methods[0]]
        print("peak RSS: " + ", ".join(f"{name} {peak:.0f} MiB ({peak / first:.3f}×)" for name, peak in peaks.items()))
        record(args.out, args, {name: {"peak_rss_mib": peak, "memory_ratio": peak / first} for name, peak in peaks.items()})
    if not args.time:
        return
    data = TASKS[args.task].splits(args).train
    device = torch.device(args.device)
    full = data.training_batches(args.timed, args.batch_size, 0, device)
    short = [({key: x[:1, :8] for key, x in inputs.items()}, y[:1, :8] if y.ndim > 1 else y[:1]) for inputs, y in full]
    batches = [short[i % len(short)] for i in range(UNTIMED_STEPS)] + full
    runs = [Run(name, args.lr, 0, batches, args) for name in args.methods]
    probed = Run(args.probe, args.lr, 0, batches, args) if args.probe else None
    probe = None if probed is None else FullGradientProbe(probed.model).adopt(probed.optimizer)
    for step in range(len(batches)):
        turn = step % len(runs)
        for run in runs[turn:] + runs[:turn]:
            run.step()
        if probed is not None and probe is not None:
            start = time.perf_counter()
            with probe:
                probed.step()
            probed.result.step_ms[-1] = 1e3 * (time.perf_counter() - start)
    for run in runs:
        run.result.step_ms, run.result.optimizer_ms = run.result.step_ms[UNTIMED_STEPS:], run.result.optimizer_ms[UNTIMED_STEPS:]
    costs = cost_figures([run.result for run in runs], peaks)
    Console(width=130).print(cost_table(costs))
    measured: dict[str, dict[str, Any]] = {
        name: {
            "timed_steps": args.timed,
            "step_ms": cost["step_ms_median"],
            "baseline_ms": costs[args.methods[0]]["step_ms_median"],
            "step_ratio": cost["step_ratio"],
            "optimizer_ms": cost["optimizer_ms_median"],
        }
        for name, cost in costs.items()
    }
    if probed is not None:
        plain = next(run for run in runs if run.result.method == args.probe).result.step_ms
        watched = probed.result.step_ms[UNTIMED_STEPS:]
        ratio = statistics.median(x / y for x, y in zip(watched, plain, strict=True))
        print(f"a step that a FullGradientProbe measures: {statistics.median(watched):.0f} ms, {ratio:.2f}× ({args.probe})")
        measured[args.probe]["probed_ratio"] = ratio
    record(args.out, args, measured)


if __name__ == "__main__":
    main()
