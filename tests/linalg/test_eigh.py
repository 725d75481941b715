"""Eigenvalues and eigenvectors of symmetric matrices: backward stability, and every layout of a stack."""

from __future__ import annotations

import math

import pytest
import torch
from _linalg import DOUBLE, SINGLE, in_both_dtypes, on_every_backend, running
from _numerics import conditioned, orthogonality
from torch import Tensor

from lowrank_kernels import ops


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
