"""The rows of the benchmark: one tidy CSV, where a re-run replaces what it measured before."""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass
class Row:
    """One provider on one case. Empty fields were not measured (and say so in ``note``, if something kept them from it).

    Attributes:
        shapes: model and layers, such as "minilm/qv".
        tokens: rows of the activations, where there are any.
        median_ms, p20_ms, p80_ms: wall time on a CPU; on a GPU device time between events, the queue being full.
        graph_ms: median time of a replayed CUDA graph.
        wall_ms: median wall time of an eager call on a GPU, synchronized.
        ratio_to_naive: median over the rounds of this provider's time by that of "naive" in the same round; of replayed graphs, if both
            could be captured.
        ratio_to_rival: the same by the best that one can have without this package (torch-fused, torch-batched).
        bytes: what must move between memory and processor if everything is read and written once.
        flops: floating-point operations of the matrix products that cannot be avoided, in whatever dtype.
        copy_share: bytes / median time, as a share of the copy bandwidth measured in the same run.
        roofline_share: the time that bytes and flops (each in its dtype) would take at the rates measured in the same run, the
            longer of the two, by the median time: 1 is the roofline.
        gemm_gflop_s: rate of a large matrix product in the dtype of the row.
        launches: kernel launches and calls into compiled code, for our own providers.
        peak_mib: peak of the temporary memory that torch allocated during the call.
        state_mib: what an optimizer keeps beside the factors: its state, and the buffers of the adapted layers.
        error, tolerance: against fp64; a row with error > tolerance has no times.
        note: why there is no time.
        commit: of this package, with "-dirty" where its sources differed from it; empty outside of a checkout.
    """

    op: str
    provider: str
    shapes: str
    rank: int
    dtype: str
    device: str
    device_name: str
    threads: int
    tokens: int | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    graph_ms: float | None = None
    wall_ms: float | None = None
    ratio_to_naive: float | None = None
    ratio_to_rival: float | None = None
    rounds: int | None = None
    tensors: int | None = None
    bytes: int | None = None
    flops: int | None = None
    copy_share: float | None = None
    roofline_share: float | None = None
    copy_gb_s: float | None = None
    gemm_gflop_s: float | None = None
    launches: int | None = None
    peak_mib: float | None = None
    state_mib: float | None = None
    error: float | None = None
    tolerance: float | None = None
    note: str = ""
    torch: str = ""
    triton: str = ""
    python: str = ""
    date: str = ""
    commit: str = ""


#: Rows that agree in these replace each other.
KEY = ("op", "provider", "shapes", "rank", "dtype", "device", "device_name", "threads", "tokens")
COLUMNS = tuple(field.name for field in fields(Row))


def _as_text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def as_text(row: Any) -> dict[str, str]:
    """A row (a dataclass) as it stands in the file."""
    return {name: _as_text(value) for name, value in asdict(row).items()}


def as_float(text: str) -> float | None:
    """A number of the file; None where there is none."""
    return float(text) if text else None


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file as text; none if it does not exist."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_given(parser: argparse.ArgumentParser, argument: str, path: Path, needed: Iterable[str]) -> list[dict[str, str]]:
    """The rows of the file that was given as ``argument``, which is a usage error unless they have the columns ``needed``."""
    if not path.is_file():
        parser.error(f"argument {argument}: there is no file {path}")
    try:
        rows = read(path)
        missing = next((name for name in needed if rows and name not in rows[0]), None)
        why = "it has no rows" if not rows else f"it has no column {missing}" if missing else ""
    except (UnicodeDecodeError, csv.Error) as error:
        why = str(error)
    if why:
        parser.error(f"argument {argument}: {path} holds no results of the benchmark: {why}")
    return rows


def check_writable(parser: argparse.ArgumentParser, argument: str, path: Path) -> None:
    """A usage error of ``argument`` if no file can be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not path.exists()
        with open(path, "a"):
            pass
        if fresh:
            path.unlink()
    except OSError as error:
        parser.error(f"argument {argument}: cannot write {path}: {error.strerror}")


def upsert(path: Path, rows: Iterable[Row]) -> None:
    """Write ``rows`` into ``path``: a row replaces the one with the same key where that stands, new ones go to the end."""
    upsert_texts(path, map(as_text, rows), KEY, COLUMNS)


def upsert_texts(path: Path, rows: Iterable[dict[str, str]], key: Sequence[str], columns: Sequence[str]) -> None:
    """:func:`upsert` for a table with a key and columns of its own."""
    table = {tuple(row.get(name, "") for name in key): row for row in read(path)}
    for row in rows:
        table[tuple(row[name] for name in key)] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.values())
    os.replace(temporary, path)
