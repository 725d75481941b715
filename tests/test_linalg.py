"""What the factorizations, Grams and solves promise, on every backend that takes CPU calls: accuracy, robustness, isolation, errors.

Factorizations are judged by orthogonality, residual and projectors, never against another library's signs or bases.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.harness import peak_temporary_bytes
from lowrank_kernels import AdamW, ops
from lowrank_kernels.backends import BackendError, force, implementations

SINGLE, DOUBLE = torch.float32, torch.float64
DTYPES = [SINGLE, DOUBLE]
#: ‖QᵀQ − I‖_max, and residuals relative to ‖X‖.
BOUND = {SINGLE: 1e-5, DOUBLE: 1e-13}
#: The worst condition number that QR must take.
WORST_KAPPA = {SINGLE: 1e6, DOUBLE: 1e12}
HEIGHTS = (57, 400, 129)


@contextlib.contextmanager
def running(operation: str, backend: str) -> Iterator[None]:
    """Force a backend for one operation; skip where it does not have it, or says that it cannot take the call."""
    if backend not in implementations(operation):
        pytest.skip(f"{backend} does not implement {operation}")
    with force(f"{operation}={backend}"):
        try:
            yield
        except BackendError as error:
            pytest.skip(str(error))


on_every_backend = pytest.mark.parametrize("backend", ["reference", "native"])
in_both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp64"])


def conditioned(rows: int, columns: int, kappa: float) -> Tensor:
    """A random fp64 matrix with singular values spread evenly, on a logarithmic scale, from 1 down to 1/kappa."""
    u, _ = torch.linalg.qr(torch.randn(rows, columns, dtype=DOUBLE))
    v, _ = torch.linalg.qr(torch.randn(columns, columns, dtype=DOUBLE))
    return u * torch.logspace(0, -math.log10(kappa), columns, dtype=DOUBLE) @ v.mT


def relative(error: Tensor, of: Tensor) -> float:
    """``‖error‖_F / ‖of‖_F`` in fp64, scaled first so that no square under- or overflows."""
    peak = of.double().abs().max().clamp_min(torch.finfo(DOUBLE).tiny)
    return float((error.double() / peak).norm() / (of.double() / peak).norm())


def orthogonality(q: Tensor) -> float:
    """``‖QᵀQ − I‖_max`` in fp64."""
    return float((q.double().mT @ q.double() - torch.eye(q.shape[1], dtype=DOUBLE)).abs().max())


# ------------------------------------------------------------------------------------------------------------------ QR and polar


def awkward(kind: str, rows: int, rank: int, dtype: torch.dtype) -> Tensor:
    """The matrices on which QR by Cholesky alone breaks down."""
    x = torch.randn(rows, rank, dtype=DOUBLE)
    if kind == "zero columns":
        x[:, ::2] = 0
    elif kind == "duplicate columns":
        x[:, rank // 2 :] = x[:, : rank - rank // 2]
    elif kind == "all zero":
        x.zero_()
    elif kind == "huge":
        x *= 1e18 if dtype == SINGLE else 1e180
    elif kind == "tiny":
        x *= 1e-18 if dtype == SINGLE else 1e-180
    elif kind == "both":  # columns of 1e18 beside columns of 1e-18
        x *= torch.tensor([1e18, 1e-18] * rank, dtype=DOUBLE)[:rank]
    elif kind == "denormal":
        x *= torch.finfo(dtype).tiny / 64
    elif kind == "one row twice":  # rank one
        x = x[:1].expand(rows, -1).clone()
    return x.to(dtype)


AWKWARD = ("zero columns", "duplicate columns", "all zero", "huge", "tiny", "both", "denormal", "one row twice")


def check_qr(x: Tensor, q: Tensor, r: Tensor, bound: float) -> None:
    assert q.isfinite().all() and r.isfinite().all()
    assert orthogonality(q) <= bound
    residual = (q.double() @ r.double() - x.double()).abs()
    denormal = x.shape[1] * torch.finfo(x.dtype).tiny
    assert residual.max() <= denormal or relative(residual, x) <= bound
    assert not r.tril(-1).any(), "R must be upper triangular"


@on_every_backend
@in_both_dtypes
@pytest.mark.parametrize("rank", [1, 4, 16, 33])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_qr_of_ill_conditioned_factors(backend: str, dtype: torch.dtype, rank: int, share: float) -> None:
    kappa = WORST_KAPPA[dtype] ** share
    xs = [conditioned(rows, rank, kappa).to(dtype) for rows in HEIGHTS]
    xs.append(conditioned(64, rank, kappa).to(dtype).mT.contiguous().mT)  # as A.mT has it
    with running("grouped_qr", backend):
        qs, rs = ops.grouped_qr(xs)
    for x, q, r in zip(xs, qs, rs, strict=True):
        check_qr(x, q, r, BOUND[dtype])
        assert (r.diagonal() >= 0).all()


@on_every_backend
@in_both_dtypes
@pytest.mark.parametrize("rank", [5, 16])
def test_qr_and_polar_of_awkward_factors(backend: str, dtype: torch.dtype, rank: int) -> None:
    xs = [awkward(kind, rows, rank, dtype) for kind in AWKWARD for rows in (rank, 130)]
    with running("grouped_qr", backend):
        (qs, rs), (again, again_rs) = ops.grouped_qr(xs), ops.grouped_qr(xs)
    for x, q, r in zip(xs, qs, rs, strict=True):
        check_qr(x, q, r, BOUND[dtype])
    assert torch.equal(rs, again_rs) and all(map(torch.equal, qs, again)), "not deterministic"


@on_every_backend
@in_both_dtypes
def test_qr_signs_follow_the_previous_q(backend: str, dtype: torch.dtype) -> None:
    xs = [torch.randn(rows, 6, dtype=DOUBLE).to(dtype) for rows in HEIGHTS]
    with running("grouped_qr", backend):
        start, _ = ops.grouped_qr(xs)
        flipped = [q * torch.tensor([1, -1, -1, 1, -1, 1]) for q in start]
        qs, rs = ops.grouped_qr(xs, flipped)
        in_place = [q.clone() for q in flipped]
        ops.grouped_qr(xs, in_place, out=in_place)
    for x, q, r, before, written in zip(xs, qs, rs, flipped, in_place, strict=True):
        torch.testing.assert_close(q, before, rtol=0, atol=4 * BOUND[dtype])
        check_qr(x, q, r, BOUND[dtype])
        assert torch.equal(q, written)


@on_every_backend
@in_both_dtypes
@pytest.mark.parametrize("kappa_share", [0, 1])
def test_polar_is_the_nearest_orthonormal_matrix(backend: str, dtype: torch.dtype, kappa_share: int) -> None:
    # Polar factors are as sensitive as the smallest singular value is small: forward error eps·κ, orthogonality none of it.
    kappa = 1e4**kappa_share
    xs = [3 * conditioned(rows, 8, kappa).to(dtype) for rows in HEIGHTS]
    with running("grouped_polar", backend):
        qs = ops.grouped_polar(xs)
        out = [torch.full_like(x, math.nan) for x in xs]
        ops.grouped_polar(xs, out=out)
    for x, q, written in zip(xs, qs, out, strict=True):
        assert orthogonality(q) <= BOUND[dtype] and torch.equal(q, written)
        symmetric = q.double().mT @ x.double()
        assert relative(symmetric - symmetric.mT, symmetric) <= BOUND[dtype]
        assert torch.linalg.eigvalsh(symmetric).min() > 0
        u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
        torch.testing.assert_close(q.double(), u @ vh, rtol=0, atol=8 * torch.finfo(dtype).eps * kappa + BOUND[dtype])


@on_every_backend
@in_both_dtypes
def test_polar_completes_what_is_rank_deficient(backend: str, dtype: torch.dtype) -> None:
    xs = [awkward(kind, rows, 5, dtype) for kind in AWKWARD for rows in (5, 130)]
    with running("grouped_polar", backend):
        qs, again = ops.grouped_polar(xs), ops.grouped_polar(xs)
    for q, repeated in zip(qs, again, strict=True):
        assert orthogonality(q) <= BOUND[dtype]
        assert torch.equal(q, repeated), "not deterministic"


# ------------------------------------------------------------------------------------------------------------------ Gram and solve


@on_every_backend
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE, torch.bfloat16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("rank", [1, 8, 33])
def test_gram(backend: str, dtype: torch.dtype, double: bool, rank: int) -> None:
    xs = [torch.randn(rows, rank).to(dtype) for rows in (*HEIGHTS, 3, 0)] + [torch.randn(rank, 90).to(dtype).mT]
    ys = [torch.randn(x.shape[0], 5).to(dtype) for x in xs]
    result = DOUBLE if double or dtype == DOUBLE else SINGLE
    with running("grouped_gram", backend):
        own = ops.grouped_gram(xs, dtype=DOUBLE if double else None)
        cross = ops.grouped_gram(xs, ys, dtype=DOUBLE if double else None)
    assert own.dtype == cross.dtype == result
    assert torch.equal(own, own.mT), "exactly symmetric"
    for x, y, gram, product in zip(xs, ys, own, cross, strict=True):
        for left, right, got in ((x, x, gram), (x, y, product)):
            exact = left.double().mT @ right.double()
            simple = left.to(result).mT @ right.to(result)
            scale = float(exact.abs().max()) if exact.numel() else 0.0
            bound = 2 * float((simple.double() - exact).abs().max()) + 8 * torch.finfo(result).eps * scale
            # Sums of another order than torch's: sqrt(n) roundings.
            bound += torch.finfo(result).eps * float(left.double().norm(dim=0).max() * right.double().norm(dim=0).max())
            assert float((got.double() - exact).abs().max()) <= bound


@on_every_backend
def test_gram_in_fp64_holds_what_overflows_fp32(backend: str) -> None:
    xs = [1e30 * torch.randn(200, 4), 1e-30 * torch.randn(200, 4), 1e-40 * torch.randn(200, 4)]
    with running("grouped_gram", backend):
        grams = ops.grouped_gram(xs, dtype=DOUBLE)
    for x, gram in zip(xs, grams, strict=True):
        torch.testing.assert_close(gram, x.double().mT @ x.double(), rtol=1e-10, atol=0)


@on_every_backend
@in_both_dtypes
@pytest.mark.parametrize("rank", [1, 8, 33])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("damping", [0.0, 1e-6, 0.3])
def test_solve(backend: str, dtype: torch.dtype, rank: int, side: str, damping: float) -> None:
    kappas = [1.0, 1e3, 1e5 if dtype == SINGLE else 1e12, 30.0]
    grams = torch.stack([(q := conditioned(rank, rank, 1.0)) * torch.logspace(0, -math.log10(k), rank) @ q.mT for k in kappas]).to(dtype)
    grams += torch.full_like(grams, math.nan).triu(1)  # only the lower triangles are read
    shapes = [(rank, width) if side == "left" else (width, rank) for width in (70, 1, 7, 300)]
    rhs = [torch.randn(shape, dtype=dtype) for shape in shapes]
    rhs[3] = rhs[3].mT.contiguous().mT
    with running("grouped_solve", backend):
        solutions = ops.grouped_solve(grams, rhs, damping, side=side)
        given, own = [torch.full_like(b, math.nan) for b in rhs], [b.clone() for b in rhs]
        for out, of in ((given, rhs), (own, own)):
            assert all(x is y for x, y in zip(ops.grouped_solve(grams, of, damping, side=side, out=out), out, strict=True))
            assert all(x._version > 0 for x in out)
    eps = torch.finfo(dtype).eps
    for found in (solutions, given, own):
        for gram, b, solution, kappa in zip(grams, rhs, found, kappas, strict=True):
            lower = gram.double().tril()
            matrix = lower + lower.tril(-1).mT + damping * torch.eye(rank, dtype=DOUBLE)
            wide, right = (x.double() if side == "left" else x.double().mT for x in (solution, b))
            # A backward stable solution, whatever the condition number; and the forward error that goes with it.
            assert (matrix @ wide - right).norm() <= 8 * rank * eps * (matrix.norm() * wide.norm() + right.norm())
            exact = torch.linalg.solve(matrix, right)
            assert (wide - exact).norm() <= 8 * rank * eps * min(kappa, 1 / max(damping, 1e-300)) * exact.norm() * 2


@on_every_backend
def test_solve_in_fp64_with_the_smallest_damping_survives_kappa_1e6(backend: str) -> None:
    """σ₁ = 10, κ = 1e6, δ = 1e-6: an fp32 Cholesky of the damped Gram fails every time, an fp64 one never."""
    xs = [10 * conditioned(300, 8, 1e6).float() for _ in range(20)]
    rhs = [torch.randn(8, 50) for _ in xs]
    with running("grouped_solve", backend):
        grams = ops.grouped_gram(xs, dtype=DOUBLE)
        solutions = ops.grouped_solve(grams, rhs, 1e-6)
    for x, b, solution in zip(xs, rhs, solutions, strict=True):
        exact = torch.linalg.solve(x.double().mT @ x.double() + 1e-6 * torch.eye(8, dtype=DOUBLE), b.double())
        torch.testing.assert_close(solution, exact.float(), rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


@on_every_backend
@in_both_dtypes
def test_solve_takes_a_stack_and_reports_what_is_not_definite(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, 20, 4, dtype=dtype)
    grams, rhs = x.mT @ x, torch.randn(5, 4, 4, dtype=dtype)
    spoilt = grams.clone()
    spoilt[1] = -torch.eye(4, dtype=dtype)
    spoilt[2, 3, 0] = math.nan
    spoilt[4] = 0
    with running("grouped_solve", backend):
        good, damped, bad = ops.grouped_solve(grams, rhs), ops.grouped_solve(spoilt, rhs, 0.5), ops.grouped_solve(spoilt, rhs)
        for out in (torch.full_like(rhs, math.nan), rhs.clone()):
            assert ops.grouped_solve(grams, rhs, out=out) is out and torch.equal(out, good)
    torch.testing.assert_close(good, torch.linalg.solve(grams.double(), rhs.double()).to(dtype), rtol=0, atol=1e4 * torch.finfo(dtype).eps)
    for index, (ok, ok_damped) in enumerate([(True, True), (False, False), (False, False), (True, True), (False, True)]):
        assert bad[index].isfinite().all() if ok else bad[index].isnan().all(), index
        assert damped[index].isfinite().all() if ok_damped else damped[index].isnan().all(), index
        assert not ok or torch.equal(bad[index], good[index])
    torch.testing.assert_close(damped[4], 2 * rhs[4])


# ------------------------------------------------------------------------------------------------------------------ eigenvalues


def symmetric_matrices(rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Symmetric matrices on which eigenvalue solvers break down, fp64, representable in ``dtype``."""
    q = conditioned(rank, rank, 1.0)
    spread, noise = torch.linspace(-1, 1, rank, dtype=DOUBLE), torch.randn(rank, rank, dtype=DOUBLE)
    grades = torch.logspace(0, -6, rank, dtype=DOUBLE)
    path = torch.ones(rank - 1, dtype=DOUBLE)
    chain = torch.diag(path, 1) + torch.diag(path, -1)
    found = {
        "indefinite": q * torch.randn(rank, dtype=DOUBLE) @ q.mT,
        "graded spectrum": q * torch.logspace(0, -12, rank, dtype=DOUBLE) @ q.mT,
        "graded entries": grades[:, None] * (noise + noise.mT) * grades,
        "graded from below": grades.flip(0)[:, None] * (noise + noise.mT) * grades.flip(0),
        "slightly indefinite": q * torch.logspace(0, -3, rank, dtype=DOUBLE).sub(2e-3) @ q.mT,
        "rank deficient": q * (torch.arange(rank) % 3 == 0) @ q.mT,
        "zero": torch.zeros(rank, rank, dtype=DOUBLE),
        "identity": 3 * torch.eye(rank, dtype=DOUBLE),
        "diagonal": torch.randn(rank, dtype=DOUBLE).diag(),
        "pairs of eigenvalues": q * (torch.arange(rank) // 2).double() @ q.mT,
        "all ones": torch.ones(rank, rank, dtype=DOUBLE),
        "nothing on the diagonal": 1 - torch.eye(rank, dtype=DOUBLE),
        "a chain": chain,
        "Wilkinson's": chain + spread.abs().diag() * (rank - 1) / 2,
        "huge": (noise + noise.mT) * (1e30 if dtype == SINGLE else 1e150),
        "tiny": (noise + noise.mT) * (1e-30 if dtype == SINGLE else 1e-150),
    }
    return {name: (x + x.mT) / 2 for name, x in found.items()}


@on_every_backend
@in_both_dtypes
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8, 16, 33, 64, 128])
def test_eigh_is_backward_stable(backend: str, dtype: torch.dtype, rank: int) -> None:
    matrices = symmetric_matrices(rank, dtype)
    xs = torch.stack(list(matrices.values())).to(dtype)
    with running("grouped_eigh", backend), torch.no_grad():
        values, vectors = ops.grouped_eigh(xs)
        alone, (again, again_vectors) = ops.grouped_eigvalsh(xs), ops.grouped_eigh(xs)
    assert values.dtype == vectors.dtype == alone.dtype == dtype and vectors.is_contiguous()
    assert torch.equal(values, again) and torch.equal(vectors, again_vectors), "not deterministic"
    bound = 8 * rank * torch.finfo(dtype).eps
    for name, x, λ, v, λ_alone in zip(matrices, xs.double(), values.double(), vectors.double(), alone.double(), strict=True):
        size = x.abs().max().item() or 1.0
        norm = (x / size).norm().item() or 1.0
        assert orthogonality(v) <= bound, name
        assert ((x / size) @ v - v * (λ / size)).norm() <= bound * norm, name
        assert (λ.diff() >= 0).all() and (λ_alone.diff() >= 0).all(), name
        exact = torch.linalg.eigvalsh(x / size)
        assert max((y / size - exact).abs().max().item() for y in (λ, λ_alone)) <= bound * norm, name


