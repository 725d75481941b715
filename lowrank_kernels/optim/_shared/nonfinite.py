"""Gradients that are infinite or NaN: which one it is, found by one look at the device and alike on all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.lists import partition
from ...parallel.shards import local_parts, shard_group


def first_nonfinite(grads: list[Tensor]) -> int | None:
    """The index of the first gradient that is not finite, None if all are; one wait for the device per device."""
    found = []
    for indices in partition((i for i, grad in enumerate(grads) if grad.numel()), lambda i: grads[i].device).values():
        # The largest absolute value is finite if and only if all are, and no dtype overflows on the way.
        finite = torch.stack(torch._foreach_norm([grads[i] for i in indices], float("inf"))).isfinite()
        if not finite.all():
            found.append(indices[int((~finite).nonzero()[0])])
    return min(found, default=None)


def which_nonfinite(named: list[tuple[str, Tensor]]) -> str | None:
    """In words, which of the named gradients is not finite, None if all are: on all ranks alike, where gradients are sharded."""
    grads = [grad for _, grad in named]
    bad = first_nonfinite(local_parts(grads))
    groups = {id(group): group for grad in grads if (group := shard_group(grad)) is not None}
    if groups:  # one decision for all ranks: each sees its own shards only
        flag = torch.tensor(float(bad is not None), device=grads[0].device)
        for group in groups.values():
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=group)
        if bad is None and flag:
            return "a gradient on another rank"
    return None if bad is None else f"the gradient of {named[bad][0]}"
