"""``python -m benchmarks``: time the operations of this package against the alternatives, on shapes of known models.

With a command as the first argument it does something with what was measured instead: ``compare A.csv B.csv``, ``plot RESULTS.csv``,
``readme`` (write the figures into README.md), ``kernels`` (what the compiler makes of the Triton kernels). Each has its own ``--help``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm

from . import ceilings, compare, kernels, plot, readme, results
from .harness import Budget, device_name, run_case
from .shapes import CHOICES, MODELS
from .suites import SUITES, WITHOUT_MODEL, Setting
from .suites.scaling import host_time_per_layer
from .table import render, render_slopes


def comma_separated(choices: Mapping[str, Any]) -> Callable[[str], list[str]]:
    """An argparse type: a comma-separated list of some of ``choices``."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(choices)}")
        return names

    return parse


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the options, and the description as it stands."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=Formatter)
    parser.add_argument("--suite", type=comma_separated(SUITES), default=",".join(SUITES), help="|".join(SUITES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model-shapes", type=comma_separated(MODELS), default="minilm,roberta-base", help=",".join(MODELS))
    parser.add_argument("--layers", type=comma_separated(CHOICES), default="all", help="adapted layers: " + ",".join(CHOICES))
    parser.add_argument("--rank", type=lambda text: [int(part) for part in text.split(",")], default="8,16")
    parser.add_argument("--dtype", type=lambda text: text.split(","), default="float32", help="of the factors: float32, bfloat16, …")
    parser.add_argument("--provider", type=lambda text: text.split(","), help="only these; a name or its beginning (default: all)")
    parser.add_argument("--tokens", type=int, help="rows of the activations (default: 256, on a GPU 8192)")
    parser.add_argument("--compile-seconds", type=float, default=60.0, help="limit for torch.compile; 0: without it")
    parser.add_argument("--op", type=lambda text: text.split(","), help="only these operations (default: all of the suites)")
    parser.add_argument("--seconds", type=float, default=Budget.seconds, help="time for each case")
    parser.add_argument("--threads", type=lambda text: [int(part) for part in text.split(",")], default=[0],
                        help="CPU threads of torch and of this package, such as 1,2; 0 is torch's choice")  # fmt: skip
    parser.add_argument("--out", type=Path, help="CSV (default: benchmarks/results/DEVICE.csv)")
    args = parser.parse_args(argv)
    args.tokens = args.tokens or (8192 if torch.device(args.device).type == "cuda" else 256)
    args.out = args.out or Path(__file__).parent / "results" / f"{torch.device(args.device).type}.csv"
    return args


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
            f"{limits.copy_bandwidth / 1e9:.1f} GB/s, {dtype_name} GEMM {limits.gemm_flops / 1e9:.0f} GFLOP/s"
        )
        more = (dtype, device, args.tokens, args.compile_seconds)
        settings = [Setting(m, c, r, *more) for m in args.model_shapes for c in args.layers for r in args.rank]
        work = [(suite, setting) for suite in args.suite for setting in (settings[:1] if suite in WITHOUT_MODEL else settings)]
        for suite, setting in tqdm(work, desc=f"{dtype_name}, {torch.get_num_threads()} threads", unit="case"):
            for case in SUITES[suite](setting):
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
