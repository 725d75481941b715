"""The Triton turn of AltLoRA against the operations of which it consists."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from lowrank_kernels.backends import force, launch_count
from lowrank_kernels.backends.lists import Tall, gather
from lowrank_kernels.backends.registry import call_counts, unavailable
from lowrank_kernels.ops import altlora_turn

pytestmark = pytest.mark.skipif("native" in unavailable(), reason="without compiled code nobody has looked at the lists, and the parts run")


def turn(device: torch.device, side: str, rank: int, dtype: torch.dtype, second: bool) -> tuple[list[Tensor], int, bool]:
    """What a turn leaves, its launches, and whether one call took it."""
    torch.manual_seed(3)
    wide = torch.promote_types(dtype, torch.float32)

    def stored(rows: int, side: str) -> Tensor:
        return torch.randn((rows, rank) if side == "B" else (rank, rows)).to(device, dtype)

    params = [torch.nn.Parameter(stored(rows, side)) for rows in (70, 300, 9)]
    state = {}
    for p in params:
        p.grad = torch.randn(p.shape).to(device, dtype)
        state[p] = {"exp_avg": torch.randn(p.shape).to(device, wide)}
        if second:
            state[p]["exp_avg_sq"] = torch.rand(p.shape).to(device, wide)
    partners = [stored(rows, "B" if side == "A" else "A") for rows in (1100, 40, 17)]
    behind = torch.randn(3, rank, rank).to(device, wide)
    moved = torch.full_like(behind, torch.nan)
    found = gather(params, [0, 1, 2], state)
    before, calls = launch_count(), call_counts().get(("grouped_altlora_turn_", "triton"), 0)
    with torch.no_grad():
        altlora_turn.altlora_turn_as_gathered_(
            found.params, found.grads, found.exp_avgs, found.exp_avg_sqs, layout=found.layout,
            partners=partners if side == "A" else Tall(partners), behind=behind, moved=moved, damping=1e-3, own_damping=1e-2, weight=0.25,
            rank_dims=[0 if side == "A" else 1] * 3, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, step=3, missed=[0, 1, 0],
        )  # fmt: skip
    taken = call_counts().get(("grouped_altlora_turn_", "triton"), 0) > calls
    return [*params, *(x for values in state.values() for x in values.values()), behind, moved], launch_count() - before, taken


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [8, 40])
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_turn_is_its_parts_to_the_bit(device: torch.device, side: str, rank: int, dtype: torch.dtype) -> None:
    second = side == "A"
    with force("triton"):
        whole, launches, taken = turn(device, side, rank, dtype, second)
    assert taken and launches == (4 if rank <= 32 else 5)
    with force("triton,grouped_altlora_turn_=reference"):
        parts, more, taken = turn(device, side, rank, dtype, second)
    assert not taken and more == launches + 1  # and two of torch's
    assert all(torch.equal(x, y) for x, y in zip(whole, parts, strict=True))
    assert not whole[-2].any() and not whole[-1].isnan().any()
