"""``grouped_altlora_turn_`` on the CPU: one call into compiled code, pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..extension import csrc
from ..lists import as_stored
from ..moments import Numbers, Stepped
from ..registry import count_launch, implements
from ._common import COMPILED, refuse


def verify(
    stepped: Stepped,
    partners: Sequence[Tensor],
    partner_layout: Any,
    behind: Tensor,
    moved: Tensor,
    rank_dims: list[int],
    *others: object,
) -> tuple[bool, str]:
    """Takes ranks up to 128, on the CPU."""
    reason = refuse(behind, behind.shape[-1])
    return (False, reason) if reason else (True, f"{COMPILED}, one call")


@implements("grouped_altlora_turn_", "native", verify)
def grouped_altlora_turn_(
    stepped: Stepped,
    partners: Sequence[Tensor],
    partner_layout: Any,
    behind: Tensor,
    moved: Tensor,
    rank_dims: list[int],
    damping: float,
    own_damping: float,
    weight: float,
    numbers: Numbers,
) -> None:
    """See the operation. ``partner_layout``: of ``lists.matrix_layout``."""
    count_launch()
    csrc.altlora_turn(
        *stepped, *as_stored(partners), partner_layout, numbers.missed, rank_dims, float(numbers.lr), numbers.beta1, numbers.beta2,
        numbers.eps, numbers.weight_decay, float(numbers.step), numbers.bias_correction, numbers.maximize, behind.shape[-1],
        behind.data_ptr(), moved.data_ptr(), damping, own_damping, weight, torch.get_num_threads(),
    )  # fmt: skip