@on_every_backend
@in_both_dtypes
def test_eigh_takes_any_stack_and_reads_lower_triangles(backend: str, dtype: torch.dtype) -> None:
    for count, rank in ((0, 4), (1, 1), (3, 0), (7, 5), (9, 4), (50, 3)):
        x = torch.randn(count, rank, rank, dtype=dtype)
        x = x + x.mT
        other = x.tril() + torch.randn(rank, rank, dtype=dtype).triu(1)
        wide = torch.full((2 * count, rank, 2 * rank), math.nan, dtype=dtype)
        wide[::2, :, rank:] = other
        with running("grouped_eigh", backend), torch.no_grad():
            expected, every_second = ops.grouped_eigh(x), ops.grouped_eigh(wide[::2, :, rank:])
            one_by_one = [ops.grouped_eigh(matrix[None]) for matrix in x]
            transposed = ops.grouped_eigh(x.mT.contiguous().mT)
            alone, alone_of_x = ops.grouped_eigvalsh(wide[::2, :, rank:]), ops.grouped_eigvalsh(x)
        assert expected[0].shape == (count, rank) and expected[1].shape == (count, rank, rank)
        for got in (every_second, transposed):
            assert all(map(torch.equal, got, expected))
        if backend == "native":  # a matrix gets the same whatever its neighbours are
            assert torch.equal(alone, alone_of_x)
            for index, single in enumerate(one_by_one):
                assert all(torch.equal(a[0], b[index]) for a, b in zip(single, expected, strict=True))


