"""Whole steps on the Triton backend, as a GPU runs them: through the dispatcher, with everything that the optimizers hand over."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from _models import batch, make_model, pair_delta
from _optimizers import OPTIMIZERS, with_reference
from torch import nn

pytest.importorskip("triton")
import lowrank_kernels as lk
from lowrank_kernels import pairs
from lowrank_kernels.backends import call_counts, force


def with_cores() -> nn.Module:
    torch.manual_seed(1)
    model = lk.adapt(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9)), rank=3, method="xs").double()
    lk.initialize(model, "svd")
    return model


PEFT = [(name, build, lambda: make_model("peft")) for name, build in OPTIMIZERS.items() if name != "SDSLoRA"]
CASES = [
    *PEFT,
    ("SDSLoRA", lambda m: lk.SDSLoRA(m, lr=1e-2, warmup_steps=1, refresh_every=1), lambda: make_model("ours")),
    ("ODLoRA", lambda m: lk.ODLoRA(m, lr=1e-2, rounds=1, round_steps=1, refresh_every=1), lambda: make_model("ours")),
    ("LoRASB", lambda m: lk.LoRASB(m, lr=1e-2), with_cores),
]


@pytest.mark.parametrize(("name", "build", "make"), CASES, ids=[name for name, *_ in CASES])
def test_steps_are_the_references(
    device: torch.device, name: str, build: Callable[..., torch.optim.Optimizer], make: Callable[[], nn.Module]
) -> None:
    start = make().to(device)
    found = []
    for backend in (with_reference("triton"), "reference"):
        model = copy.deepcopy(start)
        with force(backend):
            optimizer, before = build(model), call_counts()
            for step in range(3):
                x, y = (tensor.to(device) for tensor in batch(step))
                optimizer.zero_grad()
                (model(x) - y).square().mean().backward()
                optimizer.step()
        ran = {key for key, count in call_counts().items() if count > before.get(key, 0)}
        whole = {"grouped_adamw_", "grouped_altlora_turn_", "grouped_lorsum"}
        assert backend == "reference" or any((operation, "triton") in ran for operation in whole)
        found.append([pair_delta(pair) for pair in pairs(model)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
