"""``grouped_qr``: CholeskyQR of all factors at once, repeated or replaced on the device where a factor needs it.

Narrow data are exact in fp64, and so are products of two of them: the Gram matrix is accumulated in fp64, its Cholesky
factor and inverse are formed in fp64, and ``Q = X·W`` (W = S⁻¹ᵗʳⁱ, one r×r matrix) is rounded once. With κ the condition
number of X after scaling its columns by powers of two, the error of one pass is about ``κ²·eps64``. So per matrix,
by a level that the factorization kernel writes and the later ones read (the host never does)::

    level 0   fp32 and narrower, κ ≤ 1e4   one pass: ‖QᵀQ - I‖ ~ 1e-7
    level 1   κ ≤ 3e7                      a second Gram, of X·W in fp64 (never stored), corrects W; fp64 results are
                                           formed as (X·W₁)·W₂, so that they are orthonormal to eps64 and not to κ·eps64
    level 2   rank-deficient, worse κ,     one program per matrix: Gram-Schmidt, column by column, orthogonalized three
              non-finite, or squares       times, with power-of-two scaling and unit vectors in the place of dependent
              beyond fp64                  columns; NaN for a matrix with non-finite entries

Signs: ``⟨q_j, previous_j⟩`` is the diagonal of ``Wᵀ(XᵀP)``, and XᵀP is accumulated beside the Gram matrix. So Q is written
once, with its final sign, after the last read of ``previous`` (``qs`` may alias it).

Six launches whatever the number of matrices. Floor: read X, read X, write Q, and read ``previous`` once where it is given;
level 0 moves just that, plus r² fp64 partial sums per chunk (at most 7 % of an fp32 read, and from L2); level 1 reads X once more.
On GPUs with slow fp64 the fp64 products dominate, not the bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import compute_dtype
from ..registry import Verdict, implements
from . import _thin as thin
from ._device import rounded
from ._launch import TL_DTYPE, device_verdict, launch, on_device, padded_rank
from ._thin import exponent_of, load_tile, multiply, power_of_two, store_tile, thin_table, vector

_LARGEST_RANK = 128
_LARGEST_RANK_FP64 = 64
#: κ (Frobenius, so an upper bound) up to which one pass is enough for fp32 results, and two are enough for any.
_SINGLE_PASS = 1e4
_DOUBLE_PASS = 3e7


@triton.jit
def _load_square(pointer, first_row, first_column, R: tl.constexpr, TILE: tl.constexpr):
    """A TILE × TILE tile of a padded R × R matrix."""
    i = tl.arange(0, TILE)
    return tl.load(pointer + (first_row + i[:, None]) * R + first_column + i[None, :])


@triton.jit
def store_square(pointer, first_row, first_column, value, R: tl.constexpr, TILE: tl.constexpr):
    i = tl.arange(0, TILE)
    tl.store(pointer + (first_row + i[:, None]) * R + first_column + i[None, :], value)


@triton.jit
def _wide_tile(pointer, mode, row, rows, column, rank, stride_d, stride_r, weights, MAPPED: tl.constexpr,
               BLOCK_D: tl.constexpr, TILE: tl.constexpr, R: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """Columns ``column…`` of X, or of ``X·weights``, in fp64."""
    if MAPPED:
        total = tl.zeros([BLOCK_D, TILE], tl.float64)
        # Not unrolled, not prefetched: the weights of all tiles at once would be 128 KiB of shared memory, more than many GPUs have.
        for first in tl.range(0, R, TILE, num_stages=1):
            tile = load_tile(pointer, mode, row, rows, first, rank, stride_d, stride_r, BLOCK_D, TILE, VECTOR)
            part = _load_square(weights, first, column, R, TILE)
            total = tl.dot(tile.to(tl.float64), part, total, input_precision="ieee", out_dtype=tl.float64)
        return total
    else:
        tile = load_tile(pointer, mode, row, rows, column, rank, stride_d, stride_r, BLOCK_D, TILE, VECTOR)
        return tile.to(tl.float64)


@triton.jit
def _products(x, mode, previous, previous_mode, start, stop, rows, left, right, rank, x_d, x_r, previous_d, previous_r, weight, partial,
              SECOND: tl.constexpr, HAS_PREVIOUS: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """One tile of ``XᵀX`` and of ``XᵀP``, summed over rows ``start…stop``, to ``partial``."""
    gram = tl.zeros([TILE, TILE], tl.float64)
    cross = tl.zeros([TILE, TILE], tl.float64)
    for first in range(start, stop, BLOCK_D):
        a = _wide_tile(x, mode, first, rows, left, rank, x_d, x_r, weight, SECOND, BLOCK_D, TILE, R, VECTOR)
        if TILE == R:
            b = a
        else:
            b = _wide_tile(x, mode, first, rows, right, rank, x_d, x_r, weight, SECOND, BLOCK_D, TILE, R, VECTOR)
        gram = tl.dot(tl.trans(a), b, gram, input_precision="ieee", out_dtype=tl.float64)
        if HAS_PREVIOUS:
            p = load_tile(previous, previous_mode, first, rows, right, rank, previous_d, previous_r, BLOCK_D, TILE, VECTOR)
            cross = tl.dot(tl.trans(a), p.to(tl.float64), cross, input_precision="ieee", out_dtype=tl.float64)
    store_square(partial, left, right, gram, R, TILE)
    if HAS_PREVIOUS:
        store_square(partial + R * R, left, right, cross, R, TILE)


@triton.jit(do_not_specialize=["rank"])
def gram_kernel(tensors, chunks, levels, squares, partials, rank, X: tl.constexpr, SECOND: tl.constexpr, HAS_PREVIOUS: tl.constexpr,
                R: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """Per chunk of rows: ``XᵀX`` and ``XᵀP`` (SECOND: ``(XW)ᵀ(XW)`` of level-1 matrices), upper tiles, in fp64."""
    program = tl.program_id(0).to(tl.int64)
    index = tl.load(chunks + 2 * program)
    if SECOND:
        if tl.load(levels + index) != 1:
            return
    row = tensors + index * thin.COLUMNS
    x = tl.load(row + thin.X).to(tl.pointer_type(X))
    previous = tl.load(row + thin.PREVIOUS).to(tl.pointer_type(X))
    rows = tl.load(row + thin.ROWS)
    x_d = tl.load(row + thin.X_D)
    x_r = tl.load(row + thin.X_R)
    previous_d = tl.load(row + thin.PREVIOUS_D)
    previous_r = tl.load(row + thin.PREVIOUS_R)
    mode = tl.load(row + thin.X_MODE)
    previous_mode = tl.load(row + thin.PREVIOUS_MODE)
    weight = squares + index * (5 * R * R)
    # Tiles (0,0), (0,1), (1,1) of a 2 × 2 division; just (0,0) where one tile holds the whole rank.
    left = (tl.program_id(1) // 2) * TILE
    right = ((tl.program_id(1) + 1) // 2) * TILE
    start = tl.load(chunks + 2 * program + 1) * CHUNK
    stop = tl.minimum(start + CHUNK, rows)
    partial = partials + program * (2 * R * R)
    # A loop for each mode: Triton prefetches (cp.async) what no branch in the loop hides. (Triton 3.6 does not compile that for 16 bits in fp64.)
    if X.primitive_bitwidth < 32:
        _products(x, mode, previous, previous_mode, start, stop, rows, left, right, rank, x_d, x_r, previous_d, previous_r, weight, partial,
                  SECOND, HAS_PREVIOUS, R, TILE, BLOCK_D, VECTOR)  # fmt: skip
    elif (mode == 1) & ((previous_mode == 1) | (not HAS_PREVIOUS)):
        _products(x, 1, previous, 1, start, stop, rows, left, right, rank, x_d, x_r, previous_d, previous_r, weight, partial,
                  SECOND, HAS_PREVIOUS, R, TILE, BLOCK_D, VECTOR)  # fmt: skip
    elif (mode == 2) & ((previous_mode == 2) | (not HAS_PREVIOUS)):
        _products(x, 2, previous, 2, start, stop, rows, left, right, rank, x_d, x_r, previous_d, previous_r, weight, partial,
                  SECOND, HAS_PREVIOUS, R, TILE, BLOCK_D, VECTOR)  # fmt: skip
    elif not HAS_PREVIOUS:
        _products(x, 0, previous, 0, start, stop, rows, left, right, rank, x_d, x_r, previous_d, previous_r, weight, partial,
                  SECOND, HAS_PREVIOUS, R, TILE, BLOCK_D, VECTOR)  # fmt: skip
    else:
        _products(x, mode, previous, previous_mode, start, stop, rows, left, right, rank, x_d, x_r, previous_d, previous_r, weight, partial,
                  SECOND, HAS_PREVIOUS, R, TILE, BLOCK_D, VECTOR)  # fmt: skip


@triton.jit
def _sum_partials(partials, first_chunk, count, left, right, R: tl.constexpr, TILE: tl.constexpr):
    total = tl.zeros([TILE, TILE], tl.float64)
    for chunk in range(first_chunk, first_chunk + count):
        total += _load_square(partials + chunk * (2 * R * R), left, right, R, TILE)
    return total


@triton.jit
def _scaled_gram(partials, scales, first_chunk, count, left, right, good, R: tl.constexpr, TILE: tl.constexpr):
    """A tile of the Gram matrix with its columns scaled by powers of two; zeros if it is not to be used."""
    i = tl.arange(0, TILE)
    total = _sum_partials(partials, first_chunk, count, left, right, R, TILE)
    return tl.where(good, total * tl.load(scales + left + i)[:, None] * tl.load(scales + right + i)[None, :], 0.0)


@triton.jit
def _column_scales(diagonal, k, rank):
    """Powers of two that bring a Gram's diagonal into [1, 4), and whether every entry is in range for that."""
    good = (diagonal > 1e-250) & (diagonal < 1e250)
    exponent = tl.where(good, exponent_of(diagonal) >> 1, 0)
    return power_of_two(-exponent), power_of_two(exponent), tl.max((~good & (k < rank)).to(tl.int32), axis=0) == 0


