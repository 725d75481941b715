"""``grouped_svd_product``: thin QRs, one-sided Jacobi on all k×k cores, and the bases of the product.

Eight launches whatever the number of pairs: the six of ``qr`` for all factors at once, one program per pair for the
SVD of ``R_L R_Rᵀ`` in fp64, and ``U = Q_L·U_core``, ``V = Q_R·V_core`` for all factors at once.

C and V stay in L1/L2, nothing is spilled. Columns below ``K·eps64·‖C‖`` are rounding noise: they are replaced by an
orthonormal completion.

Floor: QR's bytes (read the factors twice, write Q), then read Q and write U, V. The cores are N·k² words. The time
of the cores is latency, about (k - 1)·8 dependent steps, all pairs side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import compute_dtype
from ..registry import Verdict, implements
from ._jacobi import LARGEST_RANK, MAX_SWEEPS, orthogonalize, places, squared_lengths, tolerance
from ._launch import TL_DTYPE, device_verdict, launch, on_device, square_warps
from ._thin import scaled, thin_table, tile_exponent, vector
from .qr import Sizes, apply_kernel, factorize, orthonormalize_column, rank_verdict


@triton.jit
def _load_core(pointer, k, K: tl.constexpr):
    """A k×k matrix in a K×K tile, and ``⌊log2⌋`` of its largest entry (1024: not finite)."""
    i = tl.arange(0, K)
    tile = tl.load(pointer + i[:, None] * k + i[None, :], mask=(i[:, None] < k) & (i[None, :] < k), other=0.0)
    return tile, tile_exponent(tile)


@triton.jit(do_not_specialize=["pairs", "k", "rank", "tolerance", "max_sweeps"])
def jacobi_kernel(rs, columns, weights, ss, pairs, k, rank, tolerance: tl.float64, max_sweeps, K: tl.constexpr, STEP: tl.constexpr):
    """One pair: singular values and both cores of ``R_L R_Rᵀ``, sorted; ``columns`` holds Cᵀ and Vᵀ (their rows rotate)."""
    pair = tl.program_id(0).to(tl.int64)
    left, left_exponent = _load_core(rs + pair * k * k, k, K)
    right, right_exponent = _load_core(rs + (pairs + pair) * k * k, k, K)
    i = tl.arange(0, K)
    left_core = weights + pair * (K * K)
    right_core = weights + (pairs + pair) * (K * K)
    square = i[:, None] * K + i[None, :]
    if (left_exponent == 1024) | (right_exponent == 1024):
        nan = tl.full([K, K], float("nan"), tl.float64)
        tl.store(left_core + square, nan)
        tl.store(right_core + square, nan)
        tl.store(ss + pair * rank + i, tl.full([K], float("nan"), tl.float32).to(ss.dtype.element_ty), mask=i < rank)
        return
    core = tl.dot(scaled(right, -right_exponent), tl.trans(scaled(left, -left_exponent)), input_precision="ieee", out_dtype=tl.float64)
    c = columns + pair * (2 * K * K)
    v = c + K * K
    tl.store(c + square, core)
    tl.store(v + square, tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(tl.float64))
    # Squared length below which a column is rounding noise: (K·eps)²‖C‖².
    noise = tl.sum(tl.sum(core * core, axis=1), axis=0) * (K * 2.220446049250313e-16) * (K * 2.220446049250313e-16)
    tl.debug_barrier()

    orthogonalize(c, v, k, noise, tolerance, max_sweeps, True, K, STEP)

    squares = squared_lengths(c, K, STEP)
    place = places(-squares, K)
    sigma = tl.sqrt(squares)
    value = scaled(sigma, left_exponent + right_exponent)
    tl.store(ss + pair * rank + place, value.to(ss.dtype.element_ty), mask=place < rank)
    inverse = tl.where(squares > noise, 1.0 / tl.where(squares > noise, sigma, 1.0), 0.0)
    for first in range(0, K, STEP):
        j = first + tl.arange(0, STEP)
        target = j[None, :] * K + place[:, None]
        tl.store(left_core + target, tl.load(c + i[:, None] * K + j[None, :]) * inverse[:, None])
        tl.store(right_core + target, tl.load(v + i[:, None] * K + j[None, :]))
    tl.debug_barrier()
    # Left vectors to full orthonormality; zero columns get completed.
    for column in range(rank):
        entries = tl.load(left_core + i * K + column)
        norm = tl.sqrt(tl.sum(entries * entries, axis=0))
        tl.debug_barrier()
        _, scale = orthonormalize_column(left_core, K, 1, k, column, norm, 0.01, K, K)
        entries = tl.load(left_core + i * K + column, mask=i < k, other=0.0) * scale
        tl.debug_barrier()
        tl.store(left_core + i * K + column, entries)
        tl.debug_barrier()


def decompose_cores(rs: Tensor, ss: Tensor, compute: torch.dtype) -> Tensor:
    """One launch: the SVDs of ``R_L R_Rᵀ``, R_L in the first half of ``rs`` (2N, k, k), R_R in the second, both fp64.

    Writes the leading ``ss.shape[1]`` singular values to ``ss`` (N, rank), contiguous; returns the left cores, then the right
    ones, (2N, K, K) with their singular vectors in columns, of which the first ``rank`` are orthonormal.
    """
    pairs, k, rank, sizes = len(ss), rs.shape[1], ss.shape[1], Sizes(rs.shape[1])
    columns = torch.empty(pairs, 2, sizes.R, sizes.R, dtype=torch.float64, device=rs.device)
    weights = torch.empty(2 * pairs, sizes.R, sizes.R, dtype=torch.float64, device=rs.device)
    with on_device(rs):
        launch(jacobi_kernel, (pairs,), rs, columns, weights, ss, pairs, k, rank,
               tolerance(sizes.R, compute), MAX_SWEEPS, K=sizes.R, STEP=16, num_warps=square_warps(sizes.R))  # fmt: skip
    return weights


def apply_cores(operation: str, qs: list[Tensor], weights: Tensor, out: list[Tensor]) -> None:
    """One launch: ``out_i``, the leading columns of ``Q_i W_i`` for W (N, K, K) in fp64, rounded once."""
    k, sizes = qs[0].shape[1], Sizes(qs[0].shape[1])
    work = thin_table(operation, qs, None, out, sizes.CHUNK)
    with on_device(qs[0]):
        launch(apply_kernel, (work.programs,), work.tensors, work.chunks, weights, weights, k, out[0].shape[1], sizes.R * sizes.R,
               X=TL_DTYPE[qs[0].dtype], Q=TL_DTYPE[out[0].dtype], QR=False, TWO_STAGES=False, R=sizes.R, TILE=sizes.TILE,
               CHUNK=sizes.CHUNK, BLOCK_D=sizes.BLOCK_D, VECTOR=vector(qs[0].dtype), **sizes.apply_options())  # fmt: skip


def verify(lefts: list[Tensor], rights: list[Tensor], us: list[Tensor], ss: Tensor, vs: list[Tensor]) -> Verdict:
    """Refuses cores above 64 × 64 and other devices than a GPU."""
    k = lefts[0].shape[1]
    if k > LARGEST_RANK:
        return False, f"factors with {k} columns: the Jacobi kernel holds at most {LARGEST_RANK}"
    ok, reason = rank_verdict(k, lefts[0].dtype)
    return device_verdict(lefts) if ok else (ok, reason)


@implements("grouped_svd_product", "triton", verify)
def grouped_svd_product(lefts: list[Tensor], rights: list[Tensor], us: list[Tensor], ss: Tensor, vs: list[Tensor]) -> None:
    """Write ``U_i``, ``s_i`` and ``V_i``; eight launches, nothing read on the host. See the module's text, and the reference."""
    first, k = lefts[0], lefts[0].shape[1]
    compute = compute_dtype(first.dtype)
    factors = [*lefts, *rights]
    bases = torch.empty(sum(x.shape[0] for x in factors), k, dtype=compute, device=first.device)
    qs = list(bases.split([x.shape[0] for x in factors]))
    rs = torch.empty(len(factors), k, k, dtype=torch.float64, device=first.device)
    factorize(factors, None, qs, rs)
    target = ss if ss.is_contiguous() else torch.empty_like(ss, memory_format=torch.contiguous_format)
    weights = decompose_cores(rs, target, compute)
    apply_cores("grouped_svd_product", qs, weights, [*us, *vs])
    if target is not ss:
        ss.copy_(target)
