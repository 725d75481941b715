"""The paper's linear task: ``python -m benchmarks.linear_task`` (a minute) draws Figure 1 of OPLoRA (Almansoori et al. 2025).

``min ‖UVᵀ − W‖_F²`` over rank 8 for a Gaussian W of 600 × 200. A batch are columns of W: all 200 without momentum at η = 0.5, with which
full training is there in one step, or 64 drawn at random with momentum 0.75 at η = 0.1. All start as LoRA does, with U = 0 (the
paper's Appendix D has the truncated SVD of a full weight for a start).

What comes out (five seeds, medians):

* Full batch: more sweeps come closer to SVDLoRA at every step, as the paper says.
* Mini-batches: SVDLoRA is no goal. It leads for some steps only, and is behind OPLoRA×8 from step 5 on, ×2 from 26, ×1 from 40, the
  projected ones from 41 (×2) and 49 (×1). After 100 steps it is 0.028 over the optimum, OPLoRA 0.014 to 0.015, projected 0.018 to 0.019.
  More sweeps help early (after 20 steps 0.036, 0.029, 0.025 with 1, 2, 8) and no longer after 100. The paper remarks both.
* A momentum of higher rank approaches SVDLoRA's from the better side: it makes OPLoRA worse (0.013 with rank 4, 0.022 with rank 64).
* Plain LoRA by SGD, at the paper's 0.02η, begins slowly and is the best of all after 100 steps (0.010). Adam at its default lr, as in the
  paper, hardly moves.

Writes one row for each (task, method, seed, step) with the loss over that of the best matrix of rank 8, minus 1, to
``benchmarks/results/linear_task.csv``, and the figure beside it: medians over the seeds and their range.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .naive.adamw import adamw_
from .naive.oplora import OPLoRALayer, SVDLoRALayer

D_OUT, D_IN, RANK, BATCH = 600, 200, 8, 64
#: η and α of a task, and how many columns its batches have.
TASKS = {"full batch": (0.5, 0.0, D_IN), "mini-batch": (0.1, 0.75, BATCH)}
COLUMNS = ("task", "method", "seed", "step", "excess")


class Layer(Protocol):
    """What trains ΔW = UVᵀ."""

    def delta_weight(self) -> Tensor: ...

    def step(self, S: Tensor, X: Tensor) -> None: ...


class LoRALayer:
    """Plain LoRA by SGD with momentum or, without lr, by Adam with its default parameters."""

    def __init__(self, A: Tensor, B: Tensor, *, lr: float | None, momentum: float = 0.0) -> None:
        self.factors, self.lr, self.momentum, self.steps = [B, A.T], lr, momentum, 0
        self.m, self.v = ([torch.zeros_like(f) for f in self.factors] for _ in range(2))

    def delta_weight(self) -> Tensor:
        U, V = self.factors
        return U @ V.T

    def step(self, S: Tensor, X: Tensor) -> None:
        (U, V), self.steps = self.factors, self.steps + 1
        gradients = [S.T @ (X @ V), X.T @ (S @ U)]
        if self.lr is None:
            self.factors = [f.clone() for f in self.factors]
            adamw_(self.factors, gradients, self.m, self.v, step=self.steps, lr=1e-3)
            return
        self.m = [self.momentum * m + g for m, g in zip(self.m, gradients, strict=True)]
        self.factors = [f - self.lr * m for f, m in zip(self.factors, self.m, strict=True)]


def make_task(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
    """W, LoRA's start (A, B), and the generator that draws the rest."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(D_OUT, D_IN, generator=generator, dtype=dtype)
    A = torch.randn(RANK, D_IN, generator=generator, dtype=dtype) / D_IN**0.5
    return W, A, torch.zeros(D_OUT, RANK, dtype=dtype), generator


def optimum(W: Tensor) -> float:
    """The loss of the best matrix of rank 8."""
    return float(torch.linalg.svdvals(W)[RANK:].square().sum())


def oplora(
    task: str, A: Tensor, B: Tensor, generator: torch.Generator, sweeps: int, mode: str = "lowrank", momentum_rank: int = RANK
) -> Layer:
    lr, momentum, _ = TASKS[task]
    start = None
    if mode == "lowrank":
        start = torch.randn(D_IN, momentum_rank, generator=generator, dtype=A.dtype) / D_IN**0.5
    return OPLoRALayer(A, B, 1.0, lr=lr, momentum=momentum, sweeps=sweeps, momentum_mode=mode, momentum_start=start)


