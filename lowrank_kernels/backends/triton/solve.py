"""``grouped_solve``: damped r×r Cholesky systems of a whole ragged list in two launches, in the Grams' dtype.

The first launch factorizes, ``G + δI = UᵀU``, one program per matrix, in blocks of 32 columns. The second solves by
substitution, as backward stable as LAPACK's (a product with the inverse would square the condition number in the error):
every right-hand side is seen as a tall matrix X (d, r), and ``X U⁻¹ U⁻ᵀ`` is formed for a block of its rows in registers.

A matrix that is not positive definite gets NaN for its reciprocal pivots, and so NaN in all of its own solution; no flag
is read on the host. Floor: read and write the right-hand sides once; the Grams are r² words per matrix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import Verdict, implements
from . import _thin as thin
from ._device import divide, root, rounded, scalar
from ._launch import TL_DTYPE, device_verdict, launch, on_device, padded_rank
from ._thin import load_tile, multiply, store_tile, thin_table, vector
from ._tuned import configuration

_LARGEST_RANK = 128


@triton.jit
def _gram_tile(gram, first_row, first_column, rank, damping, TILE: tl.constexpr):
    """A tile of ``G + δI`` from the lower triangle of G, continued by the identity."""
    i = first_row + tl.arange(0, TILE)[:, None]
    j = first_column + tl.arange(0, TILE)[None, :]
    tile = tl.load(gram + tl.maximum(i, j) * rank + tl.minimum(i, j), mask=(i < rank) & (j < rank), other=0.0)
    return tl.where(i == j, tl.where(i < rank, tile + damping, 1.0), tile)


@triton.jit
def _factor_tile(a, target, inverses, R: tl.constexpr, TILE: tl.constexpr):
    """Writes U of ``a = UᵀU`` to ``target`` and its reciprocal diagonal to ``inverses``; returns whether all went well."""
    i = tl.arange(0, TILE)
    good = tl.full((), 1, tl.int32)
    for j in range(TILE):
        row = tl.sum(tl.where(i[:, None] == j, a, 0.0), axis=0)
        column = tl.sum(tl.where(i[None, :] == j, a, 0.0), axis=1)
        pivot = tl.sum(tl.where(i == j, row, 0.0), axis=0)
        # NaN compares as false.
        good = good & ((pivot > 0.0) & (pivot < float("inf"))).to(tl.int32)
        inverse = divide(tl.full((), 1.0, a.dtype), root(tl.where(pivot > 0.0, pivot, 1.0).to(a.dtype), a.dtype), a.dtype)
        row = tl.where(i >= j, row * inverse, 0.0)
        column = tl.where(i > j, column * inverse, 0.0)
        tl.store(target + j * R + i, row)
        tl.store(inverses + j, inverse)
        a -= column[:, None] * row[None, :]
    return good


@triton.jit
def substitute(x, factor, inverses, count, R: tl.constexpr, TILE: tl.constexpr):
    """``x U⁻¹`` for a (rows, TILE) tile, U upper triangular in a matrix of row length R."""
    k = tl.arange(0, TILE)
    for j in range(count):
        solved = tl.sum(tl.where(k[None, :] == j, x, 0.0), axis=1) * tl.load(inverses + j)
        row = tl.load(factor + j * R + k, mask=k > j, other=0.0)
        x = tl.where(k[None, :] == j, solved[:, None], x - solved[:, None] * row[None, :])
    return x


@triton.jit
def substitute_back(x, factor, inverses, count, R: tl.constexpr, TILE: tl.constexpr):
    """``x U⁻ᵀ``, likewise."""
    k = tl.arange(0, TILE)
    for step in range(count):
        j = count - 1 - step
        solved = tl.sum(tl.where(k[None, :] == j, x, 0.0), axis=1) * tl.load(inverses + j)
        column = tl.load(factor + k * R + j, mask=k < j, other=0.0)
        x = tl.where(k[None, :] == j, solved[:, None], x - solved[:, None] * column[None, :])
    return x


@triton.jit
def cholesky(gram, factor, inverses, rank, damping: tl.float64, R: tl.constexpr, TILE: tl.constexpr):
    """U of ``G + δI = UᵀU`` (upper tiles of a padded R × R matrix) and the reciprocals of its diagonal, NaN if there is none."""
    damping = scalar(damping, gram.dtype.element_ty)
    good = tl.full((), 1, tl.int32)
    i = tl.arange(0, TILE)
    for block in range(0, R, TILE):
        corner = _gram_tile(gram, block, block, rank, damping, TILE)
        for inner in range(0, block, TILE):
            corner -= multiply(factor, inner, block, True, factor, inner, block, R, TILE)
        good = good & _factor_tile(corner, factor + block * R + block, inverses + block, R, TILE)
        tl.debug_barrier()
        for right in range(block + TILE, R, TILE):
            # The transpose of U's tile (block, right): X in X U_bb = A_rb - Σ U_lrᵀ U_lb.
            side = _gram_tile(gram, right, block, rank, damping, TILE)
            for inner in range(0, block, TILE):
                side -= multiply(factor, inner, right, True, factor, inner, block, R, TILE)
            side = substitute(side, factor + block * R + block, inverses + block, TILE, R, TILE)
            tl.store(factor + (block + i[None, :]) * R + right + i[:, None], side)
        tl.debug_barrier()
    if good == 0:
        k = tl.arange(0, R)
        tl.debug_barrier()
        tl.store(inverses + k, tl.full([R], float("nan"), tl.float32).to(gram.dtype.element_ty))


@triton.jit(do_not_specialize=["rank", "damping"])
def cholesky_kernel(grams, factors, inverses, rank, damping: tl.float64, R: tl.constexpr, TILE: tl.constexpr):
    """:func:`cholesky` of one matrix per program."""
    index = tl.program_id(0).to(tl.int64)
    cholesky(grams + index * rank * rank, factors + index * (R * R), inverses + index * R, rank, damping, R, TILE)


@triton.jit(do_not_specialize=["rank"])
def substitute_kernel(
    tensors, chunks, factors, inverses, rank, X: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr
):
    """BLOCK_D rows of ``X U⁻¹ U⁻ᵀ`` per program."""
    DTYPE: tl.constexpr = factors.dtype.element_ty
    program = tl.program_id(0)
    index = tl.load(chunks + 2 * program)
    row = tensors + index * thin.COLUMNS
    x = tl.load(row + thin.X).to(tl.pointer_type(X))
    out = tl.load(row + thin.Q).to(tl.pointer_type(X))
    rows = tl.load(row + thin.ROWS)
    first = tl.load(chunks + 2 * program + 1) * BLOCK_D
    tile = load_tile(
        x, tl.load(row + thin.X_MODE), first, rows, 0, rank, tl.load(row + thin.X_D), tl.load(row + thin.X_R), BLOCK_D, R, VECTOR
    ).to(DTYPE)
    factor = factors + index * (R * R)
    inverses += index * R
    tile = substitute(tile, factor, inverses, rank, R, R)
    tile = substitute_back(tile, factor, inverses, rank, R, R)
    store_tile(out, rounded(tile, X), first, rows, 0, rank, tl.load(row + thin.Q_D), tl.load(row + thin.Q_R), BLOCK_D, R)


def verify(grams: Tensor, rhs: list[Tensor] | Tensor, damping: float, left: bool, out: list[Tensor] | Tensor) -> Verdict:
    """Refuses ranks above 128 and other devices than a GPU."""
    if grams.shape[1] > _LARGEST_RANK:
        return False, f"{grams.shape[1]} × {grams.shape[1]} Grams: the kernels hold rows of at most {_LARGEST_RANK} in registers"
    return device_verdict([grams])


@implements("grouped_solve", "triton", verify)
def grouped_solve(grams: Tensor, rhs: list[Tensor] | Tensor, damping: float, left: bool, out: list[Tensor] | Tensor) -> None:
    """Write ``(G + δI)⁻¹ rhs`` or ``rhs (G + δI)⁻¹``; two launches, nothing read on the host."""
    rank = grams.shape[1]
    padded = padded_rank(rank)
    default = {"BLOCK_D": 64 if padded <= 32 else 2048 // padded, "num_warps": 4}
    chosen = configuration("substitute", padded, (grams.dtype, rhs[0].dtype), grams.device, default)
    tall, tall_out = ([m.mT if left else m for m in matrices] for matrices in (rhs, out))
    work = thin_table("grouped_solve", tall, None, tall_out, chosen["BLOCK_D"])
    if not work.programs or not rank:
        return
    factors = torch.empty(len(rhs), padded, padded, dtype=grams.dtype, device=grams.device)
    inverses = torch.empty(len(rhs), padded, dtype=grams.dtype, device=grams.device)
    # As many warps as keep the tiles of the factorization in registers.
    warps = 8 if padded > 32 and grams.dtype == torch.float64 else 4
    with on_device(grams):
        launch(cholesky_kernel, (len(rhs),), grams.contiguous(), factors, inverses, rank, float(damping),
               R=padded, TILE=min(padded, 32), num_warps=warps)  # fmt: skip
        launch(substitute_kernel, (work.programs,), work.tensors, work.chunks, factors, inverses, rank,
               X=TL_DTYPE[rhs[0].dtype], R=padded, VECTOR=vector(rhs[0].dtype), **chosen)  # fmt: skip
