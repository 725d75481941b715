"""``grouped_svd``: truncated SVD of many dense matrices by block Krylov iteration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.registry import run
from ._library import accumulation_dtype, check_list, define, no_backward

#: Estimated share of the best rank-r approximation's energy that may be missing when the iteration stops by itself.
ENERGY_TOLERANCE = 3e-3


def grouped_svd(
    xs: Sequence[Tensor], rank: int, *, oversample: int = 8, iterations: int | None = None
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Randomized truncated SVD ``X_i ≈ U_i diag(s_i) V_iᵀ`` of dense matrices; same-shaped ones in one batch.

    Block Krylov iteration (Musco & Musco 2015): the blocks of all iterations are kept, one Rayleigh-Ritz step at the end.
    On a flat spectrum (the sign matrices of LoRA-SB) it captures in six iterations what subspace iteration does not in sixteen.

    Args:
        xs: (m_i, n_i) of one dtype and device, any shapes.
        rank: how many singular triples, at most min(m_i, n_i).
        oversample: columns of a block beyond ``rank``.
        iterations: Krylov blocks after the first. None: until the captured energy Σs² is estimated to be within 3e-3 of its
            limit (from its last two increments), at least 2.

    Returns:
        ``(us, ss, vs)``: U_i (m_i, rank), V_i (n_i, rank) with orthonormal columns in the dtype of xs, and (N, rank) singular
        values, descending, fp32 at least. Deterministic: the start block has a fixed seed. A matrix with NaN or Inf gives NaN
        in its own results only.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or numbers do not fit; nothing was computed.

    The result is a constant for autograd; its backward says so.
    """
    check_list("grouped_svd", "xs", xs)
    for index, x in enumerate(xs):
        if not 1 <= rank <= min(x.shape):
            raise ValueError(f"grouped_svd: rank must be between 1 and min{tuple(x.shape)} of xs[{index}], got {rank}")
    if oversample < 0:
        raise ValueError(f"grouped_svd: oversample must be ≥ 0, got {oversample}")
    if iterations is not None and iterations < 0:
        raise ValueError(f"grouped_svd: iterations must be ≥ 0 or None, got {iterations}")
    return torch.ops.lowrank_kernels.grouped_svd(list(xs), rank, oversample, iterations)


def _empty_results(xs: list[Tensor], rank: int, oversample: int, iterations: int | None) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    if not xs:
        return [], torch.empty(0, rank), []
    ss = xs[0].new_empty(len(xs), rank, dtype=accumulation_dtype(xs[0].dtype))
    return [x.new_empty(x.shape[0], rank) for x in xs], ss, [x.new_empty(x.shape[1], rank) for x in xs]


def _grouped_svd(xs: list[Tensor], rank: int, oversample: int, iterations: int | None) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    us, ss, vs = _empty_results(xs, rank, oversample, iterations)
    if xs:
        run("grouped_svd", xs[0].device.type, xs, oversample, iterations, ENERGY_TOLERANCE, us, ss, vs)
    return us, ss, vs


define(
    "grouped_svd", "(Tensor[] xs, int rank, int oversample, int? iterations) -> (Tensor[], Tensor, Tensor[])", _grouped_svd, _empty_results
)
no_backward("grouped_svd", "the bases U and V are constants in every method of this package")
__all__ = ["grouped_svd"]
