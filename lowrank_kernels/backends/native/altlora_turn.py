"""``grouped_altlora_turn_`` on the CPU: one call into compiled code, pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..extension import csrc
from ..lists import StepNumbers, as_stored
from ..registry import count_launch, implements
from ._common import COMPILED, MAX_RANK, refuse_device


def verify(
    params: list[Tensor],
    partners: Sequence[Tensor],
    partner_layout: Any,
    behind: Tensor,
    moved: Tensor,
    rank_dims: list[int],
    *others: object,
) -> tuple[bool, str]:
    """Takes ranks up to 128, on the CPU."""
    reason = refuse_device(behind)
    if reason is not None:
        return False, reason
    rank = behind.shape[-1]
    if rank > MAX_RANK:
        return False, f"rank {rank}: the compiled code stops at {MAX_RANK}"
    return True, f"{COMPILED}, one call"


@implements("grouped_altlora_turn_", "native", verify)
def grouped_altlora_turn_(
    params: list[Tensor],
    partners: Sequence[Tensor],
    partner_layout: Any,
    behind: Tensor,
    moved: Tensor,
    rank_dims: list[int],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    layout: Any,
    damping: float,
    own_damping: float,
    weight: float,
    step: StepNumbers,
) -> None:
    """See the operation. The layouts are of ``lists.gather`` and of ``lists.matrix_layout``; ``step`` is for ``grouped_adamw_``."""
    count_launch()
    beta1, beta2 = step["betas"]
    csrc.altlora_turn(
        params, grads, exp_avgs, exp_avg_sqs, layout, *as_stored(partners), partner_layout, list(step.get("missed", ())), rank_dims,
        float(step["lr"]), beta1, beta2, step["eps"], step["weight_decay"], float(step["step"]), step.get("bias_correction", True),
        step.get("maximize", False), behind.shape[-1], behind.data_ptr(), moved.data_ptr(), damping, own_damping, weight,
        torch.get_num_threads(),
    )  # fmt: skip
