"""All methods side by side with tuned learning rates, and what their gradients look like: losses, alignment, effective ranks.

    python examples/compare.py                     # MiniLM on Rotten Tomatoes: learning rates by validation loss, three seeds
    python examples/compare.py --task smollm2      # SmolLM2 on Shakespeare: MiniLM's best learning rates ± one step, one seed
    python examples/compare.py --seconds 500       # as much as fits; the next call goes on where this one stopped

Every run is a row of ``compare_TASK.csv``, written when it is complete; rows that are there are not run again. For each method the
learning rates of a grid (steps of 2) are tried with the first seed, the grid is extended while its best is at an end, and the best
is repeated with the other seeds. Then :data:`PROBED` are run once more at their best with a ``FullGradientProbe`` (Figures 1, 3, 4, 5
of SDS-LoRA). A table is printed; ``compare_TASK_*.png`` are drawn from the files, ``compare_TASK_probe_means.csv`` has their numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from data import Splits
from finetune_text import METHODS, Method, Run, evaluate, mean_and_spread, parse, task_parser
from rich.console import Console
from rich.table import Table
from tasks import TASKS

from lowrank_kernels.diagnostics import FullGradientProbe, plot, read
from lowrank_kernels.diagnostics.plot import curves
from lowrank_kernels.diagnostics.record import COLUMNS as RECORDED

#: A new method is an entry of ``METHODS`` and a word here.
COMPARED = (
    "lora-s2",
    "lora",
    "lora+",
    "pissa",
    "dora",
    "altlora",
    "altlora+",
    "scaled-adamw",
    "lora-pro",
    "lora-rite",
    "oplora",
    "sds",
    "od",
    "od-short",
)
PROBED = ("lora", "scaled-adamw", "sds", "od")
#: Where a method's learning rates begin if not at :data:`FIRST_LRS`: AltLoRA's and OPLoRA's are no Adam's.
FIRST_LRS = (1e-3, 2e-3, 4e-3)
OWN_LRS = {"altlora": (0.1, 0.2, 0.4), "oplora": (0.025, 0.05, 0.1)}
MOST_EXTENSIONS = 4

KEY = ("task", "method", "lr", "seed", "steps", "rank", "alpha", "batch_size", "max_length", "targets", "train_examples", "held_out")
COLUMNS = (*KEY, "train_loss", "validation_loss", "test_loss", "test_accuracy", "seconds", "losses")


@dataclass(frozen=True)
class Row:
    """One complete run."""

    key: tuple[str, ...]
    train_loss: float
    validation_loss: float
    test_loss: float
    test_accuracy: float
    seconds: float
    losses: tuple[float, ...]

    @property
    def method(self) -> str:
        return self.key[1]

    @property
    def lr(self) -> float:
        return float(self.key[2])


class OutOfTime(Exception):
    """The next run would not fit into ``--seconds``."""


class Comparison:
    """The rows there are, and how missing ones are made."""

    def __init__(self, args: argparse.Namespace, methods: dict[str, Method]) -> None:
        self.args, self.methods = args, methods
        self.path: Path = args.output / f"{args.name}_{args.task}.csv"
        self.rows = {row.key: row for row in read_rows(self.path)}
        self.started, self.longest = time.monotonic(), 0.0

    def key(self, method: str, lr: float, seed: int) -> tuple[str, ...]:
        a = self.args
        data = (a.batch_size, a.max_length, "+".join(a.target_modules), a.train_examples or "all", a.held_out)
        return tuple(map(str, (a.task, method, f"{lr:.4g}", seed, a.steps, a.rank, a.alpha, *data)))

    def row(self, method: str, lr: float, seed: int) -> Row:
        """The row, run if it is missing."""
        key = self.key(method, lr, seed)
        if key not in self.rows:
            with self._budgeted():
                start = time.monotonic()
                run = self._train(method, lr, seed, None)
                result, device = run.result, run.device
                splits = splits_of(self.args.task, self.args.max_length, self.args.held_out, self.args.train_examples)
                validation, _ = evaluate(run.model, splits.validation.evaluation_batches(device))
                test, accuracy = evaluate(run.model, splits.test.evaluation_batches(device))
                row = Row(key, result.train_loss, validation, test, accuracy, time.monotonic() - start, tuple(result.losses))
                self.rows[key] = row
                append(self.path, row)
                print(
                    f"{method:>14} lr {lr:<8.4g} seed {seed}: train {row.train_loss:.4f}, validation {validation:.4f}, {row.seconds:.0f} s"
                )
        return self.rows[key]

    def middle(self, method: str) -> Row:
        """The row in the middle of the grid: the likeliest best one."""
        lrs = self.grid(method)
        return self.row(method, lrs[len(lrs) // 2], self.args.seeds[0])

    def probe_file(self, method: str) -> Path:
        """What a probe saw of the method at its best learning rate, run if it is missing."""
        best = self.best(method)
        path = self.path.with_name(f"{self.path.stem}_{method}_lr{best.lr:.4g}_{self.args.steps}_probe.csv")
        if not path.exists():
            with self._budgeted():
                partial = path.with_suffix(".part")
                partial.unlink(missing_ok=True)
                self._train(method, best.lr, self.args.seeds[0], partial)
                partial.rename(path)
                print(f"{method:>14} lr {best.lr:<8.4g} with a probe: {path}")
        return path

    def tune(self, method: str) -> None:
        """All rows of one method: a grid whose best is inside it, then the other seeds at the best."""
        seed = self.args.seeds[0]
        grid = [self.row(method, lr, seed) for lr in self.grid(method)]
        for _ in range(MOST_EXTENSIONS if self.args.extend else 0):
            best = min(grid, key=loss_of)
            if best.lr in (grid[0].lr, grid[-1].lr) and len(grid) > 1:
                lower = best.lr == grid[0].lr
                new = self.row(method, best.lr / 2 if lower else best.lr * 2, seed)
                grid = [new, *grid] if lower else [*grid, new]
        for other in self.args.seeds[1:]:
            self.row(method, min(grid, key=loss_of).lr, other)

    def best(self, method: str) -> Row:
        """The first seed's row with the lowest validation loss."""
        return min((row for row in self.of(method) if row.key[3] == str(self.args.seeds[0])), key=loss_of)

    def of(self, method: str) -> list[Row]:
        """The rows of a method under the present settings."""
        return [row for row in self.rows.values() if row.key == self.key(method, row.lr, int(row.key[3]))]

    def grid(self, method: str) -> list[float]:
        """The learning rates to begin with, rising."""
        return sorted(self.args.lrs or self._first_lrs(method))

    def _first_lrs(self, method: str) -> tuple[float, ...]:
        if self.args.task != "minilm":
            # From the cheaper task, where the method was tuned; its own grid where it was not.
            tuned = [r for r in read_rows(self.path.with_name(f"{self.args.name}_minilm.csv")) if r.method == method]
            if tuned:
                best = min((r for r in tuned if r.key[3] == min(row.key[3] for row in tuned)), key=loss_of).lr
                return best / 2, best, best * 2
        return OWN_LRS.get(method, FIRST_LRS)

    def _train(self, method: str, lr: float, seed: int, probe_file: Path | None) -> Run:
        args = self.args
        splits = splits_of(args.task, args.max_length, args.held_out, args.train_examples)
        batches = splits.train.training_batches(args.steps, args.batch_size, seed, torch.device(args.device))
        run = Run(method, lr, seed, batches, args)
        probe = None
        if probe_file is not None:
            probe = FullGradientProbe(run.model, every=args.probe_every, csv=probe_file, run=method).adopt(run.optimizer)
        for _ in range(args.steps):
            with probe or contextlib.nullcontext():
                loss = run.step()
                if probe is not None:
                    probe.log(loss=loss)
            if math.isnan(loss):
                break
        return run

    @contextlib.contextmanager
    def _budgeted(self) -> Iterator[None]:
        start = time.monotonic()
        if self.args.seconds and start - self.started + 1.2 * self.longest > self.args.seconds:
            raise OutOfTime
        yield
        self.longest = max(self.longest, time.monotonic() - start)