@triton.jit
def _cholesky(a, target, R: tl.constexpr, TILE: tl.constexpr):
    """Writes the upper factor U of ``a = UᵀU`` to ``target``.

    Returns U⁻¹, ‖U‖² and the smallest pivot (a pivot ≤ 1e-30 is replaced by 1).
    """
    i = tl.arange(0, TILE)
    lower_inverse = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(tl.float64)
    smallest = tl.full((), 1.0, tl.float64)
    squares = tl.zeros([TILE], tl.float64)
    for j in range(TILE):
        row = tl.sum(tl.where(i[:, None] == j, a, 0.0), axis=0)
        column = tl.sum(tl.where(i[None, :] == j, a, 0.0), axis=1)
        pivot = tl.sum(tl.where(i == j, row, 0.0), axis=0)
        smallest = tl.minimum(smallest, pivot)
        inverse_root = 1.0 / tl.sqrt(tl.where(pivot > 1e-30, pivot, 1.0))
        row = tl.where(i >= j, row * inverse_root, 0.0)
        column = tl.where(i > j, column * inverse_root, 0.0)
        squares += row * row
        tl.store(target + j * R + i, row)
        a -= column[:, None] * row[None, :]
        solved = tl.sum(tl.where(i[:, None] == j, lower_inverse, 0.0), axis=0) * inverse_root
        lower_inverse = tl.where(i[:, None] == j, solved[None, :], lower_inverse - column[:, None] * solved[None, :])
    return tl.trans(lower_inverse), tl.sum(squares, axis=0), smallest


