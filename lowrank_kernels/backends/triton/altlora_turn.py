"""``grouped_altlora_turn_`` in four launches up to rank 32, in five beyond: the products of chunks of the partners' rows; their sums, and what
the preconditioner makes of them; the moment step, which adds up its share of the drifts; the sum of the shares.

Three fewer than the operations one after the other: what adds up the Gram matrices, clears K and adds the damping are kernels that run anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..moments import Maps, Numbers, Stepped
from ..registry import Verdict, implements
from ._launch import device_verdict, on_device
from .adamw import LARGEST_RANK, moment_step
from .gram import gram_chunks
from .preconditioner import precondition


def verify(
    stepped: Stepped,
    partners: Sequence[Tensor],
    partner_layout: Any,
    behind: Tensor,
    moved: Tensor,
    rank_dims: list[int],
    *others: object,
) -> Verdict:
    """Takes ranks up to 128; refuses other devices than a GPU."""
    if behind.shape[-1] > LARGEST_RANK:
        return False, f"rank {behind.shape[-1]}: the kernels hold at most {LARGEST_RANK}"
    return device_verdict([behind])


@implements("grouped_altlora_turn_", "triton", verify)
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
    """See the operation; nothing is read on the host."""
    rank = behind.shape[-1]
    grams = torch.empty(behind.shape, dtype=torch.float64, device=behind.device)
    maps, realigned = torch.empty_like(behind), torch.empty_like(behind)
    with on_device(behind):
        chunks = gram_chunks(list(partners), None, rank, rank, grams.dtype)
        precondition(grams, behind, damping, weight, rank_dims[0] == 1, maps, realigned, chunks)
        moment_step(stepped, Maps(maps, realigned), rank_dims, moved, numbers, own_damping)
