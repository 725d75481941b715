"""The polar factor: the nearest orthonormal matrix, and one where there are many."""

from __future__ import annotations

import math

import pytest
import torch
from _linalg import AWKWARD, BOUND, HEIGHTS, awkward, in_both_dtypes, on_every_backend, relative, running
from _numerics import conditioned, orthogonality

from lowrank_kernels import ops


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
