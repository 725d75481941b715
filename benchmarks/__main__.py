"""``python -m benchmarks``: time the operations of this package against the alternatives, on shapes of known models."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm

from . import ceilings, results
from .harness import Budget, device_name, run_case
from .shapes import CHOICES, MODELS
from .suites import SUITES, Setting
from .table import render


def comma_separated(choices: Mapping[str, Any]) -> Callable[[str], list[str]]:
    """An argparse type: a comma-separated list of some of ``choices``."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(choices)}")
        return names

    return parse


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--suite", type=comma_separated(SUITES), default=",".join(SUITES), help="|".join(SUITES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model-shapes", type=comma_separated(MODELS), default="minilm,roberta-base", help=",".join(MODELS))
    parser.add_argument("--layers", type=comma_separated(CHOICES), default="all", help="adapted layers: " + ",".join(CHOICES))
    parser.add_argument("--rank", type=lambda text: [int(part) for part in text.split(",")], default="8,16")
    parser.add_argument("--dtype", type=lambda text: text.split(","), default="float32", help="of the factors: float32, bfloat16, …")
    parser.add_argument("--provider", type=lambda text: text.split(","), help="only these; a name or its beginning (default: all)")
    parser.add_argument("--seconds", type=float, default=Budget.seconds, help="time for each case")
    parser.add_argument("--threads", type=int, help="CPU threads of torch and of this package (default: torch's choice)")
    parser.add_argument("--out", type=Path, help="CSV (default: benchmarks/results/DEVICE.csv)")
    args = parser.parse_args(argv)
    args.out = args.out or Path(__file__).parent / "results" / f"{torch.device(args.device).type}.csv"
    return args


def main(argv: list[str] | None = None) -> list[results.Row]:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    console = Console(width=None if Console().is_terminal else 140)
    rows: list[results.Row] = []
    for dtype_name in args.dtype:
        dtype = getattr(torch, dtype_name)
        limits = ceilings.measure(device, dtype)
        console.print(
            f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}: copy "
            f"{limits.copy_bandwidth / 1e9:.1f} GB/s, {dtype_name} GEMM {limits.gemm_flops / 1e9:.0f} GFLOP/s"
        )
        settings = [Setting(m, c, r, dtype, device) for m in args.model_shapes for c in args.layers for r in args.rank]
        work = [(suite, setting) for suite in args.suite for setting in settings]
        for suite, setting in tqdm(work, desc=dtype_name, unit="case"):
            for case in SUITES[suite](setting):
                new = run_case(case, limits, Budget(seconds=args.seconds), args.provider)
                results.upsert(args.out, new)
                rows += new
    console.print(render(rows))
    console.print(f"Rows written to {args.out}", soft_wrap=True)
    return rows


if __name__ == "__main__":
    main()
