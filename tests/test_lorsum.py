"""``grouped_lorsum`` on every backend: the least-squares sweeps of Listing 1, the truncated SVD that they approach, and robustness."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.naive.oplora import lorsum
from lowrank_kernels import ops
from lowrank_kernels.backends import BackendError, force, implementations, launch_count

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = [name for name in ("reference", "native", "triton") if name in implementations("grouped_lorsum")]
PRODUCTS = [name for name in BACKENDS if name in implementations("grouped_lorsum_product")]
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def where(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything is made on the GPU where there is one and the test is of Triton, which takes nothing else there."""
    gpu = torch.cuda.is_available() and "triton" in request.node.name
    with torch.device("cuda") if gpu else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def running(backend: str, operation: str = "grouped_lorsum") -> Iterator[None]:
    """Force a backend, without gradients; skip where it says that it cannot take the call."""
    with force(f"{operation}={backend}"), torch.no_grad():
        try:
            yield
        except BackendError as error:
            pytest.skip(str(error))


def matrix(rows: int, columns: int, dtype: torch.dtype, layout: int = 0) -> Tensor:
    """Random, of norm about √columns: dense, transposed, a column slice, or every second row and column."""
    values = (torch.randn(rows, columns, dtype=torch.float64) / rows**0.5).to(dtype)
    if layout == 0:
        return values
    if layout == 1:
        return values.mT.contiguous().mT
    wide = torch.full((2 * rows, 2 * columns), torch.nan, dtype=dtype)
    return (wide[:rows, columns:] if layout == 2 else wide[::2, ::2]).copy_(values)


