"""What ``test_oplora.py`` runs on every data-parallel rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_kernels import OPLoRA, adapt, average_gradients, pairs
from lowrank_kernels.parallel.ranks import DataParallelGroup

CASES: dict[str, dict[str, Any]] = {
    "factors": {},
    "projected": {"momentum_mode": "projected"},
    "dense": {"gradient": "dense", "momentum": 0.0, "sweeps": 1},
    "sketch": {"gradient": "sketch", "sketch_width": 4},
    "kfac": {"metric": "kfac", "metric_damping": 0.05, "lr": 1e-3},
}
SHAPES = [(20, 12), (15, 20), (9, 15)]


def network() -> nn.Module:
    torch.manual_seed(0)
    model = adapt(nn.Sequential(*(nn.Linear(d_in, d_out, dtype=torch.float64) for d_out, d_in in SHAPES)), rank=3)
    for pair in pairs(model):
        pair.B.data.normal_(std=0.1)
    return model


def train(case: str, rank: int, ranks: int) -> list[Tensor]:
    """ΔW of every layer after five steps, each on this rank's share of 32 rows."""
    model = network()
    module = model if ranks == 1 else nn.parallel.DistributedDataParallel(model)
    optimizer = OPLoRA(module, **{"lr": 0.02, "momentum": 0.8, **CASES[case]})
    generator = torch.Generator().manual_seed(1)
    share = slice(32 // ranks * rank, 32 // ranks * (rank + 1))
    for _ in range(5):
        x, y = (torch.randn(32, width, generator=generator, dtype=torch.float64)[share] for width in (12, 9))
        optimizer.zero_grad()
        (module(x) - y).square().mean().backward()
        if case in ("factors", "projected", "kfac"):
            optimizer.clip_full_grad_norm_(0.5, probes=4)
        optimizer.step()
    return [pair.scale * (pair.B @ pair.A).detach() for pair in pairs(model)]


def results(rank: int, world: int) -> dict[str, tuple[list[np.ndarray], int]]:
    """For each case ΔW on one of the ranks, and the most numbers that an all-reduce of the optimizer sent."""
    sent: list[int] = []
    mean = DataParallelGroup.mean

    def counted(self: DataParallelGroup, tensors: Any) -> list[Tensor]:
        sent.append(sum(tensor.numel() for tensor in tensors))
        return mean(self, tensors)

    DataParallelGroup.mean = counted  # type: ignore[method-assign]
    try:
        found = {}
        for case in CASES:
            sent.clear()
            found[case] = [delta.numpy() for delta in train(case, rank, world)], max(sent)
        return found
    finally:
        DataParallelGroup.mean = mean  # type: ignore[method-assign]


def mean_of_large_gradients(rank: int, world: int) -> list[float]:
    """What ``average_gradients`` makes of fp16 gradients of which the sum is beyond 65504 and the mean is not."""
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.float16))
    parameter.grad = torch.tensor([40000.0, 65504.0, -60000.0 * rank], dtype=torch.float16)
    summed = nn.Parameter(torch.zeros(2))
    summed.grad = torch.ones(()).expand(2)  # as the gradient of a sum is
    average_gradients([parameter, summed])
    assert summed.grad.tolist() == [1.0, 1.0]
    return parameter.grad.tolist()
