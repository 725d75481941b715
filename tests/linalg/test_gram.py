"""Gram matrices and cross products: accuracy, and their range in fp64."""

from __future__ import annotations

import pytest
import torch
from _linalg import DOUBLE, HEIGHTS, SINGLE, on_every_backend, running

from lowrank_kernels import ops


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