def loss_of(row: Row) -> float:
    """What learning rates are chosen by; a run that diverged is the worst."""
    return math.inf if math.isnan(row.validation_loss) or math.isnan(row.losses[-1]) else row.validation_loss


@cache
def splits_of(task: str, max_length: int, held_out: int, train: int | None) -> Splits:
    """Tokenized once."""
    return TASKS[task].load_splits(max_length, held_out, train)


def read_rows(path: Path) -> list[Row]:
    """The complete runs of a file, none if it is not there."""
    if not path.exists():
        return []
    csv.field_size_limit(10**9)
    with open(path, newline="", encoding="utf-8") as file:
        numbers = ("train_loss", "validation_loss", "test_loss", "test_accuracy", "seconds")
        return [
            Row(tuple(row[k] for k in KEY), *(float(row[k]) for k in numbers), tuple(map(float, row["losses"].split())))
            for row in csv.DictReader(file)
        ]


def append(path: Path, row: Row) -> None:
    """Add one run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(COLUMNS)
        numbers = (row.train_loss, row.validation_loss, row.test_loss, row.test_accuracy, row.seconds)
        writer.writerow((*row.key, *(f"{x:.6g}" for x in numbers), " ".join(f"{x:.5g}" for x in row.losses)))


def table(comparison: Comparison, names: list[str]) -> Table:
    """Every method at its best learning rate."""
    seeds = len(comparison.args.seeds)
    title = f"{TASKS[comparison.args.task].title}, {comparison.args.steps} steps, r = {comparison.args.rank}"
    result = Table(title=title, caption=f"Learning rate by validation loss of the first seed; mean ± deviation of up to {seeds} seeds.")
    for column in ("method", "lr", "seeds", "train loss", "validation loss", "test loss", "test accuracy"):
        result.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for name in names:
        best = comparison.best(name)
        rows = [row for row in comparison.of(name) if row.lr == best.lr]
        figures = [[getattr(row, key) for row in rows] for key in ("train_loss", "validation_loss", "test_loss", "test_accuracy")]
        label = comparison.methods[name].label
        result.add_row(label, f"{best.lr:g}", str(len(rows)), *(mean_and_spread(values, 4) for values in figures))
    return result


def plot_losses(comparison: Comparison, names: list[str], path: Path, window: int = 15) -> None:
    """Training losses at the best learning rates, means over the seeds and over ``window`` steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for index, name in enumerate(names):
        best = comparison.best(name)
        losses = torch.tensor([row.losses for row in comparison.of(name) if row.lr == best.lr and len(row.losses) == comparison.args.steps])
        if not len(losses):
            continue
        width = min(window, losses.shape[1])
        curve = losses.unfold(1, width, 1).mean(dim=(0, 2))
        style = "-" if index < 10 else "--"
        label = f"{comparison.methods[name].label}, lr {best.lr:g}"
        axes.plot(range(width, losses.shape[1] + 1), curve, style, color=f"C{index % 10}", label=label)
    axes.set(xlabel="step", ylabel=f"training loss (mean of {window} steps)", title=TASKS[comparison.args.task].title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_means(probes: list[Path], path: Path) -> None:
    """What the figures show, in numbers: means over the layers, a line for each run and measured step."""
    rows = [
        {"run": run, "step": step, **{key: f"{value:.5g}" for key, value in means.items()}}
        for probe in probes
        for run, steps in curves(read(probe)).items()
        for step, means in steps.items()
        if "alignment" in means
    ]
    columns = [name for name in RECORDED if any(name in row for row in rows)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(argv: list[str] | None = None, *, methods: dict[str, Method] = METHODS, **defaults: Any) -> Comparison:
    """The comparison; ``defaults`` replace those of the options (``compared=``, ``probed=``, ``name=``)."""
    parser = task_parser(__doc__.split("\n")[0])
    parser.add_argument("--compared", nargs="*", choices=list(methods), default=list(COMPARED), help="methods to tune")
    parser.add_argument("--probed", nargs="*", choices=list(methods), default=list(PROBED), help="methods whose gradients are measured")
    parser.add_argument("--lrs", type=float, nargs="+", help="the grid to begin with (default: the method's own)")
    parser.add_argument("--no-extend", dest="extend", action="store_false", help="keep to the grid (MiniLM; others always do)")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2 for minilm, else 0")
    parser.add_argument("--probe-every", type=int, default=5, help="steps between measurements")
    parser.add_argument("--seconds", type=float, help="stop before a run that would not be complete by then")
    parser.add_argument("--name", default="compare", help="of the files")
    parser.set_defaults(**defaults)
    args = parse(parser, argv)
    args.extend &= args.task == "minilm"  # the other tasks take one step around what was found there
    args.seeds = args.seeds or ([0, 1, 2] if args.task == "minilm" else [0])
    comparison = Comparison(args, methods)
    try:
        for name in args.compared:  # so that a comparison which stops early has something of every method
            comparison.middle(name)
        for name in args.compared:
            comparison.tune(name)
        files = {name: comparison.probe_file(name) for name in args.probed if comparison.of(name)}
    except OutOfTime:
        print("Out of time: the same command goes on from here.")
        files = {}
    names = [name for name in args.compared if comparison.of(name)]
    if names:
        Console(width=130).print(table(comparison, names))
        plot_losses(comparison, names, comparison.path.with_name(f"{comparison.path.stem}_losses.png"))
    if files:
        labels = {name: methods[name].label for name in files}
        for path in plot(list(files.values()), comparison.path.with_name(comparison.path.stem), labels=labels):
            print(path)
        write_means(list(files.values()), comparison.path.with_name(f"{comparison.path.stem}_probe_means.csv"))
    return comparison


if __name__ == "__main__":
    main()
