"""QR of a ragged list of tall matrices by one tree of equal blocks: Householder everywhere, a constant number of launches.

Each matrix is cut into blocks of b rows (the last one padded with zeros), and the blocks of all matrices, whatever their
heights, are one batch: ``geqrfBatched`` reduces every b × r block to its r × r triangle, the triangles of a matrix stacked
are the (shorter) matrices of the next level, and so on until one block each is left (TSQR). There is no batched ``orgqr``;
Q is applied through the compact form of the reflectors instead, ``H_1 … H_r = I − V T Vᵀ`` with
``T⁻¹ = striu(VᵀV) + diag(VᵀV)/2``: a Gram product, a triangular solve and a product, each one batched call. The diagonal
taken from VᵀV makes the factor orthogonal to rounding even where a reflector was computed badly.

This is Householder QR: orthogonal to rounding for any condition number, and complete for rank-deficient input (a zero
column's reflector is the identity), with no guard, hence no host synchronisation. The rows of padding stay zero in Q,
because reflectors are built from zeros there and the completing unit vectors lie in the first r rows of the first block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cuda_primitives import Primitives


@dataclass(frozen=True)
class Segment:
    """Where the blocks of n equally tall matrices lie in the batch of one level."""

    offset: int
    matrices: int
    blocks: int  # for each matrix

    def of(self, batch: Tensor) -> Tensor:
        """This segment's part of ``batch`` (P, …) as (n, p, …)."""
        return batch[self.offset : self.offset + self.matrices * self.blocks].unflatten(0, (self.matrices, self.blocks))


@dataclass(frozen=True)
class Level:
    """The reflectors of one level: Vᵀ (P, r, b), unit lower trapezoidal transposed, and T⁻¹ (P, r, r), upper triangular."""

    segments: list[Segment]
    reflectors_t: Tensor
    inverse_t: Tensor