@triton.jit
def _squares(x):
    return tl.sum(tl.sum(x * x, axis=1), axis=0)


@triton.jit
def _scale_columns(partials, scales, first_chunk, count, rank, R: tl.constexpr):
    """Writes the scaling of each column and its inverse; returns whether the Gram matrix can be scaled. Only its diagonal is read."""
    k = tl.arange(0, R)
    diagonal = tl.zeros([R], tl.float64)
    for chunk in range(first_chunk, first_chunk + count):
        diagonal += tl.load(partials + chunk * (2 * R * R) + k * (R + 1))
    scale, unscale, good = _column_scales(diagonal, k, rank)
    tl.store(scales + k, scale)
    tl.store(scales + R + k, unscale)
    tl.debug_barrier()
    return good


@triton.jit
def _invert_gram(partials, scales, inverse_factor, factor, first_chunk, count, rank, good, R: tl.constexpr, TILE: tl.constexpr):
    """Writes U of the scaled Gram matrix ``UᵀU`` and U⁻¹ (upper tiles); returns the condition of U and the smallest pivot.

    Blocks of the rank, column by column: U_ij = U_ii⁻ᵀ (A_ij - Σ_l<i U_liᵀ U_lj), U_jj from A_jj - Σ_l<j U_ljᵀ U_lj, and
    (U⁻¹)_ij = -(Σ_i≤l<j (U⁻¹)_il U_lj) U_jj⁻¹. What is not needed at the moment lies in memory, and the lower tiles hold
    what is under way: in registers larger ranks would spill.
    """
    i = tl.arange(0, TILE)
    norms = tl.full((), 0.0, tl.float64)
    inverse_norms = tl.full((), 0.0, tl.float64)
    smallest = tl.full((), 1.0, tl.float64)
    for block in range(0, R, TILE):
        for above in range(0, block, TILE):
            side = _scaled_gram(partials, scales, first_chunk, count, above, block, good, R, TILE)
            for inner in range(0, above, TILE):
                side -= multiply(factor, inner, above, True, factor, inner, block, R, TILE)
            store_square(factor, block, above, side, R, TILE)
            tl.debug_barrier()
            side = multiply(inverse_factor, above, above, True, factor, block, above, R, TILE)
            norms += _squares(side)
            store_square(factor, above, block, side, R, TILE)
            tl.debug_barrier()
        corner = _scaled_gram(partials, scales, first_chunk, count, block, block, good, R, TILE)
        corner = tl.where((i[:, None] == i[None, :]) & ((block + i[None, :] >= rank) | (not good)), 1.0, corner)
        for inner in range(0, block, TILE):
            corner -= multiply(factor, inner, block, True, factor, inner, block, R, TILE)
        inverse, squared, pivot = _cholesky(corner, factor + block * R + block, R, TILE)
        smallest = tl.minimum(smallest, pivot)
        norms += squared
        inverse_norms += _squares(inverse)
        store_square(inverse_factor, block, block, inverse, R, TILE)
        tl.debug_barrier()
        for above in range(0, block, TILE):
            side = tl.zeros([TILE, TILE], tl.float64)
            for inner in range(above, block, TILE):
                side += multiply(inverse_factor, above, inner, False, factor, inner, block, R, TILE)
            store_square(inverse_factor, block, above, side, R, TILE)
            tl.debug_barrier()
            side = -multiply(inverse_factor, block, above, False, inverse_factor, block, block, R, TILE)
            inverse_norms += _squares(side)
            store_square(inverse_factor, above, block, side, R, TILE)
            tl.debug_barrier()
    return tl.sqrt(norms) * tl.sqrt(inverse_norms), smallest


