"""A problem for the tests of the preconditioned methods, and the methods."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowrank_kernels import (
    AltLoRA,
    AltLoRAPlus,
    LoRAPro,
    LoRARITE,
    LowRankLinear,
    ScaledAdamW,
    ScaledGD,
)

#: (d_out, d_in, r, s): ragged heights, two ranks, three scales.
LAYERS = [(20, 12, 3, 0.7), (15, 20, 3, 0.7), (9, 15, 3, 1.9), (11, 8, 2, 0.5)]
METHODS = [AltLoRA, AltLoRAPlus, ScaledGD, ScaledAdamW, LoRAPro, LoRARITE]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)


class Targets:
    """Layers of ours with random factors, and a target for each."""

    def __init__(self, layers=LAYERS, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(rows: int, columns: int, norm: float) -> Tensor:
            return (norm * torch.randn(rows, columns, generator=generator, dtype=torch.float64)).to(dtype)

        self.model, self.targets = nn.ModuleList(), []
        for d_out, d_in, rank, scale in layers:
            layer = LowRankLinear(nn.Linear(d_in, d_out, dtype=dtype).requires_grad_(False), rank, scale, dtype=dtype)
            layer.lora_A.data, layer.lora_B.data = random(rank, d_in, d_in**-0.5), random(d_out, rank, 0.3)
            self.model.append(layer)
            self.targets.append(random(d_out, rank + 1, rank**-0.5) @ random(rank + 1, d_in, 1))

    def gradients(self, index: int, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """∂A and ∂B of one layer, at any factors."""
        s = self.model[index].scale
        G = s * B @ A - self.targets[index]
        return s * B.mT @ G, s * G @ A.mT

    def set_gradients(self) -> None:
        for index, layer in enumerate(self.model):
            A, B = layer.lora_A.detach(), layer.lora_B.detach()
            layer.lora_A.grad, layer.lora_B.grad = self.gradients(index, A, B)

    def loss(self) -> float:
        return sum(float((layer.delta_weight() - t).double().square().sum()) for layer, t in zip(self.model, self.targets, strict=True)) / 2

    def deltas(self) -> list[Tensor]:
        return [layer.delta_weight() for layer in self.model]

    def run(self, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
        losses = [self.loss()]
        for _ in range(steps):
            self.set_gradients()
            optimizer.step()
            losses.append(self.loss())
        return losses
