"""``dropout_mask``: which entries of an activation a seed keeps; the specification of dropout by seed in ``lora_linear``.

The bits are those of Philox4x32 with 7 rounds, the fewest that pass BigCrush (Salmon, Moraes, Dror and Shaw, "Parallel random
numbers: as easy as 1, 2, 3", SC 2011). The key is the seed, the counter ``(column // 8, token, 0, 0)``; of the 128 bits the
i-th 16 decide about column ``8·(column // 8) + i``, kept where they are below ``65536·keep``. Whether an entry is kept thus depends
on the seed, its token and its column, and on nothing else: not on the number of tokens, and not on how a kernel cuts the
activation into tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dropout import RESOLUTION
from ..registry import implements
from ._common import always

ROUNDS = 7
#: Columns that one counter serves.
GROUP = 8
_LOW = 0xFFFFFFFF
Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _multiply(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of ``factor · x``, by halves of the factor: nothing reaches bit 63 of an int64."""
    low = x * (factor & 0xFFFF)
    high = x * (factor >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def philox4x32(seed: Tensor, counter: Words, rounds: int = ROUNDS) -> Words:
    """Philox4x32 of 32-bit words in int64 tensors that broadcast; ``seed`` (1,) int64, whose lower half is the first word of the key."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(rounds):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def threshold(keep: float) -> int:
    """What 16 random bits are compared with."""
    return round(keep * RESOLUTION)


@implements("dropout_mask", "reference", always)
def dropout_mask(seed: Tensor, tokens: int, columns: int, keep: float) -> Tensor:
    """The mask (tokens, columns), True = kept with probability ``keep`` (a multiple of 2⁻¹⁶), of a ``seed`` (1,) int64, on its device."""
    token = torch.arange(tokens, device=seed.device)[:, None]
    group = torch.arange(-(-columns // GROUP), device=seed.device)[None, :]
    nothing = torch.zeros_like(token)
    words = torch.stack(torch.broadcast_tensors(*philox4x32(seed, (group, token & _LOW, nothing, nothing))), dim=-1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1)
    return (halves < threshold(keep)).flatten(1)[:, :columns].contiguous()
