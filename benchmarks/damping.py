"""The experiment behind the preconditioned methods' default damping: ``python -m benchmarks.damping`` (some minutes).

A tanh network in fp32 is to learn a teacher that differs from it by matrices of rank 4 with singular values over three orders of
magnitude. The students have rank 16, so that most of what a Gram matrix holds is next to nothing, the case that damping is for;
``start`` "spread" makes it worse, with factors of singular values from 1 down to 1e-6. Every (method, learning rate, start, damping,
seed) is one run and one row of ``benchmarks/results/damping.csv``:

    loss       mean loss of the last 20 steps, divided by that of the frozen model on the same batches
    worst      the highest loss of the run, divided by the first
    blow_up    whether the loss became NaN, or higher than twice the first
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

import lowrank_kernels as lrk

WIDTHS = (64, 96, 128, 48)
TRUE_RANK, RANK, SCALE = 4, 16, 1.0
DAMPINGS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
METHODS: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[float, ...]]] = {
    "AltLoRA+": (lrk.AltLoRAPlus, (1e-3, 3e-3, 1e-2)),
    "AltLoRA": (lrk.AltLoRA, (3e-2, 1e-1, 3e-1)),
    "ScaledAdamW": (lrk.ScaledAdamW, (1e-3, 3e-3, 1e-2)),
    "ScaledGD": (lrk.ScaledGD, (3e-2, 1e-1, 3e-1)),
    "LoRA-Pro": (lrk.LoRAPro, (1e-3, 3e-3, 1e-2)),
    "LoRA-RITE": (lrk.LoRARITE, (1e-3, 3e-3, 1e-2)),
}
COLUMNS = ("method", "lr", "start", "damping", "seed", "loss", "worst", "blow_up")


def spread(rows: int, columns: int, lowest: float, generator: torch.Generator) -> Tensor:
    """(rows, columns), singular values from 1 down to ``lowest``, evenly on a logarithmic scale."""
    count = min(rows, columns)
    u, _ = torch.linalg.qr(torch.randn(rows, count, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(columns, count, generator=generator))
    return u * torch.logspace(0, math.log10(lowest), count) @ v.mT


def make_task(start: str, seed: int) -> tuple[nn.Sequential, nn.Sequential]:
    """The student (adapted) and the teacher."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = nn.Sequential(), nn.Sequential()
    for d_in, d_out in itertools.pairwise(WIDTHS):
        base, target = nn.Linear(d_in, d_out, bias=False).requires_grad_(False), nn.Linear(d_in, d_out, bias=False)
        base.weight.copy_(torch.randn(d_out, d_in, generator=generator) / d_in**0.5)
        change = spread(d_out, TRUE_RANK, 1e-3, generator) @ torch.randn(TRUE_RANK, d_in, generator=generator) / d_in**0.5
        target.weight.data.copy_(base.weight + 4 * change)
        layer = lrk.LowRankLinear(base, RANK, SCALE)
        layer.lora_A.data = torch.randn(RANK, d_in, generator=generator) / d_in**0.5
        if start == "spread":
            layer.lora_A.data = spread(RANK, d_in, 1e-6, generator)
            layer.lora_B.data = spread(d_out, RANK, 1e-6, generator)
        student += nn.Sequential(layer, nn.Tanh())
        teacher += nn.Sequential(target.requires_grad_(False), nn.Tanh())
    return student[:-1], teacher[:-1]


def losses(build: Callable[[nn.Module], torch.optim.Optimizer] | None, start: str, seed: int, steps: int) -> list[float]:
    """Those of a run with labels that are a little noisy; of the frozen model, without an optimizer."""
    student, teacher = make_task(start, seed)
    optimizer = None if build is None else build(student)
    generator = torch.Generator().manual_seed(1000 + seed)
    values = []
    for _ in range(steps):
        x = torch.randn(64, WIDTHS[0], generator=generator)
        y = teacher(x) + 0.01 * torch.randn(64, WIDTHS[-1], generator=generator)
        loss = (student(x) - y).square().mean()
        values.append(loss.item())
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            try:
                optimizer.step()
            except torch.linalg.LinAlgError:  # of a matrix that is not finite
                return [*values, math.nan]
    return values


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.damping", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "damping.csv")
    args = parser.parse_args(argv)
    frozen = {(start, seed): losses(None, start, seed, args.steps) for start in ("zero", "spread") for seed in args.seeds}
    work = [
        (name, lr, start, damping, seed)
        for name in args.methods
        for lr in METHODS[name][1]
        for (start, seed), damping in itertools.product(frozen, DAMPINGS)
    ]
    rows: list[dict[str, object]] = []
    for name, lr, start, damping, seed in tqdm(work, unit="run"):
        optimizer = METHODS[name][0]
        run = losses(lambda model, o=optimizer, lr=lr, damping=damping: o(model, lr=lr, damping=damping), start, seed, args.steps)
        worst = max(run) / run[0] if all(map(math.isfinite, run)) else math.inf
        final = statistics.fmean(run[-20:]) / statistics.fmean(frozen[start, seed][-20:])
        values = (name, lr, start, damping, seed, f"{final:.4g}", f"{worst:.4g}", worst > 2)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    Console(width=140).print(summary(rows))


def summary(rows: list[dict[str, object]]) -> Table:
    """For every damping: the loss at each method's best learning rate (mean over starts and seeds), and how many runs blew up."""
    table = Table(title="loss at the best learning rate (runs that blew up, of all learning rates)")
    names = list(dict.fromkeys(row["method"] for row in rows))
    for column in ("damping", *names):
        table.add_column(str(column), justify="right")
    for damping in DAMPINGS:
        cells = []
        for name in names:
            here = [row for row in rows if (row["method"], row["damping"]) == (name, damping)]
            means = [
                statistics.fmean(float(str(row["loss"])) for row in here if row["lr"] == lr) for lr in dict.fromkeys(r["lr"] for r in here)
            ]
            finite = [mean for mean in means if math.isfinite(mean)]
            cells.append(f"{min(finite, default=math.nan):.4f} ({sum(bool(row['blow_up']) for row in here)}/{len(here)})")
        table.add_row(f"{damping:g}", *cells)
    return table


if __name__ == "__main__":
    main()
