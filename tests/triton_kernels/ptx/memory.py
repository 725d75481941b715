"""Bytes that threads share, and who touched each of them last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

#: Stamps of one epoch (the time between two barriers): one for each warp, and two that are no warp's.
STAMPS = 64
ASYNCHRONOUS, SEVERAL = 62, 63
_OTHER_PROGRAMS = np.iinfo(np.int64).max


class Violation(AssertionError):
    """What a GPU would not report, or report as an illegal access."""


class Access(NamedTuple):
    """Threads that touch memory at once, ``size`` bytes each at ``addresses``; their ``stamps`` are the epoch's first, ``now``, + warp.

    Stamps before ``began`` are of other programs of the launch, and 0 of nobody.
    """

    addresses: NDArray[np.int64]
    size: int
    stamps: NDArray[np.int64]
    now: int
    began: int

    def foreign(self, stamps: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of ``stamps`` are of other programs."""
        return ((stamps > 0) & (stamps < self.began)) | (stamps == _OTHER_PROGRAMS)

    def unordered(self, stamps: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of ``stamps``, by address and byte, no barrier and no warp's order separates from this access."""
        return self.foreign(stamps) | ((stamps >= self.now) & (stamps != self.stamps[:, None]))


class Memory:
    """Blocks of bytes at addresses of their own; an access must lie within one of them."""

    def __init__(self, blocks: Mapping[int, NDArray[np.uint8]]) -> None:
        starts = sorted(blocks)
        self._starts = np.array(starts, dtype=np.int64)
        self._sizes = np.array([len(blocks[start]) for start in starts], dtype=np.int64)
        self._offsets = np.cumsum(self._sizes) - self._sizes
        assert (self._starts[1:] >= (self._starts + self._sizes)[:-1]).all(), "blocks overlap"
        self.data = np.concatenate([blocks[start] for start in starts])
        self._written, self._read = (np.zeros(len(self.data), dtype=np.int64) for _ in range(2))

    def block(self, start: int) -> NDArray[np.uint8]:
        """What the block at ``start`` holds now."""
        index = np.searchsorted(self._starts, start)
        return self.data[self._offsets[index] : self._offsets[index] + self._sizes[index]]

    def _locate(self, access: Access) -> NDArray[np.int64]:
        """Places in ``data``, (addresses, size)."""
        addresses, size = access.addresses, access.size
        if (addresses % size).any():
            raise Violation(f"misaligned: {size} bytes at {addresses[addresses % size != 0][0]:#x}")
        block = np.maximum(np.searchsorted(self._starts, addresses, side="right") - 1, 0)
        inside = addresses - self._starts[block]
        outside = (inside < 0) | (inside + size > self._sizes[block])
        if outside.any():
            raise Violation(f"out of bounds: {size} bytes at {addresses[outside][0]:#x}")
        return (self._offsets[block] + inside)[:, None] + np.arange(size)

    def read(self, access: Access) -> NDArray[np.uint8]:
        """The bytes, (addresses, size)."""
        at = self._locate(access)
        if access.unordered(self._written[at]).any():
            raise Violation("race: reads what another warp or program wrote")
        before = self._read[at]
        stamps = np.where(access.unordered(before), access.now + SEVERAL, access.stamps[:, None])
        stamps[access.foreign(before)] = _OTHER_PROGRAMS
        self._read[at] = stamps
        self._read[at[self._read[at] != stamps]] = access.now + SEVERAL
        return self.data[at]

    def write(self, access: Access, values: NDArray[np.uint8]) -> None:
        """Set the bytes to ``values``, (addresses, size)."""
        at = self._locate(access)
        race = access.unordered(self._written[at]) | access.unordered(self._read[at])
        if (race & (self.data[at] != values)).any():
            raise Violation("race: writes what another warp or program reads or wrote")
        stamps = np.broadcast_to(access.stamps[:, None], at.shape)
        self.data[at], self._written[at] = values, stamps
        # Of one warp any may win: elements that several of its threads hold can differ in their last bit, where a product was fused into
        # the sum with another thread's.
        if ((self.data[at] != values) & (self._written[at] != stamps)).any():
            raise Violation("race: two warps write different values")
