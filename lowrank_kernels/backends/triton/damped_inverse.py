"""``grouped_damped_inverse``: the QR of ``[R; √δ I]`` and the inverse of its triangular factor, a whole stack in one launch.

One program per matrix, in fp64: R and the rows below it stay in registers, while reflections take a column of those at
a time into R; then the inverse by substitution, a row at a time. Floor: read R, write the inverse, once; the time is
the chain of 2r steps, all matrices side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..registry import Verdict, implements
from ._device import scalar
from ._launch import device_verdict, launch, on_device, padded_rank, square_warps
from ._thin import exponent_of, scaled, tile_exponent

_LARGEST_RANK = 64


@triton.jit(do_not_specialize=["matrix_stride", "row_stride", "column_stride", "rank", "root"])
def damped_inverse_kernel(rs, matrix_stride, row_stride, column_stride, out, rank, root: tl.float64, K: tl.constexpr):
    """``root`` is √δ."""
    OUT: tl.constexpr = out.dtype.element_ty
    index = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, K)
    row, column = i[:, None].to(tl.int64), i[None, :].to(tl.int64)
    upper = (row <= column) & (column < rank)
    r = tl.load(rs + index * matrix_stride + row * row_stride + column * column_stride, mask=upper, other=0.0).to(tl.float64)
    out += index * rank * rank
    inside = (row < rank) & (column < rank)
    exponent = tile_exponent(r)
    if exponent == 1024:
        nan = tl.full([K], float("nan"), tl.float32).to(OUT)
        tl.store(out + row * rank + column, tl.broadcast_to(nan[:, None], [K, K]), mask=inside)
        return
    root = scalar(root, tl.float64)
    exponent = tl.maximum(exponent, exponent_of(root))
    r = tl.where((row == column) & (row >= rank), 1.0, scaled(r, -exponent))
    below = tl.where((row == column) & inside, scaled(root, -exponent), 0.0)
    for k in range(rank):
        head_row = tl.sum(tl.where(row == k, r, 0.0), axis=0)
        tail_column = tl.sum(tl.where(column == k, below, 0.0), axis=1)
        head = tl.sum(tl.where(i == k, head_row, 0.0), axis=0)
        tail = tl.sum(tail_column * tail_column, axis=0)
        norm = tl.sqrt(head * head + tail)
        # Without cancellation; the reflection's vector is (first, tail_column).
        first = tl.where(head > 0, -tail / tl.where(head > 0, head + norm, 1.0), head - norm)
        square = first * first + tail
        tau = tl.where(square > 0, 2.0 / tl.where(square > 0, square, 1.0), 0.0)
        overlaps = tl.where(i > k, tau * (first * head_row + tl.sum(tail_column[:, None] * below, axis=0)), 0.0)
        head_row = tl.where(i == k, norm, head_row - first * overlaps)
        r = tl.where(row == k, head_row[None, :], r)
        below -= tail_column[:, None] * overlaps[None, :]
    transposed = tl.trans(r)
    inverse = tl.zeros([K, K], tl.float64)
    for step in range(rank):
        k = rank - 1 - step
        above = tl.sum(tl.where(column == k, transposed, 0.0), axis=1)
        pivot = tl.sum(tl.where(i == k, above, 0.0), axis=0)
        known = tl.sum(tl.where(i > k, above, 0.0)[:, None] * inverse, axis=0)
        inverse = tl.where(row == k, ((tl.where(i == k, 1.0, 0.0) - known) / pivot)[None, :], inverse)
    inverse = tl.where(row <= column, scaled(inverse, -exponent), 0.0)
    tl.store(out + row * rank + column, inverse.to(OUT), mask=inside)


def verify(rs: Tensor, damping: float, out: Tensor) -> Verdict:
    """Refuses ranks above 64 and other devices than a GPU."""
    if rs.shape[1] > _LARGEST_RANK:
        return False, f"{rs.shape[1]} × {rs.shape[1]} factors: the kernel holds at most {_LARGEST_RANK} × {_LARGEST_RANK} in registers"
    return device_verdict([rs])


@implements("grouped_damped_inverse", "triton", verify)
def grouped_damped_inverse(rs: Tensor, damping: float, out: Tensor) -> None:
    """See the reference; one launch, nothing read on the host."""
    count, rank, _ = rs.shape
    padded = padded_rank(rank)
    with on_device(rs):
        launch(damped_inverse_kernel, (count,), rs, *rs.stride(), out, rank, float(damping) ** 0.5, K=padded,
               num_warps=square_warps(padded))  # fmt: skip
