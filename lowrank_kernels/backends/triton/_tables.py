"""Device tables: addresses, sizes and strides of a ragged list, so that one launch serves all of its tensors.

A table is one int64 buffer on the device with two parts: a row for each tensor, and a row ``(tensor, chunk)`` for each
program. It is cached under what it was made of (addresses, shapes, strides, dtypes, stream) and made anew when any of
that changes. Uploads come from pinned memory and are asynchronous.

CUDA graphs: a table that is used during a capture is kept for ever, because replays read it. One that has to be made
during a capture is copied by the graph itself, from a pinned area reserved before, and never serves eager calls.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Tables kept for later calls; a training run has a handful, an evaluation of many models more.
CAPACITY = 128
#: Words of pinned memory for tables made during captures: 4 MiB, some 10,000 factors.
_CAPTURE_WORDS = 1 << 19


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


_cache: OrderedDict[Hashable, Table] = OrderedDict()
#: Backward passes run in threads of autograd's, one for each GPU, and may ask for tables there (OPLoRA's overlap).
_lock = threading.RLock()
_captured: list[Table] = []
_capture_area: Tensor | None = None
_capture_used = 0


def addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The address of each tensor, for a table's key."""
    return tuple(map(torch.Tensor.data_ptr, tensors))


def signature(tensors: Sequence[Tensor]) -> tuple[Hashable, ...]:
    """Addresses, shapes, strides and the (common) dtype of a list, for a table's key."""
    if not tensors:
        return ()
    return tensors[0].dtype, addresses(tensors), tuple(map(torch.Tensor.size, tensors)), tuple(map(torch.Tensor.stride, tensors))


def first_chunks(chunks: Sequence[int]) -> list[int]:
    """The number of the first chunk of each tensor."""
    return [0, *np.cumsum(np.asarray(chunks, dtype=np.int64)[:-1]).tolist()]


def _assemble(layout: Layout) -> tuple[NDArray[np.int64], int]:
    rows = np.asarray(layout.rows, dtype=np.int64)
    counts = np.asarray(layout.chunks, dtype=np.int64)
    programs = int(counts.sum())
    tensor = np.repeat(np.arange(len(counts)), counts)
    chunk = np.arange(programs) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.concatenate([rows.ravel(), np.stack([tensor, chunk], axis=1).ravel()]), programs


def _upload(words: NDArray[np.int64], device: torch.device, capturing: bool) -> Tensor:
    global _capture_area, _capture_used
    host = torch.from_numpy(words)
    if device.type != "cuda":
        return host
    if not capturing:
        if _capture_area is None:
            _capture_area = torch.empty(_CAPTURE_WORDS, dtype=torch.int64, pin_memory=True)
        return host.pin_memory().to(device, non_blocking=True)
    if _capture_area is None or _capture_used + len(words) > len(_capture_area):
        raise RuntimeError(
            "lowrank_kernels: no pinned memory left for the tables of this CUDA graph capture; run the step once before "
            "the first capture, and capture fewer graphs over new tensors"
        )
    staged = _capture_area[_capture_used : _capture_used + len(words)]
    _capture_used += len(words)
    staged.copy_(host)
    return staged.to(device, non_blocking=True)


def table(operation: str, device: torch.device, key: Hashable, make: Callable[[], Layout]) -> Table:
    """The table of ``operation`` for ``key``, from the cache or by ``make()``."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    full_key = (operation, device, stream, key)
    with _lock:
        found = _cache.get(full_key)
        if found is None:
            layout = make()
            words, programs = _assemble(layout)
            data = _upload(words, device, capturing)
            split = len(words) - 2 * programs
            found = Table(data[:split], data[split:], programs, layout.facts)
            if capturing:
                _captured.append(found)
                return found
            _cache[full_key] = found
            if len(_cache) > CAPACITY:
                _cache.popitem(last=False)
        else:
            _cache.move_to_end(full_key)
        if capturing and not any(found is kept for kept in _captured):
            _captured.append(found)
        return found