@on_every_backend
@in_both_dtypes
@pytest.mark.parametrize("operation", ["grouped_eigh", "grouped_damped_inverse"])
def test_one_matrix_that_is_not_finite_spoils_no_other(backend: str, dtype: torch.dtype, operation: str) -> None:
    xs = torch.randn(21, 5, 5, dtype=dtype)
    xs = (xs + xs.mT if operation == "grouped_eigh" else xs.triu()).contiguous()
    spoilt = xs.clone()
    spoilt[2, 1, 1], spoilt[9, 2, 4], spoilt[20, 0, 3] = math.nan, math.inf, -math.inf
    with running(operation, backend), torch.no_grad():
        if operation == "grouped_eigh":
            clean, results = [(*ops.grouped_eigh(x), ops.grouped_eigvalsh(x)) for x in (xs, spoilt)]
        else:
            clean, results = [(ops.grouped_damped_inverse(x, 0.1),) for x in (xs, spoilt)]
    for before, after in zip(clean, results, strict=True):
        for index in range(21):
            assert after[index].isnan().all() if index in (2, 9, 20) else torch.equal(after[index], before[index])


@on_every_backend
@in_both_dtypes
@pytest.mark.parametrize("rank", [1, 4, 8, 16, 33, 64, 128])
@pytest.mark.parametrize("damping", [0.0, 1e-5, 0.3])
def test_damped_inverse(backend: str, dtype: torch.dtype, rank: int, damping: float) -> None:
    """``R_δ⁻ᵀ (RᵀR + δI) R_δ⁻¹ = I`` to rounding times the condition number of ``[R; √δ I]``, not its square."""
    eps, identity = torch.finfo(dtype).eps, torch.eye(rank, dtype=DOUBLE)
    kappas = [1.0, 1e2, WORST_KAPPA[dtype] ** 0.5, WORST_KAPPA[dtype]]
    rs = torch.stack([10 * torch.linalg.qr(conditioned(2 * rank, rank, kappa), mode="r").R for kappa in kappas]).to(dtype)
    if damping:
        rs = torch.cat([rs, torch.zeros(1, rank, rank, dtype=dtype)])  # B = 0, as training starts
        kappas.append(1.0)
    rs = rs.mT.contiguous().mT
    with running("grouped_damped_inverse", backend), torch.no_grad():
        inverses = ops.grouped_damped_inverse(rs, damping)
    assert inverses.dtype == dtype and inverses.is_contiguous()
    for r, inverse in zip(rs.double(), inverses.double(), strict=True):
        assert torch.equal(inverse, inverse.triu()) and (inverse.diagonal() > 0).all()
        tall = torch.cat([r, damping**0.5 * identity])
        # The columns of [R; √δ I] R_δ⁻¹ are orthonormal.
        assert orthogonality(tall @ inverse) <= 8 * rank * eps * torch.linalg.cond(tall)


# ------------------------------------------------------------------------------------------------------------------ preconditioners


@on_every_backend
@in_both_dtypes
@pytest.mark.parametrize("rank", [1, 4, 7, 16, 33, 128])
@pytest.mark.parametrize("kappa", [1.0, 1e3])
def test_preconditioner(backend: str, dtype: torch.dtype, rank: int, kappa: float) -> None:
    """``P = w (XᵀX + δI)⁻¹`` and ``C = (XᵀX + δI)⁻¹ XᵀX_old``, from the drift ``K = δI + Xᵀ(X - X_old)``."""
    damping, identity, layers = 1e-3, torch.eye(rank, dtype=DOUBLE), 11
    xs = [conditioned(2 * rank, rank, kappa) for _ in range(layers)]
    olds = [x + 0.1 * torch.randn(x.shape, dtype=DOUBLE) for x in xs]
    grams = torch.stack([x.mT @ x for x in xs])
    drifts = torch.stack([damping * identity + x.mT @ (x - old) for x, old in zip(xs, olds, strict=True)]).to(dtype)
    lower = grams.tril() + torch.full_like(grams, math.nan).triu(1)
    with running("grouped_preconditioner", backend), torch.no_grad():
        maps, nothing = ops.grouped_preconditioner(lower, damping, weight=0.25, dtype=dtype)
        again, realigned = ops.grouped_preconditioner(lower, damping, weight=0.25, drifts=drifts, dtype=dtype)
        _, transposed = ops.grouped_preconditioner(lower, damping, drifts=drifts, transposed=True, dtype=dtype)
    assert nothing is None and realigned is not None and maps.dtype == realigned.dtype == dtype
    assert torch.equal(maps, again) and torch.equal(maps, maps.mT) and torch.equal(realigned, transposed.mT)
    for i, (x, old) in enumerate(zip(xs, olds, strict=True)):
        damped = grams[i] + damping * identity
        eps = torch.finfo(dtype).eps + rank * torch.linalg.cond(damped) * torch.finfo(DOUBLE).eps
        inverse = torch.linalg.inv(damped)
        assert (maps[i].double() - 0.25 * inverse).abs().max() <= 8 * eps * inverse.abs().max()
        exact = inverse @ (x.mT @ old)
        amplified = (inverse.abs() @ drifts[i].double().abs()).max()
        assert (realigned[i].double() - exact).abs().max() <= 8 * eps * (1 + amplified)


