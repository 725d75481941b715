"""The compiled ``grouped_adamw_`` against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from _native import DTYPES, LAYOUTS, RANKS, assert_close_to_fp64, matrix, wide
from torch import Tensor

from lowrank_kernels import ops
from lowrank_kernels.backends import registry


def adamw_group(rank: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Parameters and gradients of ragged factors of one rank in all layouts, and which dimension is the rank."""
    shapes = [(d, rank) for d in (1, 37, 300, 2100)] + [(rank, d) for d in (1, 37, 300, 2100)]
    params = [matrix(*shape, dtype, LAYOUTS[i % 4]) for i, shape in enumerate(shapes)]
    grads = [matrix(*shape, dtype, LAYOUTS[(i // 2) % 4]) for i, shape in enumerate(shapes)]
    return params, grads, [1] * 4 + [0] * 4


def run_adamw(
    backend: str, dtype: torch.dtype, params: list[Tensor], grads: list[Tensor], *states: list[Tensor], **options
) -> list[Tensor]:
    """New parameters and states after one step on copies in ``dtype`` (states at least fp32)."""

    def copy(tensors: list[Tensor], to: torch.dtype) -> list[Tensor]:
        return [torch.empty_strided(t.shape, t.stride(), dtype=to).copy_(t) if t.ndim == 2 else t.to(to, copy=True) for t in tensors]

    options = {name: value.to(wide(dtype)) if name.endswith("maps") and value is not None else value for name, value in options.items()}
    drifts = options.get("drifts")
    if drifts is not None:
        options["drifts"] = torch.full(drifts.shape, torch.nan, dtype=wide(dtype))
    params, grads = copy(params, dtype), copy(grads, dtype)
    states = tuple([t.to(wide(dtype), copy=True) for t in state] for state in states)
    with registry.force(backend):
        ops.grouped_adamw_(params, grads, *states, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, **options)
    return [*params, *(tensor for state in states for tensor in state), *([] if drifts is None else [options["drifts"]])]


def check_adamw(dtype: torch.dtype, params: list[Tensor], grads: list[Tensor], *states: list[Tensor], **options) -> None:
    exact = run_adamw("reference", torch.float64, params, grads, *states, **options)
    same_dtype = run_adamw("reference", dtype, params, grads, *states, **options)
    ours = run_adamw("native", dtype, params, grads, *states, **options)
    single = run_adamw("reference", torch.float32, params, grads, *states, **options) if dtype == torch.float64 else same_dtype
    # All parameters are judged together, and so are their moments: a map may cancel what a small one consists of.
    for start in range(0, len(params) * (1 + sum(map(bool, states))), len(params)):
        kind = slice(start, start + len(params))
        assert_close_to_fp64(*(torch.cat([tensor.flatten() for tensor in results[kind]]) for results in (ours, same_dtype, exact, single)))


def moments(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.randn(p.shape) for p in params], [torch.rand(p.shape) for p in params]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("maps", ["none", "grad", "momentum", "both"])
@pytest.mark.parametrize("rank", RANKS)
def test_adamw(rank: int, maps: str, dtype: torch.dtype) -> None:
    params, grads, rank_dims = adamw_group(rank, dtype)
    stacked = [torch.randn(len(params), rank, rank, dtype=torch.float32) / rank**0.5 for _ in range(2)]
    options = {
        "grad_maps": stacked[0] if maps in ("grad", "both") else None,
        "momentum_maps": stacked[1] if maps in ("momentum", "both") else None,
        "rank_dims": rank_dims if maps != "none" else (),
    }
    check_adamw(dtype, params, grads, *moments(params), step=3, **options)


def test_adamw_instruction_sets(instruction_set: str) -> None:
    for dtype in DTYPES:
        params, grads, rank_dims = adamw_group(16, dtype)
        check_adamw(dtype, params, grads, *moments(params), step=3)
        maps = torch.randn(len(params), 16, 16)
        check_adamw(dtype, params, grads, *moments(params), step=3, grad_maps=maps, rank_dims=rank_dims)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
def test_adamw_all_maps(rank: int, dtype: torch.dtype, maximize: bool, instruction_set: str) -> None:
    """Each of the four maps alone, all four, and with moments missing."""
    params, grads, rank_dims = adamw_group(rank, dtype)
    names = ("grad_maps", "momentum_maps", "param_maps", "direction_maps")
    maps = {name: torch.randn(len(params), rank, rank) / rank**0.5 for name in names}
    first, second = moments(params)
    for chosen in ((names[2],), (names[3],), names):
        options = {name: maps[name] for name in chosen}
        check_adamw(dtype, params, grads, first, second, step=3, rank_dims=rank_dims, maximize=maximize, **options)
    check_adamw(dtype, params, grads, first, [], step=3, rank_dims=rank_dims, maximize=maximize, **maps)
    check_adamw(dtype, params, grads, [], [], step=3, rank_dims=rank_dims, maximize=maximize, **maps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
def test_adamw_drifts(rank: int, dtype: torch.dtype, instruction_set: str) -> None:
    """Of the factor as it is stored, to rounding of the factor times its *move*; with and without maps, and after D."""
    params, grads, rank_dims = adamw_group(rank, dtype)
    first, second = moments(params)
    maps = torch.randn(len(params), rank, rank) / rank**0.5
    for options in ({}, {"grad_maps": maps, "momentum_maps": maps}, {"direction_maps": maps}):
        before = [param.double() for param in params]
        drifts = torch.full((len(params), rank, rank), torch.nan, dtype=wide(dtype))
        *results, drifts = run_adamw("native", dtype, params, grads, first, second, step=3, rank_dims=rank_dims, drifts=drifts, **options)
        without = run_adamw("native", dtype, params, grads, first, second, step=3, rank_dims=rank_dims, **options)
        if options:
            assert all(torch.equal(a, b) for a, b in zip(results, without, strict=True))
        for drift, new, old, dim in zip(drifts, results, before, rank_dims, strict=False):
            new, old = (x.double().mT if dim == 0 else x.double() for x in (new, old))
            bound = torch.finfo(wide(dtype)).eps * (2 + new.shape[0] ** 0.5) * new.norm(dim=0)[:, None] * (new - old).norm(dim=0)
            assert ((drift.double() - new.mT @ (new - old)).abs() <= bound).all()


def test_adamw_drifts_do_not_depend_on_threads(threads: None) -> None:
    params, grads, rank_dims = adamw_group(16, torch.float32)
    params, grads = [*params, torch.randn(16, 20000)], [*grads, torch.randn(16, 20000)]
    options = {"step": 3, "rank_dims": [*rank_dims, 0], "drifts": torch.empty(len(params), 16, 16)}
    states = moments(params)
    results = run_adamw("native", torch.float32, params, grads, *states, **options)
    torch.set_num_threads(1)
    alone = run_adamw("native", torch.float32, params, grads, *states, **options)
    assert all(torch.equal(a, b) for a, b in zip(results, alone, strict=True))


@pytest.mark.parametrize("present", ["both", "first", "second", "neither"])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_adamw_options(present: str, maximize: bool, bias_correction: bool) -> None:
    params, grads, _ = adamw_group(8, torch.float32)
    # Any shapes too: a bias, a convolution, a scalar, nothing at all.
    params += [torch.randn(shape) for shape in ((50,), (4, 3, 3, 3), (), (0, 8))]
    grads += [torch.randn(param.shape) for param in params[-4:]]
    params, grads = params[:-1], grads[:-1]
    first, second = moments(params)
    states = (first if present in ("both", "first") else [], second if present in ("both", "second") else [])
    missed = [i % 3 for i in range(len(params))]
    check_adamw(torch.float32, params, grads, *states, step=5, missed=missed, maximize=maximize, bias_correction=bias_correction)


def test_adamw_without_elements() -> None:
    empty, full = torch.randn(0, 8), torch.randn(40, 8)
    before = full.clone()
    states = [torch.zeros(0, 8), torch.zeros(40, 8)]
    ops.grouped_adamw_(
        [empty, full], [empty, torch.randn(40, 8)], states, [s.clone() for s in states],
        lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, step=1,
    )  # fmt: skip
    assert not torch.equal(full, before)


def test_adamw_takes_tensors_for_lr_and_step() -> None:
    params, grads, _ = adamw_group(8, torch.float32)
    results = []
    for lr, step in ((1e-2, 4), (torch.tensor(1e-2, dtype=torch.float64), torch.tensor(4))):
        own = [p.clone() for p in params]
        zeros = [torch.zeros(p.shape) for p in own]
        ops.grouped_adamw_(own, grads, zeros, [z.clone() for z in zeros], lr=lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, step=step)
        results.append(own)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_adamw_leaves_neighbours_alone() -> None:
    parent = torch.randn(40, 16)
    before = parent.clone()
    first, second = [torch.zeros(40, 8)], [torch.zeros(40, 8)]
    ops.grouped_adamw_([parent[:, 8:]], [torch.ones(40, 8)], first, second, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0, step=1)
    assert torch.equal(parent[:, :8], before[:, :8])
    torch.testing.assert_close(parent[:, 8:], before[:, 8:] - 0.1)


def test_narrow_dtypes_round_to_nearest_even() -> None:
    """Every bf16 and fp16 number survives a step that changes nothing, and sums round as torch rounds."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        values = every.view(dtype)
        values = values[values.isfinite()].clone()
        for lr in (0.0, 1.0):
            params, grads = values.clone(), torch.empty(values.shape).uniform_(-1, 1).to(dtype) * values
            ops.grouped_adamw_([params], [grads], [], [], lr=lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0, step=1, bias_correction=False)
            expected = (values.float() - lr * grads.float()).to(dtype)
            assert torch.equal(params.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("rank_dim", [0, 1])
@pytest.mark.parametrize("height", [1, 39, 300])
def test_drifts_without_eps(rank_dim: int, height: int) -> None:
    """What stands behind the last rows of a panel is 0/0 then."""
    torch.manual_seed(0)
    shape = (3, height) if rank_dim == 0 else (height, 3)  # a rank that is worked on in panels, whichever way it lies
    new, grad = torch.randn(shape), torch.randn(shape)
    old, drifts, maps = new.clone(), torch.empty(1, 3, 3), torch.eye(3)[None]
    moments = [[torch.zeros(shape)] for _ in range(2)]
    numbers = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.0, "weight_decay": 0.0, "step": 1}
    ops.grouped_adamw_([new], [grad], *moments, grad_maps=maps, rank_dims=[rank_dim], drifts=drifts, **numbers)
    tall, before = (new.mT, old.mT) if rank_dim == 0 else (new, old)
    torch.testing.assert_close(drifts[0], tall.mT @ (tall - before), rtol=1e-4, atol=1e-5)
