"""Thin matrices (d, r) in kernels: how a ragged list of them is described on the device, and how their tiles are read and written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tables import Layout, Table, addresses, first_chunks, signature, table

#: The columns of the table, one row of it a matrix: addresses, rows, strides (from row to row, from column to column), modes of
#: :func:`load_tile`, the first of the chunks and their number, the row at which its scratch begins.
(X, Q, PREVIOUS, ROWS, X_D, X_R, Q_D, Q_R, PREVIOUS_D, PREVIOUS_R, X_MODE, PREVIOUS_MODE, FIRST_CHUNK, CHUNKS, SCRATCH_ROW, COLUMNS) = (
    tl.constexpr(i) for i in range(16)
)


@triton.jit
def load_tile(
    pointer, mode, row, rows, first, rank, stride_d, stride_r, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, VECTOR: tl.constexpr
):
    """Rows ``row…`` and columns ``first…`` of a thin matrix as a (BLOCK_D, BLOCK_R) tile, zeros outside.

    ``mode`` (from the table): 1, aligned rows; 2, aligned columns (a transposed factor); 0, anything.
    """
    d = tl.arange(0, BLOCK_D)
    k = first + tl.arange(0, BLOCK_R)
    # Hints must stand on values that are computed here: on arguments they are lost when the function is inlined.
    # Names differ between the branches because a name must keep its type across them.
    if mode == 1:
        by_rows = tl.multiple_of(pointer + row * stride_d, 16)
        row_mask = (row + d[:, None] < rows) & (k[None, :] < rank // VECTOR * VECTOR)
        tile = tl.load(by_rows + d[:, None] * (stride_d // VECTOR * VECTOR) + k[None, :], mask=row_mask, other=0.0)
    elif mode == 2:
        by_columns = tl.multiple_of(pointer + row, 16)
        column_mask = (k[:, None] < rank) & (d[None, :] < (rows - row) // VECTOR * VECTOR)
        tile = tl.trans(tl.load(by_columns + k[:, None] * (stride_r // VECTOR * VECTOR) + d[None, :], mask=column_mask, other=0.0))
    else:
        any_mask = (row + d[:, None] < rows) & (k[None, :] < rank)
        tile = tl.load(pointer + (row + d[:, None]) * stride_d + k[None, :] * stride_r, mask=any_mask, other=0.0)
    return tile


@triton.jit
def store_tile(pointer, value, row, rows, first, columns, stride_d, stride_r, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr):
    """The counterpart of :func:`load_tile`; whether rows are aligned is found out here."""
    VECTOR: tl.constexpr = 128 // value.dtype.primitive_bitwidth
    d = tl.arange(0, BLOCK_D)
    k = first + tl.arange(0, BLOCK_R)
    mask = (row + d[:, None] < rows) & (k[None, :] < columns)
    if stride_r == 1:
        if (pointer.to(tl.int64) % 16 == 0) & (stride_d % VECTOR == 0) & (columns % VECTOR == 0):
            by_rows = tl.multiple_of(pointer + row * stride_d, 16)
            row_mask = (row + d[:, None] < rows) & (k[None, :] < columns // VECTOR * VECTOR)
            tl.store(by_rows + d[:, None] * (stride_d // VECTOR * VECTOR) + k[None, :], value, mask=row_mask)
        else:
            tl.store(pointer + (row + d[:, None]) * stride_d + k[None, :], value, mask=mask)
    elif stride_d == 1:
        tl.store(pointer + k[:, None] * stride_r + row + d[None, :], tl.trans(value), mask=tl.trans(mask))
    else:
        tl.store(pointer + (row + d[:, None]) * stride_d + k[None, :] * stride_r, value, mask=mask)


@triton.jit
def multiply(a, a_row, a_column, TRANSPOSE_A: tl.constexpr, b, b_row, b_column, R: tl.constexpr, TILE: tl.constexpr):
    """The product of two tiles in memory (the first transposed, if asked for), 16 of the inner dimension at a time."""
    i = tl.arange(0, TILE)
    total = tl.zeros([TILE, TILE], a.dtype.element_ty)
    for first in range(0, TILE, 16):
        k = first + tl.arange(0, 16)
        if TRANSPOSE_A:
            left = tl.trans(tl.load(a + (a_row + k[:, None]) * R + a_column + i[None, :]))
        else:
            left = tl.load(a + (a_row + i[:, None]) * R + a_column + k[None, :])
        right = tl.load(b + (b_row + k[:, None]) * R + b_column + i[None, :])
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=a.dtype.element_ty)
    return total


@triton.jit
def power_of_two(exponent):
    """``2^exponent`` in fp64, for -1022 ≤ exponent ≤ 1023 (int64)."""
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def exponent_of(x):
    """``⌊log2 x⌋`` of normal positive fp64, -1023 for zero and denormals, 1024 for what is not finite."""
    return ((x.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023


@triton.jit
def tile_exponent(tile):
    """``⌊log2⌋`` of the largest entry of a tile in fp64, -1022 at least; 1024 if one is not finite."""
    size = tl.abs(tile)
    size = tl.where(size < float("inf"), size, float("inf"))
    return tl.maximum(exponent_of(tl.max(tl.max(size, axis=1), axis=0)), -1022)


@triton.jit
def scaled(tile, exponent):
    """``tile · 2^exponent``, in two exact halves."""
    half = exponent >> 1
    return tile * power_of_two(half) * power_of_two(exponent - half)


def vector(dtype: torch.dtype) -> int:
    """Elements of a 16-byte load."""
    return 16 // dtype.itemsize


def tile_mode(x: Tensor) -> int:
    """How ``load_tile`` may read ``x``: 1 by aligned rows, 2 by aligned columns, 0 element by element."""
    rows, rank = x.shape
    stride_d, stride_r = x.stride()
    width = vector(x.dtype)
    if x.data_ptr() % 16:
        return 0
    if stride_r == 1 and stride_d % width == 0 and rank % width == 0:
        return 1
    if stride_d == 1 and stride_r % width == 0 and rows % width == 0:
        return 2
    return 0


def thin_layout(xs: Sequence[Tensor], previous: Sequence[Tensor] | None, qs: Sequence[Tensor], chunk: int) -> Layout:
    """The table of a ragged list of thin matrices and of what is written for them."""
    previous, heights = xs if previous is None else previous, [x.shape[0] for x in xs]
    counts = [triton.cdiv(height, chunk) for height in heights]
    columns = np.empty((COLUMNS, len(xs)), dtype=np.int64)
    for matrices, address, stride_d, stride_r in ((xs, X, X_D, X_R), (qs, Q, Q_D, Q_R), (previous, PREVIOUS, PREVIOUS_D, PREVIOUS_R)):
        columns[address] = addresses(matrices)
        columns[stride_d], columns[stride_r] = zip(*map(Tensor.stride, matrices), strict=True)
    columns[ROWS], columns[FIRST_CHUNK], columns[CHUNKS] = heights, first_chunks(counts), counts
    columns[X_MODE], columns[PREVIOUS_MODE] = (list(map(tile_mode, matrices)) for matrices in (xs, previous))
    columns[SCRATCH_ROW] = first_chunks(heights)
    return Layout(columns.T, counts, (sum(heights),))


def thin_table(operation: str, xs: Sequence[Tensor], previous: Sequence[Tensor] | None, qs: Sequence[Tensor], chunk: int) -> Table:
    """The cached device table of :func:`thin_layout`."""
    key = (chunk, signature(xs), signature(previous or ()), signature(qs))
    return table(operation, xs[0].device, key, lambda: thin_layout(xs, previous, qs, chunk))