Builder = Callable[[str, Tensor, Tensor, torch.Generator], Layer]


def methods(task: str) -> dict[str, Builder]:
    """The curves of a task, by the paper's names; "r4" … "r64" are ranks of the momentum (K = 2)."""
    lr, momentum, _ = TASKS[task]
    found: dict[str, Builder] = {
        # The paper finds 0.02η best for SGD on the factors.
        "LoRA SGD": lambda t, A, B, g: LoRALayer(A, B, lr=0.02 * lr, momentum=momentum),
        "LoRA Adam": lambda t, A, B, g: LoRALayer(A, B, lr=None),
        **{f"OPLoRA×{k}": lambda t, A, B, g, k=k: oplora(t, A, B, g, k) for k in (1, 2, 8)},
    }
    if momentum:
        found |= {f"Proj. OPLoRA×{k}": lambda t, A, B, g, k=k: oplora(t, A, B, g, k, "projected") for k in (1, 2)}
        found |= {f"OPLoRA×2 r{r}": lambda t, A, B, g, r=r: oplora(t, A, B, g, 2, momentum_rank=r) for r in (4, 16, 32, 64)}
    return {**found, "SVDLoRA": lambda t, A, B, g: SVDLoRALayer(A, B, 1.0, lr=lr, momentum=momentum)}


def excess_losses(task: str, build: Builder, seed: int, steps: int, dtype: torch.dtype = torch.float32) -> list[float]:
    """Loss over the optimum's, minus 1, before the first step and after each."""
    W, A, B, generator = make_task(seed, dtype)
    layer = build(task, A, B, generator)
    # The same batches for every method.
    batches = torch.Generator().manual_seed(1000 + seed)
    best, identity = optimum(W), torch.eye(D_IN, dtype=dtype)
    values = []
    for step in range(steps + 1):
        error = layer.delta_weight() - W
        values.append(float(error.square().sum()) / best - 1)
        if step < steps:
            columns = torch.randperm(D_IN, generator=batches)[: TASKS[task][2]]
            layer.step(2 * error[:, columns].T, identity[columns])
    return values


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Figure 1: a panel for each task, and one for the rank of the momentum."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def is_rank(name: str) -> bool:
        return " r" in name

    panels: list[tuple[str, str, Callable[[str], bool]]] = [
        ("full batch", "full batch", lambda name: True),
        ("mini-batch", "64 columns a batch, momentum", lambda name: not is_rank(name)),
        ("mini-batch", "rank of the momentum, K = 2", lambda name: is_rank(name) or name in ("OPLoRA×2", "SVDLoRA")),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), constrained_layout=True)
    for axis, (task, title, chosen) in zip(axes, panels, strict=True):
        for name in dict.fromkeys(row["method"] for row in rows if row["task"] == task and chosen(row["method"])):
            by_step: dict[int, list[float]] = {}
            for row in rows:
                if (row["task"], row["method"]) == (task, name):
                    by_step.setdefault(int(row["step"]), []).append(max(float(row["excess"]), 1e-8))
            steps = sorted(by_step)
            label = "OPLoRA×2 r8" if title.startswith("rank") and name == "OPLoRA×2" else name
            style = {"color": "black", "linestyle": "--"} if name == "SVDLoRA" else {}
            (line,) = axis.plot(steps, [statistics.median(by_step[s]) for s in steps], label=label, **style)
            axis.fill_between(steps, [min(by_step[s]) for s in steps], [max(by_step[s]) for s in steps], color=line.get_color(), alpha=0.15)
        axis.set(title=title, xlabel="step", ylabel="loss / best of rank 8 − 1", yscale="log")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> list[dict[str, str]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_task", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=2, default=[8, 100], help="of the full-batch and of the mini-batch task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "linear_task.csv")
    args = parser.parse_args(argv)
    rows = [
        {"task": task, "method": name, "seed": str(seed), "step": str(step), "excess": f"{value:.5g}"}
        for task, steps in zip(TASKS, args.steps, strict=True)
        for name, build in methods(task).items()
        for seed in args.seeds
        for step, value in enumerate(excess_losses(task, build, seed, steps))
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, args.out.with_suffix(".png"))
    for task, steps in zip(TASKS, args.steps, strict=True):
        for name in methods(task):
            last = [float(row["excess"]) for row in rows if (row["task"], row["method"], row["step"]) == (task, name, str(steps))]
            print(f"{task:11} {name:16} after {steps:3} steps: {statistics.median(last):.4g} over the optimum")
    return rows


if __name__ == "__main__":
    main()
