"""``grouped_gram``: Gram and cross-Gram matrices of a whole ragged list in two launches.

The first launch forms the products of chunks of rows, tile by tile, the second adds them up in a fixed order: the result
is deterministic, without atomics. Floor: read X once (and Y once), plus r·k words per chunk of 512 rows or more, written and read
in L2. Above rank 64 each further tile of 64 columns reads its operands again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import Verdict, implements
from . import _thin as thin
from ._device import scalar
from ._launch import TL_DTYPE, device_verdict, launch, on_device, padded_rank
from ._tables import Table
from ._thin import load_tile, thin_table, vector
from ._tuned import configuration

#: Elements of a result that one program of the summation adds up.
SUM_BLOCK = 256
_LARGEST_TILE = 64
#: Of a launch, in its second dimension.
_LARGEST_GRID = 65535


@triton.jit
def _product(x, x_mode, y, y_mode, start, stop, rows, left, right, x_rank, y_rank, x_d, x_r, y_d, y_r, target, ACCUMULATOR: tl.constexpr,
             SAME: tl.constexpr, TILE_X: tl.constexpr, TILE_Y: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """One tile of ``XᵀY``, summed over rows ``start…stop``, to ``target``; SAME: X's tile is Y's, too."""
    gram = tl.zeros([TILE_X, TILE_Y], ACCUMULATOR)
    for first in range(start, stop, BLOCK_D):
        a = load_tile(x, x_mode, first, rows, left, x_rank, x_d, x_r, BLOCK_D, TILE_X, VECTOR).to(ACCUMULATOR)
        if SAME:
            b = a
        else:
            b = load_tile(y, y_mode, first, rows, right, y_rank, y_d, y_r, BLOCK_D, TILE_Y, VECTOR).to(ACCUMULATOR)
        gram = tl.dot(tl.trans(a), b, gram, input_precision="ieee", out_dtype=ACCUMULATOR)
    i = left + tl.arange(0, TILE_X)[:, None]
    j = right + tl.arange(0, TILE_Y)[None, :]
    tl.store(target + i * y_rank + j, gram, mask=(i < x_rank) & (j < y_rank))


@triton.jit(do_not_specialize=["x_rank", "y_rank"])
def partial_gram_kernel(tensors, chunks, partials, x_rank, y_rank, partial_stride, X: tl.constexpr, SYMMETRIC: tl.constexpr,
                        TILE_X: tl.constexpr, TILE_Y: tl.constexpr, TILES_Y: tl.constexpr,
                        CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """Per chunk of rows, one tile of ``XᵀY`` (SYMMETRIC: of XᵀX, upper tiles only), in the dtype of ``partials``."""
    ACCUMULATOR: tl.constexpr = partials.dtype.element_ty
    SAME: tl.constexpr = SYMMETRIC and TILES_Y == 1
    program = tl.program_id(0).to(tl.int64)
    left = (tl.program_id(1) // TILES_Y) * TILE_X
    right = (tl.program_id(1) % TILES_Y) * TILE_Y
    if SYMMETRIC:
        if left > right:
            return
    row = tensors + tl.load(chunks + 2 * program) * thin.COLUMNS
    x = tl.load(row + thin.X).to(tl.pointer_type(X))
    y = tl.load(row + thin.PREVIOUS).to(tl.pointer_type(X))
    rows = tl.load(row + thin.ROWS)
    x_d = tl.load(row + thin.X_D)
    x_r = tl.load(row + thin.X_R)
    y_d = tl.load(row + thin.PREVIOUS_D)
    y_r = tl.load(row + thin.PREVIOUS_R)
    x_mode = tl.load(row + thin.X_MODE)
    y_mode = tl.load(row + thin.PREVIOUS_MODE)
    start = tl.load(chunks + 2 * program + 1) * CHUNK
    stop = tl.minimum(start + CHUNK, rows)
    target = partials + program * partial_stride
    # A loop for each mode: Triton prefetches (cp.async) what no branch in the loop hides. (Triton 3.6 does not compile that for 16 bits in fp64.)
    PREFETCHES: tl.constexpr = X.primitive_bitwidth >= 32 or tl.float64 != ACCUMULATOR
    if not PREFETCHES:
        _product(x, x_mode, y, y_mode, start, stop, rows, left, right, x_rank, y_rank, x_d, x_r, y_d, y_r, target, ACCUMULATOR, SAME,
                 TILE_X, TILE_Y, BLOCK_D, VECTOR)  # fmt: skip
    elif (x_mode == 1) & (y_mode == 1):
        _product(x, 1, y, 1, start, stop, rows, left, right, x_rank, y_rank, x_d, x_r, y_d, y_r, target, ACCUMULATOR, SAME,
                 TILE_X, TILE_Y, BLOCK_D, VECTOR)  # fmt: skip
    elif (x_mode == 2) & (y_mode == 2):
        _product(x, 2, y, 2, start, stop, rows, left, right, x_rank, y_rank, x_d, x_r, y_d, y_r, target, ACCUMULATOR, SAME,
                 TILE_X, TILE_Y, BLOCK_D, VECTOR)  # fmt: skip
    elif SYMMETRIC:
        _product(x, 0, y, 0, start, stop, rows, left, right, x_rank, y_rank, x_d, x_r, y_d, y_r, target, ACCUMULATOR, SAME,
                 TILE_X, TILE_Y, BLOCK_D, VECTOR)  # fmt: skip
    else:
        _product(x, x_mode, y, y_mode, start, stop, rows, left, right, x_rank, y_rank, x_d, x_r, y_d, y_r, target, ACCUMULATOR, SAME,
                 TILE_X, TILE_Y, BLOCK_D, VECTOR)  # fmt: skip


@triton.jit
def sum_of_chunks(row, partials, entry, size, columns, partial_stride, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK entries of the product of one matrix, whose row of the table it is: its chunks added up in order."""
    first_chunk = tl.load(row + thin.FIRST_CHUNK)
    count = tl.load(row + thin.CHUNKS)
    source = entry
    if SYMMETRIC:
        i = entry // columns
        j = entry % columns
        source = tl.minimum(i, j) * columns + tl.maximum(i, j)
    total = tl.zeros([BLOCK], partials.dtype.element_ty)
    for chunk in range(first_chunk, first_chunk + count):
        total += tl.load(partials + chunk * partial_stride + source, mask=entry < size, other=0.0)
    return total


