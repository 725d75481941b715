"""Process groups: the ranks over which gradients are averaged, or work is divided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed


class DataParallelGroup:
    """The ranks over which gradients are averaged, or work is divided: how many, and which one this is."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size, self.rank = distributed.get_world_size(group), distributed.get_rank(group)

    def own(self, doers: Sequence[int]) -> list[int]:
        """Which of the works that ``doers`` divides are this rank's, by index."""
        return [index for index, doer in enumerate(doers) if doer == self.rank]

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean over the ranks of every tensor, by one all-reduce of them all. Equal to the last bit on all ranks."""
        if not tensors:
            return []
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        flat /= self.size  # before they are added, as DDP has it: the sum of fp16 numbers may be infinite where their mean is not
        distributed.all_reduce(flat, group=self.group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def data_parallel_group(process_group: Any) -> DataParallelGroup | None:
    """The ranks of a group (None: the default one); None if there is no other rank, or ``process_group`` is False."""
    if process_group is False or not (distributed.is_available() and distributed.is_initialized()):
        return None
    return DataParallelGroup(process_group) if distributed.get_world_size(process_group) > 1 else None
