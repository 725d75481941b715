"""``grouped_preconditioner``: ``w (G + δI)⁻¹`` and ``I - (G + δI)⁻¹ K`` of a whole stack in one launch, in fp64.

One program per matrix: Cholesky in tiles, then by substitution, a block of rows at a time in registers, from the rows of
the identity the inverse and from those of Kᵀ the other. Floor: read G and K, write both results, once; at these
sizes the chain of pivots takes the time, and the matrices side by side hide it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import Verdict, implements
from . import _thin as thin
from ._device import rounded, scalar
from ._launch import device_verdict, launch, on_device, padded_rank
from ._tables import Table
from .gram import SUM_BLOCK, sum_of_chunks
from .solve import cholesky, substitute, substitute_back

_LARGEST_RANK = 128


@triton.jit(do_not_specialize=["rank", "damping", "weight"])
def preconditioner_kernel(grams, drifts, factors, inverses, maps, realigned, tensors, partials, rank, damping: tl.float64, weight: tl.float64,
                          HAS_DRIFTS: tl.constexpr, TRANSPOSED: tl.constexpr, IN_TURN: tl.constexpr,
                          R: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, SUM_BLOCK: tl.constexpr):  # fmt: skip
    """``factors`` (N, R, R) and ``inverses`` (N, R) are scratch.

    IN_TURN, of AltLoRA: G is still in chunks of rows, to be added up to ``grams``, and K is set to zero when it has been read.
    """
    OUT: tl.constexpr = maps.dtype.element_ty
    index = tl.program_id(0).to(tl.int64)
    first_entry = index * rank * rank
    factor = factors + index * (R * R)
    inverses += index * R
    if IN_TURN:
        for first in range(0, rank * rank, SUM_BLOCK):
            entry = first + tl.arange(0, SUM_BLOCK)
            total = sum_of_chunks(tensors + index * thin.COLUMNS, partials, entry, rank * rank, rank, rank * rank, True, SUM_BLOCK)
            tl.store(grams + first_entry + entry, total, mask=entry < rank * rank)
        tl.debug_barrier()
    cholesky(grams + first_entry, factor, inverses, rank, damping, R, TILE)
    tl.debug_barrier()
    weight = scalar(weight, tl.float64)
    k = tl.arange(0, R)
    for first in range(0, R, BLOCK):
        i = first + tl.arange(0, BLOCK)
        rows = tl.where(i[:, None] == k[None, :], 1.0, 0.0).to(tl.float64)
        rows = substitute(rows, factor, inverses, rank, R, R)
        rows = substitute_back(rows, factor, inverses, rank, R, R)
        inside = (i[:, None] < rank) & (k[None, :] < rank)
        tl.store(maps + first_entry + i[:, None] * rank + k[None, :], rounded(weight * rows, OUT), mask=inside)
        if HAS_DRIFTS:
            # As rows: of the transposed drift, and what comes of them.
            at = k[None, :] * rank + i[:, None]
            columns = tl.load(drifts + first_entry + at, mask=inside, other=0.0).to(tl.float64)
            columns = substitute(columns, factor, inverses, rank, R, R)
            columns = substitute_back(columns, factor, inverses, rank, R, R)
            difference = rounded(tl.where(i[:, None] == k[None, :], 1.0, 0.0) - columns, OUT)
            if TRANSPOSED:
                at = i[:, None] * rank + k[None, :]
            tl.store(realigned + first_entry + at, difference, mask=inside)
    if IN_TURN:
        tl.debug_barrier()
        for first in range(0, rank * rank, SUM_BLOCK):
            entry = first + tl.arange(0, SUM_BLOCK)
            tl.store(drifts + first_entry + entry, tl.zeros([SUM_BLOCK], drifts.dtype.element_ty), mask=entry < rank * rank)


def verify(
    grams: Tensor, drifts: Tensor | None, damping: float, weight: float, transposed: bool, maps: Tensor, realigned: Tensor
) -> Verdict:
    """Refuses ranks above 128 and other devices than a GPU."""
    if grams.shape[1] > _LARGEST_RANK:
        return False, f"{grams.shape[1]} × {grams.shape[1]} Grams: the kernel holds rows of at most {_LARGEST_RANK} in registers"
    return device_verdict([grams])


@implements("grouped_preconditioner", "triton", verify)
def grouped_preconditioner(
    grams: Tensor, drifts: Tensor | None, damping: float, weight: float, transposed: bool, maps: Tensor, realigned: Tensor
) -> None:
    """See the reference; one launch, nothing read on the host."""
    precondition(grams.contiguous(), drifts if drifts is None else drifts.contiguous(), damping, weight, transposed, maps, realigned)


def precondition(
    grams: Tensor,
    drifts: Tensor | None,
    damping: float,
    weight: float,
    transposed: bool,
    maps: Tensor,
    realigned: Tensor,
    chunks: tuple[Table, Tensor] | None = None,
) -> None:
    """:func:`grouped_preconditioner` of contiguous stacks. With ``chunks`` of :func:`~.gram.gram_chunks` of symmetric products, G is their
    sum, ``grams`` is written, and so is ``drifts``: with zeros.
    """
    count, rank, _ = grams.shape
    padded = padded_rank(rank)
    factors = torch.empty(count, padded, padded, dtype=grams.dtype, device=grams.device)
    inverses = torch.empty(count, padded, dtype=grams.dtype, device=grams.device)
    # As few blocks of rows as fit the registers, and the shared memory of any GPU.
    block = 32 if padded == 64 or (padded == 128 and maps.dtype == torch.float32) else 16
    with on_device(grams):
        launch(preconditioner_kernel, (count,), grams, grams if drifts is None else drifts, factors, inverses, maps,
               maps if drifts is None else realigned, *((grams, grams) if chunks is None else (chunks[0].tensors, chunks[1])), rank,
               float(damping), float(weight), HAS_DRIFTS=drifts is not None, TRANSPOSED=transposed, IN_TURN=chunks is not None, R=padded,
               TILE=min(padded, 32), BLOCK=block, SUM_BLOCK=SUM_BLOCK, num_warps=8 if padded > 32 else 4)  # fmt: skip
