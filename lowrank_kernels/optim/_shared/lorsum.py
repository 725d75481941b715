"""LoRSum (OPLoRA, Equations 6 and 10) of a gradient of which only the products ``GV`` and ``GᵀU`` are known.

That is so where data-parallel ranks hold a part of it each (only thin products are sent), and in the metrics of K-FAC.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ...backends.dtypes import compute_dtype
from ...backends.lists import sent
from ...backends.sums import ridge
from ...ops import grouped_gram, grouped_lorsum_product, grouped_solve


def damped(grams: Tensor, proximal: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``VᵀV + diag(λ)`` (N, r, r) and λ (N, r), as ``grouped_lorsum`` takes them: no column's is less than rounding needs."""
    damping = ridge(grams.diagonal(dim1=1, dim2=2), proximal, dtype)
    return grams + damping.diag_embed(), damping


class Metric(Protocol):
    """D of one side of all layers, symmetric positive definite."""

    def times(self, ys: list[Tensor]) -> list[Tensor]: ...

    def solve(self, ys: list[Tensor]) -> list[Tensor]: ...


def _layer_of_row(rows: list[int], device: torch.device) -> Tensor:
    """Of layers with so many rows one below the other."""
    counts = sent(torch.tensor(rows, device="cpu"), device)
    return torch.repeat_interleave(torch.arange(len(rows), device=device), counts, output_size=sum(rows))


def composed_lorsum(
    targets: tuple[list[Tensor], list[Tensor]],
    terms: list[tuple[list[Tensor], list[Tensor]]],
    coefficients: list[Tensor],
    gradient: Callable[[list[Tensor], bool], list[Tensor]],
    gradient_coefficients: Tensor,
    sweeps: int,
    proximal: float,
    metrics: tuple[Metric, Metric] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """``grouped_lorsum`` of ``terms`` and of a gradient of which only products are known (a mean over ranks, say); it may be scaled.

    With metrics (D_U, D_V) a half sweep is (OPLoRA, Equations 6 and 10, the first term being the weight itself)::

        U ← (c₁U₁(V₁ᵀD_V V) + D_U⁻¹(Σ_{j>1} c_j U_j(V_jᵀV)) + λU⁰)(VᵀD_V V + λI)⁻¹

    that is LoRSum of the step ``D_U⁻¹(…)D_V⁻¹`` in the norm of the metrics.

    Args:
        gradient: from the Vs to the ``GV`` of all layers, or, if its second argument is True, from the Us to the ``GᵀU``.
        coefficients, gradient_coefficients: (N,) each, fp64.

    Returns:
        The new (us, vs), fp32 at least.
    """
    dtype = compute_dtype(targets[0][0].dtype)
    device = targets[0][0].device
    heights = [[len(x) for x in side] for side in targets]
    # The layers' rows one below the other, so that what is done by element is one call; and of which layer a row is.
    starts = [torch.cat(side).to(dtype) for side in targets]
    layers = [_layer_of_row(rows, device) for rows in heights]
    factors = gradient_coefficients.to(dtype)[:, None]
    current = [list(start.split(rows)) for start, rows in zip(starts, heights, strict=True)]
    for turn in range(2 * sweeps):
        side = turn % 2
        others, rows = current[1 - side], layers[side]
        mirrored = [(term[side], term[1 - side]) for term in terms]
        step = factors[rows] * torch.cat(gradient(others, side == 1))
        if metrics is None:
            gram, known = grouped_gram(others, dtype=torch.float64), grouped_lorsum_product(mirrored, others, coefficients)
        else:
            seen = metrics[1 - side].times(others)
            gram, known = grouped_gram(others, seen, dtype=torch.float64), grouped_lorsum_product(mirrored[:1], seen, coefficients[:1])
            if len(terms) > 1:
                step += torch.cat(grouped_lorsum_product(mirrored[1:], others, coefficients[1:]))
            step = torch.cat(metrics[side].solve(list(step.split(heights[side]))))
        gram, damping = damped(gram, proximal, dtype)
        sums = torch.cat(known) + step + starts[side] * damping.to(dtype)[rows]
        current[side] = grouped_solve(gram, list(sums.split(heights[side])), side="right")
    return current[0], current[1]