class Problem:
    """Layers of ragged sizes with a start of rank r, terms of all kinds, coefficients that differ by layer."""

    def __init__(self, rank: int, dtype: torch.dtype, sizes: tuple[tuple[int, int], ...], tokens: int = 70, term_dtype=None) -> None:
        other = term_dtype or dtype
        self.rank, self.dtype, self.sizes = rank, dtype, sizes
        start = [[matrix(size[side], rank, dtype, (i + side) % 4) for i, size in enumerate(sizes)] for side in (0, 1)]
        thin = [[matrix(size[side], 3 + i % 3, other, (i + 2 * side) % 4) for i, size in enumerate(sizes)] for side in (0, 1)]
        gradient = [[matrix(size[side], tokens + i, other, 1 + i % 2) for i, size in enumerate(sizes)] for side in (0, 1)]
        dense = [matrix(*size, other, i % 4) for i, size in enumerate(sizes)]
        transposed = [matrix(*size, other, (i + 1) % 4) for i, size in enumerate(sizes)]
        self.start = start[0], start[1]
        self.terms: list[Any] = [self.start, (thin[0], thin[1]), (gradient[0], gradient[1]), dense, transposed]
        self.numbers = [1.0, -0.5, 0.2, [0.3 + 0.1 * i for i in range(len(sizes))], -0.25]
        self.coefficients: list[Any] = [*self.numbers[:3], torch.tensor(self.numbers[3], dtype=torch.float64), self.numbers[4]]

    def factors(self, i: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """The terms of layer i as pairs of factors."""
        pairs = []
        for term in self.terms:
            left, right = (term[0][i], term[1][i]) if isinstance(term, tuple) else (term[i], torch.eye(self.sizes[i][1]))
            pairs.append((left.to(dtype), right.to(dtype)))
        return pairs

    def naive(self, i: int, dtype: torch.dtype, **options) -> tuple[Tensor, Tensor]:
        """Listing 1 for layer i, in ``dtype``."""
        start = self.start[0][i].to(dtype), self.start[1][i].to(dtype)
        cs = [c[i] if isinstance(c, list) else c for c in self.numbers]
        return lorsum(start, self.factors(i, dtype), cs, **options)


SIZES = ((40, 33), (96, 64), (7, 130), (65, 31))
LARGE = ((130, 600), (1100, 96), (513, 257))


def check(problem: Problem, us: list[Tensor], vs: list[Tensor], **options) -> None:
    """|out − ref64| ≤ 2·|torch in the same dtype − ref64| + 8·eps·max|ref64|; fp64 is judged by twice fp32's error, in proportion,
    and once more: there ref64 itself is off by as much as torch in that dtype."""
    times = 3 if problem.dtype == torch.float64 else 2
    proportion = 2 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps if problem.dtype == torch.float64 else 1.0
    for i in range(len(us)):
        exact = problem.naive(i, torch.float64, **options)
        same = [x.to(problem.dtype) for x in problem.naive(i, torch.float32, **options)]
        for out, own, truth in zip((us[i], vs[i]), same, exact, strict=True):
            assert out.shape == truth.shape and out.dtype == problem.dtype and out.isfinite().all()
            error, theirs = (out.double() - truth).abs().max(), (own.double() - truth).abs().max() * proportion
            bound = times * theirs + 8 * torch.finfo(problem.dtype).eps * truth.abs().max()
            assert error <= bound, f"layer {i}: error {error:.2e}, torch's {theirs:.2e}, bound {bound:.2e}"


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_sweeps_are_those_of_listing_1(backend: str, dtype: torch.dtype, rank: int) -> None:
    for first, sweeps in (("u", 2), ("v", 1)) if backend != "triton" else (("uv"[rank % 2], 1),):
        sizes, tokens = (SIZES, 70) if backend != "triton" else (SIZES[:1], 140 if rank == 1 else 7)  # the interpreter takes its time
        problem = Problem(rank, dtype, sizes, tokens, torch.bfloat16 if dtype == torch.float32 and sweeps == 1 else None)
        options = {"sweeps": sweeps, "proximal": 0.1, "first": first}
        out = tuple([torch.full_like(x, math.nan) for x in side] for side in problem.start)
        with running(backend):
            us, vs = ops.grouped_lorsum(problem.start, problem.terms, problem.coefficients, out=out, **options)
        assert us[0] is out[0][0] and vs[0] is out[1][0]
        check(problem, us, vs, **options)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton")
@pytest.mark.parametrize("rank", [40, pytest.param(128, marks=pytest.mark.large)])  # the interpreter takes its time
def test_large_ranks_on_triton(rank: int) -> None:
    """Tiles of 64 and 128 columns, of which the first has to be filled up."""
    problem = Problem(rank, torch.float32, ((rank + 30, rank + 5),), 9)
    with running("triton"):
        us, vs = ops.grouped_lorsum(problem.start, problem.terms, problem.coefficients, 1, 0.1)
    check(problem, us, vs, sweeps=1, proximal=0.1)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank, tokens", [(8, 300), (33, 129), (64, 70), (128, 200)])
def test_large_layers_and_ranks(backend: str, dtype: torch.dtype, rank: int, tokens: int) -> None:
    problem = Problem(rank, dtype, LARGE, tokens)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with running(backend):
        us, vs = ops.grouped_lorsum(problem.start, problem.terms, problem.coefficients, 2, 0.1)
        one_by_one = [
            ops.grouped_lorsum(
                ([problem.start[0][i]], [problem.start[1][i]]),
                [([t[0][i]], [t[1][i]]) if isinstance(t, tuple) else [t[i]] for t in problem.terms],
                [c[i] if isinstance(c, list) else c for c in problem.numbers],
                2,
                0.1,
            )
            for i in range(len(LARGE))
        ]
    torch.set_num_threads(before)
    check(problem, us, vs, sweeps=2, proximal=0.1)
    # Neither the other layers nor how many threads share a layer changes a bit.
    for i, (u, v) in enumerate(one_by_one):
        assert torch.equal(u[0], us[i]) and torch.equal(v[0], vs[i])


@on_every_backend
def test_many_sweeps_are_the_truncated_svd(backend: str) -> None:
    """Subspace iteration: the excess error falls by (σ₅/σ₄)⁴ a sweep, here 1/16."""
    left, right = (torch.linalg.qr(torch.randn(d, 12, dtype=torch.float64))[0] for d in (40, 33))
    values = 2.0 ** -torch.arange(12, dtype=torch.float64)
    target, start = (left * values) @ right.mT, ([matrix(40, 4, torch.float64)], [matrix(33, 4, torch.float64)])
    excess = []
    for sweeps in (1, 2, 3, 6):
        with running(backend):
            us, vs = ops.grouped_lorsum(start, [([left * values], [right])], [1.0], sweeps)
        excess.append(float((target - us[0] @ vs[0].mT).norm() / values[4:].norm() - 1))
    assert all(-1e-9 <= later <= earlier + 1e-9 for earlier, later in itertools.pairwise(excess)), excess
    assert excess[-1] < 1e-2 * excess[0] + 1e-9, excess


@on_every_backend
def test_a_sum_of_rank_r_is_met_in_one_sweep(backend: str) -> None:
    start = [matrix(30, 3, torch.float64)], [matrix(20, 3, torch.float64)]
    term = [matrix(30, 3, torch.float64)], [matrix(20, 3, torch.float64)]
    with running(backend):
        us, vs = ops.grouped_lorsum(start, [term, term], [0.75, -0.25], 1)
    torch.testing.assert_close(us[0] @ vs[0].mT, 0.5 * term[0][0] @ term[1][0].mT, rtol=0, atol=1e-9)  # the 3 × 3 systems are random


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rank_deficient_factors_keep_their_start(backend: str, dtype: torch.dtype) -> None:
    """Without λ: directions that the other side does not span stay, as in the limit λ → 0, and nothing becomes NaN."""
    u, v, p, q = (matrix(d, 4, dtype) for d in (30, 20, 30, 20))
    tolerance = 1e3 * torch.finfo(dtype).eps
    holed = v.clone()
    holed[:, 1] = 0
    twice = v.clone()
    twice[:, 3] = twice[:, 2]
    with running(backend):
        us, vs = ops.grouped_lorsum(([torch.zeros_like(u), u, u], [v, holed, twice]), [([p] * 3, [q] * 3)], [1.0], 1)
        nothing = ops.grouped_lorsum(([torch.zeros_like(u)], [v]), [([p], [q])], [1.0], 1, first="v")
    assert all(x.isfinite().all() for x in (*us, *vs))
    # V of rank 3: U's column that nothing tells about is what it was (then V is solved for U in full).
    torch.testing.assert_close(us[1][:, 1], u[:, 1], rtol=tolerance, atol=tolerance)
    lacking = torch.linalg.lstsq(us[1].double(), p.double() @ q.double().mT).solution.mT
    rounding = torch.finfo(dtype).eps * float(torch.linalg.cond(us[1].double())) ** 2 * float(lacking.abs().max())
    torch.testing.assert_close(vs[1].double(), lacking, rtol=0, atol=1e2 * rounding)
    # Equal columns of V say nothing of the difference of U's: it stays of the size it was.
    assert (us[2][:, 3] - us[2][:, 2]).norm() < 2 * (u[:, 3] - u[:, 2]).norm()
    # U = 0, solved for V first: V has nothing to learn and stays; U is then the best for it.
    torch.testing.assert_close(nothing[1][0], v, rtol=tolerance, atol=tolerance)
    best = torch.linalg.lstsq(v.double(), (p.double() @ q.double().mT).mT).solution.mT
    torch.testing.assert_close(nothing[0][0].double(), best, rtol=0, atol=1e2 * tolerance)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fewer_tokens_than_columns(backend: str, dtype: torch.dtype) -> None:
    """LoRA's start without λ: UVᵀ is the best for its U of rank 2, and V the nearest to its start, columns weighted as U's are long."""
    start, s, x = matrix(20, 4, dtype), matrix(30, 2, dtype), matrix(20, 2, dtype)
    with running(backend):
        us, vs = ops.grouped_lorsum(([torch.zeros(30, 4, dtype=dtype)], [start]), [([s], [x])], [1.0], 1)
    u, v, v0 = us[0].double(), vs[0].double(), start.double()
    target = s.double() @ x.double().mT
    left, values, right = (part[..., :2] for part in torch.svd(u))
    rounding = torch.finfo(dtype).eps * float(values[0] / values[1]) * float(target.norm())
    torch.testing.assert_close(u @ v.mT, left @ left.mT @ target, rtol=0, atol=1e4 * rounding)
    lengths = u.norm(dim=0)
    spanned = (left * values) @ right.mT  # U without the rounding that gives it a third singular value
    nearest = v0 + (torch.linalg.pinv(spanned / lengths, rtol=1e-5) @ (target - spanned @ v0.mT)).mT / lengths
    noise = 20.0 if dtype == torch.float64 else 0.5
    assert ((v - nearest) * lengths).norm() <= noise * (v0 * lengths).norm()


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank, tokens", [(5, 2), (8, 3), (16, 7), (32, 4)])
def test_fewer_tokens_than_columns_lose_no_digits(backend: str, dtype: torch.dtype, rank: int, tokens: int) -> None:
    """Without λ: after one sweep both factors are of a lower rank than they have columns, and their Gram matrices singular to rounding."""
    u, v = torch.zeros(50, rank, dtype=dtype), torch.randn(40, rank, dtype=dtype)
    s, x = torch.randn(50, tokens, dtype=dtype), torch.randn(40, tokens, dtype=dtype)
    with running(backend):
        (u,), (v,) = ops.grouped_lorsum(([u], [v]), [([u], [v]), ([s], [x])], [1.0, -0.1], 2, 0.0)
    exact = -0.1 * s.double() @ x.double().mT
    assert (u.double() @ v.double().mT - exact).norm() <= 1e3 * torch.finfo(dtype).eps * exact.norm()


@on_every_backend
def test_ill_conditioned_systems_are_solved_in_fp64(backend: str) -> None:
    """σ₁ = 10, κ = 1e6, λ = 1e-6: an fp32 Cholesky of VᵀV + λI fails."""
    left, _ = torch.linalg.qr(torch.randn(60, 8, dtype=torch.float64))
    turn, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    v = (left * torch.logspace(1, -5, 8, dtype=torch.float64) @ turn).float()
    u, p, q = (matrix(d, 8, torch.float32) for d in (50, 50, 60))
    with running(backend):
        us, vs = ops.grouped_lorsum(([u], [v]), [([p], [q])], [1.0], 1, 1e-6)
    exact = lorsum((u.double(), v.double()), [(p.double(), q.double())], [1.0], 1, 1e-6)
    product = exact[0] @ exact[1].mT
    # U is rounded to fp32, and is √(σ₁²/λ) = 1e4 times larger where V is small.
    assert ((us[0].double() @ vs[0].double().mT) - product).norm() < 1e4 * torch.finfo(torch.float32).eps * product.norm()


@on_every_backend
@pytest.mark.parametrize("where", ["u", "v", "left", "right", "dense", "coefficient"])
def test_what_is_not_finite_stays_in_its_layer(backend: str, where: str) -> None:
    problem = Problem(4, torch.float32, SIZES[:3] if backend != "triton" else ((9, 8),) * 3, 9)
    with running(backend):
        clean = ops.grouped_lorsum(problem.start, problem.terms, problem.coefficients, 1, 0.1)
        place = {"u": problem.start[0], "v": problem.start[1], "left": problem.terms[2][0], "right": problem.terms[2][1],
                 "dense": problem.terms[3]}  # fmt: skip
        if where == "coefficient":
            problem.coefficients[3][1] = math.nan
        else:
            place[where][1][2, 1] = math.inf if where == "dense" else math.nan
        us, vs = ops.grouped_lorsum(problem.start, problem.terms, problem.coefficients, 1, 0.1)
    for out, before in zip((us, vs), clean, strict=True):
        assert out[1].isnan().all()
        assert torch.equal(out[0], before[0]) and torch.equal(out[2], before[2])


@on_every_backend
def test_the_result_may_replace_the_start(backend: str) -> None:
    problem = Problem(4, torch.float32, SIZES[:2] if backend != "triton" else ((9, 8),) * 2, 9)
    with running(backend):
        expected = ops.grouped_lorsum(problem.start, problem.terms, problem.coefficients, 2, 0.1)
        versions = [x._version for x in problem.start[0]]
        us, vs = ops.grouped_lorsum(problem.start, problem.terms, problem.coefficients, 2, 0.1, out=problem.start)
    assert all(a is b for a, b in zip(us, problem.start[0], strict=True))
    assert all(torch.equal(a, b) for out, e in zip((us, vs), expected, strict=True) for a, b in zip(out, e, strict=True))
    assert all(x._version > before for x, before in zip(problem.start[0], versions, strict=True))


@on_every_backend
def test_memory_that_holds_another_dtype_is_another_term(backend: str) -> None:
    """As what autocast frees and allocates again may: the same address, shape and strides."""
    us, vs = [matrix(9, 2, torch.float32)], [matrix(8, 2, torch.float32)]
    out = [torch.empty(9, 2)], [torch.empty(8, 2)]
    memory = torch.empty(2, 27)
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (memory[i].view(dtype)[: 3 * rows].view(rows, 3).copy_(matrix(rows, 3, dtype)) for i, rows in enumerate((9, 8)))
        with running(backend):
            ops.grouped_lorsum((us, vs), [(us, vs), ([left], [right])], [1.0, 0.5], 1, 0.1, out=out)
        pairs = [(x.double(), y.double()) for x, y in ((us[0], vs[0]), (left, right))]
        exact = lorsum(pairs[0], pairs, [1.0, 0.5], 1, 0.1)
        for found, truth in zip((out[0][0], out[1][0]), exact, strict=True):
            torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["numbers", "tensor", "vector", "tensors"])
