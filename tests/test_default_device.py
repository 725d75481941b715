"""What ``torch.set_default_device`` says, or ``with torch.device(...)``, is where users' tensors go, and none of ours.

The meta device stands in for a GPU: a tensor that goes there by mistake has no values.
"""

from __future__ import annotations

import copy

import pytest
import torch
from _models import batch, make_model
from _optimizers import OPTIMIZERS, with_reference
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.backends import force
from lowrank_kernels.backends.registry import implementations

BACKENDS = [name for name in ("reference", "triton") if name in implementations("grouped_adamw_")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_where_the_parameters_are(name: str, backend: str) -> None:
    models = [make_model("ours" if name == "SDSLoRA" else "peft")]
    models.append(copy.deepcopy(models[0]))
    x, y = batch(0)
    for model, default in zip(models, ("cpu", "meta"), strict=True):
        with torch.device(default):
            optimizer = OPTIMIZERS[name](model)
            (model(x) - y).square().mean().backward()
            with force(with_reference(backend)):
                optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


@pytest.mark.parametrize("start", ["lora-sb", "svd", "pissa", "lora-ga"])
def test_starts_are_made_where_the_model_is(start: str) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9))]
    models.append(copy.deepcopy(models[0]))
    batches = [(torch.randn(8, 12), torch.randn(8, 9)) for _ in range(2)]
    for model, default in zip(models, ("cpu", "meta"), strict=True):
        with torch.device(default):
            lk.adapt(model, method="xs" if start in ("lora-sb", "svd") else "lora", rank=3)

            def loss(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
                return (model(data[0]) - data[1]).square().mean()

            if start == "lora-sb":
                lk.lora_sb_init(model, batches, loss, lr=1e-3)
            elif start == "lora-ga":
                lk.initialize(model, start, batches=batches, loss_fn=loss)
            else:
                lk.initialize(model, start)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
