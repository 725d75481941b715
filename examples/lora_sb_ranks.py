"""How few parameters does it take? LoRA-SB and LoRA-XS at several ranks against LoRA of rank 8, on the task of finetune_text.py.

    python examples/lora_sb_ranks.py                    # runs what is missing in the CSV, prints the table

All 36 linear layers of MiniLM's encoder are adapted; every method sees the same batches for as many steps, with a linearly falling learning
rate. The learning rate is chosen on the first seed, by the training loss, from a grid that is extended while its edge is best; the
other seeds run at that rate only. LoRA-SB starts from 1/100 of the training sentences, at full fine-tuning's learning rate.
Every run is one row of ``benchmarks/results/lora_sb.csv``, written when it is done: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
from data import Batch, SentenceClassifier, load_classifier, load_splits
from finetune_text import evaluate, parameter_groups, train
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

import lowrank_kernels as lrk

LAYERS = r"encoder\.layer\..*(query|key|value|dense)"
LRS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
#: Where the search begins; its neighbours are tried too.
MIDDLE_LR = {"lora": 2e-3, "lora-sb": 5e-3, "lora-xs": 5e-3}
KEY = ("method", "rank", "start_lr", "lr", "head_lr", "seed", "steps", "batch")
COLUMNS = (*KEY, "parameters", "train_loss", "test_loss", "test_accuracy", "setup_s", "seconds")
Row = dict[str, str]


def make_model(method: str, rank: int, seed: int, start_lr: float, batches: list[Batch]) -> SentenceClassifier:
    """The pretrained model with its adapters started; the seed decides the head, and A of LoRA."""
    torch.manual_seed(seed)
    model = load_classifier()
    if method == "lora":
        lrk.adapt(model.backbone, rank=rank, alpha=4.0, rank_scaling="rslora", target_modules=LAYERS)
        return model
    lrk.adapt(model.backbone, method="xs", rank=rank, target_modules=LAYERS)
    if method == "lora-sb":
        lrk.lora_sb_init(model, batches, loss_of, lr=start_lr, progress=False)
    else:
        lrk.initialize(model, "svd")
    return model


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    inputs, labels = batch
    return cross_entropy(model(**inputs), labels)


def key_of(method: str, rank: int, lr: float, seed: int, args: argparse.Namespace) -> tuple[object, ...]:
    """What a row is found by: the columns :data:`KEY`."""
    return (
        method,
        rank,
        f"{args.start_lr if method == 'lora-sb' else 0:.0e}",
        f"{lr:.0e}",
        f"{args.head_lr:.0e}",
        seed,
        args.steps,
        args.batch,
    )


def run(method: str, rank: int, lr: float, seed: int, args: argparse.Namespace) -> Row:
    """One training run."""
    started = time.perf_counter()
    splits = load_splits()
    device = torch.device("cpu")
    hundredth = max(1, len(splits.train.ids) // 100 // args.batch)
    model = make_model(method, rank, seed, args.start_lr, splits.train.training_batches(hundredth, args.batch, 1000 + seed, device))
    setup = time.perf_counter() - started
    optimizer_class = {"lora": torch.optim.AdamW, "lora-sb": lrk.LoRASB, "lora-xs": lrk.AdamW}[method]
    optimizer = optimizer_class(parameter_groups(model, lr, args.head_lr))
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / args.steps)
    batches = splits.train.training_batches(args.steps, args.batch, seed, device)
    losses = list(train(model, optimizer, scheduler, batches))
    test_loss, accuracy = evaluate(model, splits.test.evaluation_batches(device)) if args.test else (float("nan"), float("nan"))
    adapter = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head."))
    seconds = time.perf_counter() - started
    values = (adapter, f"{statistics.fmean(losses[-20:]):.5f}", f"{test_loss:.5f}", f"{accuracy:.4f}", f"{setup:.2f}", f"{seconds:.1f}")
    return dict(zip(COLUMNS, map(str, (*key_of(method, rank, lr, seed, args), *values)), strict=True))


class Results:
    """The CSV: what is in it is not run again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))

    def get(self, method: str, rank: int, lr: float, seed: int, args: argparse.Namespace) -> Row:
        """The row of these settings, run now if it is missing."""
        key = tuple(map(str, key_of(method, rank, lr, seed, args)))
        for row in self.rows:
            if tuple(row[column] for column in KEY) == key:
                return row
        row = run(method, rank, lr, seed, args)
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append(row)
        print(" ".join(row.values()), flush=True)
        return row


def tuned(results: Results, method: str, rank: int, args: argparse.Namespace) -> list[Row]:
    """The rows of all seeds at the learning rate that is best on the first one."""
    low, high = LRS.index(MIDDLE_LR[method]) - 1, LRS.index(MIDDLE_LR[method]) + 1

    def loss(lr: float) -> float:
        value = float(results.get(method, rank, lr, args.seeds[0], args)["train_loss"])
        return value if value == value else float("inf")

    best = min(LRS[low : high + 1], key=loss)
    while (best == LRS[low] and low > 0) or (best == LRS[high] and high < len(LRS) - 1):
        low, high = (low - 1, high) if best == LRS[low] else (low, high + 1)
        best = min(LRS[low : high + 1], key=loss)
    return [results.get(method, rank, best, seed, args) for seed in args.seeds]


def summary(found: dict[tuple[str, int], list[Row]]) -> Table:
    """One line per method and rank: mean and standard deviation over the seeds."""
    reference = found.get(("lora", 8))
    table = Table(title="Training loss of the last 20 steps, at each one's best learning rate")
    for column in ("method", "rank", "parameters", "× fewer", "lr", "train loss", "reaches LoRA r = 8"):
        table.add_column(column, justify="right")
    for (method, rank), rows in found.items():
        losses = [float(row["train_loss"]) for row in rows]
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        fewer = reached = "–"
        if reference is not None:
            fewer = f"{int(reference[0]['parameters']) / int(rows[0]['parameters']):.1f}"
            reached = "yes" if statistics.fmean(losses) <= statistics.fmean(float(row["train_loss"]) for row in reference) else "no"
        table.add_row(method, str(rank), rows[0]["parameters"], fewer, rows[0]["lr"], f"{statistics.fmean(losses):.4f}{spread}", reached)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(MIDDLE_LR), default=list(MIDDLE_LR), help="what to compare")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 21, 32, 48], help="of LoRA-SB and LoRA-XS; LoRA has 8")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each at the best learning rate")
    parser.add_argument("--steps", type=int, default=60, help="of every run")
    parser.add_argument("--batch", type=int, default=16, help="sentences a step")
    parser.add_argument("--head-lr", type=float, default=5e-3, help="of the classifier, which all methods train in full")
    parser.add_argument("--start-lr", type=float, default=1e-4, help="of the full fine-tuning whose first step LoRA-SB starts from")
    parser.add_argument("--test", action="store_true", help="evaluate on the test sentences too")
    results_folder = Path(__file__).parent.parent / "benchmarks" / "results"
    parser.add_argument("--out", type=Path, default=results_folder / "lora_sb.csv", help="the rows; those it has are not run again")
    args = parser.parse_args()
    results = Results(args.out)
    work = [(method, rank) for method in args.methods for rank in ([8] if method == "lora" else args.ranks)]
    found = {(method, rank): tuned(results, method, rank, args) for method, rank in work}
    Console(width=130).print(summary(found))


if __name__ == "__main__":
    main()