@on_every_backend
def test_preconditioner_of_what_is_not_positive_definite_is_nan(backend: str) -> None:
    grams = torch.eye(5, dtype=DOUBLE).repeat(21, 1, 1)
    spoilt = grams.clone()
    spoilt[2, 4, 4], spoilt[9, 3, 1], spoilt[13, 0, 0], spoilt[20, 2, 2] = -1.0, math.nan, math.inf, 0.0
    with running("grouped_preconditioner", backend), torch.no_grad():
        clean, results = (ops.grouped_preconditioner(g, drifts=torch.ones_like(g)) for g in (grams, spoilt))
    for before, after in zip(clean, results, strict=True):
        for index in range(21):
            assert after[index].isnan().all() if index in (2, 9, 13, 20) else torch.equal(after[index], before[index])


# ------------------------------------------------------------------------------------------------------------------ SVD


def projector_distance(a: Tensor, b: Tensor) -> float:
    """``‖AAᵀ − BBᵀ‖₂`` of orthonormal bases of one rank, without forming a projector: the sine of the largest angle."""
    rest = b.double() - a.double() @ (a.double().mT @ b.double())
    return float(torch.linalg.matrix_norm(rest, 2))


@on_every_backend
@in_both_dtypes
@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize("kappa", [1.0, 30.0, 1e3])
def test_svd_product(backend: str, dtype: torch.dtype, k: int, kappa: float) -> None:
    lefts = [conditioned(rows, k, kappa).to(dtype) for rows in HEIGHTS]
    rights = [conditioned(rows, k, kappa).to(dtype).mT.contiguous().mT for rows in reversed(HEIGHTS)]
    rank = max(1, k // 2)
    bound = BOUND[dtype]
    with running("grouped_svd_product", backend):
        us, ss, vs = ops.grouped_svd_product(lefts, rights, rank)
    for left, right, u, s, v in zip(lefts, rights, us, ss, vs, strict=True):
        exact_u, exact, exact_vh = torch.linalg.svd(left.double() @ right.double().mT, full_matrices=False)
        assert orthogonality(u) <= bound and orthogonality(v) <= bound
        assert (s.diff() <= 0).all()
        assert (s.double() - exact[:rank]).abs().max() <= bound * exact[0]
        gap = exact[rank - 1] - exact[rank]
        for got, basis in ((u, exact_u[:, :rank]), (v, exact_vh[:rank].mT)):
            assert projector_distance(got, basis) <= bound * float(exact[0] / gap)
        image = left.double() @ (right.double().mT @ v.double())
        assert (image - u.double() * s.double()).abs().max() <= bound * exact[0], "the triples belong together"


def transposed_places(xs: list[Tensor]) -> list[Tensor]:
    """Where tensors like xs may be written, stored the other way round."""
    return [torch.full_like(x.mT, math.nan, memory_format=torch.contiguous_format).mT for x in xs]


@on_every_backend
@in_both_dtypes
def test_svd_product_of_awkward_factors(backend: str, dtype: torch.dtype) -> None:
    kinds = [kind for kind in AWKWARD if kind not in ("huge", "tiny", "both")]
    lefts, rights = ([awkward(kind, rows, 5, dtype) for kind in kinds] for rows in (70, 130))
    big, small = (1e18, 1e-18) if dtype == SINGLE else (1e150, 1e-150)
    for scale_left, scale_right in ((big, big), (small, small), (big, small)):
        # The product itself is to be in range: singular values that overflow are rightly Inf.
        lefts.append((torch.randn(70, 5, dtype=DOUBLE) * scale_left).to(dtype))
        rights.append((torch.randn(130, 5, dtype=DOUBLE) * scale_right).to(dtype))
    with running("grouped_svd_product", backend):
        us, ss, vs = ops.grouped_svd_product(lefts, rights, 5)
        again = ops.grouped_svd_product(lefts, rights, 5, out=(out := transposed_places(us), transposed_places(vs)))
    for index, (left, right, u, s, v) in enumerate(zip(lefts, rights, us, ss, vs, strict=True)):
        assert orthogonality(u) <= BOUND[dtype] and orthogonality(v) <= BOUND[dtype], index
        exact = torch.linalg.svdvals(torch.linalg.qr(left.double())[1] @ torch.linalg.qr(right.double())[1].mT)
        if exact[0] < torch.finfo(dtype).max and exact.isfinite().all():
            assert (s.double() - exact).abs().max() <= BOUND[dtype] * exact[0] + 8 * torch.finfo(dtype).tiny, index
    assert all(map(operator.is_, out, again[0]))
    assert torch.equal(ss, again[1]) and all(map(torch.equal, us + vs, again[0] + again[2])), "not deterministic"


def peak_rss() -> int:
    """Highest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@on_every_backend
def test_svd_product_never_forms_the_product(backend: str) -> None:
    rows = 40_000
    left, right = torch.randn(rows, 4), torch.randn(rows, 4)
    product_bytes = 4 * rows**2  # 6.4 GB
    with running("grouped_svd_product", backend):
        before = peak_rss()
        ops.grouped_svd_product([left], [right], 4)
        assert peak_rss() - before < 0.02 * product_bytes
        allocated = peak_temporary_bytes(lambda: ops.grouped_svd_product([left], [right], 4), torch.device("cpu"))
    assert allocated <= 16 * left.nbytes


def gaussian(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns)


def signs(rows: int, columns: int) -> Tensor:
    """What LoRA-SB decomposes: a flat spectrum."""
    return torch.randn(rows, columns).sign()


def decaying(rows: int, columns: int) -> Tensor:
    """A random matrix with columns shrunk like 1/(1 + j/20), mixed."""
    x = torch.randn(rows, columns) / (1 + torch.arange(columns) / 20)
    mix, _ = torch.linalg.qr(torch.randn(columns, columns))
    return x @ mix


def low_rank_plus_noise(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, 12) @ torch.randn(12, columns) + torch.randn(rows, columns)


KINDS: dict[str, Callable[[int, int], Tensor]] = {f.__name__: f for f in (gaussian, signs, decaying, low_rank_plus_noise)}


@functools.cache
def dense(kind: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A matrix and its exact squared singular values, one of each kind for all tests of this file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(kind))
        x = KINDS[kind](rows, columns)
    wide = x if rows >= columns else x.mT
    return x, torch.linalg.eigvalsh(wide.double().mT @ wide.double()).flip(0)


def check_energy(backend: str, x: Tensor, squares: Tensor, rank: int) -> None:
    with running("grouped_svd", backend):
        (u,), ss, (v,) = ops.grouped_svd([x], rank)
    assert orthogonality(u) <= 1e-5 and orthogonality(v) <= 1e-5
    exact = squares[:rank].sum()
    # By what the bases capture, not by the singular values that the operation claims.
    image = u.double().mT @ x.double()
    assert image.square().sum() >= 0.995 * exact
    assert (x.double() @ v.double()).square().sum() >= 0.995 * exact
    assert ss[0].double().square().sum() <= (1 + 1e-5) * exact
    # Rayleigh-Ritz: UᵀXV is the diagonal of the singular values.
    core = image @ v.double()
    assert (core - torch.diag(ss[0].double())).abs().max() <= 1e-4 * ss[0, 0]


@on_every_backend
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [8, 16, 64])
def test_svd_captures_the_energy(backend: str, kind: str, rank: int) -> None:
    check_energy(backend, *dense(kind, 1024, 1024), rank)


@on_every_backend
@pytest.mark.parametrize("shape", [(1536, 384), (300, 1100)])
def test_svd_captures_the_energy_of_rectangles(backend: str, shape: tuple[int, int]) -> None:
    check_energy(backend, *dense("signs", *shape), 8)


@pytest.mark.large
@on_every_backend
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2048, 4096])
def test_svd_captures_the_energy_of_large_matrices(backend: str, kind: str, size: int) -> None:
    x, squares = dense(kind, size, size)
    for rank in (8, 16, 64):
        check_energy(backend, x, squares, rank)


@on_every_backend
@in_both_dtypes
def test_svd_of_small_matrices_is_exact(backend: str, dtype: torch.dtype) -> None:
    """Where the Krylov space is the whole space; ragged shapes, zero, rank one, huge and tiny ones."""
    shapes = [(9, 14), (14, 9), (9, 14), (8, 8), (9, 14), (9, 14), (9, 14)]
    xs = [torch.randn(shape, dtype=DOUBLE) for shape in shapes]
    xs[3][:, 1:] = xs[3][:, :1]
    xs[4].zero_()
    xs[5] *= 1e18 if dtype == SINGLE else 1e180
    xs[6] *= 1e-18 if dtype == SINGLE else 1e-180
    xs = [x.to(dtype) for x in xs]
    with running("grouped_svd", backend):
        us, ss, vs = ops.grouped_svd(xs, 8)
        again = ops.grouped_svd(xs, 8, out=(out := transposed_places(us), transposed_places(vs)))
    for index, (x, u, s, v) in enumerate(zip(xs, us, ss, vs, strict=True)):
        assert orthogonality(u) <= BOUND[dtype] and orthogonality(v) <= BOUND[dtype], index
        exact = torch.linalg.svdvals(x.double())[:8]
        assert (s.double() - exact).abs().max() <= 10 * BOUND[dtype] * exact[0], index
    assert all(map(operator.is_, out, again[0]))
    assert torch.equal(ss, again[1]) and all(map(torch.equal, us + vs, again[0] + again[2])), "not deterministic"


def mixed(rows: int, columns: int, rank: int) -> Tensor:
    return torch.randn(rows, rank) @ torch.randn(rank, columns)


#: Few distinct singular values or low rank: the Krylov space is exhausted before the iteration stops.
EXHAUSTED: dict[str, Callable[[int, int], Tensor]] = {
    "ones": torch.ones,
    "zeros": torch.zeros,
    "identity": torch.eye,
    "blocks": lambda m, n: torch.block_diag(*[torch.ones(m // 8, n // 8)] * 8),
    "weighted blocks": lambda m, n: torch.block_diag(*[torch.full((m // 4, n // 4), i + 1.0) for i in range(4)]),
    "few signs": lambda m, n: torch.where(torch.rand(m, 1) < 0.2, torch.randn(m, n).sign(), 0.0),
    **{f"rank {k}": functools.partial(mixed, rank=k) for k in (1, 3, 12)},
    **{f"signs of rank {k}": lambda m, n, k=k: mixed(m, n, k).sign() for k in (1, 2)},
}
#: Rounding of a product of orthonormal bases.
ORTHONORMAL = {SINGLE: 2e-6, DOUBLE: 1e-14}


@on_every_backend
@in_both_dtypes
@pytest.mark.parametrize("kind", EXHAUSTED)
@pytest.mark.parametrize("shape", [(64, 64), (96, 40), (40, 96)])
def test_svd_of_exhausted_spectra(backend: str, dtype: torch.dtype, kind: str, shape: tuple[int, int]) -> None:
    x = EXHAUSTED[kind](*shape).to(dtype)
    squares = torch.linalg.svdvals(x.double()).square()
    full = min(shape)
    for rank, iterations in ((1, None), (3, 16), (8, None), (full // 2, 1), (full, None)):
        with running("grouped_svd", backend):
            us, ss, vs = ops.grouped_svd([x, torch.randn_like(x)], rank, iterations=iterations)
        assert max(map(orthogonality, us + vs)) <= ORTHONORMAL[dtype], (rank, iterations)
        u, s, v = us[0], ss[0], vs[0]
        captured = (u.double().mT @ x.double()).square().sum(), (x.double() @ v.double()).square().sum(), s.double().square().sum()
        for energy in captured:
            assert 0.995 * squares[:rank].sum() <= energy <= (1 + 1e-5) * squares[:rank].sum(), (rank, iterations)


@on_every_backend
def test_svd_iterations_and_oversampling_help(backend: str) -> None:
    x, squares = dense("signs", 1024, 1024)
    energies = {}
    with running("grouped_svd", backend):
        for iterations, oversample in ((0, 0), (1, 0), (4, 0), (4, 8)):
            _, ss, _ = ops.grouped_svd([x], 8, iterations=iterations, oversample=oversample)
            energies[iterations, oversample] = float(ss.square().sum() / squares[:8].sum())
    assert energies[0, 0] < 0.6 < energies[1, 0] < energies[4, 0] < energies[4, 8] <= 1 + 1e-5
    assert energies[4, 8] > 0.97


# ------------------------------------------------------------------------------------------------------------------ all of them

CALLS: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "grouped_gram": lambda xs: list(ops.grouped_gram(xs)),
    "grouped_qr": lambda xs: ops.grouped_qr(xs)[0],
    "grouped_solve": lambda xs: ops.grouped_solve(torch.eye(4).expand(len(xs), 4, 4).to(xs[0].dtype).contiguous(), xs, 0.5, side="right"),
    "grouped_svd_product": lambda xs: ops.grouped_svd_product(xs, [x.flip(0) for x in xs], 3)[0],
    "grouped_svd": lambda xs: ops.grouped_svd(xs, 3)[0],
    "grouped_polar": lambda xs: ops.grouped_polar(xs),
    "grouped_eigh": lambda xs: list(ops.grouped_eigh(torch.stack([x.mT @ x for x in xs]))[1]),
    "grouped_damped_inverse": lambda xs: list(ops.grouped_damped_inverse(torch.stack([(x.mT @ x).triu() for x in xs]), 0.1)),
    "grouped_preconditioner": lambda xs: list(ops.grouped_preconditioner(torch.stack([x.mT @ x for x in xs]).double(), 0.1)[0]),
}
for_every_operation = pytest.mark.parametrize("operation", CALLS)


@on_every_backend
@in_both_dtypes
@for_every_operation
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_own_matrix(backend: str, dtype: torch.dtype, operation: str, bad: float) -> None:
    xs = [torch.randn(rows, 4, dtype=dtype) for rows in (30, 50, 30, 30, 50)]
    spoilt = [x.clone() for x in xs]
    spoilt[1][7, 2] = bad
    spoilt[3][0, 0] = bad
    with running(operation, backend):
        clean, results = CALLS[operation](xs), CALLS[operation](spoilt)
    for index, (expected, result) in enumerate(zip(clean, results, strict=True)):
        if index in (1, 3):
            assert not result.isfinite().all(), f"{operation} hides what is not finite"
        else:
            # A batch of same-shaped matrices may be computed together, to rounding.
            torch.testing.assert_close(result, expected, rtol=0, atol=0 if operation != "grouped_svd" else 100 * torch.finfo(dtype).eps)


@on_every_backend
@for_every_operation
def test_inputs_are_not_written(backend: str, operation: str) -> None:
    xs = [torch.randn(rows, 4) for rows in (30, 50)]
    before = [x.clone() for x in xs]
    with running(operation, backend):
        CALLS[operation](xs)
    assert all(map(torch.equal, xs, before))


def negated(x: Tensor) -> Tensor:
    """x, as a view of memory that holds −x."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg() and torch.equal(view, x)
    return view


@on_every_backend
@pytest.mark.parametrize("operation", ["grouped_eigh", "grouped_damped_inverse", "grouped_preconditioner", "grouped_solve"])
def test_stacks_that_are_negated_lazily(backend: str, operation: str) -> None:
    xs = torch.randn(3, 9, 4, dtype=DOUBLE)
    stack = xs.mT @ xs + (torch.eye(4) if operation != "grouped_damped_inverse" else 0)
    stack = stack.triu() if operation == "grouped_damped_inverse" else stack
    rhs = torch.randn(3, 4, 5, dtype=DOUBLE)
    calls: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "grouped_eigh": lambda s, _: ops.grouped_eigh(s)[0],
        "grouped_damped_inverse": lambda s, _: ops.grouped_damped_inverse(s, 0.1),
        "grouped_preconditioner": lambda s, _: ops.grouped_preconditioner(s, 0.1)[0],
        "grouped_solve": lambda s, r: ops.grouped_solve(s, r, 0.1),
    }
    with running(operation, backend):
        torch.testing.assert_close(calls[operation](negated(stack), negated(rhs)), calls[operation](stack, rhs))