@triton.jit(do_not_specialize=["size", "columns", "partial_stride", "out_stride", "diagonal"])
def sum_chunks_kernel(tensors, partials, out, size, columns, partial_stride, out_stride, diagonal: tl.float64,
                      SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Adds up the partial products of each matrix, and ``diagonal · I``; SYMMETRIC takes every entry from the upper triangle."""
    index = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = sum_of_chunks(tensors + index * thin.COLUMNS, partials, entry, size, columns, partial_stride, SYMMETRIC, BLOCK)
    total += tl.where(entry // columns == entry % columns, scalar(diagonal, partials.dtype.element_ty), 0.0)
    tl.store(out + index * out_stride + entry, total, mask=entry < size)


class GramSizes:
    """Tile sizes of the Gram kernels for X of rank ``x_rank`` and Y of rank ``y_rank``."""

    def __init__(self, x_rank: int, y_rank: int) -> None:
        padded = max(padded_rank(x_rank), padded_rank(y_rank))
        self.TILE_X, self.TILE_Y = (min(padded_rank(rank), _LARGEST_TILE) for rank in (x_rank, y_rank))
        self.tiles_x, self.TILES_Y = triton.cdiv(x_rank, self.TILE_X), triton.cdiv(y_rank, self.TILE_Y)
        # So that the partial products stay a small part of what is read.
        self.CHUNK = max(512, 32 * padded)
        # A product holds all of its inner dimension in registers: more rows would spill.
        self.padded, self.default = padded, {"BLOCK_D": 32 if padded <= 16 else 16, "num_warps": 4 if padded <= 32 else 8}


def launch_partials(work: Table, partials: Tensor, x_rank: int, y_rank: int, dtype: torch.dtype, *, symmetric: bool) -> None:
    """The first launch, on a table of ``thin_table`` with ``GramSizes.CHUNK``; ``partials`` (programs, stride ≥ r·k)."""
    sizes = GramSizes(x_rank, y_rank)
    chosen = configuration("partial_gram", sizes.padded, (dtype, partials.dtype), partials.device, sizes.default)
    launch(partial_gram_kernel, (work.programs, sizes.tiles_x * sizes.TILES_Y), work.tensors, work.chunks, partials, x_rank, y_rank,
           partials.stride(0), X=TL_DTYPE[dtype], SYMMETRIC=symmetric, TILE_X=sizes.TILE_X, TILE_Y=sizes.TILE_Y, TILES_Y=sizes.TILES_Y,
           CHUNK=sizes.CHUNK, VECTOR=vector(dtype), **chosen)  # fmt: skip


def launch_sum(tensors: Tensor, count: int, partials: Tensor, out: Tensor, *, symmetric: bool, diagonal: float = 0.0) -> None:
    """The second launch: ``out`` (N, …), each matrix contiguous, from the chunks that the table's rows name, plus ``diagonal · I``."""
    size = out[0].numel()
    launch(sum_chunks_kernel, (count, triton.cdiv(size, SUM_BLOCK)), tensors, partials, out, size, out.shape[-1], partials.stride(0),
           out.stride(0), float(diagonal), SYMMETRIC=symmetric, BLOCK=SUM_BLOCK, num_warps=4)  # fmt: skip


def verify(xs: list[Tensor], ys: list[Tensor] | None, grams: Tensor, layouts: object = None) -> Verdict:
    """Takes ranks to some thousands; refuses other devices than a GPU."""
    if triton.cdiv(grams.shape[1] * grams.shape[2], SUM_BLOCK) > _LARGEST_GRID:
        return (
            False,
            f"products of {grams.shape[1]} × {grams.shape[2]}: the sum of their chunks has a grid of at most {_LARGEST_GRID} blocks",
        )
    return device_verdict(xs)


def gram_chunks(xs: list[Tensor], ys: list[Tensor] | None, x_rank: int, y_rank: int, dtype: torch.dtype) -> tuple[Table, Tensor]:
    """The products of chunks of rows, in ``dtype``, in one launch; the table of the chunks comes first."""
    work = thin_table("grouped_gram", xs, ys, xs, GramSizes(x_rank, y_rank).CHUNK)
    partials = torch.empty(work.programs, x_rank * y_rank, dtype=dtype, device=xs[0].device)
    if work.programs:
        launch_partials(work, partials, x_rank, y_rank, xs[0].dtype, symmetric=ys is None)
    return work, partials


@implements("grouped_gram", "triton", verify)
def grouped_gram(xs: list[Tensor], ys: list[Tensor] | None, grams: Tensor, layouts: object = None) -> None:
    """Write ``XᵀY`` (or XᵀX, exactly symmetric) of every pair; two launches, nothing read on the host."""
    x_rank, y_rank = grams.shape[1:]
    if not grams.numel():
        return
    target = grams if grams.is_contiguous() else torch.empty_like(grams, memory_format=torch.contiguous_format)
    with on_device(xs[0]):
        work, partials = gram_chunks(xs, ys, x_rank, y_rank, grams.dtype)
        launch_sum(work.tensors, len(xs), partials, target, symmetric=ys is None)
    if target is not grams:
        grams.copy_(target)