@triton.jit
def _unscale(scales, inverse_factor, factor, kept, KEEPS: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr):
    """U and U⁻¹ of the Gram matrix itself, in place, zeros below the diagonal; KEEPS: a copy of U⁻¹ goes to ``kept``."""
    i = tl.arange(0, TILE)
    for left in range(0, R, TILE):
        for right in range(0, R, TILE):
            upper = left <= right
            row_scale = tl.load(scales + left + i)[:, None]
            column_unscale = tl.load(scales + R + right + i)[None, :]
            inverse = tl.where(upper, _load_square(inverse_factor, left, right, R, TILE) * row_scale, 0.0)
            factored = tl.where(upper, _load_square(factor, left, right, R, TILE) * column_unscale, 0.0)
            # Replicas in other threads must have read before anything is overwritten.
            tl.debug_barrier()
            store_square(inverse_factor, left, right, inverse, R, TILE)
            store_square(factor, left, right, factored, R, TILE)
            if KEEPS:
                store_square(kept, left, right, inverse, R, TILE)


@triton.jit
def _upper_product(a, b, left, right, R: tl.constexpr, TILE: tl.constexpr):
    """A tile of the product of two upper triangular matrices."""
    total = tl.zeros([TILE, TILE], tl.float64)
    for inner in range(0, R, TILE):
        if (left <= inner) & (inner <= right):
            total += multiply(a, left, inner, False, b, inner, right, R, TILE)
    tl.debug_barrier()
    return total


@triton.jit
def _join_passes(weight, factor, new_weight, new_factor, R: tl.constexpr, TILE: tl.constexpr):
    """W ← W₁ U⁻¹ and R ← U R₁ in place, tile by tile, in the order in which no tile is needed after it was overwritten."""
    for right in range(R - TILE, -1, -TILE):
        for left in range(0, R, TILE):
            if left <= right:
                store_square(weight, left, right, _upper_product(weight, new_weight, left, right, R, TILE), R, TILE)
    for left in range(0, R, TILE):
        for right in range(0, R, TILE):
            if left <= right:
                store_square(factor, left, right, _upper_product(new_factor, factor, left, right, R, TILE), R, TILE)
    tl.debug_barrier()


@triton.jit
def _sign_columns(weight, sign, block, R: tl.constexpr, TILE: tl.constexpr):
    """Column ``block`` of W's tiles, down to the diagonal one, times the columns' signs, in place."""
    for inner in range(0, R, TILE):
        if inner <= block:
            signed = _load_square(weight, inner, block, R, TILE) * sign[None, :]
            tl.debug_barrier()
            store_square(weight, inner, block, signed, R, TILE)


