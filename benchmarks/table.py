"""The rows of a run as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.table import Table

from .results import Row


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}" if value < 1000 else f"{value:.0f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def render_slopes(slopes: Mapping[str, float]) -> Table:
    """Host time per layer, and its ratio to torch's fused AdamW."""
    table = Table(title="Host time of a step per layer: slope over 6 … 600 small layers")
    for column in ("provider", "µs", "× torch-fused"):
        table.add_column(column, justify="left" if column == "provider" else "right")
    for name, slope in slopes.items():
        table.add_row(name, f"{slope:.2f}", f"{slope / slopes['torch-fused']:.2f}" if "torch-fused" in slopes else "")
    return table


def render(rows: Sequence[Row]) -> Table:
    """One line per row, one block per case; on a GPU with replay and wall times beside the device time."""
    cuda = any(row.device == "cuda" for row in rows)
    table = Table(title="Times in ms; device time on a GPU" if cuda else "Times in ms (wall), interleaved")
    left = ("case", "provider")
    columns = ["case", "provider", "median", "p20–p80", "× naive", "× rival", "roofline", "launches", "peak MiB", "state", "error"]
    if cuda:
        columns[4:4] = ["graph", "wall"]
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=column != "case")
    for case, group in groupby(rows, key=lambda row: (row.op, row.shapes, row.rank, row.dtype, row.tokens)):
        title = f"{case[0]}\n{case[1]} r={case[2]} {case[3]}" + (f" {case[4]} tokens" if case[4] else "")
        for row in group:
            cells = [_number(row.median_ms), f"{_number(row.p20_ms)}–{_number(row.p80_ms)}"]
            if row.median_ms is None:
                cells = ["–", row.note.split(":")[0]]
            if cuda:
                cells += [_number(row.graph_ms), _number(row.wall_ms)]
            cells += [
                _number(row.ratio_to_naive),
                _number(row.ratio_to_rival),
                _share(row.roofline_share),
                "" if row.launches is None else str(row.launches),
            ]
            table.add_row(title, row.provider, *cells, _number(row.peak_mib), _number(row.state_mib), _number(row.error, 2))
            title = ""
        table.add_section()
    return table