def test_forms_of_coefficients(form: str) -> None:
    us, vs = [matrix(9, 2, torch.float64) for _ in range(3)], [matrix(8, 2, torch.float64) for _ in range(3)]
    terms = [(us, vs), [matrix(9, 8, torch.float64) for _ in range(3)]]
    values = torch.tensor([[1.0, 1.0, 1.0], [0.1, 0.2, 0.3]])
    forms: dict[str, Any] = {"numbers": values.tolist(), "tensor": values, "tensors": [torch.tensor(1.0), values[1]]}
    if form == "vector":
        values[1], forms["vector"] = 0.5, torch.tensor([1.0, 0.5])
    for backend in BACKENDS:
        with running(backend):
            got = ops.grouped_lorsum((us, vs), terms, forms[form], 1, 0.1)
        for i in range(3):
            pairs = [(us[i], vs[i]), (terms[1][i], torch.eye(8, dtype=torch.float64))]
            exact = lorsum((us[i], vs[i]), pairs, values[:, i].double().tolist(), 1, 0.1)
            for out, truth in zip((got[0][i], got[1][i]), exact, strict=True):
                torch.testing.assert_close(out, truth, rtol=1e-11, atol=1e-12)


def test_launches_do_not_grow_with_the_number_of_layers() -> None:
    for backend in BACKENDS[1:]:
        counts = []
        for layers in (3, 12):
            us, vs = ([torch.randn(6, 2) for _ in range(layers)] for _ in range(2))
            before = launch_count()
            with running(backend):
                ops.grouped_lorsum((us, vs), [(us, vs), [torch.randn(6, 6) for _ in us]], [1.0, 0.1], 1)
            counts.append(launch_count() - before)
        assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("backend", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank, tokens", [(1, 5), (7, 70), (33, 140)])
def test_products_with_sums(backend: str, dtype: torch.dtype, rank: int, tokens: int) -> None:
    problem = Problem(rank, dtype, SIZES, tokens, torch.bfloat16 if rank == 7 else None)
    for sides in ((0, 1), (1, 0)):  # G X, and GᵀX
        terms = [(term[sides[0]], term[sides[1]]) if isinstance(term, tuple) else [d if sides[0] == 0 else d.mT for d in term]
                 for term in problem.terms]  # fmt: skip
        with running(backend, "grouped_lorsum_product"):
            before = launch_count()
            ys = ops.grouped_lorsum_product(terms, problem.start[sides[1]], problem.coefficients)
            launches = launch_count() - before
        assert launches == {"reference": 0, "native": 1, "triton": 5}[backend]
        for i, (y, x) in enumerate(zip(ys, problem.start[sides[1]], strict=True)):
            cs = [c[i] if isinstance(c, list) else c for c in problem.numbers]
            truth, own = (
                sum(
                    c * ((p, q)[sides[0]] @ ((p, q)[sides[1]].T @ x.to(wide)))
                    for c, (p, q) in zip(cs, problem.factors(i, wide), strict=True)
                )
                for wide in (torch.float64, torch.promote_types(dtype, torch.float32))
            )
            assert y.dtype == own.dtype and y.shape == own.shape
            theirs = (own.double() - truth).abs().max()
            assert (y.double() - truth).abs().max() <= 2 * theirs + 8 * torch.finfo(y.dtype).eps * truth.abs().max()


@pytest.mark.parametrize("backend", PRODUCTS)
def test_products_stay_in_their_layer_and_of_nothing_are_zero(backend: str) -> None:
    problem = Problem(4, torch.float32, SIZES, 40)
    with running(backend, "grouped_lorsum_product"):
        clean = ops.grouped_lorsum_product(problem.terms, problem.start[1], problem.coefficients)
        problem.terms[2][0][1][3, 2] = math.nan
        spoilt = ops.grouped_lorsum_product(problem.terms, problem.start[1], problem.coefficients)
        assert spoilt[1][3].isnan().all() and spoilt[1].isnan().sum() == 4
        assert all(torch.equal(clean[i], spoilt[i]) for i in (0, 2, 3))
        empty = [[x[:, :0] for x in side] for side in problem.start]
        for terms in ([tuple(empty)], [tuple(empty)] * 2):
            assert not any(y.any() for y in ops.grouped_lorsum_product(terms, problem.start[1], [1.0] * len(terms)))


def test_misuse_of_products_is_named() -> None:
    us, vs = Problem(4, torch.float32, SIZES, 40).start
    for terms, xs, message in (
        ([], vs, "non-empty list"),
        ([(us, vs)], us, r"terms\[0\]\[1\]"),
        ([(us, vs)], [*vs[:-1], vs[-1][:, :2]], "call once per width"),
        ([(us, vs)], vs[:1], "equal lengths"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            ops.grouped_lorsum_product(terms, xs, [1.0] * len(terms))
    assert ops.grouped_lorsum_product([([], [])], [], [1.0]) == []
    torch.library.opcheck(torch.ops.lowrank_kernels.grouped_lorsum_product, (vs[:1], us[:1], vs[:1], [1.0], None))


def test_nothing_to_do() -> None:
    assert ops.grouped_lorsum(([], []), [([], [])], [1.0]) == ([], [])


def test_opcheck_and_no_backward() -> None:
    us, vs = [matrix(9, 2, torch.float32)], [matrix(8, 2, torch.float32)]
    arguments = (us, vs, [*us, matrix(9, 8, torch.float32)], [*vs, None], [1.0, 0.5], None, 1, 0.1, True)
    torch.library.opcheck(torch.ops.lowrank_kernels.grouped_lorsum, arguments)
    out = [torch.empty_like(us[0])], [torch.empty_like(vs[0])]
    torch.library.opcheck(torch.ops.lowrank_kernels.grouped_lorsum_out, (*arguments, *out))
    us[0].requires_grad_()
    result, _ = ops.grouped_lorsum((us, vs), [(us, vs)], [1.0])
    with pytest.raises(RuntimeError, match="no backward"):
        result[0].sum().backward()


def test_misuse_is_named() -> None:
    us, vs = [torch.randn(9, 2)] * 2, [torch.randn(8, 2)] * 2
    good: dict[str, Any] = {"targets": (us, vs), "terms": [(us, vs)], "coefficients": [1.0]}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"sweeps": 0}, "sweeps must be ≥ 1"),
        ({"sweeps": -1}, "sweeps must be ≥ 1"),
        ({"sweeps": 2**62}, "sweeps must be ≤ 2147483647, got"),
        ({"sweeps": True}, "sweeps must be an integer, got True"),
        *[({"proximal": value}, "proximal must be a number") for value in (None, "x", [])],
        *[({"coefficients": value}, "coefficients must be a list") for value in ("1", {0: 1.0}, {1.0}, 5, None)],
        *[({"coefficients": [value]}, r"coefficients\[0\] must be a number") for value in ("1.5", None, 1j, True)],
        ({"coefficients": [["2", 1.0]]}, r"coefficients\[0\]\[0\] must be a number, got '2'"),
        ({"coefficients": [[1.0, math.nan]]}, r"coefficients\[0\]\[1\] must be finite, got nan"),
        ({"coefficients": [math.nan]}, r"coefficients\[0\] must be finite, got nan"),
        ({"coefficients": torch.ones(1, device="meta")}, r"coefficients\[0\] must be real and hold values, got torch.float32 on meta"),
        *[({"out": value}, "out must be two lists of tensors") for value in (5, {}, [])],
        ({"out": (torch.ones(()), vs)}, r"out\[0\] must be a list of tensors, got Tensor"),
        ({"terms": [torch.ones(())]}, r"terms\[0\] must be a list of tensors, got Tensor"),
        ({"proximal": -1.0}, "proximal must be ≥ 0"),
        ({"proximal": math.nan}, "proximal must be ≥ 0"),
        ({"first": "a"}, "first must be one of 'u', 'v'"),
        ({"terms": []}, "terms must be a non-empty list"),
        ({"coefficients": [1.0, 2.0]}, "got 2 coefficients for 1 terms"),
        ({"coefficients": [[1.0]]}, r"coefficients\[0\] has 1 numbers for 2 layers"),
        ({"coefficients": [torch.ones(3)]}, r"coefficients\[0\] has shape \(3,\)"),
        ({"targets": us}, "targets must be two lists|targets"),
        ({"targets": (us, vs[:1])}, "equal lengths"),
        ({"targets": (us, [torch.randn(8, 3)] * 2)}, "has 3 columns"),
        ({"targets": ([us[0], torch.randn(9, 3)], [vs[0], torch.randn(8, 3)])}, "call once per rank"),
        ({"targets": (us, [v.double() for v in vs])}, "dtype"),
        ({"terms": [(us[:1], vs[:1])]}, "equal lengths"),
        ({"terms": [(vs, us)]}, r"terms\[0\]\[0\]\[0\] of shape \(8, 2\)"),
        ({"terms": [[torch.randn(8, 9)] * 2]}, r"terms\[0\]\[0\] of shape \(8, 9\)"),
        ({"terms": [(us, [v.double() for v in vs])]}, "dtype"),
        ({"out": (us, [torch.randn(7, 2)] * 2)}, "out"),
        ({"out": ([u.double() for u in us], [v.double() for v in vs])}, "out"),
    ]
    for change, message in wrong:
        with pytest.raises((ValueError, TypeError), match=message):
            ops.grouped_lorsum(**{**good, **change})
