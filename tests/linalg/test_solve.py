"""Damped solves with Gram matrices: backward stability, damping, and what is not definite."""

from __future__ import annotations

import math

import pytest
import torch
from _linalg import DOUBLE, SINGLE, in_both_dtypes, on_every_backend, running
from _numerics import conditioned

from lowrank_kernels import ops


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
