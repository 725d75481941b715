"""FSDP2's parameters: what a rank holds of them, whole matrices from shards and back, and gradients of parameters that are kept whole
beside sharded ones."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..backends.lists import PLAIN, partition, plain
from .ranks import check_process_group, data_parallel_group

#: How to train, under FSDP2, factors that a method needs whole.
KEEP_WHOLE = (
    "use DDP, or keep the factors whole: fully_shard(…, ignored_params={the adapters' parameters}), and call "
    "lowrank_kernels.average_gradients(model) before step(), since FSDP2 does not average the gradients of what it ignores"
)

#: Why other frameworks' shards cannot be trained.
FLATTENED = (
    "FSDP1 (FullyShardedDataParallel) and DeepSpeed ZeRO flatten parameters, and a factor that is no matrix cannot be paired; "
    "use FSDP2 (torch.distributed.fsdp.fully_shard) or DDP"
)

#: Why a ZeroRedundancyOptimizer cannot hold them.
PARTITIONED = (
    "torch's ZeroRedundancyOptimizer gives each rank some of the parameters, here A and there B of one layer, and a step needs both; use "
    "DDP with the optimizer itself (its state is that of the adapters alone), or shard by FSDP2. Within it works AdamW with lr_ratio=1"
)


def made_by_zero() -> bool:
    """Whether an optimizer that is being made belongs to a ZeroRedundancyOptimizer, which shows nowhere but among the callers."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.optim.zero_redundancy_optimizer":
            return True
        frame = frame.f_back
    return False


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 makes parameters."""
    return type(tensor) not in PLAIN and hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local_parts(tensors: list[Tensor]) -> list[Tensor]:
    """What this rank holds of the tensors; plain ones are themselves."""
    if plain(tensors):
        return tensors
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]  # type: ignore[attr-defined]


def shard_dims(tensor: Tensor) -> list[tuple[int, int]]:
    """``(mesh dimension, tensor dimension)`` of every sharding of a DTensor; empty for a plain or replicated tensor."""
    if not is_sharded(tensor):
        return []
    return [(i, x.dim) for i, x in enumerate(tensor.placements) if x.is_shard()]  # type: ignore[attr-defined]


def shard_group(tensor: Tensor) -> Any:
    """The process group over which a DTensor is sharded (along one mesh dimension), None for a plain or replicated tensor."""
    dims = shard_dims(tensor)
    return tensor.device_mesh.get_group(dims[0][0]) if dims else None  # type: ignore[attr-defined]


def all_gathered(tensors: list[Tensor]) -> list[Tensor]:
    """The whole of every tensor, on every rank; plain ones are themselves. One all-gather per group, dtype and device.

    Each is sharded along at most one mesh dimension, in ``torch.chunk``'s pieces; what is sent are these, padded to the first one's size.
    """
    found = list(tensors)
    if plain(found):
        return found
    alike: defaultdict[Any, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        if is_sharded(tensor):
            if shard_dims(tensor):
                alike[shard_group(tensor), tensor.dtype, tensor.device].append(index)
            else:
                found[index] = tensor.to_local()  # type: ignore[attr-defined]
    for (group, dtype, device), members in alike.items():
        ranks, pieces, sizes = distributed.get_world_size(group), [], []
        for index in members:
            ((_, dim),) = shard_dims(tensors[index])
            local = tensors[index].to_local().movedim(dim, 0)  # type: ignore[attr-defined]
            rows = -(-tensors[index].shape[dim] // ranks)
            piece = torch.zeros(rows, *local.shape[1:], dtype=dtype, device=device)
            piece[: len(local)] = local
            pieces.append(piece)
            sizes.append(piece.numel())
        mine = torch.cat([piece.reshape(-1) for piece in pieces])
        everybodys = mine.new_empty(ranks * len(mine))
        distributed.all_gather_into_tensor(everybodys, mine, group=group)
        for index, piece, parts in zip(members, pieces, everybodys.view(ranks, -1).split(sizes, dim=1), strict=True):
            ((_, dim),) = shard_dims(tensors[index])
            # Only the last piece that holds anything is short, so the padding is all at the end.
            joined = parts.reshape(-1, *piece.shape[1:])[: tensors[index].shape[dim]]
            found[index] = joined.movedim(0, dim)
    return found


def assign(target: Tensor, value: Tensor) -> None:
    """``target ← value``, a whole matrix that every rank has; a sharded target takes its part. Nothing is communicated."""
    if is_sharded(target):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = target.device_mesh  # type: ignore[attr-defined]
        copies = DTensor.from_local(value.to(target.dtype), mesh, [Replicate()] * mesh.ndim, run_check=False)
        value = copies.redistribute(mesh, target.placements)  # type: ignore[attr-defined]
    target.copy_(value)


@torch.no_grad()
def average_gradients(params: nn.Module | Iterable[Tensor], process_group: Any = None) -> None:
    """Replace ``.grad`` of every plain parameter that is trained by its mean over the ranks, in one all-reduce per dtype and device.

    For parameters that FSDP2 was told to leave whole (``fully_shard(…, ignored_params=…)``): it does not average their gradients. Those
    of sharded parameters, which it does average, are left alone. Call it once per step, after the last backward pass and before clipping.

    Args:
        params: a model, or parameters; the same ones in the same order on every rank. One without gradient on this rank counts as zero,
            one without gradient on any rank stays so.
        process_group: None is the default group. Without ``torch.distributed``, or alone in the group, nothing happens.

    Raises:
        TypeError, ValueError: ``params`` is neither a model nor parameters, a gradient is sparse, or ``process_group`` is none, or one that
            this process is not in.
    """
    given = params.parameters() if isinstance(params, nn.Module) else params
    found: list[Any] = [None] if isinstance(given, Tensor) or not isinstance(given, Iterable) else list(given)
    if not all(isinstance(p, Tensor) for p in found):
        raise TypeError(f"average_gradients: params must be a model or an iterable of parameters, got {type(params).__name__}")
    check_process_group("average_gradients", process_group)
    ranks = data_parallel_group(process_group)
    if ranks is None:
        return
    whole = [p for p in found if p.requires_grad and not is_sharded(p)]
    for index, p in enumerate(whole):
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise ValueError(
                f"average_gradients: trained parameter {index}, of shape {tuple(p.shape)}, has a gradient of layout {p.grad.layout}; "
                "make it dense (embeddings: sparse=False)"
            )
    for members in partition(whole, lambda p: (p.dtype, p.device)).values():
        used = torch.tensor([float(p.grad is not None) for p in members], dtype=members[0].dtype, device=members[0].device)
        *means, used = ranks.mean([*(torch.zeros_like(p) if p.grad is None else p.grad for p in members), used])
        for index, (p, mean) in enumerate(zip(members, means, strict=True)):
            if p.grad is not None and 0 not in p.grad.stride():
                p.grad.copy_(mean)
            elif used[index]:  # there was none here, or an expanded one, which cannot be written
                p.grad = mean.clone()
