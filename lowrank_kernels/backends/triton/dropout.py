"""Dropout inside the kernels, by seed, and ``dropout_mask``, which writes what they would keep; the reference specifies the bits.

A mask in memory costs a byte an entry, written once, read by three kernels and kept until the backward pass. Philox costs arithmetic instead:
with a counter for each entry and 10 rounds the code of ``project_kernel`` grows from 232 to 1,104 instructions on sm_90; with one
counter for 8 entries and 7 rounds to 456, as many as it has when it reads a mask. Not yet timed on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.dropout import ROUNDS, threshold
from ..registry import Verdict, implements
from ._launch import device_verdict, launch, on_device

_ROUNDS = tl.constexpr(ROUNDS)
#: What a kernel's ``DROP`` means.
NOTHING, BY_MASK, BY_SEED = 0, 1, 2


@triton.jit
def kept_by_seed(seed, t, first, limit, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which entries of the tile of tokens ``t`` and BLOCK_D columns from ``first`` (a multiple of 8) are kept: 16 bits below ``limit``."""
    group = first // 8 + tl.arange(0, BLOCK_D // 8)
    zero = tl.zeros([BLOCK_T, BLOCK_D // 8], tl.int32)
    r0, r1, r2, r3 = tl.philox(seed, zero + group[None, :], zero + t[:, None], zero, zero, _ROUNDS)
    even = tl.interleave(tl.interleave(r0 & 0xFFFF, r2 & 0xFFFF), tl.interleave(r1 & 0xFFFF, r3 & 0xFFFF))
    odd = tl.interleave(tl.interleave(r0 >> 16, r2 >> 16), tl.interleave(r1 >> 16, r3 >> 16))
    return tl.interleave(even, odd).to(tl.int32) < limit


@triton.jit
def dropped(tile, source, t, first, inside, length, limit, DROP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """``tile`` with zeros for what is dropped. ``source``: a contiguous mask (tokens, length) (DROP 1), or the seed (DROP 2)."""
    if DROP == 1:
        columns = first + tl.arange(0, BLOCK_D)
        kept = tl.load(source + t.to(tl.int64)[:, None] * length + columns[None, :], mask=inside, other=0) != 0
        tile = tl.where(kept, tile, 0.0)
    if DROP == 2:
        tile = tl.where(kept_by_seed(tl.load(source), t, first, limit, BLOCK_T, BLOCK_D), tile, 0.0)
    return tile


@triton.jit(do_not_specialize=["tokens", "limit"])
def mask_kernel(seed, out, tokens, length, limit, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """The mask itself, one tile per program."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.program_id(1) * BLOCK_D
    d = first + tl.arange(0, BLOCK_D)
    kept = kept_by_seed(tl.load(seed), t, first, limit, BLOCK_T, BLOCK_D)
    tl.store(out + t.to(tl.int64)[:, None] * length + d[None, :], kept.to(tl.int8), mask=(t[:, None] < tokens) & (d[None, :] < length))


class Drop(NamedTuple):
    """What the kernels of a call drop from the adapter's input, or from ∂x."""

    source: Tensor
    how: int
    limit: int


def what_drops(mask: Tensor | None, seed: Tensor | None, keep: float) -> Drop | None:
    """A mask, a seed, or neither."""
    if mask is not None:
        return Drop(mask, BY_MASK, 0)
    return None if seed is None else Drop(seed, BY_SEED, threshold(keep))


def verify(seed: Tensor, tokens: int, columns: int, keep: float) -> Verdict:
    """Refuses other devices than a GPU."""
    return device_verdict([seed])


@implements("dropout_mask", "triton", verify)
def dropout_mask(seed: Tensor, tokens: int, columns: int, keep: float) -> Tensor:
    """One launch."""
    out = torch.empty(tokens, columns, dtype=torch.int8, device=seed.device)
    if out.numel():
        with on_device(seed):
            launch(mask_kernel, (triton.cdiv(tokens, 32), triton.cdiv(columns, 128)), seed, out, tokens, columns, threshold(keep),
                   BLOCK_T=32, BLOCK_D=128, num_warps=4)  # fmt: skip
    return out.view(torch.bool)
