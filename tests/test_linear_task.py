"""The linear task of OPLoRA (600 × 200, r = 8): what Figure 1 claims, on the naive layers that the optimizer is tested against."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest

from benchmarks import linear_task
from benchmarks.linear_task import D_IN, RANK, excess_losses, methods, oplora


@pytest.mark.parametrize("seed", [0, 1])
def test_more_sweeps_come_closer_to_the_optimum(seed: int) -> None:
    """Full batch at η = 0.5, where SVDLoRA is at the optimum after one step."""
    paths = [excess_losses("full batch", lambda *task, k=k: oplora(*task, k), seed, 3) for k in (1, 2, 4, 8)]
    best = excess_losses("full batch", methods("full batch")["SVDLoRA"], seed, 3)
    assert all(abs(value) < 1e-5 for value in best[1:])
    for after in zip(*[path[1:] for path in paths], strict=True):
        assert all(more < fewer for fewer, more in itertools.pairwise(after)), after
    assert all(b < a for path in paths for a, b in itertools.pairwise(path))
    # OPLoRA×8 after two steps: within 1 % of SVDLoRA's total loss.
    assert (1 + paths[-1][2]) / (1 + best[2]) < 1.01


def test_a_momentum_of_higher_rank_comes_closer_to_full_momentum() -> None:
    """64 columns a batch, α = 0.75, η = 0.1: OPLoRA's losses approach SVDLoRA's as its momentum gets more columns.

    That holds over long runs only: here in the second half of 100 steps, between ranks far apart. In the first steps M has a lower rank
    than its truncation, and over a few dozen steps neighbouring ranks change places with the seed.
    """
    steps, seed = 100, 0
    full = excess_losses("mini-batch", methods("mini-batch")["SVDLoRA"], seed, steps)
    gaps = []
    for rank in (4, 32, 64):
        path = excess_losses("mini-batch", lambda *task, r=rank: oplora(*task, 2, momentum_rank=r), seed, steps)
        gaps.append(statistics.fmean(abs(a - b) for a, b in zip(path[steps // 2 :], full[steps // 2 :], strict=True)))
    assert gaps[0] > gaps[1] > gaps[2], gaps


def test_the_script_writes_rows_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = linear_task.main(["--steps", "1", "2", "--seeds", "0", "--out", str(tmp_path / "task.csv")])
    assert {row["method"] for row in rows} >= {"LoRA SGD", "LoRA Adam", "OPLoRA×8", "Proj. OPLoRA×1", "OPLoRA×2 r64", "SVDLoRA"}
    assert (tmp_path / "task.png").stat().st_size > 10_000
    starts = {row["method"]: float(row["excess"]) for row in rows if row["step"] == "0"}
    assert len(set(starts.values())) == 1 and D_IN > RANK
