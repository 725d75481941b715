"""Process groups: the ranks over which gradients are averaged, or which have equal factors and divide the work among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from ..backends.lists import partition


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


def check_process_group(function: str, group: Any) -> None:
    """Refuse what is no group of processes, and one that this process does not belong to: it would go on alone, without a word."""
    if group is None or group is False:
        return
    if distributed.is_available() and group is distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{function}: process_group does not contain this process; pass one that does, or call it on its ranks alone")
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"{function}: process_group must be a torch.distributed.ProcessGroup, None (the default group) or False (none), "
            f"got {group!r:.80}"
        )


def data_parallel_group(process_group: Any) -> DataParallelGroup | None:
    """The ranks of a group (None: the default one); None if there is no other rank, or ``process_group`` is False."""
    if process_group is False or not (distributed.is_available() and distributed.is_initialized()):
        return None
    return DataParallelGroup(process_group) if distributed.get_world_size(process_group) > 1 else None


def group_of_a_copy(process_group: Any) -> Any:
    """What stands for it in a copy or a file: False (none) stays, and a group, which belongs to its process, becomes the default one."""
    return False if process_group is False else None


def may_lose_ranks() -> bool | None:
    """Whether the DistributedDataParallel whose forward is running lets ranks without data leave the steps to the others, as it does in
    ``join()``, and after it until ``join(enable=False)``; None outside of such a forward."""
    ddp = DistributedDataParallel._active_ddp_module
    return None if ddp is None else ddp._join_config.enable and not ddp._join_config.throw_on_early_termination


def assign_ranks(costs: Sequence[float], ranks: int) -> list[int]:
    """Which rank does which of the jobs: the dearest first, each to the rank that has least to do. The same answer on every rank."""
    loads, doers = [0.0] * ranks, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        doers[index] = min(range(ranks), key=loads.__getitem__)
        loads[doers[index]] += costs[index]
    return doers


def exchange(tensors: Sequence[Tensor], doers: Sequence[int], group: Any) -> None:
    """Write ``tensors[i]``, right on rank ``doers[i]`` of the group, on all others: one all-gather per dtype and device.

    What is sent is as long as the largest share. Afterwards the tensors are equal to the last bit on all ranks.
    """
    rank, ranks = distributed.get_rank(group), distributed.get_world_size(group)
    for (dtype, device), members in partition(range(len(tensors)), lambda i: (tensors[i].dtype, tensors[i].device)).items():
        held = [[i for i in members if doers[i] == doer] for doer in range(ranks)]
        sizes = [[tensors[i].numel() for i in mine] for mine in held]
        mine = torch.zeros(max(map(sum, sizes)), dtype=dtype, device=device)
        if held[rank]:
            torch.cat([tensors[i].reshape(-1) for i in held[rank]], out=mine[: sum(sizes[rank])])
        everybodys = mine.new_empty(ranks * len(mine))
        distributed.all_gather_into_tensor(everybodys, mine, group=group)
        others = [doer for doer in range(ranks) if doer != rank and held[doer]]
        rows = everybodys.view(ranks, -1)
        found = [part for doer in others for part in rows[doer, : sum(sizes[doer])].split(sizes[doer])]
        targets = [tensors[i] for doer in others for i in held[doer]]
        torch._foreach_copy_(targets, [part.view(target.shape) for part, target in zip(found, targets, strict=True)])
