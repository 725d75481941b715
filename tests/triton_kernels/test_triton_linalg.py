"""Linear algebra of Triton against the reference in fp64: in the interpreter without a GPU, on the GPU with one."""

from __future__ import annotations

import math

import pytest
import torch
from _numerics import conditioned
from _triton_kernels import WIDE
from torch import Tensor

pytest.importorskip("triton")
from lowrank_kernels.backends import launch_count, reference
from lowrank_kernels.backends.triton import damped_inverse, eigh, gram, polar, preconditioner, qr, solve, svd_product, sylvester

pytestmark = pytest.mark.usefixtures("nan_scratch")


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


# --- grouped_eigh, grouped_sylvester, grouped_damped_inverse --------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, rank", [(torch.float64, 1), (torch.float64, 5), (torch.float64, 16), (torch.float32, 8), (torch.float32, 33)]
)
def test_eigh(device: torch.device, dtype: torch.dtype, rank: int) -> None:
    q = conditioned(rank, rank, 1.0)
    spectra = [torch.randn(rank), torch.logspace(0, -12, rank), torch.arange(rank) % 3 == 0, torch.arange(rank) // 2, torch.zeros(rank)]
    matrices = [q * spectrum.double() @ q.mT for spectrum in spectra]
    scale = 1e30 if dtype == torch.float32 else 1e150
    matrices += [-q[:, :1] @ q[:, :1].mT, torch.ones(rank, rank).double(), scale * matrices[0], matrices[0] / scale, matrices[0] * math.nan]
    exact = torch.stack([(x + x.mT) / 2 for x in matrices]).to(dtype)
    # A slice, of which the lower triangles alone can be read.
    xs = torch.full((len(exact), rank, 2 * rank), math.nan, dtype=dtype)
    xs[:, :, rank:] = exact.tril()
    xs[:, :, rank:].masked_fill_(torch.ones(rank, rank).triu(1) > 0, math.nan)
    xs = xs.to(device)[:, :, rank:]
    values, alone = (torch.full((len(xs), rank), math.nan, dtype=dtype, device=device) for _ in range(2))
    vectors = torch.full_like(xs, math.nan, memory_format=torch.contiguous_format)
    before = launch_count()
    eigh.grouped_eigh(xs, values, vectors)
    eigh.grouped_eigh(xs, alone, None)
    assert launch_count() == before + 2
    assert values[-1].isnan().all() and vectors[-1].isnan().all() and alone[-1].isnan().all()
    bound = 8 * rank * torch.finfo(dtype).eps
    for x, λ, v, λ_alone in zip(exact[:-1].double(), values.cpu().double(), vectors.cpu().double(), alone.cpu().double(), strict=False):
        size = x.abs().max().item() or 1.0
        norm = (x / size).norm().item() or 1.0
        assert (v.mT @ v - torch.eye(rank)).abs().max() <= bound
        assert ((x / size) @ v - v * (λ / size)).norm() <= bound * norm
        assert (λ.diff() >= 0).all() and torch.equal(λ, λ_alone)
        assert (λ / size - torch.linalg.eigvalsh(x / size)).abs().max() <= bound * norm
    ok, reason = eigh.verify(torch.empty(1, 65, 65, device=device), values, vectors)
    assert not ok and "65" in reason


@pytest.mark.parametrize("rank", [1, 6, 16])
def test_sylvester(device: torch.device, rank: int) -> None:
    x, y, rhs = torch.randn(3, 4, rank, rank, dtype=torch.float64, device=device).unbind()
    left, right = x @ x.mT, y @ y.mT
    left[1], right[1] = 0, 0
    left[2], rhs[3, 0, 0] = math.nan, math.inf
    before, out = launch_count(), torch.full_like(rhs, math.nan)
    sylvester.grouped_sylvester(left.triu().mT, right.triu().mT, rhs, out)
    assert launch_count() == before + 1
    size = (left[0].norm() + right[0].norm()) * out[0].norm() + rhs[0].norm()
    assert (left[0] @ out[0] + out[0] @ right[0] - rhs[0]).norm() <= 8 * rank * torch.finfo(torch.float64).eps * size
    assert not out[1].any() and out[2].isnan().all() and not out[3].isfinite().any()


@pytest.mark.parametrize("damping", [0.0, 1e-5, 0.3])
@pytest.mark.parametrize(
    "dtype, rank", [(torch.float64, 1), (torch.float64, 5), (torch.float64, 16), (torch.float32, 8), (torch.float32, 33)]
)
def test_damped_inverse(device: torch.device, dtype: torch.dtype, rank: int, damping: float) -> None:
    kappas = [1.0, 1e3, 1e6] if dtype == torch.float32 else [1.0, 1e6, 1e12]
    factors = [10 * torch.linalg.qr(conditioned(2 * rank, rank, kappa), mode="r").R for kappa in kappas]
    factors += [torch.zeros(rank, rank).double()] if damping else []
    exact = torch.stack([*factors, factors[0] * math.nan]).to(dtype)
    below = torch.ones(rank, rank).tril(-1) > 0  # is not read
    rs = exact.masked_fill(below, math.nan).mT.contiguous().mT.to(device)
    out = torch.full_like(exact, math.nan, device=device)
    before = launch_count()
    damped_inverse.grouped_damped_inverse(rs, damping, out)
    assert launch_count() == before + 1
    assert out[-1].isnan().all()
    for r, inverse in zip(exact[:-1].double(), out.cpu().double(), strict=False):
        assert torch.equal(inverse, inverse.triu()) and (inverse.diagonal() > 0).all()
        tall = torch.cat([r.triu(), damping**0.5 * torch.eye(rank, dtype=torch.float64)])
        # The columns of [R; √δ I] R_δ⁻¹ are orthonormal.
        basis = tall @ inverse
        assert (basis.mT @ basis - torch.eye(rank)).abs().max() <= 8 * rank * torch.finfo(dtype).eps * torch.linalg.cond(tall)
    huge = torch.full((1, rank, rank), 1e30 if dtype == torch.float32 else 1e300, dtype=dtype, device=device).triu()
    damped_inverse.grouped_damped_inverse(huge, damping, out[:1])
    assert out[0].isfinite().all() and (out[0].diagonal() > 0).all()
    ok, reason = damped_inverse.verify(torch.empty(1, 65, 65, device=device), damping, out)
    assert not ok and "65" in reason


@pytest.mark.parametrize("operation", ["grouped_svd"])
def test_what_has_no_kernel_says_why(device: torch.device, operation: str) -> None:
    from lowrank_kernels.backends.registry import implementations

    ok, reason = implementations(operation)["triton"].verify()
    assert not ok and "GEMM" in reason