@triton.jit(do_not_specialize=["rank", "single_pass", "double_pass"])
def factor_kernel(tensors, levels, squares, scales, partials, rs, rank, single_pass: tl.float64, double_pass: tl.float64,
                  SECOND: tl.constexpr, TWO_STAGES: tl.constexpr, HAS_PREVIOUS: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Per matrix: sum the partial Grams, factorize, set the level, and W, R (with signs, where this pass is the last)."""
    index = tl.program_id(0).to(tl.int64)
    if SECOND:
        if tl.load(levels + index) != 1:
            return
    row = tensors + index * thin.COLUMNS
    first_chunk = tl.load(row + thin.FIRST_CHUNK)
    count = tl.load(row + thin.CHUNKS)
    # Squares per matrix: W, R, then in the second pass its own U⁻¹ and U, which are multiplied into the first two; the
    # fifth keeps the first pass's W for an application in two stages.
    weight = squares + index * (5 * R * R)
    factor = weight + R * R
    new_weight = weight
    new_factor = factor
    if SECOND:
        new_weight = weight + 2 * R * R
        new_factor = weight + 3 * R * R
    scales += index * (2 * R)
    good = _scale_columns(partials, scales, first_chunk, count, rank, R)
    condition, smallest = _invert_gram(partials, scales, new_weight, new_factor, first_chunk, count, rank, good, R, TILE)
    _unscale(scales, new_weight, new_factor, weight + 4 * R * R, TWO_STAGES and not SECOND, R, TILE)

    level = 2
    if good & (smallest > 1e-30):
        if condition <= double_pass:
            level = 1
        if condition <= single_pass:
            level = 0
    if SECOND:
        if level == 1:
            level = 2
    tl.store(levels + index, level)
    if level == 2:
        return
    tl.debug_barrier()
    if SECOND:
        _join_passes(weight, factor, new_weight, new_factor, R, TILE)
    if level == 1:
        return

    # Signs: ⟨q_j, previous_j⟩ is a diagonal entry of Wᵀ(XᵀP). W's columns carry them, and R's rows.
    i = tl.arange(0, TILE)
    for block in range(0, R, TILE):
        sign = tl.full([TILE], 1.0, tl.float64)
        if HAS_PREVIOUS:
            aligned = tl.zeros([TILE], tl.float64)
            for inner in range(0, R, TILE):
                if inner <= block:
                    cross = _sum_partials(partials + R * R, first_chunk, count, inner, block, R, TILE)
                    aligned += tl.sum(_load_square(weight, inner, block, R, TILE) * cross, axis=0)
            sign = tl.where(aligned < 0, -1.0, 1.0).to(tl.float64)
            _sign_columns(weight, sign, block, R, TILE)
            if TWO_STAGES and SECOND:
                _sign_columns(new_weight, sign, block, R, TILE)
        row_sign = tl.sum(tl.where(i[:, None] == i[None, :], sign[None, :], 0.0), axis=1)
        a = block + i[:, None]
        for right in range(0, R, TILE):
            b = right + i[None, :]
            value = tl.where(a <= b, _load_square(factor, block, right, R, TILE) * row_sign[:, None], 0.0)
            tl.store(rs + index * rank * rank + a * rank + b, value.to(rs.dtype.element_ty), mask=(a < rank) & (b < rank))


@triton.jit
def _apply(x, mode, q, start, stop, rows, rank, columns, x_d, x_r, q_d, q_r, weight, Q: tl.constexpr, TWO_STAGES: tl.constexpr,
           R: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """Rows ``start…stop`` of ``Q = X·W``."""
    for first in range(start, stop, BLOCK_D):
        # All of a row's tiles are computed before any is written: Q may be X.
        if TILE == R:
            if TWO_STAGES:
                # The same product as the second Gram was made of: that is what makes Q orthonormal to the last digit.
                value = _wide_tile(x, mode, first, rows, 0, rank, x_d, x_r, weight + 4 * R * R, True, BLOCK_D, TILE, R, VECTOR)
                value = tl.dot(value, _load_square(weight + 2 * R * R, 0, 0, R, TILE), input_precision="ieee", out_dtype=tl.float64)
            else:
                value = _wide_tile(x, mode, first, rows, 0, rank, x_d, x_r, weight, True, BLOCK_D, TILE, R, VECTOR)
            store_tile(q, rounded(value, Q), first, rows, 0, columns, q_d, q_r, BLOCK_D, TILE)
        else:
            value = rounded(_wide_tile(x, mode, first, rows, 0, rank, x_d, x_r, weight, True, BLOCK_D, TILE, R, VECTOR), Q)
            other = rounded(_wide_tile(x, mode, first, rows, TILE, rank, x_d, x_r, weight, True, BLOCK_D, TILE, R, VECTOR), Q)
            tl.debug_barrier()
            store_tile(q, value, first, rows, 0, columns, q_d, q_r, BLOCK_D, TILE)
            store_tile(q, other, first, rows, TILE, columns, q_d, q_r, BLOCK_D, TILE)


@triton.jit(do_not_specialize=["rank", "columns", "weight_stride"])
def apply_kernel(tensors, chunks, levels, weights, rank, columns, weight_stride, X: tl.constexpr, Q: tl.constexpr, QR: tl.constexpr, TWO_STAGES: tl.constexpr,
                 R: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """Per chunk of rows: the first ``columns`` columns of ``Q = X·W``, in fp64, rounded once."""
    program = tl.program_id(0).to(tl.int64)
    index = tl.load(chunks + 2 * program)
    if QR:
        if tl.load(levels + index) == 2:
            return
    row = tensors + index * thin.COLUMNS
    x = tl.load(row + thin.X).to(tl.pointer_type(X))
    q = tl.load(row + thin.Q).to(tl.pointer_type(Q))
    rows = tl.load(row + thin.ROWS)
    x_d = tl.load(row + thin.X_D)
    x_r = tl.load(row + thin.X_R)
    q_d = tl.load(row + thin.Q_D)
    q_r = tl.load(row + thin.Q_R)
    mode = tl.load(row + thin.X_MODE)
    weight = weights + index * weight_stride
    start = tl.load(chunks + 2 * program + 1) * CHUNK
    stop = tl.minimum(start + CHUNK, rows)
    if X.primitive_bitwidth < 32:
        _apply(x, mode, q, start, stop, rows, rank, columns, x_d, x_r, q_d, q_r, weight, Q, TWO_STAGES, R, TILE, BLOCK_D, VECTOR)
    elif mode == 1:
        _apply(x, 1, q, start, stop, rows, rank, columns, x_d, x_r, q_d, q_r, weight, Q, TWO_STAGES, R, TILE, BLOCK_D, VECTOR)
    elif mode == 2:
        _apply(x, 2, q, start, stop, rows, rank, columns, x_d, x_r, q_d, q_r, weight, Q, TWO_STAGES, R, TILE, BLOCK_D, VECTOR)
    else:
        _apply(x, 0, q, start, stop, rows, rank, columns, x_d, x_r, q_d, q_r, weight, Q, TWO_STAGES, R, TILE, BLOCK_D, VECTOR)


@triton.jit
def _project_out(work, work_d, work_r, rows, j, R: tl.constexpr, BLOCK_D: tl.constexpr):
    """``v ← v - Q(Qᵀv)`` for column j against columns < j of ``work``, in fp64; returns ``Qᵀv`` (R) and ‖v‖² after."""
    k = tl.arange(0, R)
    coefficients = tl.zeros([R], tl.float64)
    for first in range(0, rows, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        tile = tl.load(work + d[:, None] * work_d + k[None, :] * work_r, mask=(d[:, None] < rows) & (k[None, :] < j), other=0.0)
        v = tl.load(work + d * work_d + j * work_r, mask=d < rows, other=0.0)
        coefficients += tl.sum(tile.to(tl.float64) * v.to(tl.float64)[:, None], axis=0)
    tl.debug_barrier()
    squares = tl.zeros([BLOCK_D], tl.float64)
    for first in range(0, rows, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        tile = tl.load(work + d[:, None] * work_d + k[None, :] * work_r, mask=(d[:, None] < rows) & (k[None, :] < j), other=0.0)
        v = tl.load(work + d * work_d + j * work_r, mask=d < rows, other=0.0)
        left = v.to(tl.float64) - tl.sum(tile.to(tl.float64) * coefficients[None, :], axis=1)
        left = left.to(work.dtype.element_ty)
        # Replicas of v in other threads must be read before it is overwritten.
        tl.debug_barrier()
        tl.store(work + d * work_d + j * work_r, left, mask=d < rows)
        squares += left.to(tl.float64) * left.to(tl.float64)
    tl.debug_barrier()
    return coefficients, tl.sum(squares, axis=0)


@triton.jit
def _emptiest_row(work, work_d, work_r, rows, j, R: tl.constexpr, BLOCK_D: tl.constexpr):
    """The row i for which the unit vector e_i is farthest from the span of columns < j (the first one, on a tie)."""
    k = tl.arange(0, R)
    least = tl.full([BLOCK_D], 2.0, tl.float64)
    where = tl.zeros([BLOCK_D], tl.int64)
    for first in range(0, rows, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        tile = tl.load(work + d[:, None] * work_d + k[None, :] * work_r, mask=(d[:, None] < rows) & (k[None, :] < j), other=0.0)
        filled = tl.sum(tile.to(tl.float64) * tile.to(tl.float64), axis=1)
        better = (filled < least) & (d < rows)
        least = tl.where(better, filled, least)
        where = tl.where(better, d, where)
    smallest = tl.min(least, axis=0)
    return tl.min(tl.where(least == smallest, where, rows), axis=0)


@triton.jit
def orthonormalize_column(work, work_d, work_r, rows, j, norm, tolerance, R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Column j of ``work`` made orthonormal to those before it; its norm was ``norm``, at most ``tolerance·norm`` counts as dependent.

    Returns the coefficients of the column in the basis (column j of R). A dependent column is replaced by a unit
    vector, orthonormalized, with ``R_jj = 0``.
    """
    k = tl.arange(0, R)
    coefficients = tl.zeros([R], tl.float64)
    squares = norm * norm
    for _ in range(3):
        part, squares = _project_out(work, work_d, work_r, rows, j, R, BLOCK_D)
        coefficients += part
    length = tl.sqrt(squares)
    if length <= tolerance * norm:
        unit = _emptiest_row(work, work_d, work_r, rows, j, R, BLOCK_D)
        for first in range(0, rows, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            tl.store(work + d * work_d + j * work_r, tl.where(d == unit, 1.0, 0.0).to(work.dtype.element_ty), mask=d < rows)
        tl.debug_barrier()
        for _ in range(3):
            unused, squares = _project_out(work, work_d, work_r, rows, j, R, BLOCK_D)
        length = tl.sqrt(squares)
    else:
        coefficients = tl.where(k == j, length, coefficients)
    return coefficients, 1.0 / length


@triton.jit(do_not_specialize=["rank", "tolerance"])
def guarded_kernel(tensors, levels, scratch, rs, rank, tolerance: tl.float64, X: tl.constexpr, Q: tl.constexpr, COMPUTE: tl.constexpr,
                   WORK_IN_OUTPUT: tl.constexpr, HAS_PREVIOUS: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Level-2 matrices, one program each: Gram-Schmidt with reorthogonalization and completion."""
    index = tl.program_id(0).to(tl.int64)
    if tl.load(levels + index) != 2:
        return
    row = tensors + index * thin.COLUMNS
    x = tl.load(row + thin.X).to(tl.pointer_type(X))
    q = tl.load(row + thin.Q).to(tl.pointer_type(Q))
    previous = tl.load(row + thin.PREVIOUS).to(tl.pointer_type(X))
    rows = tl.load(row + thin.ROWS)
    x_d = tl.load(row + thin.X_D)
    x_r = tl.load(row + thin.X_R)
    q_d = tl.load(row + thin.Q_D)
    q_r = tl.load(row + thin.Q_R)
    previous_d = tl.load(row + thin.PREVIOUS_D)
    previous_r = tl.load(row + thin.PREVIOUS_R)
    if WORK_IN_OUTPUT:
        work = q
        work_d = q_d
        work_r = q_r
    else:
        work = scratch + tl.load(row + thin.SCRATCH_ROW) * rank
        work_d = tl.full((), 0, tl.int64) + rank
        work_r = tl.full((), 1, tl.int64)
    k = tl.arange(0, R)
    r_base = rs + index * rank * rank

    largest = tl.zeros([R], tl.float64)
    for first in range(0, rows, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        tile = tl.load(x + d[:, None] * x_d + k[None, :] * x_r, mask=(d[:, None] < rows) & (k[None, :] < rank), other=0.0)
        size = tl.abs(tile.to(tl.float64))
        # NaN compares as false and becomes infinite with the rest.
        size = tl.where(size < float("inf"), size, float("inf"))
        largest = tl.maximum(largest, tl.max(size, axis=0))
    if tl.max(largest, axis=0) == float("inf"):
        for first in range(0, rows, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            tl.store(q + d[:, None] * q_d + k[None, :] * q_r, tl.full([BLOCK_D, R], float("nan"), tl.float32).to(Q),
                     mask=(d[:, None] < rows) & (k[None, :] < rank))  # fmt: skip
        for i in range(rank):
            tl.store(r_base + i * rank + k, tl.full([R], float("nan"), COMPUTE), mask=k < rank)
        return
    exponents = tl.where(largest > 0, tl.maximum(exponent_of(largest), -1022) + 1, 0)

    for j in range(rank):
        exponent = tl.sum(tl.where(k == j, exponents, 0), axis=0)
        half = exponent >> 1
        down = power_of_two(-half)
        down_rest = power_of_two(half - exponent)
        squares = tl.zeros([BLOCK_D], tl.float64)
        for first in range(0, rows, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            v = tl.load(x + d * x_d + j * x_r, mask=d < rows, other=0.0).to(tl.float64) * down * down_rest
            squares += v * v
            tl.debug_barrier()  # where Q is X, and threads hold copies of an element, all must have read it
            tl.store(work + d * work_d + j * work_r, v.to(COMPUTE), mask=d < rows)
        tl.debug_barrier()
        norm = tl.sqrt(tl.sum(squares, axis=0))
        coefficients, scale = orthonormalize_column(work, work_d, work_r, rows, j, norm, tolerance, R, BLOCK_D)
        if HAS_PREVIOUS:
            products = tl.zeros([BLOCK_D], tl.float64)
            for first in range(0, rows, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                v = tl.load(work + d * work_d + j * work_r, mask=d < rows, other=0.0).to(tl.float64)
                p = tl.load(previous + d * previous_d + j * previous_r, mask=d < rows, other=0.0).to(tl.float64)
                products += v * p
            sign = tl.where(tl.sum(products, axis=0) < 0, -1.0, 1.0)
            scale *= sign
            coefficients = tl.where(k == j, coefficients * sign, coefficients)
        for first in range(0, rows, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            v = tl.load(work + d * work_d + j * work_r, mask=d < rows, other=0.0).to(tl.float64) * scale
            tl.debug_barrier()
            tl.store(work + d * work_d + j * work_r, v.to(COMPUTE), mask=d < rows)
            if not WORK_IN_OUTPUT:
                tl.store(q + d * q_d + j * q_r, rounded(v, Q), mask=d < rows)
        tl.debug_barrier()
        up = tl.where(k <= j, coefficients, 0.0) * power_of_two(half) * power_of_two(exponent - half)
        tl.store(r_base + k * rank + j, up.to(COMPUTE), mask=k < rank)


class Sizes:
    """Tile sizes of the QR kernels for one rank."""

    def __init__(self, rank: int) -> None:
        self.R = padded_rank(rank)
        self.TILE = min(self.R, 64)
        self.FACTOR_TILE = min(self.R, 32)
        self.CHUNK = max(512, 32 * self.R)
        self.BLOCK_D = {16: 64, 32: 32}.get(self.R, 16)
        self.GUARDED_BLOCK_D = 2048 // self.R
        self.warps = 4 if self.R <= 32 else 8

    def apply_options(self, two_stages: bool = False) -> dict[str, int]:
        """Launch options of ``apply_kernel``: fewer tiles of weights are prefetched than Triton's three, which do not fit any GPU."""
        stages = {32: 2 if two_stages else 3, 64: 1 if two_stages else 2}.get(self.R, 3)
        return {"num_warps": self.warps, "num_stages": stages}


def factorize(xs: list[Tensor], previous: list[Tensor] | None, qs: list[Tensor], rs: Tensor) -> None:
    """The six launches. ``qs`` may have another dtype than ``xs``; ``rs`` is contiguous (N, r, r)."""
    first, rank = xs[0], xs[0].shape[1]
    sizes = Sizes(rank)
    work = thin_table("grouped_qr", xs, previous, qs, sizes.CHUNK)
    (scratch_rows,) = work.facts
    compute = compute_dtype(first.dtype)
    squares = torch.empty(len(xs), 5, sizes.R, sizes.R, dtype=torch.float64, device=first.device)
    partials = torch.empty(work.programs, 2, sizes.R, sizes.R, dtype=torch.float64, device=first.device)
    scales = torch.empty(len(xs), 2, sizes.R, dtype=torch.float64, device=first.device)
    levels = torch.empty(len(xs), dtype=torch.int32, device=first.device)
    # The guarded path needs `previous` until the end of each column, and its columns in full precision.
    in_output = previous is None and qs[0].dtype == compute
    scratch = levels if in_output else torch.empty(scratch_rows, rank, dtype=compute, device=first.device)
    shape = {"R": sizes.R, "TILE": sizes.TILE}
    kinds = {"X": TL_DTYPE[first.dtype], "VECTOR": vector(first.dtype), "CHUNK": sizes.CHUNK, "BLOCK_D": sizes.BLOCK_D}
    has_previous, two_stages = previous is not None, compute == torch.float64
    single = _SINGLE_PASS if compute == torch.float32 else 0.0
    tolerance = (4 if compute == torch.float32 else 64) * torch.finfo(compute).eps
    gram_grid = (work.programs, 1 if sizes.R == sizes.TILE else 3)
    with on_device(first):
        for second in (False, True):
            launch(gram_kernel, gram_grid, work.tensors, work.chunks, levels, squares, partials, rank, **shape, **kinds,
                   SECOND=second, HAS_PREVIOUS=has_previous and not second, num_warps=sizes.warps)  # fmt: skip
            # The second Gram is close to I, with a Frobenius condition near r; if not, the first one was misleading.
            launch(factor_kernel, (len(xs),), work.tensors, levels, squares, scales, partials, rs, rank, 4.0 * sizes.R if second else single,
                   _DOUBLE_PASS, R=sizes.R, TILE=sizes.FACTOR_TILE, SECOND=second, TWO_STAGES=two_stages, HAS_PREVIOUS=has_previous, num_warps=4)  # fmt: skip
        launch(apply_kernel, (work.programs,), work.tensors, work.chunks, levels, squares, rank, rank, 5 * sizes.R * sizes.R,
               **shape, **kinds, Q=TL_DTYPE[qs[0].dtype], QR=True, TWO_STAGES=two_stages, **sizes.apply_options(two_stages))  # fmt: skip
        launch(guarded_kernel, (len(xs),), work.tensors, levels, scratch, rs, rank, tolerance, X=kinds["X"], Q=TL_DTYPE[qs[0].dtype],
               COMPUTE=TL_DTYPE[compute], WORK_IN_OUTPUT=in_output, HAS_PREVIOUS=has_previous, R=sizes.R,
               BLOCK_D=sizes.GUARDED_BLOCK_D, num_warps=8)  # fmt: skip


def rank_verdict(rank: int, dtype: torch.dtype) -> Verdict:
    """Whether the QR kernels hold this rank."""
    largest = _LARGEST_RANK_FP64 if dtype == torch.float64 else _LARGEST_RANK
    if rank < 1 or rank > largest:
        return False, f"rank {rank} in {dtype}: the kernels hold 1 to {largest} without spilling registers"
    return True, "Triton kernels"


def verify(xs: list[Tensor], previous: list[Tensor] | None, qs: list[Tensor], rs: Tensor, layouts: object = None) -> Verdict:
    """Refuses ranks above 128 (fp64: 64) and other devices than a GPU."""
    ok, reason = rank_verdict(xs[0].shape[1], xs[0].dtype)
    return device_verdict(xs) if ok else (ok, reason)


@implements("grouped_qr", "triton", verify)
def grouped_qr(xs: list[Tensor], previous: list[Tensor] | None, qs: list[Tensor], rs: Tensor, layouts: object = None) -> None:
    """Write ``Q_i`` and ``R_i``; six launches, nothing read on the host. See the module's text, and the reference."""
    target = rs if rs.is_contiguous() else torch.empty_like(rs, memory_format=torch.contiguous_format)
    factorize(xs, previous, qs, target)
    if target is not rs:
        rs.copy_(target)
