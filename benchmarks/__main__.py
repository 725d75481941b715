"""``python -m benchmarks``: time the operations of this package against the alternatives, on shapes of known models.

With a command as the first argument it does something with what was measured instead: ``compare A.csv B.csv``, ``plot RESULTS.csv``,
``readme`` (write the figures into README.md), ``kernels`` (what the compiler makes of the Triton kernels). Each has its own ``--help``.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm

from lowrank_kernels.backends.dtypes import FLOATING

from . import ceilings, compare, kernels, plot, readme, results
from .harness import Budget, Case, device_name, failures, run_case
from .shapes import CHOICES, MODELS, TINY, layers
from .suites import OPERATIONS, SUITES, WITHOUT_MODEL, Setting
from .suites.scaling import host_time_per_layer
from .table import render, render_slopes

#: Names of the dtypes that factors may have.
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATING}


def comma_separated(choices: Mapping[str, Any]) -> Callable[[str], list[str]]:
    """An argparse type: a comma-separated list of some of ``choices``."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(choices)}")
        return names

    return parse


def numbers(least: int) -> Callable[[str], list[int]]:
    """An argparse type: comma-separated integers, none below ``least``."""

    def parse(text: str) -> list[int]:
        try:
            values = [int(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no integer, and no integers with commas between") from None
        if min(values) < least:
            raise argparse.ArgumentTypeError(f"{min(values)} is below {least}")
        return values

    return parse


def seconds(positive: bool) -> Callable[[str], float]:
    """An argparse type: a finite number of seconds, or none at all if not ``positive``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            raise argparse.ArgumentTypeError(f"{text} is no time; give seconds, {'more than 0' if positive else '0 or more'}")
        return value

    return parse


def present_device(text: str) -> str:
    """An argparse type: a device of this machine on which something can be timed."""
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not supported; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"torch sees no {text!r} on this machine")
    return text


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the options, and the description as it stands."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=Formatter)
    parser.add_argument("--suite", type=comma_separated(SUITES), default=",".join(SUITES), help="|".join(SUITES))
    parser.add_argument("--device", type=present_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model-shapes", type=comma_separated(MODELS), default="minilm,roberta-base", help=",".join(MODELS))
    parser.add_argument("--layers", type=comma_separated(CHOICES), default="all", help="adapted layers: " + ",".join(CHOICES))
    parser.add_argument("--rank", type=numbers(1), default="8,16")
    parser.add_argument("--dtype", type=comma_separated(DTYPES), default="float32", help="of the factors: float32, bfloat16, …")
    parser.add_argument("--provider", type=lambda text: text.split(","), help="only these; a name or its beginning (default: all)")
    parser.add_argument("--tokens", type=int, help="rows of the activations (default: 256, on a GPU 8192)")
    parser.add_argument("--compile-seconds", type=seconds(positive=False), default=60.0, help="limit for torch.compile; 0: without it")
    parser.add_argument("--op", type=lambda text: text.split(","), help="only these operations (default: all of the suites)")
    parser.add_argument("--seconds", type=seconds(positive=True), default=Budget.seconds, help="time for each case")
    parser.add_argument("--threads", type=numbers(0), default=[0],
                        help="CPU threads of torch and of this package, such as 1,2; 0 is torch's choice")  # fmt: skip
    parser.add_argument("--out", type=Path, help="CSV (default: benchmarks/results/DEVICE.csv)")
    return parser


def providers_of(args: argparse.Namespace) -> Iterator[str]:
    """Who will be measured, read off the same cases on tiny inputs: which there are is each case's."""
    for suite, choice, dtype in product(args.suite, args.layers, args.dtype):
        tiny = Setting(TINY, choice, 1, getattr(torch, dtype), torch.device(args.device), 1, args.compile_seconds)
        for case in SUITES[suite](tiny):
            if not args.op or case.op in args.op:
                yield from case.providers


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    known = [operation for suite in args.suite for operation in OPERATIONS[suite]]
    for name in args.op or ():
        if name not in known:
            parser.error(f"argument --op: {name!r} is none of {', '.join(known)}")
    offered = dict.fromkeys(providers_of(args)) if args.provider else {}
    for name in args.provider or ():
        if offered and not any(provider.startswith(name) for provider in offered):
            parser.error(f"argument --provider: {name!r} is none of {', '.join(offered)}")
    if args.tokens is not None and args.tokens < 1:
        parser.error(f"argument --tokens: {args.tokens} is below 1")
    if not WITHOUT_MODEL.issuperset(args.suite):
        for model, choice in product(args.model_shapes, args.layers):
            most = min(min(shape) for shape in layers(model, choice))
            if max(args.rank) > most:
                parser.error(f"argument --rank: {max(args.rank)} is above {most}, the smallest dimension of {model}/{choice}")
    args.tokens = args.tokens or (8192 if torch.device(args.device).type == "cuda" else 256)
    args.out = args.out or Path(__file__).parent / "results" / f"{torch.device(args.device).type}.csv"
    results.check_writable(parser, "--out", args.out)
    return args


def cases_of(suite: str, setting: Setting) -> Iterator[Case]:
    """The cases of a suite; one that cannot be made, for want of memory, ends this suite of this setting and not the run."""
    try:
        yield from SUITES[suite](setting)
    except failures() as error:
        tqdm.write(f"{suite} of {setting.model}, rank {setting.rank}: no more cases, {error}")


def main(argv: list[str] | None = None) -> list[results.Row]:
    args = parse_arguments(argv)
    device = torch.device(args.device)
    console = Console(width=None if Console().is_terminal else 140)
    rows: list[results.Row] = []
    for threads, dtype_name in product(args.threads, args.dtype):
        if threads:
            torch.set_num_threads(threads)
        dtype = getattr(torch, dtype_name)
        limits = ceilings.measure(device, dtype)
        console.print(
            f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}: copy "
            f"{limits.copy_bandwidth / 1e9:.1f} GB/s, GEMM of "
            + ", ".join(f"{str(kind).removeprefix('torch.')} {rate / 1e9:.0f}" for kind, rate in limits.gemm_flops.items())
            + " GFLOP/s"
        )
        more = (dtype, device, args.tokens, args.compile_seconds)
        settings = [Setting(m, c, r, *more) for m in args.model_shapes for c in args.layers for r in args.rank]
        work = [(suite, setting) for suite in args.suite for setting in (settings[:1] if suite in WITHOUT_MODEL else settings)]
        for suite, setting in tqdm(work, desc=f"{dtype_name}, {torch.get_num_threads()} threads", unit="case"):
            for case in cases_of(suite, setting):
                if args.op and case.op not in args.op:
                    continue
                new = run_case(case, limits, Budget(seconds=args.seconds), args.provider)
                results.upsert(args.out, new)
                rows += new
    console.print(render(rows))
    slopes = host_time_per_layer(results.as_text(row) for row in rows)
    if slopes:
        console.print(render_slopes(slopes))
    console.print(f"Rows written to {args.out}", soft_wrap=True)
    return rows


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "compare": compare.main,
    "plot": plot.main,
    "readme": readme.main,
    "kernels": kernels.main,
}


if __name__ == "__main__":
    command = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if command is not None:
        sys.exit(command(sys.argv[2:]))
    main()