@on_every_backend
@for_every_operation
def test_lists_that_are_negated_lazily(backend: str, operation: str) -> None:
    xs = [torch.randn(rows, 4, dtype=DOUBLE) for rows in (30, 50, 30)]
    with running(operation, backend):
        expected, results = CALLS[operation](xs), CALLS[operation]([xs[0], negated(xs[1]), xs[2]])
    torch.testing.assert_close(results, expected)


@on_every_backend
def test_a_moment_step_of_what_is_negated_lazily(backend: str) -> None:
    params, grads = ([torch.randn(rows, 4) for rows in (5, 7)] for _ in range(2))
    outcomes, numbers = [], {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "step": 1}
    for change in (torch.clone, negated):
        stepped, moments = [p.clone() for p in params], [[torch.zeros(rows, 4) for rows in (5, 7)] for _ in range(2)]
        with running("grouped_adamw_", backend):
            ops.grouped_adamw_(stepped, [change(g) for g in grads], *moments, **numbers)
        outcomes.append([*stepped, *moments[0], *moments[1]])
    torch.testing.assert_close(outcomes[1], outcomes[0])
    with pytest.raises(ValueError, match=r"params\[1\] is written, but negated lazily"):
        ops.grouped_adamw_([params[0], negated(params[1])], grads, *moments, **numbers)


