"""``python -m lowrank_kernels.diagnostics plot run.csv``: the papers' figures from what a probe has recorded."""

from __future__ import annotations

import argparse
from pathlib import Path

from .plot import plot


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lowrank_kernels.diagnostics", description=__doc__)
    command = parser.add_subparsers(dest="command", required=True).add_parser("plot", help="draw Figures 1, 3, 4, 5 and the spectra")
    command.add_argument("csv", nargs="+", type=Path, help="files written by FullGradientProbe(csv=…); their runs are compared")
    command.add_argument("--output", type=Path, help="folder for the PNG files (default: beside the first CSV)")
    command.add_argument("--window", type=int, default=5, help="curves are means over so many measured steps")
    args = parser.parse_args(argv)
    if args.window < 1:
        command.error(f"argument --window: must be a positive number of steps, got {args.window}")
    try:
        written = plot(args.csv, args.output or args.csv[0].parent, args.window)
    except OSError as error:
        command.error(f"argument csv or --output: {error.filename}: {error.strerror}")
    except ValueError as error:
        command.error(f"argument csv: {error}")
    if not written:
        command.error(f"argument csv: nothing was measured in {', '.join(map(str, args.csv))}")
    for path in written:
        print(path)


if __name__ == "__main__":
    main()
