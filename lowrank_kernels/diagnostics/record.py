"""Where measurements go: a CSV file, and TensorBoard when it is installed."""

from __future__ import annotations

import csv
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from .._checks import check_path

Row = dict[str, Any]

#: Of the CSV, in this order. ``layer`` is empty in rows of the whole model; ``spectrum`` holds numbers with spaces between.
COLUMNS = (
    "run", "step", "layer", "method", "loss", "alignment", "alignment_unscaled", "rank_grad_a", "rank_grad_b", "rank_grad_a_unscaled",
    "rank_grad_b_unscaled", "gradient_norm", "stable_rank_a", "stable_rank_b", "drift_a", "drift_b", "delta_effective_rank",
    "delta_stable_rank", "spectrum",
)  # fmt: skip
TEXT = ("run", "layer", "method")


class RowWriter:
    """Keeps rows, appends them to a CSV, and sends the means over the layers to TensorBoard."""

    def __init__(self, path: str | Path | None, run: str, tensorboard: str | Path | None) -> None:
        for argument, place in (("csv", path), ("tensorboard", tensorboard)):
            if place is not None:
                check_path("FullGradientProbe", argument, place)
        self.rows: list[Row] = []
        self.run = run
        self.path = None if path is None else Path(path)
        self.writer: Any = None
        if tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("FullGradientProbe: tensorboard=… needs the package tensorboard: pip install tensorboard") from error
        if self.path is not None:
            try:  # now, and not in the first step that is measured
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "a", encoding="utf-8"):
                    pass
            except OSError as error:
                raise type(error)(f"FullGradientProbe: csv={str(self.path)!r} cannot be written: {error.strerror}") from None
        if self.path is not None and self.path.stat().st_size:
            try:
                with open(self.path, newline="", encoding="utf-8") as file:
                    header = tuple(next(csv.reader(file)))
            except (csv.Error, UnicodeDecodeError):
                raise ValueError(f"FullGradientProbe: csv={str(self.path)!r} is no CSV file; name another file") from None
            if header != COLUMNS:
                raise ValueError(f"FullGradientProbe: csv={str(self.path)!r} holds other columns; name another file")
        if tensorboard is not None:
            self.writer = SummaryWriter(Path(tensorboard) / run)

    def write(self, rows: list[Row]) -> None:
        """Add rows of one step."""
        rows = [{"run": self.run, **row} for row in rows]
        for row in rows:
            unknown = set(row) - set(COLUMNS)
            if unknown:
                raise ValueError(f"FullGradientProbe: cannot record {', '.join(sorted(unknown))}; the columns are {', '.join(COLUMNS)}")
        self.rows += rows
        if self.path is not None and rows:
            fresh = not self.path.exists() or not self.path.stat().st_size
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if fresh:
                    writer.writeheader()
                writer.writerows({key: _text(value) for key, value in row.items()} for row in rows)
        if self.writer is not None:
            for key, value in layer_means(rows).items():
                self.writer.add_scalar(f"diagnostics/{key}", value, rows[0]["step"])
            self.writer.flush()


def _text(value: Any) -> Any:
    if isinstance(value, list):
        return " ".join(f"{x:.4g}" for x in value)
    return f"{value:.6g}" if isinstance(value, float) else value


def layer_means(rows: list[Row]) -> dict[str, float]:
    """Mean over the layers of each measure, NaN left out."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        for key, value in row.items():
            if key not in (*TEXT, "step", "spectrum") and value is not None and not math.isnan(value):
                values[key].append(value)
    return {key: sum(v) / len(v) for key, v in values.items()}


def read(path: str | Path) -> list[Row]:
    """The rows of a CSV: numbers as floats, empty cells None, the spectrum a list.

    Raises:
        OSError: ``path`` cannot be read.
        TypeError, ValueError: it is no path, or the file holds something else; the line is named.
    """
    check_path("read", "path", path)
    csv.field_size_limit(10**9)

    def parse(key: str, text: str) -> Any:
        if key in TEXT:
            return text
        if not text:
            return None
        if key == "spectrum":
            return [float(x) for x in text.split()]
        return int(text) if key == "step" else float(text)

    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            if reader.fieldnames is None or not {"run", "step", "layer"} <= set(reader.fieldnames):
                raise ValueError("it has no columns run, step and layer")
            rows = []
            for row in reader:
                if None in row or None in row.values() or not row["step"]:
                    raise ValueError(f"line {reader.line_num} has too many or too few cells, or no step")
                try:
                    rows.append({key: parse(key, text) for key, text in row.items()})
                except ValueError as error:
                    raise ValueError(f"line {reader.line_num}: {error}") from None
        except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
            raise ValueError(f"{os.fspath(path)} was not written by FullGradientProbe: {error}") from None
        return rows
