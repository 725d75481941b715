"""The Triton backend against the reference in fp64: in the interpreter without a GPU, on the GPU with one."""

from __future__ import annotations

import contextlib
import math
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
from lowrank_kernels.backends import force, launch_count, reference, select
from lowrank_kernels.backends.moments import Maps, Numbers, Stepped
from lowrank_kernels.backends.triton import (
    _tables,
    adamw,
    dropout,
    gram,
    lora_linear,
    lora_shared,
    polar,
    preconditioner,
    qr,
    solve,
    svd_product,
)

WIDE = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float16: torch.float32}


@pytest.fixture(autouse=True)
def nan_scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN, so that a kernel that reads what it did not write is found out."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def poisoned(tensor: Tensor) -> Tensor:
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor.fill_(-77)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
    yield


def assert_accurate(out: Tensor, torch_out: Tensor, exact: Tensor, name: str) -> None:
    """``|out − ref64| ≤ 2·|torch in the same dtype − ref64| + 8·eps(dtype)·max|ref64|``."""
    if not exact.numel():
        return
    error, theirs = (out.double() - exact).abs().max(), (torch_out.double() - exact).abs().max()
    # In fp64 ``exact`` is rounded as much as ``out`` is, and torch's result is ``exact`` itself.
    bound = 2 * theirs + (32 if out.dtype == torch.float64 else 8) * torch.finfo(out.dtype).eps * exact.abs().max()
    assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"


def conditioned(rows: int, rank: int, condition: float) -> Tensor:
    q = torch.linalg.qr(torch.randn(rows, rank, dtype=torch.float64))[0]
    turn = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64))[0]
    return q * torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64) @ turn


# --- grouped_adamw_ -------------------------------------------------------------------------------------------------------


def adamw_inputs(dtype: torch.dtype, rank: int, maps: bool, device: torch.device) -> tuple[list[list[Tensor]], list[int]]:
    stacked = torch.randn(70, 2 * rank).to(device, dtype)
    params = [
        torch.randn(rank, 130).to(device, dtype),
        stacked[:, rank:],
        torch.randn(41, rank).to(device, dtype),
        torch.randn(9, rank).to(device, dtype).mT,
    ]
    if not maps:
        params += [
            torch.randn(5).to(device, dtype),
            torch.randn(2052).to(device, dtype),
            torch.randn(3, 4, 5).to(device, dtype),
            torch.empty(0, device=device, dtype=dtype),
        ]
    grads = [torch.randn(p.shape).to(device, dtype) for p in params]
    grads[0] = torch.randn(params[0].shape[::-1]).to(device, dtype).mT
    moments = [[torch.rand(p.shape).to(device, WIDE[dtype]) for p in params] for _ in range(2)]
    return [params, grads, *moments], [0, 1, 1, 0]


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("rank, maps", [(8, False), (1, True), (8, True), (33, True), (128, True)])
@pytest.mark.parametrize("on_device", [False, True])
def test_adamw(device: torch.device, dtype: torch.dtype, rank: int, maps: bool, on_device: bool) -> None:
    lists, dims = adamw_inputs(dtype, rank, maps, device)
    count = len(lists[0])
    p, c = (torch.randn(count, rank, rank).to(device, WIDE[dtype]) / rank if maps else None for _ in range(2))
    missed = [0, 2, *[0] * (count - 2)]

    def run(function, data, lr, step, double=False):
        pp, cc = (None if m is None else m.double() if double else m for m in (p, c))
        numbers = Numbers(lr, 0.9, 0.999, 1e-8, 0.1, step, missed, True, on_device)
        function(Stepped(*data), Maps(pp, cc), dims if maps else [], None, numbers)

    theirs, exact = ([[t.clone() for t in ts] for ts in lists], [[t.double().clone() for t in ts] for ts in lists])
    rate, step = (torch.tensor(1e-2, dtype=torch.float64, device=device), torch.tensor(4, device=device)) if on_device else (1e-2, 4)
    before = launch_count()
    run(adamw.grouped_adamw_, lists, rate, step)
    assert launch_count() == before + 1
    run(reference.adamw.grouped_adamw_, theirs, 1e-2, 4)
    run(reference.adamw.grouped_adamw_, exact, 1e-2, 4, double=True)
    for which, name in ((0, "param"), (2, "exp_avg"), (3, "exp_avg_sq")):
        for out, other, truth in zip(lists[which], theirs[which], exact[which], strict=True):
            assert_accurate(out, other, truth, name)


