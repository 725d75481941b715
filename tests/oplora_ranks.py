"""One data-parallel rank of ``test_oplora.py``: trains, then saves ΔW and how many numbers each all-reduce of the optimizer sent.

python oplora_ranks.py RANK FILE
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lowrank_kernels import OPLoRA, adapt, pairs
from lowrank_kernels.optim.ranks import Ranks

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


def main(rank: int, file: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    sent: list[int] = []
    mean = Ranks.mean

    def counted(self: Ranks, tensors: Any) -> list[Tensor]:
        sent.append(sum(tensor.numel() for tensor in tensors))
        return mean(self, tensors)

    Ranks.mean = counted  # type: ignore[method-assign]
    results = {}
    for case in CASES:
        sent.clear()
        results[case] = train(case, rank, 2), max(sent)
    torch.save(results, f"{file}.{rank}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), sys.argv[2])
