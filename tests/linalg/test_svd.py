"""The randomized SVD: the energy that its bases capture, and spectra that exhaust the Krylov space."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import pytest
import torch
from _linalg import BOUND, DOUBLE, SINGLE, in_both_dtypes, on_every_backend, running, transposed_places
from _numerics import orthogonality
from torch import Tensor

from lowrank_kernels import ops


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