def test_an_optimizer_steps_by_a_gradient_that_is_negated_lazily() -> None:
    start, grad = torch.randn(2, 6, 4)
    outcomes = []
    for change in (torch.clone, negated):
        parameter = torch.nn.Parameter(start.clone())
        parameter.grad = change(grad)
        AdamW([parameter], lr=0.1).step()
        outcomes.append(parameter.detach())
    torch.testing.assert_close(outcomes[1], outcomes[0])
    parameter = torch.nn.Parameter(negated(start))
    parameter.grad = grad
    optimizer = AdamW([parameter], lr=0.1)
    with pytest.raises(ValueError, match=r"params\[0\] is written, but negated lazily"):
        optimizer.step()
    assert torch.equal(parameter.detach(), start) and optimizer._torn is None


@for_every_operation
def test_no_backward(operation: str) -> None:
    xs = [torch.randn(rows, 4, requires_grad=True) for rows in (30, 50)]
    with pytest.raises(RuntimeError, match=f"{operation} has no backward.*no_grad"):
        sum(result.sum() for result in CALLS[operation](xs)).backward()


def test_empty_lists() -> None:
    assert ops.grouped_gram([]).shape[0] == 0
    assert ops.grouped_qr([])[0] == []
    assert ops.grouped_solve(torch.empty(0, 3, 3), []) == []
    assert ops.grouped_svd_product([], [], 2)[0] == []
    assert ops.grouped_svd([], 2)[0] == []
    assert ops.grouped_polar([]) == []
    assert ops.grouped_eigh(torch.empty(0, 3, 3))[1].shape == (0, 3, 3)
    assert ops.grouped_damped_inverse(torch.empty(0, 3, 3)).shape == (0, 3, 3)
    assert ops.grouped_preconditioner(torch.empty(0, 3, 3, dtype=DOUBLE))[0].shape == (0, 3, 3)


@on_every_backend
def test_opcheck(backend: str) -> None:
    namespace = torch.ops.lowrank_kernels
    xs = [torch.randn(rows, 4, dtype=DOUBLE) for rows in (9, 6)]
    strided = [x.mT.contiguous().mT for x in xs]
    spd = torch.stack([x.mT @ x for x in xs])
    previous, out, rs = [torch.linalg.qr(x)[0] for x in xs], [torch.empty_like(x) for x in xs], torch.empty(2, 4, 4, dtype=DOUBLE)
    moments = [[torch.rand(x.shape, dtype=DOUBLE) for x in xs] for _ in range(2)]
    lists = ([x.clone() for x in xs], strided, *moments)
    no_maps, maps = (None, None, None, None, [], None), (spd, spd.triu(), 0.1 * spd, spd.mT, [1, 1], rs.clone())
    numbers, tensors = (0.1, None, 0.9, 0.99, 1e-8, 0.01, 3, None), (0.0, torch.tensor(0.1), 0.9, 0.99, 1e-8, 0.01, 0, torch.tensor(3.0))
    for operation, overload, arguments in (
        ("grouped_adamw_", namespace.grouped_adamw_, (*lists, *no_maps, *numbers, [], True, False)),
        ("grouped_adamw_", namespace.grouped_adamw_, (*lists[:2], [], [], *no_maps, *numbers, [], False, True)),
        ("grouped_adamw_", namespace.grouped_adamw_, (*lists, *maps, *numbers, [0, 2], True, True)),
        ("grouped_adamw_", namespace.grouped_adamw_, (*lists, *maps, *tensors, [], True, False)),
        ("grouped_gram", namespace.grouped_gram, (strided, None, False)),
        ("grouped_gram", namespace.grouped_gram, (strided, xs, True)),
        ("grouped_qr", namespace.grouped_qr, (strided, None)),
        ("grouped_qr", namespace.grouped_qr, (xs, previous)),
        ("grouped_qr", namespace.grouped_qr_out, (xs, previous, out, rs)),
        ("grouped_solve", namespace.grouped_solve, (spd, xs, 0.1, False)),
        ("grouped_solve", namespace.grouped_solve, (spd, [x.mT for x in xs], 0.0, True)),
        ("grouped_solve", namespace.grouped_solve_out, (spd, xs, 0.1, False, out)),
        ("grouped_solve", namespace.grouped_solve_stacked, (spd, spd, 0.1, False)),
        ("grouped_solve", namespace.grouped_solve_stacked_out, (spd, rs, 0.1, True, rs.clone())),
        ("grouped_svd_product", namespace.grouped_svd_product, (xs, strided, 2)),
        ("grouped_svd", namespace.grouped_svd, (xs, 2, 1, None)),
        ("grouped_polar", namespace.grouped_polar, (strided,)),
        ("grouped_polar", namespace.grouped_polar_out, (xs, out)),
        ("grouped_eigh", namespace.grouped_eigh, (spd,)),
        ("grouped_eigh", namespace.grouped_eigvalsh, (spd.mT,)),
        ("grouped_damped_inverse", namespace.grouped_damped_inverse, (spd.triu(), 0.1)),
        ("grouped_preconditioner", namespace.grouped_preconditioner, (spd, None, 0.1, 1.0, False, torch.float32)),
        ("grouped_preconditioner", namespace.grouped_preconditioner, (spd.mT, spd.triu(), 0.1, 0.5, True, DOUBLE)),
    ):
        if backend in implementations(operation):
            with force(f"{operation}={backend}"):
                torch.library.opcheck(overload, arguments)


def test_forward_mode_is_refused() -> None:
    x = torch.randn(9, 4)
    for call in (
        lambda x: ops.grouped_gram([x]),
        lambda x: ops.grouped_qr([x])[1],
        lambda x: ops.grouped_solve(torch.eye(4)[None], x.mT[None]),
    ):
        with pytest.raises(RuntimeError, match="has no forward-mode derivative .* detached"):
            torch.func.jvp(call, (x,), (x,))
        assert torch.equal(torch.func.jvp(lambda x, call=call: call(x.detach()) + x[0, 0] * 0, (x,), (x,))[0], call(x))


def test_functionalized_calls_are_the_eager_ones() -> None:
    x = torch.randn(9, 4)
    for call in (
        lambda x: ops.grouped_gram([x, x]),
        lambda x: ops.grouped_qr([x])[0][0],
        lambda x: ops.grouped_polar([x])[0],
        lambda x: ops.grouped_svd_product([x], [x], 2)[1],
        lambda x: ops.grouped_lorsum(([x], [x]), [([x], [x])], [0.5])[0][0],
    ):
        assert torch.equal(torch.func.functionalize(call)(x), call(x))


X, TALLER, WIDE, THREE = torch.ones(9, 4), torch.ones(11, 4), torch.ones(3, 4), torch.ones(9, 3)
EYE = torch.eye(4)[None]
NUMBERS: dict[str, object] = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "step": 1}


def adamw(param: Tensor = X, **changed: object) -> None:
    """A step that is refused, and so changes nothing."""
    own = X.clone()
    try:
        ops.grouped_adamw_([own, param], [X, param], [X * 0, X * 0], [X * 0, X * 0], **NUMBERS | changed)
    finally:
        assert torch.equal(own, X)