@pytest.mark.parametrize("moments", [(True, False), (False, True), (False, False)])
def test_adamw_without_some_moments(device: torch.device, moments: tuple[bool, bool]) -> None:
    (params, grads, ms, vs), _ = adamw_inputs(torch.float32, 4, False, device)
    ms, vs = ms if moments[0] else [], vs if moments[1] else []
    exact = [[t.double().clone() for t in ts] for ts in (params, grads, ms, vs)]
    numbers = Numbers(0.1, 0.0, 0.9, 1e-8, 0.0, 1, [], False, False)
    adamw.grouped_adamw_(Stepped(params, grads, ms, vs), Maps(), [], None, numbers)
    reference.adamw.grouped_adamw_(Stepped(*exact), Maps(), [], None, numbers)
    for out, truth in zip([*params, *ms, *vs], [*exact[0], *exact[2], *exact[3]], strict=True):
        assert_accurate(out, truth, truth, "result") if out.numel() else None


@pytest.mark.parametrize(
    "dtype, rank, given, drifting",
    [
        (torch.float32, 8, "PCTD", True),
        (torch.float32, 8, "T", True),
        (torch.bfloat16, 5, "D", True),
        (torch.float64, 20, "CD", True),
        (torch.float32, 4, "", True),
        (torch.float32, 40, "PCTD", True),
        (torch.float64, 70, "TD", True),
        (torch.bfloat16, 33, "PC", True),
        (torch.float16, 12, "PTD", False),
    ],
)
@pytest.mark.parametrize("dense", [False, True])
def test_adamw_with_all_maps_and_drifts(
    device: torch.device, dtype: torch.dtype, rank: int, given: str, drifting: bool, dense: bool
) -> None:
    lists, dims = adamw_inputs(dtype, rank, True, device)
    # More rows than one program takes, in either orientation.
    for i, shape in ((0, (rank, 530)), (2, (300, rank))):
        for which, tensors in enumerate(lists):
            values = torch.rand(shape) if which == 3 else torch.randn(shape)
            tensors[i] = values.to(device, tensors[i].dtype)
    if dense:  # contiguous, and so long that several elements are loaded at a time
        for tensors in lists:
            for i, x in enumerate(tensors):
                tensors[i] = (x[:, : x.shape[1] // 8 * 8] if dims[i] == 0 else x[: x.shape[0] // 8 * 8]).contiguous()
    layout = adamw._mapped_layout(*lists, dims, [], 64, 1)
    assert layout.facts == ((math.gcd(16 // dtype.itemsize, rank) if dense and dtype != torch.float64 else 1),)
    maps = Maps(*(torch.randn(4, rank, rank).to(device, WIDE[dtype]) / rank if name in given else None for name in "PCTD"))
    theirs, exact = ([[t.clone() for t in ts] for ts in lists], [[t.double().clone() for t in ts] for ts in lists])
    olds = [p.clone() for p in lists[0]]
    drifts = torch.full((4, rank, rank), math.nan, dtype=WIDE[dtype], device=device) if drifting else None
    numbers = Numbers(0.03, 0.9, 0.99, 1e-8, 0.1, 3, [0, 1, 0, 0], True, True)
    before = launch_count()
    adamw.grouped_adamw_(Stepped(*lists), maps, dims, drifts, numbers)
    assert launch_count() == before + (1 if not drifting else 2 if rank <= 32 else 3)
    reference.adamw.grouped_adamw_(Stepped(*theirs), maps, dims, None, numbers)
    reference.adamw.grouped_adamw_(Stepped(*exact), Maps(*(None if m is None else m.double() for m in maps)), dims, None, numbers)
    for which, name in ((0, "param"), (2, "exp_avg"), (3, "exp_avg_sq")):
        for out, other, truth in zip(lists[which], theirs[which], exact[which], strict=True):
            assert_accurate(out, other, truth, name)
    if drifts is None:
        return
    # Of the factors as they are stored, whatever rounding they went through.
    for i, (new, old, drift) in enumerate(zip(lists[0], olds, drifts, strict=True)):
        new, old = ((x.mT if dims[i] == 0 else x).double() for x in (new, old))
        error = (drift.double() - new.mT @ (new - old)).abs().max()
        assert error <= 16 * torch.finfo(drift.dtype).eps * new.norm() * (new - old).norm(), (i, error)


def test_hyperparameters_on_the_cpu_are_read_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor lr on the CPU beside parameters on a GPU: reading it costs nothing, and no reason to take the reference."""
    lr, step = torch.tensor(0.25), torch.tensor(3.0)
    launched: list[tuple[Any, ...]] = []
    monkeypatch.setattr(adamw, "signature", lambda tensors: ())
    monkeypatch.setattr(adamw, "addresses", lambda tensors: ())
    monkeypatch.setattr(adamw, "table", lambda *args: _tables.Table(params[0], params[0], 1, ()))
    monkeypatch.setattr(adamw, "on_device", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(adamw, "launch", lambda kernel, grid, *args, **options: launched.append((*args[4:14], options)))
    with FakeTensorMode():
        params = [torch.empty_strided((8,), (1,), device="cuda:0")]
    tensors, numbers = (Stepped(*[params] * 4), Maps(), [], None), Numbers(lr, 0.5, 0.75, 1e-8, 0.0, step, [], True, False)
    assert adamw.verify(*tensors, numbers)[0]
    adamw.grouped_adamw_(*tensors, numbers)
    ((rate, *_, corrected1, corrected2, options),) = launched
    assert (rate, corrected1, corrected2) == (0.25, 1 - 0.5**3, 1 - 0.75**3)
    assert not options["LR_ON_DEVICE"] and not options["STEP_ON_DEVICE"]
    with FakeTensorMode():
        elsewhere = torch.empty_strided((), (), device="cuda:1")
    ok, reason = adamw.verify(*tensors, numbers._replace(lr=elsewhere))
    assert not ok and "cuda:1" in reason


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
            work = _tables.table("test", torch.device("cpu"), number, lambda number=number: _tables.Layout([[number] * 3], [2]))
            assert work.tensors.tolist() == [number] * 3 and work.programs == 2

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))


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
    assert own is not late and own.tensors.tolist() == [2] * 3, "on another stream its upload may still be under way"
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


# --- grouped_qr -----------------------------------------------------------------------------------------------------------


def check_qr(xs: list[Tensor], previous: list[Tensor] | None, qs: list[Tensor], rs: Tensor) -> None:
    qr.grouped_qr(xs, previous, qs, rs)
    for i, (x, q, r) in enumerate(zip(xs, qs, rs, strict=True)):
        narrow = torch.finfo(x.dtype).eps > 1e-5
        limit = 1e-13 if x.dtype == torch.float64 else 4 * torch.finfo(x.dtype).eps if narrow else 1e-5
        q, r, x = q.double(), r.double(), x.double()
        eye = torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
        assert (q.mT @ q - eye).abs().max() <= limit, i
        allowed = (1e-13 if limit == 1e-13 else max(limit, 1e-5)) * x.norm() + x.shape[1] * torch.finfo(rs.dtype).tiny
        assert (q @ r - x).norm() <= allowed, i
        assert torch.equal(r, r.triu()), i
        if previous is None:
            assert (r.diagonal() >= 0).all(), i


@pytest.mark.parametrize("dtype, rank", [(torch.float32, r) for r in (1, 4, 8, 16, 33, 64, 128)]
                         + [(torch.float64, 4), (torch.float64, 33), (torch.bfloat16, 8), (torch.float16, 16)])  # fmt: skip
def test_qr_ragged(device: torch.device, dtype: torch.dtype, rank: int) -> None:
    heights = (rank, rank + 7, 530) if rank <= 16 else (rank, rank + 37)
    wide = [torch.randn(d, rank, dtype=torch.float64) for d in heights]
    xs = [x.to(device, dtype) for x in wide]
    xs[-1] = xs[-1].mT.contiguous().mT
    storage = torch.full((sum(heights), 2 * rank), math.nan, dtype=dtype, device=device)
    previous = [torch.randn(d, rank).to(device, dtype) for d in heights]
    qs = [part[:, rank:] for part in storage.split(heights)]
    before = launch_count()
    check_qr(xs, previous, qs, torch.full((len(xs), rank, rank), math.nan, dtype=WIDE[dtype], device=device))
    assert launch_count() == before + 6
    assert all(((q.double() * p.double()).sum(0) > 0).all() for q, p in zip(qs, previous, strict=True))
    assert storage[:, :rank].isnan().all()


@pytest.mark.parametrize("dtype, conditions", [(torch.float32, (1e2, 1e5, 1e6, 1e9)), (torch.float64, (1e2, 1e6, 1e9, 1e12))])
def test_qr_ill_conditioned(device: torch.device, dtype: torch.dtype, conditions: tuple[float, ...]) -> None:
    xs = [conditioned(90, 8, c).to(device, dtype) for c in conditions]
    check_qr(xs, None, [torch.empty_like(x) for x in xs], torch.empty(len(xs), 8, 8, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_qr_degenerate(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.randn(40, 6, dtype=dtype)
    zero_column, duplicate, square = x.clone(), x.clone(), torch.zeros(6, 6, dtype=dtype)
    zero_column[:, 2] = 0
    duplicate[:, 4] = duplicate[:, 1]
    square[0, 0] = 1
    graded = x * torch.tensor([1e18, 1e-18, 1.0, 1e-9, 1e9, 1.0], dtype=dtype)
    huge = x * (1e36 if dtype == torch.float32 else 1e300)
    xs = [zero_column, duplicate, torch.zeros_like(x), square, graded, x * 1e18, x * 1e-18, x * torch.finfo(dtype).tiny * 1e-3, huge]
    xs = [m.to(device) for m in xs]
    results = []
    for _ in range(2):
        qs = [torch.full_like(m, math.nan) for m in xs]
        rs = torch.full((len(xs), 6, 6), math.nan, dtype=dtype, device=device)
        check_qr(xs, None, qs, rs)
        results.append([*qs, rs])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "not deterministic"


def test_qr_reports_non_finite_per_matrix(device: torch.device) -> None:
    xs = [torch.randn(20, 3, device=device) for _ in range(4)]
    xs[1][7, 1] = math.nan
    xs[2][3, 0] = -math.inf
    previous = [torch.randn_like(x) for x in xs]
    qs, rs = [torch.empty_like(x) for x in xs], torch.empty(4, 3, 3, device=device)
    qr.grouped_qr(xs, previous, qs, rs)
    for i in (1, 2):
        assert qs[i].isnan().all() and rs[i].isnan().all()
    check_qr([xs[0], xs[3]], None, [torch.empty_like(xs[0]), torch.empty_like(xs[3])], torch.empty(2, 3, 3, device=device))
    assert qs[0].isfinite().all() and qs[3].isfinite().all() and rs[0].isfinite().all() and rs[3].isfinite().all()


@pytest.mark.parametrize("make", [lambda: torch.randn(50, 5), lambda: torch.zeros(50, 5), lambda: conditioned(50, 5, 1e6).float()])
def test_qr_may_overwrite_previous(device: torch.device, make) -> None:
    x, previous = make().to(device), torch.linalg.qr(torch.randn(50, 5))[0].to(device)
    apart, alias = [torch.empty_like(x)], [previous.clone()]
    rs = [torch.empty(1, 5, 5, device=device) for _ in range(2)]
    qr.grouped_qr([x], [previous], apart, rs[0])
    qr.grouped_qr([x], alias, alias, rs[1])
    assert torch.equal(apart[0], alias[0]) and torch.equal(*rs)
    assert ((apart[0] * previous).sum(0) >= 0).all()


# --- grouped_svd_product --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, k, rank", [(torch.float32, 1, 1), (torch.float32, 8, 4), (torch.float32, 16, 16), (torch.float64, 5, 3), (torch.bfloat16, 4, 2)]
)
def test_svd_product(device: torch.device, dtype: torch.dtype, k: int, rank: int) -> None:
    lefts = [
        torch.randn(70, k),
        torch.randn(k, k) * 1e-15,
        torch.zeros(30, k),
        torch.randn(40, max(1, k // 2)) @ torch.randn(max(1, k // 2), k),
    ]
    rights = [torch.randn(33, k), torch.randn(520, k) * 1e15, torch.randn(20, k), torch.randn(30, k)]
    lefts, rights = ([x.to(device, dtype) for x in xs] for xs in (lefts, rights))
    lefts[3][0, 0] = math.nan if rank == 4 else lefts[3][0, 0]
    us, vs = ([torch.full((x.shape[0], rank), math.nan, dtype=dtype, device=device) for x in xs] for xs in (lefts, rights))
    ss = torch.full((4, rank), math.nan, dtype=WIDE[dtype], device=device)
    before = launch_count()
    svd_product.grouped_svd_product(lefts, rights, us, ss, vs)
    assert launch_count() == before + 8
    limit = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
    for i, (left, right, u, s, v) in enumerate(zip(lefts, rights, us, ss, vs, strict=True)):
        if rank == 4 and i == 3:
            assert u.isnan().all() and s.isnan().all() and v.isnan().all()
            continue
        product, u, s, v = left.double() @ right.double().mT, u.double(), s.double(), v.double()
        exact = torch.linalg.svdvals(product)[:rank]
        eye = torch.eye(rank, dtype=torch.float64, device=device)
        assert (s - exact).abs().max() <= min(limit, 1e-5) * exact[0]
        assert (u.mT @ u - eye).abs().max() <= limit and (v.mT @ v - eye).abs().max() <= limit
        assert (product @ v - u * s).abs().max() <= 4 * limit * exact[0]


def test_svd_product_refuses_what_it_cannot_hold(device: torch.device) -> None:
    x = torch.randn(80, 65, device=device)
    ok, reason = svd_product.verify([x], [x], [x], torch.empty(1, 65), [x])
    assert not ok and "65" in reason


# --- grouped_gram ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, accumulator", [(torch.float32, torch.float64), (torch.float32, torch.float32),
                                                (torch.float64, torch.float64), (torch.bfloat16, torch.float32)])  # fmt: skip
@pytest.mark.parametrize("rank, columns", [(1, 1), (8, None), (5, 20), (33, None), (70, 3), (66, None)])
def test_gram(device: torch.device, dtype: torch.dtype, accumulator: torch.dtype, rank: int, columns: int | None) -> None:
    heights = (rank, 0, 3, 1100 if rank < 10 else 90)
    xs = [torch.randn(d, 2 * rank).to(device, dtype)[:, :rank] for d in heights]
    xs[0], xs[3] = xs[0].mT.contiguous().mT, xs[3].contiguous()
    ys = None if columns is None else [torch.randn(columns, d).to(device, dtype).mT for d in heights]
    out = torch.full((4, rank, columns or rank), math.nan, dtype=accumulator, device=device)
    before = launch_count()
    gram.grouped_gram(xs, ys, out)
    assert launch_count() == before + 2
    torch_out, exact = torch.empty_like(out), torch.empty_like(out, dtype=torch.float64)
    reference.gram.grouped_gram(xs, ys, torch_out)
    reference.gram.grouped_gram([x.double() for x in xs], None if ys is None else [y.double() for y in ys], exact)
    for i, (x, y) in enumerate(zip(xs, ys or xs, strict=True)):
        error, theirs = ((o[i].double() - exact[i]).abs().max() for o in (out, torch_out))
        # Entries cancel; what is rounded are sums of |x||y|. In fp64 ``exact`` is rounded as much as ``out`` is.
        rounding = (32 if accumulator == torch.float64 else 8) * torch.finfo(accumulator).eps
        assert error <= 2 * theirs + rounding * (x.double().abs().mT @ y.double().abs()).max(), i
    if ys is None:
        assert torch.equal(out, out.mT)


def test_gram_refuses_what_no_grid_holds(device: torch.device) -> None:
    x = torch.zeros(1, 4096, device=device)
    assert gram.verify([x[:, :4095]], None, x[:, :1, None].expand(1, 4095, 4095))[0]
    ok, reason = gram.verify([x], None, x[:, :1, None].expand(1, 4096, 4096))
    assert not ok and "4096 × 4096" in reason


# --- grouped_solve --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, rank, rhs_dtype, left",
    [(dtype, rank, narrow, left) for dtype in (torch.float32, torch.float64) for left in (True, False)
     for rank, narrow in ((1, None), (4, torch.bfloat16), (16, None))]
    + [(torch.float32, 33, None, False), (torch.float64, 100, None, True)],
)  # fmt: skip
def test_solve(device: torch.device, dtype: torch.dtype, rank: int, rhs_dtype: torch.dtype | None, left: bool) -> None:
    factors = torch.randn(4, 2 * rank, rank, dtype=torch.float64)
    grams = (factors.mT @ factors).to(device, dtype)
    # Only the lower triangles are read; the second matrix is not positive definite, the third is not finite.
    grams = grams.tril() + torch.full_like(grams, math.nan).triu(1)
    grams[1, -1, -1] = -1.0
    grams[2, rank // 2, 0] = math.inf
    narrow = rhs_dtype or dtype
    rhs = [torch.randn(rank, d).to(device, narrow) for d in (rank, 7, 20, 70)]
    rhs = rhs if left else [x.mT if i % 2 else x.mT.contiguous() for i, x in enumerate(rhs)]
    out = [torch.full_like(x, math.nan, memory_format=torch.contiguous_format) for x in rhs]
    before = launch_count()
    solve.grouped_solve(grams, rhs, 1e-3, left, out)
    assert launch_count() == before + 2
    exact = [torch.empty_like(x, dtype=torch.float64) for x in rhs]
    reference.solve.grouped_solve(grams.double(), [x.double() for x in rhs], 1e-3, left, exact)
    assert out[1].isnan().all() and out[2].isnan().all()
    for i in (0, 3):
        g = grams[i].double().tril()
        condition = torch.linalg.cond(g + g.tril(-1).mT + 1e-3 * torch.eye(rank, dtype=torch.float64, device=device))
        bound = (rank * condition * torch.finfo(dtype).eps + torch.finfo(narrow).eps) * exact[i].abs().max()
        assert (out[i].double() - exact[i]).abs().max() <= bound, i


def test_solve_of_ill_conditioned_systems_is_as_accurate_as_cholesky_allows(device: torch.device) -> None:
    """The solution of ``G X = G`` is I to κ·eps; a product with the inverse would be wrong by κ²·eps."""
    x = conditioned(60, 6, 1e6)
    gram_matrix = (x.mT @ x).to(device)[None]
    out = [torch.empty_like(gram_matrix[0])]
    solve.grouped_solve(gram_matrix, [gram_matrix[0]], 0.0, True, out)
    residual = gram_matrix[0] @ out[0] - gram_matrix[0]
    assert residual.abs().max() <= 1e-14 * gram_matrix.abs().max()
    assert (out[0] - torch.eye(6, dtype=torch.float64, device=device)).abs().max() <= 1e-2
    ok, reason = solve.verify(torch.empty(1, 129, 129, device=device), [], 0.0, True, [])
    assert not ok and "129" in reason


# --- grouped_preconditioner -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rank, dtype, with_drifts, transposed",
    [(1, torch.float64, True, False), (5, torch.float32, True, True), (16, torch.float32, False, False), (33, torch.float64, True, True)],
)
def test_preconditioner(device: torch.device, rank: int, dtype: torch.dtype, with_drifts: bool, transposed: bool) -> None:
    factors = torch.randn(4, 2 * rank, rank, dtype=torch.float64)
    grams = (factors.mT @ factors).to(device)
    grams = grams.tril() + torch.full_like(grams, math.nan).triu(1)
    grams[1, -1, -1] = -1.0
    grams[2, rank // 2, 0] = math.inf
    drifts = torch.randn(4, rank, rank, dtype=dtype, device=device) if with_drifts else None
    out, exact = ([torch.full(grams.shape, math.nan, dtype=dtype, device=device) for _ in range(2)] for _ in range(2))
    before = launch_count()
    preconditioner.grouped_preconditioner(grams, drifts, 1e-3, 0.25, transposed, *out)
    assert launch_count() == before + 1
    reference.preconditioner.grouped_preconditioner(grams, drifts, 1e-3, 0.25, transposed, *exact)
    for mine, theirs in zip(out[: 1 + with_drifts], exact, strict=False):
        assert mine[1:3].isnan().all()
        tolerance = 8 * torch.finfo(dtype).eps if dtype == torch.float32 else 1e-11
        assert (mine[::3] - theirs[::3]).abs().max() <= tolerance * (1 + theirs[::3].abs().max())
    ok, reason = preconditioner.verify(torch.empty(1, 129, 129, device=device), None, 0.0, 1.0, False, *out)
    assert not ok and "129" in reason


# --- grouped_polar --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, rank", [(torch.float32, 1), (torch.float32, 6), (torch.float64, 6), (torch.bfloat16, 4)])
def test_polar(device: torch.device, dtype: torch.dtype, rank: int) -> None:
    half = max(1, rank // 2)
    xs = [torch.randn(70, rank), torch.randn(rank, rank) * 1e-15, torch.zeros(30, rank), torch.randn(40, half) @ torch.randn(half, rank)]
    xs = [x.to(device, dtype) for x in [*xs, torch.randn(40, rank)]]
    xs[0], xs[4][3, 0] = xs[0].mT.contiguous().mT, math.nan
    out = [torch.full_like(x, math.nan) for x in xs]
    before = launch_count()
    polar.grouped_polar(xs, out)
    assert launch_count() == before + 9
    assert out[4].isnan().all()
    limit = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
    for i, (x, q) in enumerate(zip(xs[:4], out, strict=False)):
        x, q = x.double(), q.double()
        assert (q.mT @ q - torch.eye(rank, dtype=torch.float64, device=device)).abs().max() <= limit, i
        # X = QH with H = QᵀX symmetric positive semidefinite: that is what makes it the polar factor.
        h = q.mT @ x
        assert (q @ h - x).norm() <= 4 * limit * x.norm() and (h - h.mT).norm() <= 4 * limit * x.norm(), i
        assert torch.linalg.eigvalsh(h + h.mT).min() >= -4 * limit * x.norm(), i


@pytest.mark.parametrize("operation", ["grouped_svd"])
def test_what_has_no_kernel_says_why(device: torch.device, operation: str) -> None:
    from lowrank_kernels.backends.registry import implementations

    ok, reason = implementations(operation)["triton"].verify()
    assert not ok and "GEMM" in reason


# --- lora_linear ----------------------------------------------------------------------------------------------------------


def enough(size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Of a large size, what splits the sums too: without a GPU's table of tiles, those of wide dtypes have half the tokens and columns."""
    return size // 2 if size > 256 and WIDE[dtype] == dtype and device.type == "cpu" else size


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("rank, tokens", [(1, 70), (8, 530), (33, 40), (128, 40), (4, 0)])
@pytest.mark.parametrize("kind, drop", [("plain", "nothing"), ("plain", "mask"), ("decoupled", "seed"), ("core", "seed")])
def test_lora_linear(device: torch.device, dtype: torch.dtype, rank: int, tokens: int, kind: str, drop: str) -> None:
    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(device, dtype)

    d_in, d_out, tokens = 70, 50, enough(tokens, dtype, device)
    if tokens > 100 and drop == "seed":
        drop = "mask"  # random bits are slow in the interpreter; the test of tile shapes below draws them for many tokens
    for base in (True, False):
        x, grad, a, b = make(d_in, tokens).mT, make(tokens, d_out), make(rank, d_in), make(d_out, rank)
        weight, bias = (make(d_out, d_in), make(d_out)) if base else (None, None)
        q_a, q_b = (make(rank, d_in), make(d_out, rank)) if kind == "decoupled" else (None, None)
        wide_core = torch.randn(rank, rank, dtype=torch.float64, device=device).mT if kind == "core" else None
        core = None if wide_core is None else wide_core.to(torch.promote_types(dtype, torch.float32))
        keep = 1.0 if drop == "nothing" else 0.75
        mask = torch.rand(tokens, d_in, device=device) < keep if drop == "mask" else None
        # The reference gets the mask, the kernels the seed.
        seed, theirs_mask = None, mask
        if drop == "seed":
            seed = torch.randint(-(2**62), 2**62, (1,), device=device)
            theirs_mask = reference.dropout.dropout_mask(seed, tokens, d_in, keep)
        narrow = (x, weight, bias, a, b, q_a, q_b)
        exact = tuple(None if t is None else t.double() for t in narrow)
        tail, their_tail = (0.7, mask, keep), (0.7, theirs_mask, keep)
        cores = (core, core, None if core is None else core.double())
        outs = [
            lora_linear.lora_linear(*narrow, *tail, cores[0], seed),
            reference.lora_linear.lora_linear(*narrow, *their_tail, cores[1]),
            reference.lora_linear.lora_linear(*exact, *their_tail, cores[2]),
        ]
        for out, theirs, truth in zip(*outs, strict=True):
            assert_accurate(out, theirs, truth, "forward")
        has_core = core is not None
        for needs in (
            [True, base, base, True, True, has_core],
            [False, False, False, True, False, False],
            [True, False, False, False, False, has_core],
            [False] * 5 + [has_core],
        ):
            grads = []
            for f, (xx, w, _, aa, bb, qa, qb), g, hidden, rest, last in (
                (lora_linear.lora_linear_backward, narrow, grad, outs[1][1], tail, (cores[0], seed)),
                (reference.lora_linear.lora_linear_backward, narrow, grad, outs[1][1], their_tail, (cores[1],)),
                (reference.lora_linear.lora_linear_backward, exact, grad.double(), outs[2][1], their_tail, (cores[2],)),
            ):
                grads.append(f(g, xx, w, aa, bb, qa, qb, hidden, *rest, needs, *last))
            assert len(grads[0]) == sum(needs)
            for out, theirs, truth in zip(*grads, strict=True):
                assert out.shape == truth.shape
                assert_accurate(out, theirs, truth, "backward")


def test_entries_that_32_bits_cannot_reach_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of x that lie 2²⁹ entries apart: offsets within a row are 32-bit in the kernels."""
    seen: list[Tensor] = []
    monkeypatch.setattr(lora_linear, "launch", lambda kernel, grid, *args, **options: seen.append(args[1 if len(seen) == 1 else 0]))
    far, factor = torch.empty_strided((4, 8), (1, 1 << 29), device="meta"), torch.empty_strided((8, 2), (2, 1), device="meta")
    lora_linear.project(far, None, 1.0, factor, None, False)
    lora_linear.token_sum(torch.empty_strided((4, 2), (2, 1), device="meta"), far, None, 1.0, factor.mT, 1, 8)
    assert [x.stride() for x in seen] == [(8, 1), (8, 1)]


@pytest.mark.parametrize("tokens, columns", [(1, 1), (70, 130), (33, 8), (3, 777), (0, 5), (4, 0)])
def test_the_kernels_masks_are_the_references(device: torch.device, tokens: int, columns: int) -> None:
    for number in (0, 7, 2**31, 2**62 + 3, -1, -(2**63)):
        for keep in (0.5, 1 / 65536, 0.9000091552734375, 1.0):
            seed = torch.tensor([number], device=device)
            ours, theirs = (module.dropout_mask(seed, tokens, columns, keep) for module in (dropout, reference.dropout))
            assert ours.dtype == theirs.dtype == torch.bool and ours.device == theirs.device
            assert torch.equal(ours, theirs)


def test_every_kernel_and_every_tile_shape_drops_the_same(device: torch.device) -> None:
    """Forward, ∂x and ∂A by identity matrices, whose entries show x̃ itself; ranks and dtypes that differ in their tiles."""
    tokens, d = 300, 16
    seed, keep = torch.tensor([-12345678901234], device=device), 0.5
    mask = reference.dropout.dropout_mask(seed, tokens, d, keep)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, grad = torch.ones(tokens, d, device=device, dtype=dtype), torch.ones(tokens, d, device=device, dtype=dtype)
        for rank in (d, 70):  # the identity, padded with zeros
            a = torch.eye(rank, d, device=device, dtype=dtype)
            b = a.mT.contiguous()
            y, hidden = lora_linear.lora_linear(x, None, None, a, b, None, None, 1.0, None, keep, None, seed)
            assert torch.equal(y != 0, mask) and torch.equal(hidden[:, :d] != 0, mask)
            needs = [True, False, False, True, False, False]
            of_x, of_a = lora_linear.lora_linear_backward(grad, x, None, a, b, None, None, hidden, 1.0, None, keep, needs, None, seed)
            assert torch.equal(of_x != 0, mask)
            assert torch.equal(of_a[0].double(), mask.sum(0) / keep)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("rank, tokens", [(1, 70), (24, 530), (64, 40), (4, 0)])
@pytest.mark.parametrize("decoupled", [False, True], ids=["plain", "decoupled"])
def test_lora_shared(device: torch.device, dtype: torch.dtype, rank: int, tokens: int, decoupled: bool) -> None:
    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(device, dtype)

    def compare(name: str, *args: object) -> None:
        exact = [a.double() if isinstance(a, Tensor) else a for a in args]
        calls = ((lora_shared, args), (reference.lora_shared, args), (reference.lora_shared, exact))
        outs = [getattr(module, name)(*data) for module, data in calls]
        outs = [out if isinstance(out, (tuple, list)) else [out] for out in outs]
        for out, theirs, truth in zip(*outs, strict=True):
            assert (out is None) == (truth is None)
            if truth is not None:
                assert out.shape == truth.shape
                assert_accurate(out, theirs, truth, name)

    d_in, d_out, tokens = 70, enough(330, dtype, device), enough(tokens, dtype, device)
    x, a, q = make(d_in, tokens).mT, make(rank, d_in), make(rank, d_in) if decoupled else None
    compare("lora_down", x, a, q)
    on_a, on_q, grad_x = make(tokens, rank), make(tokens, rank) if decoupled else None, make(tokens, d_in)
    for arguments in (
        (grad_x, on_a, on_q, x, a, q),
        (None, on_a, on_q, None, a, q),
        (None, on_a, None, x, None, None),
        (grad_x, None, on_q, x, a, q),
    ):
        if arguments[1] is not None or arguments[2] is not None:
            compare("lora_down_backward", *arguments)
    both = make(tokens, 2 * rank + 1)
    hidden, hidden_q = both[:, : 2 * rank : 2], both[:, rank : 2 * rank] if decoupled else None
    weight, bias, b, q_b = make(d_out, d_in), make(d_out), make(d_out, rank), make(d_out, rank) if decoupled else None
    compare("lora_up", x, weight, bias, hidden, b, hidden_q, q_b, 0.7)
    compare("lora_up", None, None, None, hidden, b, hidden_q, q_b, 0.7)
    grad = make(d_out, tokens).mT
    for needs in (
        [True, True, True, decoupled],
        [False, False, True, decoupled],
        [True, True, False, False],
        [False, False, False, decoupled],
    ):
        compare("lora_up_backward", grad, weight, hidden_q if decoupled else hidden, b, q_b, 0.7, needs)


# --- the registry ---------------------------------------------------------------------------------------------------------


def test_launches_do_not_grow_with_the_number_of_layers(device: torch.device) -> None:
    counts = []
    for layers in (6, 24):
        xs = [torch.randn(6 + i % 5, 2, device=device) for i in range(layers)]
        before = launch_count()
        with force("triton"):
            args = (xs, None, [torch.empty_like(x) for x in xs], torch.empty(layers, 2, 2, device=device))
            select("grouped_qr", device.type, args).implementation.function(*args)
            stepped, numbers = Stepped(xs, xs, [], []), Numbers(0.1, 0.9, 0.9, 1e-8, 0.0, 1, [], False, False)
            args = (stepped, Maps(), [], None, numbers)
            select("grouped_adamw_", device.type, args).implementation.function(*args)
            grams = torch.empty(layers, 2, 2, device=device)
            gram.grouped_gram(xs, None, grams)
            solve.grouped_solve(grams, xs, 1.0, False, [torch.empty_like(x) for x in xs])
            preconditioner.grouped_preconditioner(grams.double(), grams, 1.0, 1.0, False, grams, torch.empty_like(grams))
            polar.grouped_polar(xs[: layers // 3], [torch.empty_like(x) for x in xs[: layers // 3]])
            news = torch.empty(layers, 2, 2, 2, device=device)
            adamw.grouped_adamw_(stepped, Maps(*[grams] * 4), [1] * layers, news, numbers)
        counts.append(launch_count() - before)
    assert counts[0] == counts[1] == 7 + 2 + 2 + 1 + 9 + 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it is the default")
def test_never_chosen_by_default_on_the_cpu() -> None:
    x = torch.randn(8, 2)
    assert select("grouped_qr", "cpu", ([x], None, [x], torch.empty(1, 2, 2))).implementation.backend != "triton"
