"""Least squares on gradients that data-parallel ranks hold a part of each: only thin products are sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from ..ops import grouped_gram, grouped_lorsum_product, grouped_solve


class Ranks:
    """The ranks over which gradients are averaged, or work is divided: how many, and which one this is."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size, self.rank = distributed.get_world_size(group), distributed.get_rank(group)

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean over the ranks of every tensor, by one all-reduce of them all. Equal to the last bit on all ranks."""
        if not tensors:
            return []
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        distributed.all_reduce(flat, group=self.group)
        flat /= self.size
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def ranks_of(process_group: Any) -> Ranks | None:
    """The ranks of a group (None: the default one); None if there is no other rank, or ``process_group`` is False."""
    if process_group is False or not (distributed.is_available() and distributed.is_initialized()):
        return None
    return Ranks(process_group) if distributed.get_world_size(process_group) > 1 else None


def damped(grams: Tensor, proximal: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``VᵀV + diag(λ)`` (N, r, r) and λ (N, r), as ``grouped_lorsum`` takes them: no column's is less than rounding needs."""
    diagonal = grams.diagonal(dim1=1, dim2=2)
    relative = 4 * grams.shape[1] * torch.finfo(torch.float64).eps
    if proximal == 0:
        relative = max(relative, torch.finfo(dtype).eps)
    damping = (relative * diagonal).clamp_min(proximal)
    damping = torch.where(damping == 0, 1.0, damping)
    return grams + damping.diag_embed(), damping


def lorsum_over_ranks(
    targets: tuple[list[Tensor], list[Tensor]],
    terms: list[tuple[list[Tensor], list[Tensor]]],
    coefficients: list[Tensor],
    gradient: Callable[[list[Tensor], bool], list[Tensor]],
    gradient_coefficients: Tensor,
    sweeps: int,
    proximal: float,
) -> None:
    """``grouped_lorsum`` of ``terms``, which every rank has, and of a gradient that is a mean over ranks, into the targets.

    Args:
        gradient: from the Vs to the ``GV`` of all layers, or, if its second argument is True, from the Us to the ``GᵀU``.
        coefficients, gradient_coefficients: (N,) each, fp64.
    """
    dtype = torch.promote_types(targets[0][0].dtype, torch.float32)
    count, device = len(targets[0]), targets[0][0].device
    heights = [[len(x) for x in side] for side in targets]
    # The layers' rows one below the other, so that what is done by element is one call; and of which layer a row is.
    starts = [torch.cat(side).to(dtype) for side in targets]
    layers = [
        torch.repeat_interleave(torch.arange(count, device=device), torch.tensor(rows, device=device), output_size=sum(rows))
        for rows in heights
    ]
    factors = gradient_coefficients.to(dtype)[:, None]
    current = [list(start.split(rows)) for start, rows in zip(starts, heights, strict=True)]
    for turn in range(2 * sweeps):
        side = turn % 2
        others = current[1 - side]
        grams, damping = damped(grouped_gram(others, dtype=torch.float64), proximal, dtype)
        thin = grouped_lorsum_product([(term[side], term[1 - side]) for term in terms], others, coefficients)
        rows = layers[side]
        sums = torch.cat(thin) + factors[rows] * torch.cat(gradient(others, side == 1)) + starts[side] * damping.to(dtype)[rows]
        current[side] = grouped_solve(grams, list(sums.split(heights[side])), side="right")  # type: ignore[assignment]
    torch._foreach_copy_([*targets[0], *targets[1]], [*current[0], *current[1]])
