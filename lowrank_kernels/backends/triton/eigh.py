"""``grouped_eigh``: one-sided Jacobi in fp64, a whole stack of symmetric matrices in one launch.

One program per matrix. ``X + cI`` with ``c = 2‖X‖`` is positive definite with a condition number of at most 3, so that
what orthogonalizes its columns are its eigenvectors, and the columns' lengths its eigenvalues: no second matrix is
rotated, none is left without a direction, and ``λ = σ - c`` is off by a few eps of ‖X‖, as eigenvalues are anyway.

Floor: read X, write Λ and V, once; the time is latency, about (r - 1)·8 dependent steps, all matrices side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import Verdict, implements
from ._jacobi import LARGEST_RANK, MAX_SWEEPS, orthogonalize, places, squared_lengths, tolerance
from ._launch import device_verdict, launch, on_device, padded_rank, square_warps
from ._thin import scaled, tile_exponent


@triton.jit(do_not_specialize=["matrix_stride", "row_stride", "column_stride", "rank", "tolerance", "max_sweeps"])
def eigh_kernel(xs, matrix_stride, row_stride, column_stride, scratch, values, vectors, rank, tolerance: tl.float64, max_sweeps,
                HAS_VECTORS: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """``scratch`` (N, K, K), fp64, holds the columns of ``X + cI`` as rows; of X the lower triangle is read."""
    OUT: tl.constexpr = values.dtype.element_ty
    index = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, K)
    xs += index * matrix_stride
    values += index * rank
    vectors += index * rank * rank
    columns = scratch + index * (K * K)
    largest = tl.zeros([K, STEP], tl.float64)
    for first in range(0, K, STEP):
        j = first + tl.arange(0, STEP)
        row = tl.maximum(i[:, None], j[None, :]).to(tl.int64)
        column = tl.minimum(i[:, None], j[None, :]).to(tl.int64)
        x = tl.load(xs + row * row_stride + column * column_stride, mask=row < rank, other=0.0).to(tl.float64)
        tl.store(columns + i[:, None] * K + j[None, :], x)
        size = tl.abs(x)
        largest = tl.maximum(largest, tl.where(size < float("inf"), size, float("inf")))
    exponent = tile_exponent(largest)
    if exponent == 1024:
        nan = tl.full([K], float("nan"), tl.float32).to(OUT)
        tl.store(values + i, nan, mask=i < rank)
        if HAS_VECTORS:
            for k in range(rank):
                tl.store(vectors + k * rank + i, nan, mask=i < rank)
        return
    sums = tl.zeros([K], tl.float64)
    squares = tl.zeros([K], tl.float64)
    tl.debug_barrier()
    for first in range(0, K, STEP):
        j = first + tl.arange(0, STEP)
        x = scaled(tl.load(columns + i[:, None] * K + j[None, :]), -exponent)
        sums += tl.sum(tl.abs(x), axis=1)
        squares += tl.sum(x * x, axis=1)
        tl.debug_barrier()  # replicas in other threads have read
        tl.store(columns + i[:, None] * K + j[None, :], x)
    tl.debug_barrier()
    norm = tl.minimum(tl.max(sums, axis=0), tl.sqrt(tl.sum(squares, axis=0)))
    shift = tl.where(norm > 0, 2.0 * norm, 1.0)
    diagonal = tl.load(columns + i * (K + 1), mask=i < rank, other=0.0)
    tl.debug_barrier()
    tl.store(columns + i * (K + 1), diagonal + shift, mask=i < rank)
    tl.debug_barrier()
    orthogonalize(columns, columns, rank, 0.0, tolerance, max_sweeps, False, K, STEP)

    lengths = tl.sqrt(squared_lengths(columns, K, STEP))
    place = places(tl.where(i < rank, lengths, float("inf")), K)
    tl.store(values + place, scaled(lengths - shift, exponent).to(OUT), mask=i < rank)
    if HAS_VECTORS:
        inverse = 1.0 / tl.where(i < rank, lengths, 1.0)
        for first in range(0, K, STEP):
            j = first + tl.arange(0, STEP)
            entries = tl.load(columns + i[:, None] * K + j[None, :]) * inverse[:, None]
            tl.store(vectors + j[None, :] * rank + place[:, None], entries.to(OUT), mask=(i[:, None] < rank) & (j[None, :] < rank))


def verify(xs: Tensor, values: Tensor, vectors: Tensor | None) -> Verdict:
    """Refuses ranks above 64 and other devices than a GPU."""
    if xs.shape[1] > LARGEST_RANK:
        return False, f"{xs.shape[1]} × {xs.shape[1]} matrices: the Jacobi kernel holds at most {LARGEST_RANK}"
    return device_verdict([xs])


@implements("grouped_eigh", "triton", verify)
def grouped_eigh(xs: Tensor, values: Tensor, vectors: Tensor | None) -> None:
    """See the reference; one launch, nothing read on the host."""
    count, rank, _ = xs.shape
    padded = padded_rank(rank)
    scratch = torch.empty(count, padded, padded, dtype=torch.float64, device=xs.device)
    with on_device(xs):
        launch(eigh_kernel, (count,), xs, *xs.stride(), scratch, values, values if vectors is None else vectors, rank,
               tolerance(padded, xs.dtype), MAX_SWEEPS, HAS_VECTORS=vectors is not None, K=padded, STEP=16,
               num_warps=square_warps(padded))  # fmt: skip
