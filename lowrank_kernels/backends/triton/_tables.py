"""Device tables: addresses, sizes and strides of a ragged list, so that one launch serves all of its tensors.

A table is one int64 buffer on the device with two parts: a row for each tensor, and a row ``(tensor, chunk)`` for each
program. It is cached under what it was made of (addresses, shapes, strides, dtypes, stream) and made anew when any of
that changes. Uploads come from pinned memory and are asynchronous.

CUDA graphs: a table that is used during a capture is kept for ever, because replays read it. Those of eager calls serve
captures on other streams too, once their upload is known to be done. One that has to be made during a capture (of gradients
that the graph itself allocates) is copied by the graph, from pinned memory reserved by eager calls, and serves no other.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..lists import sent

#: Tables kept for later calls; a training run has a handful, an evaluation of many models more.
CAPACITY = 128


class Table(NamedTuple):
    """``tensors`` (N, columns) and ``chunks`` (programs, 2) on the device, and what the host knows about them."""

    tensors: Tensor
    chunks: Tensor
    programs: int
    facts: tuple[int, ...]


class Layout(NamedTuple):
    """What a table is made of, on the host: ``rows`` (N, columns), the chunks of each tensor, and facts for the launch."""

    rows: Sequence[Sequence[int]]
    chunks: Sequence[int]
    facts: tuple[int, ...] = ()


@dataclass(slots=True)
class _Kept:
    """A table of eager calls; ``upload`` is None once it is known to be done."""

    table: Table
    words: int
    upload: torch.cuda.Event | None


class _Pinned:
    """Memory for what captures copy to the device: always as much as all tables of eager calls take together, and 128 KiB for numbers."""

    def __init__(self) -> None:
        self.wanted = 1 << 14
        self._free = torch.empty(0, dtype=torch.int64, device="cpu")
        self._in_use: list[Tensor] = []

    def reserve(self) -> None:
        """Not during a capture, which allocates no pinned memory."""
        if len(self._free) < self.wanted:
            self._free = _pinned_words(2 * self.wanted)

    def take(self, words: int) -> Tensor:
        if len(self._free) < words:
            raise RuntimeError(
                f"lowrank_kernels: a CUDA graph capture needs a table of {words} words, and {len(self._free)} words of pinned memory are "
                "reserved; run the step eagerly, with all its tensors, once before each capture"
            )
        taken, self._free = self._free[:words], self._free[words:]
        self._in_use.append(taken)
        return taken


_cache: OrderedDict[tuple[Hashable, int], _Kept] = OrderedDict()
#: Of those, under their keys without the stream, what every stream may read.
_uploaded: dict[Hashable, _Kept] = {}
#: Backward passes run in threads of autograd's, one for each GPU, and may ask for tables there (OPLoRA's overlap).
_lock = threading.RLock()
_captured: list[Table] = []
_pinned = _Pinned()


def addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The address of each tensor, for a table's key."""
    return tuple(map(torch.Tensor.data_ptr, tensors))


def signature(tensors: Sequence[Tensor]) -> tuple[Hashable, ...]:
    """Addresses, shapes, strides and the common dtype of a list, for a table's key."""
    if not tensors:
        return ()
    return tensors[0].dtype, addresses(tensors), tuple(map(torch.Tensor.size, tensors)), tuple(map(torch.Tensor.stride, tensors))


def first_chunks(chunks: Sequence[int]) -> list[int]:
    """The number of the first chunk of each tensor."""
    return [0, *np.cumsum(np.asarray(chunks, dtype=np.int64)[:-1]).tolist()]


def _assemble(layout: Layout) -> tuple[NDArray[np.int64], int]:
    rows = np.asarray(layout.rows, dtype=np.int64).ravel()
    if len(rows) % 2:  # Triton compiles a kernel for pointers that 16 bytes divide, and another for others
        rows = np.append(rows, 0)
    counts = np.asarray(layout.chunks, dtype=np.int64)
    programs = int(counts.sum())
    tensor = np.repeat(np.arange(len(counts)), counts)
    chunk = np.arange(programs) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.concatenate([rows, np.stack([tensor, chunk], axis=1).ravel()]), programs


def _pinned_words(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=True)  # whatever torch.set_default_device says


def _send(staged: Tensor, device: torch.device) -> Tensor:
    return staged.to(device, non_blocking=True)


def _made(layout: Layout, device: torch.device, capturing: bool) -> Table:
    words, programs = _assemble(layout)
    data = torch.from_numpy(words)
    if device.type == "cuda":
        data = _send((_pinned.take(len(words)) if capturing else _pinned_words(len(words))).copy_(data), device)
    split = len(words) - 2 * programs
    return Table(data[:split], data[split:], programs, layout.facts)


def _keep(key: tuple[Hashable, int], found: Table, device: torch.device) -> None:
    upload, words = None, 0
    if device.type == "cuda":
        upload, words = torch.cuda.Event(), found.tensors.numel() + found.chunks.numel()
        upload.record(torch.cuda.current_stream(device))
    _cache[key] = _Kept(found, words, upload)
    _pinned.wanted += words
    if len(_cache) > CAPACITY:
        (gone, _), old = _cache.popitem(last=False)
        _pinned.wanted -= old.words
        if _uploaded.get(gone) is old:
            del _uploaded[gone]


def upload_numbers(values: Sequence[float], device: torch.device) -> Tensor:
    """Numbers of the host in fp64 on the device, without waiting for it. A graph's replays find what they are now."""
    data = torch.tensor(values, dtype=torch.float64, device="cpu")
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        with _lock:
            return _send(_pinned.take(len(data)).view(torch.float64).copy_(data), device)
    return sent(data, device)


def table(operation: str, device: torch.device, key: Hashable, make: Callable[[], Layout]) -> Table:
    """The table of ``operation`` for ``key``, from the cache or by ``make()``."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    place = (operation, device, key)
    with _lock:
        kept = _cache.get((place, stream))
        if capturing:
            kept = kept or _uploaded.get(place)
            found = kept.table if kept else _made(make(), device, capturing)
            if not any(found is held for held in _captured):
                _captured.append(found)
            return found
        if kept is None:
            found = _made(make(), device, capturing)
            _keep((place, stream), found, device)
        else:
            found = kept.table
            _cache.move_to_end((place, stream))
            if kept.upload is not None and kept.upload.query():
                kept.upload = None
                _uploaded[place] = kept
        if device.type == "cuda":
            _pinned.reserve()
        return found
