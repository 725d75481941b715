"""``python -m benchmarks plot RESULTS.csv``: figures of a result file, written next to it or into ``--out``.

``…-bars.png``      time of every provider by that of the naive one, one panel for each operation
``…-roofline.png``  how much of the roofline measured in the same run is reached
``…-layers.png``    a step's time against the number of layers, and its slope
``…-rank.png``      time against the rank
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .results import as_float, check_writable, read, read_given
from .suites.scaling import COUNTS, OP, host_time_per_layer

Rows = list[dict[str, str]]
#: Columns without which there is no figure.
NEEDED = ("op", "provider", "shapes", "rank", "median_ms", "ratio_to_naive", "copy_share", "torch")
#: Rows that may stand in one figure.
FIGURE = ("device", "device_name", "dtype", "threads")


def _grouped(rows: Iterable[dict[str, str]], *names: str) -> dict[tuple[str, ...], Rows]:
    groups: defaultdict[tuple[str, ...], Rows] = defaultdict(list)
    for row in rows:
        groups[tuple(row.get(name) or "" for name in names)].append(row)
    return dict(groups)


def _panels(names: list[str], width: float = 7.0, height: float = 3.2) -> tuple[Any, dict[str, Any]]:
    """A figure with one titled panel for each name."""
    from matplotlib.figure import Figure

    columns = min(2, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes, names, strict=False):
        axis.set_title(name, fontsize=10)
        axis.tick_params(labelsize=7)
    return figure, dict(zip(names, axes, strict=False))


def _colours(providers: Iterable[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    return {name: colormaps["tab20"](index % 20) for index, name in enumerate(dict.fromkeys(providers))}


def _case(row: dict[str, str]) -> str:
    return f"{row['shapes'].removesuffix('/all')}\nr={row['rank']}" + (f"\n{row['tokens']} tok." if row.get("tokens") else "")


def _bars(rows: Rows, value: Callable[[dict[str, str]], float | None], line: float, label: str) -> Any | None:
    """Grouped bars: a panel for each operation, a group for each case, a bar for each provider."""
    rows = [row for row in rows if value(row) is not None and row["op"] != OP]
    if not rows:
        return None
    by_op = _grouped(rows, "op")
    figure, axes = _panels([op for (op,) in by_op])
    colours = _colours(row["provider"] for row in rows)
    for (op,), members in by_op.items():
        axis = axes[op]
        shapes = list(dict.fromkeys(row["shapes"] for row in members))
        cases = list(dict.fromkeys(_case(row) for row in sorted(members, key=lambda row: (shapes.index(row["shapes"]), int(row["rank"])))))
        providers = list(dict.fromkeys(row["provider"] for row in members))
        width = 0.85 / len(providers)
        for place, provider in enumerate(providers):
            mine = {_case(row): value(row) for row in members if row["provider"] == provider}
            at = [index + (place - (len(providers) - 1) / 2) * width for index, case in enumerate(cases) if case in mine]
            axis.bar(at, [mine[case] for case in cases if case in mine], width, label=provider, color=colours[provider])
        axis.axhline(line, color="black", linewidth=0.8, linestyle="--")
        axis.set_ylim(bottom=0)  # a bar is read by its length
        axis.set_xticks(range(len(cases)), cases, fontsize=7 if len(cases) < 8 else 5)
        axis.set_ylabel(label, fontsize=8)
        axis.legend(fontsize=6, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    return figure


def bars(rows: Rows) -> Any | None:
    """Time by the naive one's."""
    return _bars(rows, lambda row: as_float(row["ratio_to_naive"]), 1.0, "time / naive")


def roofline(rows: Rows) -> Any | None:
    """Time on the roofline by the measured time."""
    return _bars(rows, lambda row: as_float(row.get("roofline_share") or row["copy_share"]), 1.0, "share of the roofline")


