"""A small model with everything that an adapter meets, for the tests of adapters in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_kernels as lrk


class Block(nn.Module):
    def __init__(self, d: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.query = nn.Linear(d, d)
        self.value = nn.Linear(d, d, bias=False)
        self.norm = nn.LayerNorm(d)
        self.up = nn.Linear(d, hidden)
        self.down = nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.value(x) * torch.tanh(self.query(x))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Two blocks, an embedding tied to the output, and a head."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, d)
        self.blocks = nn.ModuleList([Block(d), Block(d)])
        self.unembed = nn.Linear(d, 20, bias=False)
        self.unembed.weight = self.embedding.weight
        self.classifier = nn.Linear(d, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return torch.cat([self.unembed(x), self.classifier(x)], dim=-1)


def randomize(model: nn.Module, decoupled: bool = True) -> nn.Module:
    """Give every adapter a ΔW as large as a weight, decoupled with orthonormal Q where the layer can be."""
    for layer in model.modules():
        if isinstance(layer, lrk.LowRankLinear):
            with torch.no_grad():
                layer.lora_A.normal_(std=layer.in_features**-0.5)
                layer.lora_B.normal_(std=layer.rank**-0.5)
                if layer.method == "sds" and decoupled:
                    layer.q_a.copy_(torch.linalg.qr(torch.randn(layer.in_features, layer.rank))[0].mT)
                    layer.q_b.copy_(torch.linalg.qr(torch.randn(layer.out_features, layer.rank))[0])
                    layer.decoupled = True
    return model


def adapted_net(method: str = "sds", **kwargs: object) -> Net:
    model = Net().double()
    lrk.adapt(model, method, rank=2, **{"target_modules": ["query", "value", "up", "down"]} | kwargs)
    return randomize(model)


IDS = torch.arange(10).reshape(2, 5)


def names_of(model: nn.Module) -> list[str]:
    return [pair.name for pair in lrk.pairs(model)]
