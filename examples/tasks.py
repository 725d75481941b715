"""The tasks that the methods are compared on: a model, its data, and what a run of it takes by default."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data import Splits, load_classifier, load_splits
from language import load_language_model, load_shakespeare
from torch import nn


@dataclass(frozen=True)
class Task:
    """A model whose ``backbone`` is adapted, whose output is scored by cross entropy, and data for it.

    Attributes:
        title: for plots.
        load_model: the pretrained model.
        load_splits: from (length in tokens, held out, how much to train on) to the data.
        defaults: of the command line's options.
    """

    title: str
    load_model: Callable[[], nn.Module]
    load_splits: Callable[[int, int, int | None], Splits]
    defaults: dict[str, Any]

    def splits(self, args: argparse.Namespace) -> Splits:
        return self.load_splits(args.max_length, args.held_out, args.train_examples)


#: All linear layers of a Llama block, as in the papers.
LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

TASKS = {
    "minilm": Task(
        "MiniLM-L6 on Rotten Tomatoes",
        load_classifier,
        load_splits,
        {"steps": 200, "batch_size": 16, "max_length": 64, "held_out": 1000, "target_modules": ["query", "value"]},
    ),
    "smollm2": Task(
        "SmolLM2-135M on Shakespeare",
        load_language_model,
        load_shakespeare,
        {"steps": 60, "batch_size": 2, "max_length": 96, "held_out": 32, "target_modules": LLAMA_LINEARS},
    ),
}
