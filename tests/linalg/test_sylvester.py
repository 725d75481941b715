"""``L X + X R = C`` with symmetric positive semidefinite coefficients."""

from __future__ import annotations

import math

import pytest
import torch
from _linalg import DOUBLE, on_every_backend, running
from _numerics import conditioned
from torch import Tensor

from lowrank_kernels import ops


def semidefinite(rank: int, *spectra: Tensor) -> Tensor:
    """One matrix with random eigenvectors for each spectrum."""
    qs = [conditioned(rank, rank, 1.0) for _ in spectra]
    return torch.stack([(x + x.mT) / 2 for x in (q * spectrum @ q.mT for q, spectrum in zip(qs, spectra, strict=True))])


@on_every_backend
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8, 16, 33, 128])
def test_solutions_leave_a_residual_of_rounding(backend: str, rank: int) -> None:
    one, graded = torch.ones(rank, dtype=DOUBLE), torch.logspace(0, -6, rank, dtype=DOUBLE)
    half = (torch.arange(rank) % 2).double()
    left = semidefinite(rank, one, graded, graded, 1e30 * graded, 1e-30 * graded, half, torch.rand(rank, dtype=DOUBLE) + 0.1)
    right = semidefinite(rank, graded, one, graded, 1e30 * one, 1e-30 * graded, one, torch.rand(rank, dtype=DOUBLE))
    rhs = torch.randn(7, rank, rank, dtype=DOUBLE)
    with running("grouped_sylvester", backend), torch.no_grad():
        x, again = (ops.grouped_sylvester(left, right, rhs) for _ in range(2))
    assert torch.equal(x, again), "not deterministic"
    norms = [torch.linalg.matrix_norm(y) for y in (left, right, x, rhs)]
    residual = torch.linalg.matrix_norm(left @ x + x @ right - rhs)
    assert (residual <= 8 * rank * torch.finfo(DOUBLE).eps * ((norms[0] + norms[1]) * norms[2] + norms[3])).all()


@on_every_backend
def test_where_neither_has_anything_the_solution_has_nothing(backend: str) -> None:
    """As for LoRA-Pro's first step, where B = 0; and C may have something there that no X brings about."""
    rank = 6
    q_l, q_r = (conditioned(rank, rank, 1.0) for _ in range(2))
    λ, μ = torch.tensor([0, 0, 1, 2, 3, 4.0], dtype=DOUBLE), torch.tensor([0, 0, 0, 1, 5, 6.0], dtype=DOUBLE)
    rotated, sums = torch.randn(rank, rank, dtype=DOUBLE), λ[:, None] + μ
    expected = q_l @ torch.where(sums > 0, rotated / sums, 0) @ q_r.mT
    left, right, rhs = (q_l * λ @ q_l.mT)[None], (q_r * μ @ q_r.mT)[None], (q_l @ rotated @ q_r.mT)[None]
    with running("grouped_sylvester", backend), torch.no_grad():
        torch.testing.assert_close(ops.grouped_sylvester(left, right, rhs)[0], expected, rtol=1e-13, atol=1e-13)
        nothing = torch.zeros_like(left)
        assert not ops.grouped_sylvester(nothing, nothing, rhs).any()
        torch.testing.assert_close(ops.grouped_sylvester(nothing, torch.eye(rank, dtype=DOUBLE)[None], rhs), rhs)


@on_every_backend
def test_any_stack_of_which_lower_triangles_are_read(backend: str) -> None:
    for count, rank in ((1, 1), (3, 0), (7, 5), (9, 4), (50, 3)):
        x, y, rhs = torch.randn(3, count, rank, rank, dtype=DOUBLE).unbind()
        left, right = x @ x.mT, y @ y.mT
        wide = torch.full((2 * count, rank, 2 * rank), math.nan, dtype=DOUBLE)
        wide[::2, :, rank:] = left.tril() + torch.randn(rank, rank, dtype=DOUBLE).triu(1)
        with running("grouped_sylvester", backend), torch.no_grad():
            expected = ops.grouped_sylvester(left, right, rhs)
            strided = ops.grouped_sylvester(wide[::2, :, rank:], right.tril(), rhs.mT.contiguous().mT)
            one_by_one = [ops.grouped_sylvester(*(s[i : i + 1] for s in (left, right, rhs))) for i in range(count)]
        if backend == "native":  # a matrix gets the same whatever its neighbours are
            assert torch.equal(strided, expected) and all(torch.equal(a[0], b) for a, b in zip(one_by_one, expected, strict=True))
        torch.testing.assert_close(strided, expected, rtol=1e-9, atol=1e-9)


@on_every_backend
@pytest.mark.parametrize("where", range(3))
def test_what_is_not_finite_spoils_no_other(backend: str, where: int) -> None:
    x = torch.randn(11, 5, 5, dtype=DOUBLE)
    stacks = [x @ x.mT, x.mT @ x, x.clone()]
    with running("grouped_sylvester", backend), torch.no_grad():
        clean = ops.grouped_sylvester(*stacks)
        stacks[where] = stacks[where].clone()
        stacks[where][2, 1, 1], stacks[where][10, 4, 0] = math.nan, math.inf
        spoilt = ops.grouped_sylvester(*stacks)
    for index in range(11):
        assert not spoilt[index].isfinite().any() if index in (2, 10) else torch.equal(spoilt[index], clean[index])
