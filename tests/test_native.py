"""The compiled CPU backend against the reference in fp64, over what makes each operation hard."""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys
from array import array
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_kernels import ops
from lowrank_kernels.backends import reference, registry
from lowrank_kernels.backends.lists import Tall, gather
from lowrank_kernels.ops.altlora_turn import altlora_turn_as_gathered_

native = pytest.importorskip("lowrank_kernels.backends.native", reason="the native extension is not built")
_csrc = native._csrc

RANKS = (1, 4, 8, 16, 33, 64, 128)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INSTRUCTION_SETS = [name for name in ("avx512", "avx2", "portable") if _csrc.use_instruction_set(name)]
_csrc.use_instruction_set(INSTRUCTION_SETS[0])


@pytest.fixture(autouse=True)
def forced_native() -> Iterator[None]:
    with registry.force("native"):
        yield


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _csrc.instruction_set()
    assert _csrc.use_instruction_set(request.param)
    yield request.param
    assert _csrc.use_instruction_set(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Two threads, whatever the machine: work must be handed out, and large matrices split."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def matrix(rows: int, columns: int, dtype: torch.dtype, layout: str = "rows", scale: Tensor | float = 1.0) -> Tensor:
    """Random, in one of the layouts that factors come in: dense, transposed, a column slice, every second row and column."""
    values = (torch.randn(rows, columns, dtype=torch.float64) * scale).to(dtype)
    if layout == "rows":
        return values
    if layout == "transposed":
        return values.mT.contiguous().mT
    if layout == "columns of a wider one":
        out = torch.full((rows, 2 * columns), torch.nan, dtype=dtype)[:, columns:]
    else:
        out = torch.full((2 * rows, 2 * columns), torch.nan, dtype=dtype)[::2, ::2]
    return out.copy_(values)


LAYOUTS = ("rows", "transposed", "columns of a wider one", "strided")


def assert_close_to_fp64(out: Tensor, torch_out: Tensor, exact: Tensor, torch_single: Tensor | None = None) -> None:
    """The rule of the house: at most twice the error of torch in the same dtype, plus 8 eps of the largest entry.

    In fp64 torch's result is the exact one by definition: there its error is that of fp32 (``torch_single``), in proportion.
    """
    assert out.isfinite().all()
    error, torch_error = ((value.double() - exact).abs().max().item() for value in (out, torch_out))
    eps = torch.finfo(out.dtype).eps
    if out.dtype == torch.float64 and torch_single is not None:
        torch_error = (torch_single.double() - exact).abs().max().item() * eps / torch.finfo(torch.float32).eps
    bound = 2 * torch_error + 8 * eps * exact.abs().max().item()
    assert error <= bound, f"error {error:.3g}, torch's {torch_error:.3g}, bound {bound:.3g}"


# --- grouped_adamw_ ---------------------------------------------------------------------------------------------------


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


# --- grouped_qr -------------------------------------------------------------------------------------------------------


def check_qr(xs: list[Tensor], qs: list[Tensor], rs: Tensor, previous: list[Tensor] | None = None, residual_slack: float = 0.0) -> None:
    dtype = xs[0].dtype
    eps = torch.finfo(dtype).eps
    orthogonal = {torch.float32: 1e-5, torch.float64: 1e-13}.get(dtype, 4 * eps)
    residual = {torch.float32: 1e-5, torch.float64: 1e-13}.get(dtype, 4 * eps)
    for index, (x, q, r) in enumerate(zip(xs, qs, rs, strict=True)):
        # One power of two out of everything, so that norms of 1e±18 and of denormals are in range.
        exponent = torch.frexp(x.double().abs().amax()).exponent
        x, r, q = torch.ldexp(x.double(), -exponent), torch.ldexp(r.double(), -exponent), q.double()
        assert q.isfinite().all() and r.isfinite().all()
        assert (q.mT @ q - torch.eye(q.shape[1])).abs().max() <= orthogonal
        assert torch.linalg.norm(q @ r - x) <= residual * torch.linalg.norm(x) + residual_slack
        assert torch.equal(r, r.triu())
        signs = r.diagonal() if previous is None else (q * previous[index].double()).sum(dim=0)
        assert (signs >= -10 * eps * signs.abs().max()).all()  # Q was rounded to its dtype after the choice


def conditioned(rows: int, columns: int, kappa: float, dtype: torch.dtype) -> Tensor:
    left, right = (torch.linalg.qr(torch.randn(n, columns, dtype=torch.float64))[0] for n in (rows, columns))
    exponents = torch.linspace(0, -1, columns, dtype=torch.float64)
    return ((left * kappa**exponents) @ right.mT).to(dtype)


def heights(rank: int) -> list[int]:
    return sorted({rank, rank + 1, max(rank, 64), max(rank, 300), 1500})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
def test_qr_layouts(rank: int, dtype: torch.dtype) -> None:
    for shift in range(4):
        xs = [matrix(d, rank, dtype, LAYOUTS[(i + shift) % 4]) for i, d in enumerate(heights(rank))]
        previous = [matrix(d, rank, dtype, LAYOUTS[(i + 2 * shift) % 4]) for i, d in enumerate(heights(rank))]
        out = [torch.full_like(matrix(d, rank, dtype, LAYOUTS[(i + 3 * shift) % 4]), torch.nan) for i, d in enumerate(heights(rank))]
        copies = [x.clone() for x in xs]
        qs, rs = ops.grouped_qr(xs)
        check_qr(xs, qs, rs)
        qs, rs = ops.grouped_qr(xs, previous, out=out)
        check_qr(xs, qs, rs, previous)
        assert all(torch.equal(x, copy) for x, copy in zip(xs, copies, strict=True))


@pytest.mark.parametrize("kappa", [1.0, 1e1, 1e2, 1e3, 1e4, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_qr_conditioning(dtype: torch.dtype, kappa: float) -> None:
    if dtype == torch.float32 and kappa > 1e6:
        pytest.skip("beyond what fp32 can hold")
    for rank in (2, 8, 16, 33, 128):
        xs = [conditioned(d, rank, kappa, dtype) for d in heights(rank)]
        check_qr(xs, *ops.grouped_qr(xs))


def hard_matrices(rank: int, dtype: torch.dtype) -> dict[str, tuple[list[Tensor], float]]:
    """What breaks a plain CholeskyQR, with the residual that may be added (relative to the scaled matrix)."""
    tiny = torch.finfo(dtype).smallest_normal
    huge, denormal = (1e18, 1e-42) if dtype == torch.float32 else (1e150, 1e-318)
    plain = [matrix(d, rank, dtype) for d in heights(rank)]

    def changed(change) -> list[Tensor]:
        copies = [x.clone() for x in plain]
        for x in copies:
            change(x)
        return copies

    steps = torch.logspace(-1, 1, rank, dtype=torch.float64)
    return {
        "zero column": (changed(lambda x: x[:, rank // 2].zero_()), 0),
        "zero first column": (changed(lambda x: x[:, 0].zero_()), 0),
        "duplicate columns": (changed(lambda x: x[:, -1].copy_(x[:, 0])), 0),
        "rank one": (changed(lambda x: x.copy_(x[:, :1].expand_as(x))), 0),
        "all zero": (changed(lambda x: x.zero_()), 0),
        "identity": (changed(lambda x: x.copy_(torch.eye(*x.shape))), 0),
        "a single entry": (changed(lambda x: x.zero_()[-1, -1].fill_(3)), 0),
        "huge": ([x * huge for x in plain], 0),
        "small": ([x / huge for x in plain], 0),
        "huge and small columns": ([(x.double() * huge ** (steps.log10())).to(dtype) for x in plain], 0),
        # R itself is denormal there: every entry of it may be off by half of the smallest number.
        "denormal": ([x * denormal for x in plain], rank**1.5 * tiny * torch.finfo(dtype).eps / denormal * 4),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 8, 16, 33, 128])
def test_qr_robustness(rank: int, dtype: torch.dtype, instruction_set: str) -> None:
    for name, (xs, slack) in hard_matrices(rank, dtype).items():
        qs, rs = ops.grouped_qr(xs)
        try:
            check_qr(xs, qs, rs, residual_slack=slack)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        again, rs_again = ops.grouped_qr(xs)
        assert torch.equal(rs, rs_again) and all(torch.equal(a, b) for a, b in zip(qs, again, strict=True)), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_qr_of_what_is_not_finite(bad: float) -> None:
    for dtype in DTYPES:
        xs = [matrix(d, 8, dtype) for d in (8, 100, 1500)]
        clean, clean_rs = ops.grouped_qr(xs)
        xs[1][57, 3] = bad
        qs, rs = ops.grouped_qr(xs)
        assert qs[1].isnan().all() and rs[1].isnan().all()
        for i in (0, 2):
            assert torch.equal(qs[i], clean[i]) and torch.equal(rs[i], clean_rs[i])


def test_qr_follows_its_previous_q_in_place() -> None:
    """A small change of X changes Q little, with ``out`` the previous Q itself, in the columns of a wider matrix."""
    for dtype in (torch.float32, torch.float64):
        xs = [matrix(d, 8, dtype) for d in (64, 700, 3000)]
        parents = [torch.randn(x.shape[0], 16, dtype=dtype) for x in xs]
        qs = [parent[:, :8] for parent in parents]
        right_halves = [parent[:, 8:].clone() for parent in parents]
        bases = [torch.linalg.qr(x)[0] * torch.where(torch.rand(8) < 0.5, -1, 1) for x in xs]
        for q, basis in zip(qs, bases, strict=True):
            q.copy_(basis)
        moved = [x + 1e-3 * torch.randn_like(x) for x in xs]
        out, rs = ops.grouped_qr(moved, qs, out=qs)
        check_qr(moved, out, rs, bases)
        for q, basis, parent, right in zip(qs, bases, parents, right_halves, strict=True):
            assert (q - basis).abs().max() < 0.05
            assert torch.equal(parent[:, 8:], right)


def test_qr_matches_the_reference() -> None:
    """Where the QR is unique (full rank, signs fixed), it is the reference's."""
    xs = [matrix(d, 16, torch.float32) for d in (64, 768, 3000)]
    previous = [torch.randn_like(x) for x in xs]
    qs, rs = ops.grouped_qr(xs, previous)
    with registry.force("reference"):
        same, same_rs = ops.grouped_qr(xs, previous)
        exact, exact_rs = ops.grouped_qr([x.double() for x in xs], [p.double() for p in previous])
    for ours, theirs, truth in zip([*qs, rs], [*same, same_rs], [*exact, exact_rs], strict=True):
        assert_close_to_fp64(ours, theirs, truth)


@pytest.mark.parametrize("rank", [1, 16, 128])
def test_qr_does_not_depend_on_threads(rank: int, threads: None) -> None:
    """One matrix that is split among threads, beside small ones: the same bits as on one thread."""
    xs = [matrix(d, rank, torch.float32, layout) for d, layout in ((200000 // rank, "rows"), (150, "rows"), (300, "transposed"))]
    previous = [torch.randn_like(x) for x in xs]
    deficient = [x.clone() for x in xs]
    for x in deficient:
        x[:, -1] = x[:, 0]
    for group in (xs, deficient):
        qs, rs = ops.grouped_qr(group, previous)
        torch.set_num_threads(1)
        alone, alone_rs = ops.grouped_qr(group, previous)
        torch.set_num_threads(2)
        assert torch.equal(rs, alone_rs) and all(torch.equal(a, b) for a, b in zip(qs, alone, strict=True))
        check_qr(group, qs, rs, previous)


# --- grouped_svd_product ----------------------------------------------------------------------------------------------


def check_svd(lefts: list[Tensor], rights: list[Tensor], us: list[Tensor], ss: Tensor, vs: list[Tensor]) -> None:
    dtype = lefts[0].dtype
    eps = torch.finfo(dtype).eps
    orthogonal = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 4 * eps)
    accurate = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 1e-5)
    for left, right, u, s, v in zip(lefts, rights, us, ss, vs, strict=True):
        left, right, u, v, s = (t.double() for t in (left, right, u, v, s))
        assert u.isfinite().all() and v.isfinite().all() and s.isfinite().all()
        for basis in (u, v):
            assert (basis.mT @ basis - torch.eye(len(s))).abs().max() <= orthogonal
        # The spectrum of the product, from its core in fp64.
        exact = torch.linalg.svdvals(torch.linalg.qr(left)[1] @ torch.linalg.qr(right)[1].mT)[: len(s)]
        assert (s - exact).abs().max() <= accurate * exact[0]
        assert (s.diff() <= 0).all() and (s >= 0).all()
        # uᵢᵀ M vⱼ is diagonal with the singular values: the triples belong together.
        core = (u.mT @ left) @ (v.mT @ right).mT
        assert (core - torch.diag(exact)).abs().max() <= max(10 * accurate, 8 * eps) * exact[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", RANKS)
def test_svd_product(k: int, dtype: torch.dtype) -> None:
    shapes = [(k, k + 3), (200, 150), (1500, 300)]
    for rank in {k, max(1, k // 2)}:
        lefts = [matrix(max(m, k), k, dtype, LAYOUTS[i]) for i, (m, _) in enumerate(shapes)]
        rights = [matrix(max(n, k), k, dtype, LAYOUTS[i + 1]) for i, (_, n) in enumerate(shapes)]
        check_svd(lefts, rights, *ops.grouped_svd_product(lefts, rights, rank))


@pytest.mark.parametrize("k", [1, 8, 33, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_svd_product_robustness(dtype: torch.dtype, k: int, instruction_set: str) -> None:
    plain = [matrix(m, k, dtype) for m in (max(k, 100), 900)]
    rights = [matrix(n, k, dtype, "transposed") for n in (max(k, 130), 200)]
    half = max(1, k // 2)
    cases = {
        "zero": [torch.zeros_like(x) for x in plain],
        "deficient": [torch.cat([x[:, :half], x[:, : k - half]], dim=1) for x in plain],
        "decaying": [(x.double() * torch.logspace(0, -6, k, dtype=torch.float64)).to(dtype) for x in plain],
        "equal singular values": [torch.linalg.qr(x)[0] for x in plain],
    }
    for lefts in cases.values():
        others = [torch.linalg.qr(r)[0] for r in rights] if lefts is cases["equal singular values"] else rights
        check_svd(lefts, others, *ops.grouped_svd_product(lefts, others, k))
    us, ss, vs = ops.grouped_svd_product([x * 1e18 for x in plain], [x * 1e-18 for x in rights], k)
    check_svd(plain, rights, us, ss, vs)


def test_svd_product_of_what_is_not_finite() -> None:
    lefts, rights = ([matrix(d, 8, torch.float32) for d in (50, 60, 1500)] for _ in range(2))
    clean = ops.grouped_svd_product(lefts, rights, 4)
    rights[1][3, 3] = torch.inf
    us, ss, vs = ops.grouped_svd_product(lefts, rights, 4)
    assert us[1].isnan().all() and ss[1].isnan().all() and vs[1].isnan().all()
    for i in (0, 2):
        assert all(torch.equal(ours[i], before[i]) for ours, before in zip((us, ss, vs), clean, strict=True))


def test_svd_product_does_not_depend_on_threads(threads: None) -> None:
    lefts, rights = [matrix(20000, 16, torch.float32), matrix(64, 16, torch.float32)], [matrix(3000, 16, torch.float32) for _ in range(2)]
    us, ss, vs = ops.grouped_svd_product(lefts, rights, 8)
    torch.set_num_threads(1)
    alone = ops.grouped_svd_product(lefts, rights, 8)
    assert torch.equal(ss, alone[1])
    assert all(torch.equal(a, b) for a, b in zip([*us, *vs], [*alone[0], *alone[2]], strict=True))


# --- grouped_altlora_turn_ -----------------------------------------------------------------------------------------------


def altlora_turn(
    side: str, heights: tuple[tuple[int, int], ...], rank: int, dtype: torch.dtype, whole: bool, **options: Any
) -> list[Tensor]:
    """What a turn of factors (their heights, their partners') leaves, as a whole or as the operations that it consists of."""
    torch.manual_seed(7)
    state_dtype, second, taken = wide(dtype), options.pop("second", True), options.pop("taken", whole)
    layouts = ("rows", "rows", "columns of a wider one", "strided")  # as they are stored

    def stored(rows: int, i: int) -> Tensor:
        return matrix(rows, rank, dtype, layouts[i % 4]) if side == "B" else matrix(rank, rows, dtype, layouts[i % 4])

    params = [torch.nn.Parameter(stored(height, i)) for i, (height, _) in enumerate(heights)]
    state = {}
    for i, p in enumerate(params):
        p.grad = stored(heights[i][0], i)
        state[p] = {"exp_avg": torch.randn(p.shape, dtype=state_dtype)}
        if second:
            state[p]["exp_avg_sq"] = torch.rand(p.shape, dtype=state_dtype)
    stored_partners = [matrix(rows, rank, dtype) for _, rows in heights]
    partners = stored_partners if side == "A" else Tall([y.mT.contiguous() for y in stored_partners])
    behind = torch.randn(len(params), rank, rank, dtype=state_dtype)
    moved = torch.full_like(behind, torch.nan)
    found = gather(params, list(range(len(params))), state)
    assert found.layout is not None
    calls = registry.call_counts().get(("grouped_altlora_turn_", "native"), 0)
    with torch.no_grad():
        (partial(altlora_turn_as_gathered_, layout=found.layout) if whole else ops.grouped_altlora_turn_)(
            found.params, found.grads, found.exp_avgs, found.exp_avg_sqs, partners=partners, behind=behind, moved=moved, damping=1e-3,
            own_damping=1e-2, weight=0.25, rank_dims=[0 if side == "A" else 1] * len(params),
            **{"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "step": 3, **options},
        )  # fmt: skip
    assert registry.call_counts().get(("grouped_altlora_turn_", "native"), 0) == calls + taken
    return [*params, *(value for values in state.values() for value in values.values()), behind, moved]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["A", "B"])
def test_altlora_turn_is_its_parts_to_the_bit(side: str, dtype: torch.dtype, threads: None) -> None:
    many = tuple((40 + 23 * (i % 7), 30 + 11 * (i % 5)) for i in range(19))
    cases = [(rank, many, {}) for rank in RANKS if rank < 30]
    cases += [
        (8, ((2500, 1100), (64, 3000), *many), {"missed": [i % 3 for i in range(21)], "maximize": True}),
        (4, ((40000, 20000), (30, 40)), {"second": False, "betas": (0.9, 0.0), "bias_correction": False}),  # shared by the threads
        (16, ((1, 1), (5, 0), (0, 5)), {}),
        (33, many[:3], {}),
        (128, many[:2], {}),
    ]
    for rank, heights, options in cases:
        wanted = altlora_turn(side, heights, rank, dtype, whole=False, **options)
        got = altlora_turn(side, heights, rank, dtype, whole=True, **options)
        assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True)), (rank, heights)
        assert not got[-2].any()
        torch.set_num_threads(1)
        assert all(map(torch.equal, altlora_turn(side, heights, rank, dtype, whole=True, **options), got)), (rank, heights)
        torch.set_num_threads(2)


def test_altlora_turn_as_a_whole_only_where_its_parts_are_free() -> None:
    for forced in ("reference", "native,grouped_gram=reference", "native,grouped_adamw_=reference"):
        with registry.force(forced):
            altlora_turn("A", ((30, 20),), 4, torch.float32, whole=True, taken=False)


def test_what_is_written_is_what_was_given() -> None:
    """A layout says where tensors lie: that of other lists would have theirs written, so the operations take none."""
    given, other = (torch.nn.Parameter(torch.ones(9, 4)) for _ in range(2))
    given.grad, other.grad = torch.ones(9, 4), torch.ones(9, 4)
    numbers = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "step": 1}
    layout = gather([other], [0], {other: {}}).layout
    small = torch.zeros(1, 4, 4)
    turn = {"partners": [torch.ones(7, 4)], "behind": small, "moved": small.clone(), "damping": 0.1, "own_damping": 0.1, "weight": 1.0}
    with torch.no_grad():
        for call in (
            lambda **more: ops.grouped_adamw_([given], [given.grad], [], [], **numbers, **more),
            lambda **more: ops.grouped_altlora_turn_([given], [given.grad], [], [], **turn, rank_dims=[1], **numbers, **more),
        ):
            with pytest.raises(TypeError, match="layout"):
                call(layout=layout)
            assert torch.equal(given, other)
            call()
            assert not torch.equal(given, other)
            given.copy_(other)


# --- grouped_gram -----------------------------------------------------------------------------------------------------


def gram_bound(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounding of sums of products that are formed in ``dtype``, entry by entry."""
    return torch.finfo(dtype).eps * (1 + x.shape[0] ** 0.5) * x.double().norm(dim=0)[:, None] * y.double().norm(dim=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
def test_gram(rank: int, dtype: torch.dtype, instruction_set: str) -> None:
    tall = (1, 37, 256, 300, 2100, 0)
    for columns in (None, rank, 5, 70):
        xs = [matrix(d, rank, dtype, LAYOUTS[i % 4]) for i, d in enumerate(tall)]
        ys = None if columns is None else [matrix(d, columns, dtype, LAYOUTS[(i + 1) % 4]) for i, d in enumerate(tall)]
        for result in {wide(dtype), torch.float64}:
            grams = ops.grouped_gram(xs, ys, dtype=result)
            assert grams.dtype == result and grams.shape == (len(xs), rank, columns or rank)
            for gram, x, y in zip(grams, xs, ys or xs, strict=True):
                if ys is None:
                    assert torch.equal(gram, gram.mT)
                assert ((gram.double() - x.double().mT @ y.double()).abs() <= gram_bound(x, y, result)).all()


def test_gram_keeps_bad_numbers_to_their_matrix() -> None:
    xs = [matrix(d, 8, torch.float32) for d in (30, 40, 1500)]
    clean = ops.grouped_gram(xs)
    xs[1][7, 3] = torch.nan
    grams = ops.grouped_gram(xs)
    assert grams[1].isnan().any()
    assert torch.equal(grams[0], clean[0]) and torch.equal(grams[2], clean[2])


@pytest.mark.parametrize("rank", [1, 16, 128])
def test_gram_does_not_depend_on_threads(rank: int, threads: None) -> None:
    xs = [torch.randn(400000 // rank, rank), torch.randn(150, rank), torch.randn(rank, 300).mT]
    ys = [torch.randn_like(x) for x in xs]
    results = [ops.grouped_gram(xs), ops.grouped_gram(xs, ys, dtype=torch.float64)]
    torch.set_num_threads(1)
    assert torch.equal(results[0], ops.grouped_gram(xs)) and torch.equal(results[1], ops.grouped_gram(xs, ys, dtype=torch.float64))


# --- grouped_solve ----------------------------------------------------------------------------------------------------


def positive_definite(count: int, rank: int, dtype: torch.dtype) -> Tensor:
    """With something else above the diagonal, which must not be read."""
    roots = torch.randn(count, rank, 3 * rank, dtype=torch.float64) / rank**0.5
    grams = (roots @ roots.mT).to(dtype)
    return grams.tril() + torch.full_like(grams, torch.nan).triu(1).nan_to_num(7.0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
def test_solve(rank: int, dtype: torch.dtype, gram_dtype: torch.dtype, side: str, instruction_set: str) -> None:
    widths = (1, 37, rank, 300, 2100)
    grams = positive_definite(len(widths), rank, gram_dtype)
    rhs = [matrix(d, rank, dtype, LAYOUTS[i % 4]) for i, d in enumerate(widths)]
    rhs = [x.mT for x in rhs] if side == "left" else rhs
    solutions = ops.grouped_solve(grams, rhs, 0.1, side=side)
    with registry.force("reference"):
        same_dtype = ops.grouped_solve(grams, rhs, 0.1, side=side)
        exact = ops.grouped_solve(grams.double(), [x.double() for x in rhs], 0.1, side=side)
    symmetric = grams.double().tril() + grams.double().tril(-1).mT + 0.1 * torch.eye(rank, dtype=torch.float64)
    # Where torch's arithmetic is that of the exact solution, both have the rounding of a system of this condition.
    rounding = torch.finfo(gram_dtype).eps * torch.linalg.cond(symmetric)
    for ours, theirs, truth, x, inexact in zip(solutions, same_dtype, exact, rhs, rounding, strict=True):
        assert ours.dtype == dtype and ours.shape == x.shape and ours.is_contiguous()
        error, torch_error = ((value.double() - truth).abs().max().item() for value in (ours, theirs))
        eps = max(torch.finfo(dtype).eps, torch.finfo(gram_dtype).eps)
        assert error <= 2 * torch_error + (8 * eps + inexact.item()) * truth.abs().max().item()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rank", [4, 8, 16])
def test_solve_past_the_caches_is_what_it_is_in_them(rank: int, side: str, offset: int, instruction_set: str) -> None:
    """36 MB in one call, and one matrix after the other; ``offset`` elements past a vector's boundary nothing can be streamed."""
    rows = [(1 << 19) // rank, 37, (1 << 22) // rank]
    grams = positive_definite(3, rank, torch.float32)
    rhs = [torch.randn((rank, d) if side == "left" else (d, rank)) for d in rows]
    out = [torch.full((x.numel() + offset,), math.nan)[offset:].view(x.shape) for x in rhs]
    ops.grouped_solve(grams, rhs, 0.1, side=side, out=out)
    for i, x in enumerate(rhs):
        parts = x.split(1 << 16, dim=1 if side == "left" else 0)
        alone = [ops.grouped_solve(grams[i : i + 1], [part.contiguous()], 0.1, side=side)[0] for part in parts]
        assert torch.equal(out[i], torch.cat(alone, dim=1 if side == "left" else 0))


def test_solve_of_stacked_right_hand_sides() -> None:
    grams = positive_definite(5, 8, torch.float64)
    for rhs in (torch.randn(5, 8, 3), torch.eye(8, dtype=torch.float64).expand(5, 8, 8), torch.randn(5, 3, 8).mT):
        solution = ops.grouped_solve(grams, rhs, 1e-3)
        assert isinstance(solution, Tensor) and solution.shape == rhs.shape and solution.is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(solution, ops.grouped_solve(grams, list(rhs), 1e-3), strict=True))


@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
def test_solve_reports_what_is_not_positive_definite(gram_dtype: torch.dtype) -> None:
    grams = positive_definite(6, 8, gram_dtype)
    rhs = [torch.randn(8, 40) for _ in grams]
    clean = ops.grouped_solve(grams, rhs, 0.1)
    grams[1], grams[3, 5, 2], grams[4, 7, 7] = -torch.eye(8), torch.nan, torch.inf
    solutions = ops.grouped_solve(grams, rhs, 0.1)
    for index, (ours, before) in enumerate(zip(solutions, clean, strict=True)):
        assert ours.isnan().all() if index in (1, 3, 4) else torch.equal(ours, before)


def test_solve_of_an_ill_conditioned_gram_with_little_damping() -> None:
    """σ₁ = 10, κ = 1e6: in fp64 a damping of 1e-6 is enough; B = 0 leaves the damping alone."""
    x = conditioned(300, 8, 1e6, torch.float64) * 10
    grams = torch.stack([x.mT @ x, torch.zeros(8, 8, dtype=torch.float64)])
    solutions = ops.grouped_solve(grams, torch.eye(8, dtype=torch.float64).expand(2, 8, 8), 1e-6)
    exact = torch.linalg.inv(grams + 1e-6 * torch.eye(8, dtype=torch.float64))
    assert (solutions - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_solve_does_not_depend_on_threads(threads: None) -> None:
    grams, rhs = positive_definite(3, 16, torch.float64), [torch.randn(d, 16) for d in (30000, 300, 200)]
    solutions = ops.grouped_solve(grams, rhs, 0.1, side="right")
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(solutions, ops.grouped_solve(grams, rhs, 0.1, side="right"), strict=True))


# --- grouped_polar ----------------------------------------------------------------------------------------------------


def check_polar(xs: list[Tensor], polars: list[Tensor]) -> None:
    """Orthonormal columns, and PᵀX symmetric and positive semidefinite with P PᵀX = X: what defines the polar factor."""
    for x, p in zip(xs, polars, strict=True):
        eps = torch.finfo(x.dtype).eps
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-13}.get(x.dtype, 8 * eps)
        x = torch.ldexp(x.double(), -torch.frexp(x.double().abs().amax()).exponent)
        p, norm = p.double(), torch.linalg.norm(x)
        assert p.isfinite().all()
        assert (p.mT @ p - torch.eye(p.shape[1])).abs().max() <= tolerance
        stretch = p.mT @ x
        assert (stretch - stretch.mT).abs().max() <= tolerance * norm
        assert torch.linalg.eigvalsh(stretch + stretch.mT).min() >= -tolerance * norm
        assert torch.linalg.norm(p @ stretch - x) <= tolerance * norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
def test_polar(rank: int, dtype: torch.dtype) -> None:
    for shift in range(4):
        xs = [matrix(d, rank, dtype, LAYOUTS[(i + shift) % 4]) for i, d in enumerate(heights(rank))]
        out = [torch.full_like(matrix(d, rank, dtype, LAYOUTS[(i + 3 * shift) % 4]), torch.nan) for i, d in enumerate(heights(rank))]
        check_polar(xs, ops.grouped_polar(xs))
        check_polar(xs, ops.grouped_polar(xs, out=out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 8, 33, 128])
def test_polar_robustness(rank: int, dtype: torch.dtype, instruction_set: str) -> None:
    for name, (xs, _) in hard_matrices(rank, dtype).items():
        if name == "denormal":  # its digits are few, so the residual of a denormal X is not small
            continue
        try:
            check_polar(xs, ops.grouped_polar(xs))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_polar_of_what_is_not_finite() -> None:
    xs = [matrix(d, 8, torch.float32) for d in (8, 100, 1500)]
    clean = ops.grouped_polar(xs)
    xs[1][57, 3] = torch.inf
    polars = ops.grouped_polar(xs)
    assert polars[1].isnan().all() and torch.equal(polars[0], clean[0]) and torch.equal(polars[2], clean[2])


# --- grouped_eigh and grouped_damped_inverse --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 5, 16, 33])
def test_eigh_of_every_instruction_set(rank: int, dtype: torch.dtype, instruction_set: str) -> None:
    x = torch.randn(19, rank, rank, dtype=dtype)
    x = x + x.mT
    x[3], x[4] = 0, x[4, 0, 0] * torch.eye(rank)
    values, vectors = (torch.full(shape, torch.nan, dtype=dtype) for shape in ((19, rank), (19, rank, rank)))
    native.eigh.grouped_eigh(x, values, vectors)
    eps, wide_vectors = torch.finfo(dtype).eps, vectors.double()
    size = torch.linalg.matrix_norm(x.double())[:, None, None] + torch.finfo(dtype).tiny
    residual = x.double() @ wide_vectors - wide_vectors * values.double()[:, None, :]
    assert (residual.abs() / size).max() <= 8 * rank * eps
    assert (wide_vectors.mT @ wide_vectors - torch.eye(rank)).abs().max() <= 8 * rank * eps


@pytest.mark.parametrize("rank", [1, 4, 16, 33])
def test_damped_inverse_of_every_instruction_set(rank: int, instruction_set: str) -> None:
    r = torch.randn(19, rank, rank, dtype=torch.float64).triu() * 1e-2
    out = torch.full_like(r, torch.nan)
    native.damped_inverse.grouped_damped_inverse(r, 1e-3, out)
    inverse = torch.linalg.inv(r.mT @ r + 1e-3 * torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(out @ out.mT, inverse, rtol=1e-10, atol=1e-10 * inverse.abs().max().item())


@pytest.mark.parametrize("rank", [1, 3, 4, 8, 16, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_preconditioner_of_every_instruction_set(rank: int, dtype: torch.dtype, instruction_set: str) -> None:
    x, drifts = torch.randn(19, 2 * rank, rank, dtype=torch.float64), torch.randn(19, rank, rank, dtype=dtype)
    found, exact = ([torch.full_like(drifts, torch.nan) for _ in range(2)] for _ in range(2))
    for backend, out in ((native, found), (reference, exact)):
        backend.preconditioner.grouped_preconditioner(x.mT @ x, drifts, 1e-2, 0.5, True, *out)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    for a, b in zip(found, exact, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_small_stacks_do_not_depend_on_threads(threads: None) -> None:
    x = torch.randn(301, 16, 16, dtype=torch.float64)

    def work() -> tuple[Tensor, ...]:
        inverses = ops.grouped_damped_inverse(x.triu(), 0.1), *ops.grouped_preconditioner(x.mT @ x, 0.1, drifts=x)
        return (*ops.grouped_eigh(x), ops.grouped_eigvalsh(x), *inverses)

    results = [work() for _ in range(2)]
    torch.set_num_threads(1)
    results.append(work())
    assert all(torch.equal(a, b) for got in results[1:] for a, b in zip(results[0], got, strict=True))


# --- what holds for all of them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operation",
    [
        "grouped_adamw_",
        "grouped_damped_inverse",
        "grouped_eigh",
        "grouped_gram",
        "grouped_polar",
        "grouped_preconditioner",
        "grouped_qr",
        "grouped_solve",
        "grouped_svd_product",
    ],
)
def test_one_call_whatever_the_number_of_layers(operation: str) -> None:
    counts = []
    for layers in (6, 60):
        xs = [torch.randn(40, 8) for _ in range(layers)]
        before, calls = registry.launch_count(), registry.call_counts().get((operation, "native"), 0)
        if operation == "grouped_adamw_":
            states = [torch.zeros(40, 8) for _ in xs]
            ops.grouped_adamw_(xs, xs, states, [s.clone() for s in states], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0, step=1)
        elif operation == "grouped_solve":
            ops.grouped_solve(torch.eye(8).repeat(layers, 1, 1), xs, side="right")
        elif operation in ("grouped_eigh", "grouped_damped_inverse"):
            getattr(ops, operation)(torch.eye(8).repeat(layers, 1, 1))
        elif operation == "grouped_preconditioner":
            ops.grouped_preconditioner(torch.eye(8, dtype=torch.float64).repeat(layers, 1, 1))
        elif operation in ("grouped_gram", "grouped_polar", "grouped_qr"):
            getattr(ops, operation)(xs)
        else:
            ops.grouped_svd_product(xs, xs, 4)
        counts.append(registry.launch_count() - before)
        assert registry.call_counts()[operation, "native"] == calls + 1
    assert counts == [1, 1]


def test_empty_lists() -> None:
    ops.grouped_adamw_([], [], [], [], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0, step=1)
    assert ops.grouped_qr([])[0] == []
    assert ops.grouped_polar([]) == []
    assert ops.grouped_gram([]).shape == (0, 0, 0)
    assert ops.grouped_solve(torch.empty(0, 8, 8), []) == []
    assert ops.grouped_svd_product([], [], 3)[0] == []


def _work_in_child(results: multiprocessing.Queue, x: Tensor) -> None:
    with registry.force("native"):
        qs, rs = ops.grouped_qr([x] * 8)
        p, zero = x.clone(), torch.zeros_like(x)
        ops.grouped_adamw_([p], [x], [zero], [zero.clone()], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0, step=1)
    results.put((qs[0].numpy(), rs[0].numpy()))  # torch's own products may wait for ever in a forked child


def test_forked_child(threads: None) -> None:
    """OpenMP's threads do not survive a fork: the child must work, serially, and not wait for them for ever."""
    x = torch.randn(3000, 8)
    ops.grouped_qr([x] * 8)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_work_in_child, args=(results, x))
    child.start()
    try:
        q, r = map(torch.from_numpy, results.get(timeout=60))
    finally:
        child.kill()
        child.join()
    assert (q.mT @ q - torch.eye(8)).abs().max() < 1e-5 and (q @ r - x).abs().max() < 1e-4


def test_refusals_name_the_reason() -> None:
    wide_factor = torch.randn(300, 129)
    with pytest.raises(registry.BackendError, match="rank 129"):
        ops.grouped_qr([wide_factor])
    with pytest.raises(registry.BackendError, match="129 columns"):
        ops.grouped_svd_product([wide_factor], [wide_factor], 4)
    for operation in (ops.grouped_eigh, ops.grouped_damped_inverse, ops.grouped_preconditioner):
        with pytest.raises(registry.BackendError, match="rank 129"):
            operation(torch.eye(129, dtype=torch.float64)[None])
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = torch.zeros(2, 3, 4, 5)
    with pytest.raises(registry.BackendError, match="strides"):
        ops.grouped_adamw_([channels_last], [channels_last], [state], [state], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0, step=1)
    x = torch.randn(4, 8)
    with pytest.raises(registry.BackendError, match="GEMM"):
        ops.lora_linear(x, None, None, torch.randn(2, 8), torch.randn(3, 2))


def test_tables_are_checked() -> None:
    u = torch.randn(8, 4)
    with pytest.raises(ValueError, match="sections"):
        _csrc.svd_product(2, array("q", [0] * 10), 0, 4, 2, u.data_ptr(), 1)


def test_lists_are_checked() -> None:
    x, rs = torch.randn(9, 4), torch.empty(1, 4, 4)
    empty = torch.empty(9, 4, device="meta")
    for wrong, said in (([x[:3]], "not tall"), ([x[0]], "no matrix"), ([x, x], "different lengths"), ([empty], "strided|memory")):
        with pytest.raises(ValueError, match=said):
            _csrc.qr(wrong, 0, None, None, 0, None, [x], 0, None, 0, 4, rs.data_ptr(), 1)
    with pytest.raises(ValueError, match="do not fit"):
        _csrc.qr([x], 0, None, None, 0, None, [x[:8]], 0, None, 0, 4, rs.data_ptr(), 1)
    tail = ([], [], 0.1, 0.9, 0.99, 1e-8, 0.0, 1.0, True, False, 0, 0, 0, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="do not fit"):
        _csrc.adamw([x], [x[:8]], [], [], None, *tail)
    x.grad = x.clone()
    layout = _csrc.gather([x], [0], {x: {}}, "exp_avg", "exp_avg_sq")[-1]
    with pytest.raises(ValueError, match="a layout of other lists"):
        _csrc.adamw([x, x], [x, x], [], [], layout, *tail)
    with pytest.raises(ValueError, match="a layout of another list"):
        _csrc.gram([x, x], 0, _csrc.matrix_layout([x], 0), None, 0, 0, True, 4, 4, rs.data_ptr(), 1)


def test_results_and_operands_without_memory_are_refused() -> None:
    x, square = torch.randn(9, 4), torch.eye(4)[None]
    lorsum = array("q", [0] * 14), 1, array("q", [0] * 8)
    calls = {
        "grouped_qr": lambda: _csrc.qr([x], 0, None, None, 0, None, [x.clone()], 0, None, 0, 4, 0, 1),
        "grouped_svd_product": lambda: _csrc.svd_product(
            1, array("q", [*[x.data_ptr()] * 4, 9, 9, *[4, 1] * 4]), 0, 4, 2, 0, 1
        ),
        "grouped_gram": lambda: _csrc.gram([x], 0, None, None, 0, 0, True, 4, 4, 0, 1),
        "grouped_solve": lambda: _csrc.solve([x], [x.clone()], False, 0, False, 4, 0, 0.1, 1),
        "grouped_eigh": lambda: _csrc.eigh(1, 4, 0, square.data_ptr(), 16, 4, 1, 0, 0, 1),
        "grouped_damped_inverse": lambda: _csrc.damped_inverse(1, 4, 0, 0, 16, 4, 1, 0.1, square.data_ptr(), 1),
        "grouped_preconditioner": lambda: _csrc.preconditioner(1, 4, 0, square.data_ptr(), 0, 0.1, 1.0, False, 0, 0, 1),
        "grouped_lorsum": lambda: _csrc.lorsum(1, *lorsum, 0, 0, 0, 1, 0.0, True, 1),
        "grouped_altlora_turn": lambda: _csrc.altlora_turn(
            [x], [x], [], [], None, [x], 0, None, [], [1], 0.1, 0.9, 0.99, 1e-8, 0.0, 1.0, False, False, 4, 0, 0, 0.1, 0.1, 1.0, 1
        ),
    }  # fmt: skip
    for what, call in calls.items():
        with pytest.raises(ValueError, match=rf"^{what}: a tensor without memory \(fake, meta or distributed\)"):
            call()
    assert _csrc.gram([], 0, None, None, 0, 0, True, 4, 4, 0, 1) is None, "nothing is written"


def test_a_missing_extension_is_reported_once_with_its_cause() -> None:
    code = (
        "import sys, warnings; sys.modules['lowrank_kernels.backends.native._csrc'] = None\n"
        "import torch; from lowrank_kernels import ops; from lowrank_kernels.backends import registry\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    ops.grouped_qr([torch.randn(9, 3)]); ops.grouped_qr([torch.randn(9, 3)])\n"
        "found = [str(w.message) for w in caught if 'native' in str(w.message)]\n"
        "assert len(found) == 1 and 'did not load' in found[0] and 'compiler' in found[0], found\n"
        "assert 'did not load' in registry.unavailable()['native']\n"
        "assert registry.call_counts()['grouped_qr', 'reference'] == 2\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "LOWRANK_KERNELS_BACKEND": ""})
