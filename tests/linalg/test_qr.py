"""QR: orthogonality and residual of factors on which QR by Cholesky alone breaks down, and the signs."""

from __future__ import annotations

import pytest
import torch
from _linalg import AWKWARD, BOUND, DOUBLE, HEIGHTS, WORST_KAPPA, awkward, in_both_dtypes, on_every_backend, relative, running
from _numerics import conditioned, orthogonality
from torch import Tensor

from lowrank_kernels import ops


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
def test_qr_of_awkward_factors(backend: str, dtype: torch.dtype, rank: int) -> None:
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
