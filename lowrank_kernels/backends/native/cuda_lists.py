"""Ragged lists of factors as few stacked tensors, and back: copies in bulk, no host synchronisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def _is_wide(x: Tensor) -> bool:
    """Whether ``x`` (d, r) is stored as the rows of its transpose (``A.mT``)."""
    return x.stride(0) == 1 and x.shape[1] > 1 and x.stride(1) >= x.shape[0]


@dataclass(frozen=True)
class Bucket:
    """Indices of the list's matrices of one height, stored in one way."""

    indices: list[int]
    height: int


def buckets(*lists: Sequence[Tensor] | None) -> list[Bucket]:
    """Group indices by height and storage order over parallel lists (None: absent)."""
    present = [tensors for tensors in lists if tensors is not None]
    found: dict[tuple[int, ...], list[int]] = {}
    for index, tensors in enumerate(zip(*present, strict=True)):
        found.setdefault((tensors[0].shape[0], *map(_is_wide, tensors)), []).append(index)
    return [Bucket(indices, key[0]) for key, indices in found.items()]


def stack_transposed(tensors: Sequence[Tensor], bucket: Bucket) -> Tensor:
    """(n, r, d): the bucket's matrices, transposed; stacked as they are stored."""
    chosen = [tensors[index] for index in bucket.indices]
    if _is_wide(chosen[0]):
        return torch.stack([x.mT for x in chosen])
    return torch.stack(chosen).mT


def write_transposed(targets: Sequence[Tensor], bucket: Bucket, values_t: Tensor) -> None:
    """Copy (n, r, d), transposed, into the bucket's targets (d, r), in their dtype and storage order."""
    chosen = [targets[index] for index in bucket.indices]
    wide = _is_wide(chosen[0])
    values = (values_t if wide else values_t.mT).to(chosen[0].dtype).contiguous()
    torch._foreach_copy_([x.mT for x in chosen] if wide else chosen, list(values.unbind()))


def to_list_order(values: Tensor, bucket_list: Sequence[Bucket]) -> Tensor:
    """Reorder (N, …) from the buckets' order to the list's; without a table of indices, which would have to be copied over."""
    order = [index for bucket in bucket_list for index in bucket.indices]
    if order == list(range(len(order))):
        return values
    sources = values.unbind()
    position = {index: place for place, index in enumerate(order)}
    return torch.stack([sources[position[index]] for index in range(len(order))])


def to_bucket_order(values: Tensor, bucket_list: Sequence[Bucket]) -> list[Tensor]:
    """Split (N, …) in the list's order into one tensor (n, …) for each bucket."""
    if len(bucket_list) == 1:
        return [values]
    sources = values.unbind()
    return [torch.stack([sources[index] for index in bucket.indices]) for bucket in bucket_list]