def layers(rows: Rows) -> Any | None:
    """A step's time against the number of layers."""
    rows = [row for row in rows if row["op"] == OP and row["median_ms"]]
    if not rows:
        return None
    slopes = host_time_per_layer(rows)
    figure, axes = _panels(["One step of small layers"], width=8, height=5)
    (axis,) = axes.values()
    colours = _colours(row["provider"] for row in rows)
    for (provider,), members in _grouped(rows, "provider").items():
        points = sorted((COUNTS[row["shapes"]], as_float(row.get("wall_ms") or row["median_ms"])) for row in members)
        slope = f" ({slopes[provider]:.1f} µs/layer)" if provider in slopes else ""
        axis.loglog(*zip(*points, strict=True), marker="o", markersize=3, label=provider + slope, color=colours[provider])
    axis.set_xlabel("layers")
    axis.set_ylabel("ms")
    axis.legend(fontsize=7)
    return figure


def rank(rows: Rows) -> Any | None:
    """Time against the rank, for every operation and shapes with three ranks at least."""
    by_panel = _grouped((row for row in rows if row["op"] != OP and row["median_ms"]), "op", "shapes", "tokens")
    by_panel = {key: members for key, members in by_panel.items() if len({row["rank"] for row in members}) > 2}
    if not by_panel:
        return None
    figure, axes = _panels([" ".join(filter(None, key)) for key in by_panel])
    colours = _colours(row["provider"] for members in by_panel.values() for row in members)
    for key, members in by_panel.items():
        axis = axes[" ".join(filter(None, key))]
        for (provider,), mine in _grouped(members, "provider").items():
            points = sorted((int(row["rank"]), as_float(row["median_ms"])) for row in mine)
            axis.loglog(*zip(*points, strict=True), base=2, marker="o", markersize=3, label=provider, color=colours[provider])
        axis.set_xlabel("rank", fontsize=8)
        axis.set_ylabel("ms", fontsize=8)
        axis.legend(fontsize=6)
    return figure


KINDS: dict[str, Callable[[Rows], Any | None]] = {"bars": bars, "roofline": roofline, "layers": layers, "rank": rank}


def draw(
    path: Path,
    out: Path | None = None,
    threads: int | None = None,
    ops: Iterable[str] = (),
    without: Iterable[str] = (),
    suffix: str = "png",
) -> list[Path]:
    """All figures that the rows of ``path`` give (of some operations and providers, at one number of threads), written into ``out``."""
    from matplotlib import rc_context

    ops, without = set(ops), set(without)
    rows = [row for row in read(path) if (not ops or row["op"] in ops) and row["provider"] not in without]
    rows = [row for row in rows if threads is None or row["threads"] == str(threads)]
    groups = _grouped(rows, *FIGURE)
    out = path.parent if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for (_, device_name, dtype, count), rows in groups.items():
        which = "" if len(groups) == 1 else f"-{dtype}-{count}-threads"
        if len({key[:2] for key in groups}) > 1:
            which += "-" + "".join(c if c.isalnum() else "-" for c in device_name)
        for kind, make in KINDS.items():
            figure = make(rows)
            if figure is not None:
                figure.suptitle(f"{device_name}, {count} threads, {dtype}, torch {rows[-1]['torch']}", fontsize=9)
                target = out / f"{path.stem}-{kind}{which}.{suffix}"
                # The same rows give the same file.
                with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lowrank_kernels"}):
                    figure.savefig(target, dpi=120, metadata={"Date": None} if suffix == "svg" else None)
                written.append(target)
    return written


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, metavar="RESULTS.csv")
    parser.add_argument("--out", type=Path, help="folder for the figures (default: that of the file)")
    parser.add_argument("--threads", type=int, help="only rows at this number of threads")
    parser.add_argument("--op", type=lambda text: text.split(","), default=[], help="only these operations")
    parser.add_argument("--without", type=lambda text: text.split(","), default=[], help="not these providers")
    parser.add_argument("--format", choices=("png", "svg"), default="png")
    args = parser.parse_args(argv)
    found = read_given(parser, "RESULTS.csv", args.results, (*FIGURE, *NEEDED))
    there = {"op": args.op, "provider": args.without, "threads": [] if args.threads is None else [str(args.threads)]}
    for column, wanted in there.items():
        known = dict.fromkeys(row[column] for row in found)
        for name in wanted:
            if name not in known:
                option = "without" if column == "provider" else column
                parser.error(f"argument --{option}: {name!r} is none of those of the file: {', '.join(known)}")
    check_writable(parser, "--out", (args.out or args.results.parent) / f"{args.results.stem}-bars.{args.format}")
    for path in draw(args.results, args.out, args.threads, args.op, args.without, args.format):
        print(path)
    return 0
