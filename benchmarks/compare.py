"""``python -m benchmarks compare A.csv B.csv``: what became slower or faster between two runs; the exit status is for CI."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .results import KEY, as_float, read_given


@dataclass(frozen=True)
class Change:
    """One row of both files.

    Attributes:
        key: the row's, in the order of ``KEY``.
        before, after: the column's values; None where a file shows no time.
    """

    key: tuple[str, ...]
    before: float | None
    after: float | None

    @property
    def ratio(self) -> float | None:
        """After / before."""
        return self.after / self.before if self.before and self.after is not None else None

    def verdict(self, threshold: float) -> str:
        """ "slower", "faster", "lost" (there was a time, and there is none now) or ""."""
        if self.ratio is None:
            return "lost" if self.before is not None and self.after is None else ""
        return "slower" if self.ratio >= 1 + threshold else "faster" if self.ratio <= 1 / (1 + threshold) else ""


def compare(a: list[dict[str, str]], b: list[dict[str, str]], column: str = "median_ms") -> list[Change]:
    """The rows that are in both, in the order of ``b``."""
    before = {tuple(row.get(name) or "" for name in KEY): row for row in a}
    keyed = [(tuple(row.get(name) or "" for name in KEY), row) for row in b]
    return [Change(key, as_float(before[key][column]), as_float(row[column])) for key, row in keyed if key in before]


def render(changes: list[Change], threshold: float) -> Table:
    """One line for each change."""
    table = Table(title=f"B / A, where it is {100 * threshold:g} % or more")
    for column in ("case", "provider", "A", "B", "B / A", ""):
        table.add_column(column, justify="left" if column in ("case", "provider", "") else "right")
    for change in changes:
        row = dict(zip(KEY, change.key, strict=True))
        case = f"{row['op']} {row['shapes']} r={row['rank']} {row['dtype']} {row['threads']} threads" + f" {row['tokens']} tokens" * bool(
            row["tokens"]
        )
        values = ["–" if value is None else f"{value:.4g}" for value in (change.before, change.after)]
        ratio, verdict = change.ratio, change.verdict(threshold)
        style = {"slower": "red", "lost": "red", "faster": "green"}.get(verdict)
        table.add_row(case, row["provider"], *values, "" if ratio is None else f"{ratio:.3f}", verdict, style=style)
    return table


def main(argv: list[str] | None = None) -> int:
    """0: nothing of ours became slower; 1: something did, or lost its time; 2: no row is in both files."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare", description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("a", type=Path, metavar="A.csv", help="before")
    parser.add_argument("b", type=Path, metavar="B.csv", help="after")
    parser.add_argument("--threshold", type=float, default=0.05, help="smaller relative changes are noise")
    parser.add_argument(
        "--column", choices=("median_ms", "graph_ms", "wall_ms", "ratio_to_naive", "ratio_to_rival", "peak_mib"), default="median_ms",
        help="what is compared; a ratio within one run is the fairer one if the machine was not the same",
    )  # fmt: skip
    parser.add_argument("--provider", default="ours", help="beginning of the providers that decide the exit status; '' for all")
    parser.add_argument("--all", action="store_true", help="show rows that did not change, too")
    args = parser.parse_args(argv)
    before, after = (read_given(parser, name, path, (*KEY, args.column)) for name, path in (("A.csv", args.a), ("B.csv", args.b)))
    changes = compare(before, after, args.column)
    console = Console(width=None if Console().is_terminal else 140)
    if not changes:
        console.print(f"{args.a} and {args.b} have no row in common (rows agree in {', '.join(KEY)})")
        return 2
    shown = changes if args.all else [change for change in changes if change.verdict(args.threshold)]
    if shown:
        console.print(render(shown, args.threshold))
    providers = [change for change in changes if change.key[KEY.index("provider")].startswith(args.provider)]
    worse = [change for change in providers if change.verdict(args.threshold) in ("slower", "lost")]
    console.print(f"{len(changes)} rows in both, {len(shown)} shown; {len(worse)} of {args.provider or 'all'} slower or lost")
    return 1 if worse else 0
