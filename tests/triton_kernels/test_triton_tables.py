"""The tables of addresses that Triton's kernels read: which calls share one, in threads and in captures."""

from __future__ import annotations

import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from lowrank_kernels.backends.moments import Maps, Numbers, Stepped
from lowrank_kernels.backends.triton import _tables, adamw

pytestmark = pytest.mark.usefixtures("nan_scratch")


def test_tables_follow_new_addresses_and_strides(device: torch.device) -> None:
    storage = torch.randn(64, device=device)
    others = (Maps(), [], None, Numbers(0.5, 0.9, 0.9, 1e-8, 0.0, 1, [], False, False))
    for view in (storage.view(8, 8), storage.view(8, 8).mT, storage.view(16, 4), storage[1:33].view(8, 4)):
        before, grad = view.clone(), torch.randn(view.shape, device=device)
        for _ in range(2):
            adamw.grouped_adamw_(Stepped([view], [grad], [], []), *others)
        torch.testing.assert_close(view, before - grad)
    for _ in range(_tables.CAPACITY + 10):
        adamw.grouped_adamw_(Stepped([torch.zeros(4, device=device)], [torch.ones(4, device=device)], [], []), *others)
    assert len(_tables._cache) <= _tables.CAPACITY


def test_tables_are_made_in_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As autograd's threads do, one for each GPU: what one finds another may just be putting out of the cache."""
    monkeypatch.setattr(_tables, "CAPACITY", 1)

    class Slow(OrderedDict):  # type: ignore[type-arg]
        def get(self, key: object, default: object = None) -> Any:
            found = super().get(key, default)
            time.sleep(1e-4)  # the others' turn
            return found

    monkeypatch.setattr(_tables, "_cache", Slow())

    def use(thread: int) -> None:
        for turn in range(40):
            number = (turn // 2 + thread) % 2
            work = _tables.table("test", torch.device("cpu"), number, lambda number=number: _tables.Layout([[number] * 4], [2]))
            assert work.tensors.tolist() == [number] * 4 and work.programs == 2

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))


def test_chunks_lie_where_16_bytes_divide_after_an_odd_number_of_rows() -> None:
    """Triton compiles a kernel for pointers that 16 bytes divide, and another for others."""
    work = _tables.table("test", torch.device("cpu"), "odd", lambda: _tables.Layout([[7] * 3], [2]))
    assert work.tensors.tolist()[:3] == [7] * 3 and work.chunks.tolist() == [0, 0, 0, 1]
    assert (work.chunks.data_ptr() - work.tensors.data_ptr()) % 16 == 0


class FakeCuda:
    """What tables ask of torch.cuda. Uploads are done when ``done`` says so; memory that is pinned during a capture is an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing, self.cuda_stream, self.done, self.pinned = False, 1, False, 0
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "Event", lambda: self)
        monkeypatch.setattr(_tables, "_pinned_words", self.pin)
        monkeypatch.setattr(_tables, "_send", lambda staged, device: staged.clone())
        for name, fresh in (("_cache", OrderedDict()), ("_uploaded", {}), ("_captured", []), ("_pinned", _tables._Pinned())):
            monkeypatch.setattr(_tables, name, fresh)

    def record(self, stream: object) -> None:
        assert stream is self and not self.capturing

    def query(self) -> bool:
        assert not self.capturing
        return self.done

    def pin(self, count: int) -> Tensor:
        assert not self.capturing
        self.pinned += count
        return torch.empty(count, dtype=torch.int64)

    def table(self, key: int, rows: int = 3) -> _tables.Table:
        return _tables.table("test", torch.device("cuda"), key, lambda: _tables.Layout([[key] * rows], [2]))


def test_captures_read_tables_of_eager_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    eager = cuda.table(1)
    cuda.done = True
    assert cuda.table(1) is eager  # and finds that its upload is done
    late = cuda.table(2)
    cuda.capturing, cuda.cuda_stream = True, 2
    assert cuda.table(1) is eager
    own = cuda.table(2)
    assert own is not late and own.tensors.tolist() == [2, 2, 2, 0], "on another stream its upload may still be under way"
    assert [held is table for held, table in zip(_tables._captured, (eager, own), strict=True)] == [True, True]
    cuda.capturing = False
    again = cuda.table(2)
    assert again is not late and again is not own, "what a graph copies is there after a replay only"


def test_captures_find_as_much_pinned_memory_as_eager_calls_took(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    cuda.table(1, rows=1 << 20)
    cuda.capturing = True
    new = cuda.table(2, rows=1 << 20)  # of gradients that the graph allocates
    numbers = _tables.upload_numbers([0.5, -1.0], torch.device("cuda"))
    assert new.tensors[-1] == 2 and numbers.tolist() == [0.5, -1.0]
    with pytest.raises(RuntimeError, match="run the step eagerly, with all its tensors, once before each capture"):
        cuda.table(3, rows=1 << 22)
    cuda.capturing = False
    before = cuda.pinned
    cuda.table(1, rows=1 << 20)
    assert cuda.pinned == before, "half of what was reserved is left, which is enough for another capture"
