"""One-sided Jacobi in kernels, one program per matrix: what the SVD of a core and the eigenvectors of a small matrix share.

The columns of a matrix are rotated in K/2 disjoint pairs at a time (round robin, K - 1 steps a sweep) until all are
orthogonal to the tolerance. They lie as rows in scratch memory of (K, K), where they stay in L1/L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: The largest matrices whose columns the kernels hold.
LARGEST_RANK = 64
MAX_SWEEPS = 40


def tolerance(padded: int, compute: torch.dtype) -> float:
    """The largest cosine of two columns at which a sweep is the last one; that sweep still squares it."""
    return 1e-15 * padded if compute == torch.float64 else 1e-10


@triton.jit
def orthogonalize(columns, vectors, k, noise, tolerance, max_sweeps, HAS_VECTORS: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr):
    """Rotates the first k columns until they are orthogonal, and ``vectors``, if there are any, along with them.

    Columns of a squared length of at most ``noise`` are left alone.
    """
    # Only the real columns take part (and a padding column, where their number is odd).
    h = tl.arange(0, K // 2)
    even = (k + 1) // 2 * 2
    taking_part = (h < even // 2)[:, None]
    worst = tl.full((), 1.0, tl.float64)
    sweep = 0
    while (sweep < max_sweeps) & (worst > tolerance):
        angles = tl.zeros([K // 2], tl.float64)
        for step in range(even - 1):
            # Round robin: the last column stays, the others move by one place each step.
            a = tl.where(h == 0, even - 1, (step + h) % (even - 1)) * K
            b = ((step - h + 2 * (even - 1)) % (even - 1)) * K
            alpha = tl.zeros([K // 2], tl.float64)
            beta = tl.zeros([K // 2], tl.float64)
            gamma = tl.zeros([K // 2], tl.float64)
            for first in range(0, K, STEP):
                j = first + tl.arange(0, STEP)
                p = tl.load(columns + a[:, None] + j[None, :], mask=taking_part, other=0.0)
                q = tl.load(columns + b[:, None] + j[None, :], mask=taking_part, other=0.0)
                alpha += tl.sum(p * p, axis=1)
                beta += tl.sum(q * q, axis=1)
                gamma += tl.sum(p * q, axis=1)
            significant = (alpha > noise) & (beta > noise)
            angle = tl.where(significant, tl.abs(gamma) / tl.sqrt(tl.where(significant, alpha * beta, 1.0)), 0.0)
            angles = tl.maximum(angles, angle)
            # Also at an angle below the tolerance: the last sweep is the one that brings the digits.
            turn = angle > 1e-17
            zeta = (beta - alpha) / tl.where(turn, 2.0 * gamma, 1.0)
            tangent = tl.where(zeta < 0, -1.0, 1.0) / (tl.abs(zeta) + tl.sqrt(1.0 + zeta * zeta))
            tangent = tl.where(turn, tangent, 0.0)
            cosine = 1.0 / tl.sqrt(1.0 + tangent * tangent)
            sine = (cosine * tangent)[:, None]
            cosine = cosine[:, None]
            tl.debug_barrier()
            for first in range(0, K, STEP):
                j = first + tl.arange(0, STEP)
                p = tl.load(columns + a[:, None] + j[None, :], mask=taking_part, other=0.0)
                q = tl.load(columns + b[:, None] + j[None, :], mask=taking_part, other=0.0)
                if HAS_VECTORS:
                    p_v = tl.load(vectors + a[:, None] + j[None, :], mask=taking_part, other=0.0)
                    q_v = tl.load(vectors + b[:, None] + j[None, :], mask=taking_part, other=0.0)
                # Replicas in other threads must have read before anything is overwritten.
                tl.debug_barrier()
                tl.store(columns + a[:, None] + j[None, :], cosine * p - sine * q, mask=taking_part)
                tl.store(columns + b[:, None] + j[None, :], sine * p + cosine * q, mask=taking_part)
                if HAS_VECTORS:
                    tl.store(vectors + a[:, None] + j[None, :], cosine * p_v - sine * q_v, mask=taking_part)
                    tl.store(vectors + b[:, None] + j[None, :], sine * p_v + cosine * q_v, mask=taking_part)
            tl.debug_barrier()
        worst = tl.max(angles, axis=0)
        sweep += 1


@triton.jit
def squared_lengths(columns, K: tl.constexpr, STEP: tl.constexpr):
    """Those of all columns (K)."""
    i = tl.arange(0, K)
    squares = tl.zeros([K], tl.float64)
    for first in range(0, K, STEP):
        j = first + tl.arange(0, STEP)
        part = tl.load(columns + i[:, None] * K + j[None, :])
        squares += tl.sum(part * part, axis=1)
    return squares


@triton.jit
def places(keys, K: tl.constexpr):
    """Each key's place in ascending order, equal ones by index."""
    i = tl.arange(0, K)
    other = tl.trans(tl.broadcast_to(keys[:, None], [K, K]))
    before = (other < keys[:, None]) | ((other == keys[:, None]) & (i[None, :] < i[:, None]))
    return tl.sum(before.to(tl.int32), axis=1)
