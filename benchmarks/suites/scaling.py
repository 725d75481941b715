"""The host's part of a step: every optimizer on 6 … 600 layers so small that their arithmetic is next to nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from statistics import linear_regression

from ..harness import Case
from ..results import as_float
from ..shapes import SMALL
from . import Setting, suite
from .memory import step_case

OP, RANK = "step_of_small_layers", 4
COUNTS = {f"{name}/all": count for count, name in SMALL.items()}


@suite("scaling", OP, per_model=False)
def cases(setting: Setting) -> Iterator[Case]:
    """One step of each optimizer, for every number of layers; torch's fused AdamW is the yardstick."""
    for name in SMALL.values():
        yield step_case(replace(setting, model=name, choice="all", rank=RANK), OP)


def host_time_per_layer(rows: Iterable[Mapping[str, str]]) -> dict[str, float]:
    """Provider → µs per layer (A and B): the slope of the least-squares line through its times at all numbers of layers.

    ``rows`` as text, of one device, dtype and number of threads; wall times on a GPU. Providers with fewer than two times are left out.
    """
    points: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        time = as_float(row.get("wall_ms", "")) or as_float(row["median_ms"])
        if row["op"] == OP and time is not None:
            points[row["provider"]].append((COUNTS[row["shapes"]], 1e3 * time))
    return {name: linear_regression(*zip(*found, strict=True)).slope for name, found in points.items() if len(found) > 1}
