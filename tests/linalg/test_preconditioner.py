"""Preconditioners of Gram matrices, with and without a drift."""

from __future__ import annotations

import math

import pytest
import torch
from _linalg import DOUBLE, in_both_dtypes, on_every_backend, running
from _numerics import conditioned

from lowrank_kernels import ops


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
