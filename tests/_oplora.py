"""What the tests of OPLoRA share: small models in both kinds of layers, and their full gradients by plain autograd."""

from __future__ import annotations

import peft
import pytest
import torch
from _models import batch, pair_delta
from _models import make_model as make_any_model
from torch import Tensor, nn

import lowrank_kernels as lk
from benchmarks.naive.oplora import OPLoRALayer
from lowrank_kernels import OPLoRA, pairs

LR = 0.05
GRADIENTS = ("factors", "dense", "sketch")
every_gradient = pytest.mark.parametrize("gradient", GRADIENTS)
every_library = pytest.mark.parametrize("library", ["ours", "peft"])
#: Three ways to hold G, and the scaled variant, whose metrics are as wide as a test's layers allow.
KFAC = {"metric": "kfac", "metric_damping": 0.05, "metric_decay": 0.9, "lr": 1e-3}
every_kind = pytest.mark.parametrize("kind", [*({"gradient": gradient} for gradient in GRADIENTS), KFAC], ids=[*GRADIENTS, "kfac"])


def make_model(library: str, **options) -> nn.Module:
    torch.manual_seed(0)  # half of PEFT's factors start at random
    return make_any_model(library, **options)


def make(params, **options) -> OPLoRA:
    return OPLoRA(params, **{"lr": LR, "momentum": 0.8, **options})


def deltas(model: nn.Module) -> list[Tensor]:
    return [pair_delta(pair) for pair in pairs(model)]


def assert_alike(model: nn.Module, other: nn.Module, tolerance: float) -> None:
    for mine, theirs in zip(deltas(model), deltas(other), strict=True):
        assert theirs.norm() > 1e-3
        assert float((mine - theirs).norm() / theirs.norm()) <= tolerance


def bases(model: nn.Module) -> list[nn.Linear]:
    return [module.base_layer for module in model.modules() if hasattr(module, "base_layer")]


def naive_gradients(model: nn.Module, layers: list[OPLoRALayer], step: int) -> list[tuple[Tensor, Tensor]]:
    """(S, X) of every layer of :func:`make_model`'s network, by plain autograd through a dense network."""
    x, y = batch(step)
    seen = []
    for index, (base, layer) in enumerate(zip(bases(model), layers, strict=True)):
        output = x @ (base.weight + layer.delta_weight()).T + base.bias
        output = output if output.requires_grad else output.requires_grad_()
        output.retain_grad()
        seen.append((output, x))
        x = torch.tanh(output) if index < len(layers) - 1 else output
    (x - y).square().mean().backward()
    return [(output.grad, x.detach()) for output, x in seen]


class Shared(nn.Module):
    """One adapted layer used twice in a forward pass, one not used, one whose output is not, rank-3 inputs, dropout if wanted."""

    def __init__(self, library: str = "ours", dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared, self.unused, self.dangling = (nn.Linear(12, 12).double() for _ in range(4))
        self.last = nn.Linear(12, 9).double()
        names = ["first", "shared", "unused", "dangling", "last"]
        if library == "ours":
            lk.adapt(self, rank=3, target_modules=names, dropout=dropout)
        else:
            config = peft.LoraConfig(r=3, target_modules=names, lora_dropout=dropout)
            peft.inject_adapter_in_model(config, self)
        for pair in pairs(self):
            pair.A.data = torch.randn(pair.A.shape, dtype=torch.float64) / 4
            pair.B.data = torch.randn(pair.B.shape, dtype=torch.float64) / 4

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.reshape(2, -1, 12)))
        x = torch.tanh(self.shared(torch.tanh(self.shared(x))))
        self.dangling(x)
        return self.last(x).reshape(-1, 9)