SCALAR, SPARSE = torch.ones(()), EYE.to_sparse()
MISUSES: list[tuple[Callable[[], object], str]] = [
    (lambda: adamw(X.to_sparse()), r"grouped_adamw_: params\[1\] is torch.sparse_coo; only strided"),
    (lambda: adamw(step=0), r"grouped_adamw_: step counts from 1, .* got step=0"),
    (lambda: adamw(step=2, missed=[0, 2]), r"must be above missed; got step=2 and missed=2"),
    (lambda: adamw(missed=[0, 0.5]), r"missed\[1\] must be a whole number, got 0.5"),
    (lambda: adamw(step="1"), r"step must be a whole number, got '1'"),
    (lambda: adamw(step=torch.ones(2)), r"step must be one number, got a tensor of shape \(2,\)"),
    (lambda: adamw(lr=math.nan), r"lr must be finite, got nan"),
    (lambda: adamw(lr=None), r"lr must be a number, got None"),
    (lambda: adamw(betas=0.9), r"betas must be two numbers, such as \(0.9, 0.999\), got 0.9"),
    (lambda: adamw(betas=(0.9,)), r"betas must be two numbers"),
    (lambda: adamw(betas=(0.9, 1.0)), r"betas must be in \[0, 1\)"),
    (lambda: adamw(eps=None), r"eps must be a number, got None"),
    (lambda: adamw(eps=-1.0), r"eps must be ≥ 0, got -1.0"),
    (lambda: ops.grouped_adamw_([X], (x for x in [X]), [], [], **NUMBERS), r"grads must be a list, got generator"),
    (lambda: ops.grouped_gram([X, X.to_sparse()]), r"xs\[1\] is torch.sparse_coo; only strided tensors are taken"),
    (lambda: ops.grouped_solve([EYE[0]], [X.mT]), r"grouped_solve: grams must be one stacked tensor \(N, r, r\), got list"),
    (lambda: ops.grouped_svd_product((x for x in [X]), [X], 2), r"grouped_svd_product: lefts must be a list, got generator"),
    (lambda: ops.lora_linear([X], None, None, THREE, THREE), r"lora_linear: x must be a tensor, got list"),
    (lambda: ops.lora_linear(X, None, None, THREE.mT, None), r"lora_linear: b must be a tensor, got NoneType"),
    (lambda: ops.grouped_lorsum_product([([X], [THREE])], [X], [1.0]), r"^grouped_lorsum_product: terms\[0\]"),
    (lambda: ops.grouped_gram(X), r"grouped_gram: xs must be a list"),
    (lambda: ops.grouped_gram([X, THREE]), r"xs\[1\] has 3 columns"),
    (lambda: ops.grouped_gram([X, X.double()]), r"xs\[1\] has dtype torch.float64, expected torch.float32"),
    (lambda: ops.grouped_gram([X.long()]), r"xs\[0\] has dtype torch.int64"),
    (lambda: ops.grouped_gram([X[0]]), r"xs\[0\] must have 2 dimensions"),
    (lambda: ops.grouped_gram([X, "X"]), r"xs\[1\] must be a tensor"),
    (lambda: ops.grouped_gram([X, X.to("meta")]), r"xs\[1\] is on meta"),
    (lambda: ops.grouped_gram([X], [TALLER]), r"xs\[0\] has 9 rows, ys\[0\] has 11"),
    (lambda: ops.grouped_gram([X, X], [X]), r"lists must have equal lengths, got xs: 2, ys: 1"),
    (lambda: ops.grouped_gram([X], [X.double()]), r"ys\[0\] has dtype"),
    (lambda: ops.grouped_gram([X], dtype=torch.bfloat16), r"grouped_gram: dtype must be"),
    (lambda: ops.grouped_gram([X.double()], dtype=SINGLE), r"grouped_gram: dtype must be torch.float64, got"),
    (lambda: ops.grouped_solve(EYE[0], [X.mT]), r"grams must be \(N, r, r\)"),
    (lambda: ops.grouped_solve(EYE.bfloat16(), [X.mT]), r"grouped_solve: grams must be fp32 or fp64, got torch.bfloat16"),
    (lambda: ops.grouped_solve(EYE, [X.mT], side="both"), r"side must be 'left' or 'right'"),
    (lambda: ops.grouped_solve(EYE, [X.mT], -1.0), r"damping must be ≥ 0, got -1"),
    (lambda: ops.grouped_solve(EYE, [X.mT], math.nan), r"damping must be ≥ 0, got nan"),
    (lambda: ops.grouped_solve(EYE, [X.mT], math.inf), r"grouped_solve: damping must be finite, got inf"),
    (lambda: ops.grouped_solve(EYE, [X.mT], "x"), r"grouped_solve: damping must be a number, got 'x'"),
    (lambda: ops.grouped_solve(EYE, [X.mT], None), r"grouped_solve: damping must be a number, got None"),
    (lambda: ops.grouped_damped_inverse(EYE, torch.ones(2)), r"grouped_damped_inverse: damping must be a number, got tensor"),
    (lambda: ops.grouped_preconditioner(EYE.double(), 0.1, weight=math.nan), r"grouped_preconditioner: weight must be finite, got nan"),
    (lambda: ops.grouped_solve(EYE, [X.mT, X.mT]), r"grouped_solve: rhs must be as many matrices as grams, 1, got 2"),
    (lambda: ops.grouped_solve(EYE, [X]), r"rhs\[0\] of shape \(9, 4\) does not fit 4 × 4 Grams from the left"),
    (lambda: ops.grouped_solve(EYE, [X.mT], side="right"), r"rhs\[0\] of shape \(4, 9\) does not fit"),
    (lambda: ops.grouped_solve(EYE, EYE.long()), r"rhs has dtype torch.int64; use one of .*torch.float32"),
    (lambda: ops.grouped_solve(EYE, EYE.to("meta")), r"rhs is on meta, grams is on cpu; move both to one device"),
    (lambda: ops.grouped_solve(EYE, X.mT), r"stacked rhs must have 3 dimensions"),
    (lambda: ops.grouped_solve(EYE, EYE, out=negated(EYE)), r"grouped_solve: out is written, but negated lazily"),
    (lambda: ops.grouped_solve(EYE, [X.mT], out=X.mT), r"grouped_solve: out must be a list of tensors, got Tensor"),
    (lambda: ops.grouped_solve(EYE, [X.mT], out=[]), r"lists must have equal lengths, got rhs: 1, out: 0"),
    (lambda: ops.grouped_solve(EYE, [X.mT], out=[X]), r"out\[0\] has shape \(9, 4\), rhs\[0\] has \(4, 9\)"),
    (lambda: ops.grouped_solve(EYE, [X.mT], out=[X.mT.double()]), r"out\[0\] has dtype torch.float64, expected torch.float32"),
    (lambda: ops.grouped_solve(EYE, EYE, out=EYE[0]), r"out must be \(1, 4, 4\) torch.float32 on cpu, like rhs; got \(4, 4\)"),
    (lambda: ops.grouped_solve(EYE, EYE, out=[EYE[0]]), r"out must be \(1, 4, 4\) .* got list"),
    (lambda: ops.grouped_gram(X), r"grouped_gram: xs must be a list of tensors, got Tensor"),
    (lambda: ops.grouped_gram(None), r"grouped_gram: xs must be a list of tensors, got NoneType"),
    (lambda: ops.grouped_qr(X), r"grouped_qr: xs must be a list of tensors, got Tensor"),
    (lambda: ops.grouped_qr(None), r"grouped_qr: xs must be a list of tensors, got NoneType"),
    (lambda: ops.grouped_qr([WIDE]), r"xs\[0\] must be tall"),
    (lambda: ops.grouped_qr([X, THREE]), r"xs\[1\] has rank 3"),
    (lambda: ops.grouped_qr([X], [TALLER]), r"previous\[0\] has shape \(11, 4\)"),
    (lambda: ops.grouped_qr([X], out=[TALLER]), r"out\[0\] has shape \(11, 4\)"),
    (lambda: ops.grouped_qr([X], [X, X]), r"previous: 2"),
    (lambda: ops.grouped_svd_product([X], [THREE], 2), r"rights\[0\] has 3 columns"),
    (lambda: ops.grouped_svd_product([X, X], [X], 2), r"lefts: 2, rights: 1"),
    (lambda: ops.grouped_svd_product([WIDE], [X], 2), r"lefts\[0\] must be tall"),
    (lambda: ops.grouped_svd_product([X], [X], 5), r"rank must be between 1 and 4"),
    (lambda: ops.grouped_svd_product([X], [X], 0), r"rank must be ≥ 1"),
    (lambda: ops.grouped_svd([X, WIDE], 4), r"rank must be between 1 and min\(3, 4\) of xs\[1\]"),
    (lambda: ops.grouped_svd([X], 2, oversample=-1), r"oversample must be ≥ 0"),
    (lambda: ops.grouped_svd([X], 2, iterations=-1), r"iterations must be ≥ 0"),
    (lambda: ops.grouped_svd([X], 2, out=[X]), r"grouped_svd: out must be a pair \(us, vs\) of lists of tensors, got 1 values"),
    (lambda: ops.grouped_svd([X], 2, out=X), r"out must be a pair .* got Tensor"),
    (lambda: ops.grouped_svd([X], 4, out=([X], [X])), r"out\[1\]\[0\] must have shape \(4, 4\), got \(9, 4\)"),
    (lambda: ops.grouped_svd_product([X], [X], 4, out=([X, X], [X])), r"out\[0\] must have 1 tensors, got 2"),
    (lambda: ops.grouped_svd_product([X], [X], 4, out=([X], [X.double()])), r"out\[1\]\[0\] has dtype torch.float64"),
    (lambda: ops.grouped_polar([X, THREE]), r"xs\[1\] must be tall with 4 columns"),
    (lambda: ops.grouped_polar([WIDE]), r"xs\[0\] must be tall"),
    (lambda: ops.grouped_polar([X], out=[TALLER]), r"out\[0\] has shape \(11, 4\)"),
    (lambda: ops.grouped_polar([X], out=[X, X]), r"out: 2"),
    (lambda: ops.grouped_eigh([EYE[0]]), r"grouped_eigh: xs must be one stacked tensor"),
    (lambda: ops.grouped_eigh(EYE[0]), r"grouped_eigh: xs must be \(N, r, r\), got \(4, 4\)"),
    (lambda: ops.grouped_eigvalsh(EYE[:, :3]), r"grouped_eigvalsh: xs must be \(N, r, r\), got \(1, 3, 4\)"),
    (lambda: ops.grouped_eigh(EYE.bfloat16()), r"grouped_eigh: xs must be fp32 or fp64, got torch.bfloat16"),
    (lambda: ops.grouped_damped_inverse([EYE[0]]), r"grouped_damped_inverse: rs must be one stacked tensor"),
    (lambda: ops.grouped_damped_inverse(EYE[0]), r"grouped_damped_inverse: rs must be \(N, r, r\), got \(4, 4\)"),
    (lambda: ops.grouped_damped_inverse(EYE.long()), r"grouped_damped_inverse: rs must be fp32 or fp64"),
    (lambda: ops.grouped_damped_inverse(EYE, -1.0), r"grouped_damped_inverse: damping must be ≥ 0, got -1"),
    (lambda: ops.grouped_preconditioner([EYE[0]]), r"grouped_preconditioner: grams must be one stacked tensor"),
    (lambda: ops.grouped_preconditioner(EYE), r"grouped_preconditioner: grams must be fp64, got torch.float32"),
    (lambda: ops.grouped_preconditioner(EYE[0].double()), r"grouped_preconditioner: grams must be \(N, r, r\), got \(4, 4\)"),
    (lambda: ops.grouped_preconditioner(EYE.double(), drifts=[EYE[0]]), r"drifts must be one stacked tensor .* got list"),
    (lambda: adamw(grad_maps=[EYE[0]], rank_dims=[1, 1]), r"grouped_adamw_: grad_maps must be one stacked tensor .* got list"),
    (lambda: adamw(grad_maps=EYE, rank_dims=[1, 1]), r"grad_maps must be torch.float32 of shape \(2, 4, 4\) on cpu, got .* \(1, 4, 4\)"),
    (lambda: ops.grouped_preconditioner(EYE.double(), math.nan), r"grouped_preconditioner: damping must be ≥ 0, got nan"),
    (
        lambda: ops.grouped_preconditioner(EYE.double(), dtype=torch.bfloat16),
        r"dtype must be torch.float64 or torch.float32",
    ),
    (
        lambda: ops.grouped_preconditioner(EYE.double(), drifts=EYE),
        r"drifts must be torch.float64 of shape \(1, 4, 4\)",
    ),
    (lambda: adamw(lr=10**400), r"grouped_adamw_: lr must be finite in fp64, got a number beyond"),
    (lambda: adamw(lr=torch.ones(1, dtype=torch.complex64)), r"lr must be a real number, got a tensor of dtype torch.complex64"),
    (lambda: adamw(step=torch.ones(1, device="meta")), r"step must be a tensor that holds a value, or a number, got one on meta"),
    (lambda: adamw(step=10**30), r"step must be ≥ .* and below 2³¹"),
    (lambda: adamw(betas=(0.9, "x")), r"betas\[1\] must be a number, got 'x'"),
    (lambda: adamw(maximize="x"), r"maximize must be True or False, got 'x'"),
    (lambda: adamw(bias_correction=None), r"bias_correction must be True or False"),
    (lambda: adamw(missed=np.zeros(2)), r"missed must be a list, got ndarray"),
    (lambda: adamw(grad_maps=EYE, rank_dims=torch.ones(2)), r"rank_dims must be a list, got Tensor"),
    (lambda: adamw(drifts=EYE.repeat(2, 1, 1).to_sparse(), rank_dims=[1, 1]), r"drifts is torch.sparse_coo; only strided"),
    *[
        (lambda dims=dims: adamw(grad_maps=EYE.repeat(2, 1, 1), rank_dims=dims), r"rank_dims must be 0 \(a factor \(r, d\)\) or 1")
        for dims in ([1.0, 1.0], [True, True], [torch.ones(()), 1])
    ],
    *[
        (lambda states=states: ops.grouped_adamw_([X], [X], states, [], **NUMBERS), r"exp_avgs must be a list, got")
        for states in (None, False, X[None], SCALAR, np.zeros((1, 9, 4)))
    ],
    (lambda: ops.grouped_adamw_([X], SCALAR, [], [], **NUMBERS), r"grads must be a list, got Tensor"),
    (lambda: ops.grouped_adamw_(None, [], [], [], **NUMBERS), r"params must be a list of tensors, got NoneType"),
    (lambda: ops.grouped_adamw_([], [X], [], [], **NUMBERS), r"equal lengths, got params: 0, grads: 1"),
    (lambda: ops.grouped_adamw_([], [], [], [], **NUMBERS | {"lr": "x"}), r"lr must be a number, got 'x'"),
    (lambda: ops.grouped_adamw_([negated(X)], [X], [], [], **NUMBERS), r"params\[0\] is written, but negated lazily"),
    (lambda: ops.grouped_polar([X], out=[negated(X)]), r"out\[0\] is written, but negated lazily"),
    *[(lambda ys=ys: ops.grouped_gram([X], ys), r"grouped_gram: ys(\[0\])? must be a") for ys in ("x", [None], 5, SCALAR)],
    (lambda: ops.grouped_gram([X], [X[0]]), r"ys\[0\] must have 2 dimensions"),
    (lambda: ops.grouped_qr([X], SCALAR), r"grouped_qr: previous must be a list, got Tensor"),
    (lambda: ops.grouped_svd_product(SCALAR, [X], 2), r"lefts must be a list, got Tensor"),
    (lambda: ops.grouped_eigh(SPARSE), r"grouped_eigh: xs is torch.sparse_coo; only strided tensors are taken, call .to_dense"),
    (lambda: ops.grouped_damped_inverse(SPARSE), r"grouped_damped_inverse: rs is torch.sparse_coo"),
    (lambda: ops.grouped_solve(SPARSE, [X.mT]), r"grouped_solve: grams is torch.sparse_coo"),
    (lambda: ops.grouped_solve(EYE, SPARSE), r"grouped_solve: rhs is torch.sparse_coo"),
    (lambda: ops.grouped_solve(EYE, EYE, out=SPARSE), r"grouped_solve: out is torch.sparse_coo"),
    (lambda: ops.grouped_solve(EYE, EYE, 10**400), r"grouped_solve: damping must be finite in fp64"),
    (lambda: ops.grouped_preconditioner(EYE.double(), transposed="x"), r"transposed must be True or False, got 'x'"),
    *[(lambda rank=rank: ops.grouped_svd_product([X], [X], rank), r"rank must be a whole number") for rank in ("x", 1.5, True, SCALAR)],
    *[
        (lambda name=name, value=value: ops.grouped_svd([X], **{"rank": 2, name: value}), rf"grouped_svd: {name} must be (a whole|≥)")
        for name in ("rank", "oversample", "iterations")
        for value in ("x", [], SCALAR, True, 1.5, 10**30)
    ],
]


@pytest.mark.parametrize(("call", "message"), MISUSES, ids=[message for _, message in MISUSES])
def test_misuse_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()