def _pack(matrices_t: Sequence[Tensor], rank: int, rows: int) -> tuple[list[Segment], Tensor]:
    """Cut groups of matrices, each (n, r, d) transposed, into zero-padded blocks (P, r, rows)."""
    segments, offset = [], 0
    for group in matrices_t:
        blocks = -(-group.shape[2] // rows)
        segments.append(Segment(offset, group.shape[0], blocks))
        offset += group.shape[0] * blocks
    packed = matrices_t[0].new_zeros(offset, rank, rows)
    for segment, group in zip(segments, matrices_t, strict=True):
        target = segment.of(packed)
        full, rest = divmod(group.shape[2], rows)
        if full:
            target[:, :full].copy_(group[:, :, : full * rows].unflatten(2, (full, rows)).movedim(2, 1))
        if rest:
            target[:, full, :, :rest].copy_(group[:, :, full * rows :])
    return segments, packed


def _reduce(primitives: Primitives, segments: list[Segment], blocks_t: Tensor) -> tuple[Level, Tensor]:
    """Factor all blocks (P, r, b) in place: the level's reflectors, and the triangles Rᵀ (P, r, r)."""
    count, rank, _ = blocks_t.shape
    taus = blocks_t.new_zeros(count, rank)
    primitives.geqrf_(blocks_t, taus)
    triangles_t = blocks_t[:, :, :rank].tril()
    active = taus != 0  # a zero tau is H = I, whatever stands below the diagonal
    reflectors_t = blocks_t.triu_(1).masked_fill_(~active[:, :, None], 0)
    reflectors_t.diagonal(dim1=1, dim2=2).copy_(active)
    inverse_t = blocks_t.new_empty(count, rank, rank)
    primitives.matmul(reflectors_t, reflectors_t, inverse_t, transpose_b=True)
    diagonal = inverse_t.diagonal(dim1=1, dim2=2)
    diagonal.copy_(torch.where(active, diagonal * 0.5, 1.0))
    return Level(segments, reflectors_t, inverse_t), triangles_t


def factor(primitives: Primitives, matrices_t: Sequence[Tensor], rank: int, rows: int) -> tuple[list[Level], Tensor]:
    """QR of groups of finite matrices (n_g, r, d_g), given transposed, d_g ≥ r, in blocks of ``rows`` ≥ 2r rows.

    Returns the levels, lowest first, and Rᵀ (N, r, r) in the order of the groups.
    """
    levels: list[Level] = []
    groups = list(matrices_t)
    while True:
        height = min(rows, max(group.shape[2] for group in groups))
        segments, blocks_t = _pack(groups, rank, height)
        level, triangles_t = _reduce(primitives, segments, blocks_t)
        levels.append(level)
        if all(segment.blocks == 1 for segment in segments):
            return levels, triangles_t
        # Block p's triangle is rows p·r … of the next level's matrix: (n, p, column, row) → (n, column, p·r + row).
        groups = [segment.of(triangles_t).movedim(1, 2).flatten(2) for segment in segments]


def apply_q(primitives: Primitives, levels: list[Level], coefficients_t: Tensor) -> list[Tensor]:
    """``(Q C)ᵀ`` for C given transposed, (N, c, r): one tensor (n, c, ≥ d) for each group, padded as its blocks are."""
    for depth in range(len(levels) - 1, -1, -1):
        level = levels[depth]
        reflectors_t = level.reflectors_t
        count, rank, rows = reflectors_t.shape
        columns = coefficients_t.shape[1]
        # Q C = [C; 0] − V T (V₁ᵀ C), V₁ the first r rows of V.
        middle = reflectors_t.new_empty(count, rank, columns)
        primitives.matmul(reflectors_t[:, :, :rank], coefficients_t, middle, transpose_b=True)
        primitives.solve_upper_(level.inverse_t, middle)
        product_t = reflectors_t.new_zeros(count, columns, rows)
        product_t[:, :, :rank].copy_(coefficients_t)
        primitives.matmul(middle, reflectors_t, product_t, transpose_a=True, alpha=-1.0, beta=1.0)
        groups = [segment.of(product_t).movedim(1, 2).flatten(2) for segment in level.segments]  # (n, c, p·b)
        if depth == 0:
            return groups
        below = levels[depth - 1].segments
        coefficients_t = torch.cat(
            [
                group[:, :, : child.blocks * rank].unflatten(2, (child.blocks, rank)).movedim(2, 1).flatten(0, 1)
                for group, child in zip(groups, below, strict=True)
            ]
        )
    raise AssertionError("a factorization has at least one level")  # pragma: no cover


def orthonormalize_rows(primitives: Primitives, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Gram–Schmidt's result on the rows of each (n, k, d ≥ k), by Householder: orthonormal rows, and Rᵀ (n, k, k).

    Row signs follow ``vectors``; a row that depends on those before it is completed.
    """
    count, k, d = vectors.shape
    scaled, exponents = normalize_rows(vectors)
    levels, r_t = factor(primitives, [scaled], k, max(d, 2 * k))
    rows = apply_q(primitives, levels, identity(count, k, vectors))[0][:, :, :d]
    signs = torch.where(r_t.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0).to(vectors.dtype)
    return rows * signs[:, :, None], scale_rows(r_t * signs[:, None, :], exponents)


def identity(count: int, size: int, like: Tensor) -> Tensor:
    """``count`` identity matrices."""
    return torch.eye(size, dtype=like.dtype, device=like.device).expand(count, size, size).contiguous()


def scale_rows(x: Tensor, exponents: Tensor) -> Tensor:
    """``diag(2^exponents) x`` for (n, r, d) and (n, r); in two halves, since 2^e alone may leave the range of the dtype."""
    half = exponents.div(2, rounding_mode="floor")
    return torch.ldexp(torch.ldexp(x, half[..., None]), (exponents - half)[..., None])


def normalize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of finite (n, r, d) scaled by powers of two to a largest entry in [1/2, 1), and the exponents taken out (n, r)."""
    exponents = torch.frexp(x.abs().amax(dim=2)).exponent
    return scale_rows(x, -exponents), exponents
