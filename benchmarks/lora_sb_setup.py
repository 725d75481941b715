"""``python -m benchmarks.lora_sb_setup``: what the start of LoRA-SB costs before training: seconds, memory beyond a LoRA step's, energy.

Each model is one row of ``results/lora_sb_setup.csv``, replaced by a re-run. Seconds are those of the first call in the process, as a
training script sees them. Memory is what torch allocates, from the profiler, for the same batches: the start, without its accumulators,
and the steps of LoRA that come after it. Energy is measured against the exact singular values of the same update.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from data import Batch, SentenceClassifier, load_classifier, load_splits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lowrank_kernels as lrk

from . import results
from .harness import device_name, peak_temporary_bytes

LAYERS = r"encoder\.layer\..*(query|key|value|dense)"
MIB = 2**20


@dataclass(frozen=True)
class Setup:
    """One measurement.

    Attributes:
        layers: adapted; ``samples``: that the gradients were taken from.
        seconds: of ``lora_sb_init``; ``svd_seconds`` of them are the truncated SVDs.
        energy: the least share, over the layers, of the energy that the best rank-r approximation has.
        lora_mib, start_mib: peak of what was allocated beyond the model during LoRA's steps and during the start.
        accumulator_mib: the running sums of the gradients, part of ``start_mib``.
        gradient_mib: the gradient of the largest layer.
        extra: ``(start - accumulator - lora) / gradient``: how many of the largest gradients the start needs beyond a LoRA step.
    """

    model: str
    rank: int
    threads: int
    device_name: str
    layers: int
    samples: int
    seconds: float
    svd_seconds: float
    energy: float
    lora_mib: float
    start_mib: float
    accumulator_mib: float
    gradient_mib: float
    extra: float
    torch: str
    python: str
    date: str


KEY = ("model", "rank", "threads", "device_name")


@dataclass(frozen=True)
class Task:
    """A classifier without adapters, the same whenever it is made, and what to take gradients from."""

    make: Callable[[], nn.Module]
    batches: list[Batch]

    def load(self) -> nn.Module:
        torch.manual_seed(0)  # the head is random
        return self.make()


def minilm(share: float = 0.01, size: int = 16) -> Task:
    """MiniLM on Rotten Tomatoes: 36 linear layers, 1/100 of the training sentences."""
    train = load_splits().train
    count = max(1, int(share * len(train.ids)) // size)
    return Task(load_classifier, train.training_batches(count, size, 0, torch.device("cpu")))


def random_bert(blocks: int, width: int, tokens: int = 64, size: int = 4, count: int = 1) -> Task:
    """A BERT of random weights on random tokens: six linear layers a block."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=1000, hidden_size=width, num_hidden_layers=blocks, num_attention_heads=width // 64, intermediate_size=4 * width,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip

    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(size, tokens, dtype=torch.long)
    batches: list[Batch] = []
    for _ in range(count):
        ids, labels = (torch.randint(0, high, shape, generator=generator) for high, shape in ((1000, (size, tokens)), (2, (size,))))
        batches.append(({"input_ids": ids, "attention_mask": mask}, labels))
    return Task(lambda: SentenceClassifier(BertModel(config)), batches)


TASKS: dict[str, Callable[[], Task]] = {"minilm": minilm, "bert-12x1024": lambda: random_bert(12, 1024)}


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    inputs, labels = batch
    return cross_entropy(model(**inputs), labels)


def adapted(task: Task, method: str, rank: int) -> nn.Module:
    model = task.load()
    lrk.adapt(model.backbone, method=method, rank=rank, target_modules=LAYERS)
    return model


def best_energy(task: Task, names: list[str], rank: int) -> dict[str, float]:
    """The share of the update's energy, ``sign(Σ∇L)``, that the exact rank-r SVD keeps, of each layer."""
    model = task.load().requires_grad_(False)
    weights = {name: model.get_submodule(name).weight.requires_grad_() for name in names}
    for batch in task.batches:
        (len(batch[1]) * loss_of(model, batch)).backward()
    shares = {}
    for name, weight in weights.items():
        x = weight.grad.sign()
        gram = x @ x.mT if x.shape[0] <= x.shape[1] else x.mT @ x  # whole numbers: exact
        shares[name] = (torch.linalg.eigvalsh(gram)[-rank:].sum() / x.square().sum()).item()
        weight.grad = None
    return shares


def lora_step_bytes(task: Task, rank: int) -> int:
    """Peak of a LoRA step over the batches; the optimizer's state is there already."""
    model = adapted(task, "lora", rank)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def steps() -> None:
        for batch in task.batches:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()

    steps()
    return peak_temporary_bytes(steps, torch.device("cpu"))


def measure(name: str, task: Task, rank: int) -> Setup:
    """One row."""
    reports: list[lrk.InitReport] = []
    model = adapted(task, "xs", rank)

    def start() -> None:
        reports.append(lrk.lora_sb_init(model, task.batches, loss_of, lr=1e-4, progress=False))

    start()
    first = reports[0]
    peak = peak_temporary_bytes(start, torch.device("cpu"))
    largest = max(p.A.shape[1] * p.B.shape[0] * 4 for p in lrk.pairs(model))
    lora = lora_step_bytes(task, rank)
    best = best_energy(task, list(first.energy), rank)
    return Setup(
        name, rank, torch.get_num_threads(), device_name(torch.device("cpu")), len(first.energy), first.samples, first.seconds,
        first.svd_seconds, min(first.energy[layer] / share for layer, share in best.items()), lora / MIB, peak / MIB,
        first.accumulator_bytes / MIB, largest / MIB, (peak - first.accumulator_bytes - lora) / largest, torch.__version__,
        platform.python_version(), date.today().isoformat(),
    )  # fmt: skip


def upsert(path: Path, row: Setup) -> None:
    """Write the row; it replaces the one with the same :data:`KEY`."""
    results.upsert_texts(path, [results.as_text(row)], KEY, [field.name for field in fields(Setup)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lora_sb_setup.csv")
    args = parser.parse_args(argv)
    for name in args.models:
        row = measure(name, TASKS[name](), args.rank)
        upsert(args.out, row)
        print(
            f"{name}, r = {row.rank}: {row.layers} layers from {row.samples} samples in {row.seconds:.2f} s ({row.svd_seconds:.2f} s of "
            f"SVDs), at least {row.energy:.4f} of the exact energy; {row.start_mib:.1f} MiB with {row.accumulator_mib:.1f} of "
            f"accumulators, LoRA's steps {row.lora_mib:.1f}: {row.extra:.2f} × the largest gradient ({row.gradient_mib:.1f}) beyond those"
        )


if __name__ == "__main__":
    main()
