"""``grouped_adamw_`` of Triton against the reference in fp64: in the interpreter without a GPU, on the GPU with one."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from _triton_kernels import WIDE, assert_accurate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
from lowrank_kernels.backends import launch_count, reference
from lowrank_kernels.backends.moments import Maps, Numbers, Stepped
from lowrank_kernels.backends.triton import _tables, adamw

pytestmark = pytest.mark.usefixtures("nan_scratch")


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
