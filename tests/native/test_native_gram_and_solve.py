"""The compiled Gram matrices, and what is done with r×r ones: solves, eigenvalues, inverses."""

from __future__ import annotations

import math

import pytest
import torch
from _native import DTYPES, LAYOUTS, RANKS, matrix, native, wide
from _numerics import conditioned
from torch import Tensor

from lowrank_kernels import ops
from lowrank_kernels.backends import reference, registry

# --- grouped_gram -----------------------------------------------------------------------------------------------------


def gram_bound(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounding of sums of products that are formed in ``dtype``, entry by entry."""
    return torch.finfo(dtype).eps * (1 + x.shape[0] ** 0.5) * x.double().norm(dim=0)[:, None] * y.double().norm(dim=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
def test_gram(rank: int, dtype: torch.dtype, instruction_set: str) -> None:
    tall = (1, 37, 256, 300, 2100, 0)
    for columns, shift in ((None, 0), (rank, 0), (rank, 1), (5, 1), (70, 0), (70, 1)):
        xs = [matrix(d, rank, dtype, LAYOUTS[i % 4]) for i, d in enumerate(tall)]
        ys = None if columns is None else [matrix(d, columns, dtype, LAYOUTS[(i + shift) % 4]) for i, d in enumerate(tall)]
        for result in {wide(dtype), torch.float64}:
            grams = ops.grouped_gram(xs, ys, dtype=result)
            assert grams.dtype == result and grams.shape == (len(xs), rank, columns or rank)
            for gram, x, y in zip(grams, xs, ys or xs, strict=True):
                if ys is None:
                    assert torch.equal(gram, gram.mT)
                assert ((gram.double() - x.double().mT @ y.double()).abs() <= gram_bound(x, y, result)).all()


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("rank", RANKS)
def test_gram_of_many_alike(rank: int, layout: str, instruction_set: str) -> None:
    """Where memory is asked for the next matrix, which may be shorter."""
    tall = (300, 1100, 40, 300, 256, 7)
    xs, ys = ([matrix(d, rank, torch.float32, layout) for d in tall] for _ in "xy")
    for result in (torch.float32, torch.float64):
        for own, cross, x, y in zip(ops.grouped_gram(xs, dtype=result), ops.grouped_gram(xs, ys, dtype=result), xs, ys, strict=True):
            assert ((own.double() - x.double().mT @ x.double()).abs() <= gram_bound(x, x, result)).all()
            assert ((cross.double() - x.double().mT @ y.double()).abs() <= gram_bound(x, y, result)).all()


def test_cross_grams_of_matrices_without_rows() -> None:
    """Their memory is at no address, as that of a y that is not given; none of their columns lie one behind the other."""
    x, y = torch.empty(0, 2)[:, 1:], torch.empty(0, 70)
    assert not ops.grouped_gram([x], [y]).any() and not ops.grouped_gram([y], [x], dtype=torch.float64).any()


def test_gram_keeps_bad_numbers_to_their_matrix() -> None:
    xs = [matrix(d, 8, torch.float32) for d in (30, 40, 1500)]
    clean = ops.grouped_gram(xs)
    xs[1][7, 3] = torch.nan
    grams = ops.grouped_gram(xs)
    assert grams[1].isnan().any()
    assert torch.equal(grams[0], clean[0]) and torch.equal(grams[2], clean[2])


@pytest.mark.parametrize("rank", [1, 16, 128])
def test_gram_does_not_depend_on_threads(rank: int, threads: None) -> None:
    xs = [torch.randn(400000 // rank, rank), torch.randn(150, rank), torch.randn(rank, 300).mT]
    ys = [torch.randn_like(x) for x in xs]
    results = [ops.grouped_gram(xs), ops.grouped_gram(xs, ys, dtype=torch.float64)]
    torch.set_num_threads(1)
    assert torch.equal(results[0], ops.grouped_gram(xs)) and torch.equal(results[1], ops.grouped_gram(xs, ys, dtype=torch.float64))


# --- grouped_solve ----------------------------------------------------------------------------------------------------


def positive_definite(count: int, rank: int, dtype: torch.dtype) -> Tensor:
    """With something else above the diagonal, which must not be read."""
    roots = torch.randn(count, rank, 3 * rank, dtype=torch.float64) / rank**0.5
    grams = (roots @ roots.mT).to(dtype)
    return grams.tril() + torch.full_like(grams, torch.nan).triu(1).nan_to_num(7.0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
def test_solve(rank: int, dtype: torch.dtype, gram_dtype: torch.dtype, side: str, instruction_set: str) -> None:
    widths = (1, 37, rank, 300, 2100)
    grams = positive_definite(len(widths), rank, gram_dtype)
    rhs = [matrix(d, rank, dtype, LAYOUTS[i % 4]) for i, d in enumerate(widths)]
    rhs = [x.mT for x in rhs] if side == "left" else rhs
    solutions = ops.grouped_solve(grams, rhs, 0.1, side=side)
    with registry.force("reference"):
        same_dtype = ops.grouped_solve(grams, rhs, 0.1, side=side)
        exact = ops.grouped_solve(grams.double(), [x.double() for x in rhs], 0.1, side=side)
    symmetric = grams.double().tril() + grams.double().tril(-1).mT + 0.1 * torch.eye(rank, dtype=torch.float64)
    # Where torch's arithmetic is that of the exact solution, both have the rounding of a system of this condition.
    rounding = torch.finfo(gram_dtype).eps * torch.linalg.cond(symmetric)
    for ours, theirs, truth, x, inexact in zip(solutions, same_dtype, exact, rhs, rounding, strict=True):
        assert ours.dtype == dtype and ours.shape == x.shape and ours.is_contiguous()
        error, torch_error = ((value.double() - truth).abs().max().item() for value in (ours, theirs))
        eps = max(torch.finfo(dtype).eps, torch.finfo(gram_dtype).eps)
        assert error <= 2 * torch_error + (8 * eps + inexact.item()) * truth.abs().max().item()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rank", [4, 8, 16])
def test_solve_past_the_caches_is_what_it_is_in_them(rank: int, side: str, offset: int, instruction_set: str) -> None:
    """36 MB in one call, and one matrix after the other; ``offset`` elements past a vector's boundary nothing can be streamed."""
    rows = [(1 << 19) // rank, 37, (1 << 22) // rank]
    grams = positive_definite(3, rank, torch.float32)
    rhs = [torch.randn((rank, d) if side == "left" else (d, rank)) for d in rows]
    out = [torch.full((x.numel() + offset,), math.nan)[offset:].view(x.shape) for x in rhs]
    ops.grouped_solve(grams, rhs, 0.1, side=side, out=out)
    for i, x in enumerate(rhs):
        parts = x.split(1 << 16, dim=1 if side == "left" else 0)
        alone = [ops.grouped_solve(grams[i : i + 1], [part.contiguous()], 0.1, side=side)[0] for part in parts]
        assert torch.equal(out[i], torch.cat(alone, dim=1 if side == "left" else 0))


def test_solve_of_stacked_right_hand_sides() -> None:
    grams = positive_definite(5, 8, torch.float64)
    for rhs in (torch.randn(5, 8, 3), torch.eye(8, dtype=torch.float64).expand(5, 8, 8), torch.randn(5, 3, 8).mT):
        solution = ops.grouped_solve(grams, rhs, 1e-3)
        assert isinstance(solution, Tensor) and solution.shape == rhs.shape and solution.is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(solution, ops.grouped_solve(grams, list(rhs), 1e-3), strict=True))


@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
def test_solve_reports_what_is_not_positive_definite(gram_dtype: torch.dtype) -> None:
    grams = positive_definite(6, 8, gram_dtype)
    rhs = [torch.randn(8, 40) for _ in grams]
    clean = ops.grouped_solve(grams, rhs, 0.1)
    grams[1], grams[3, 5, 2], grams[4, 7, 7] = -torch.eye(8), torch.nan, torch.inf
    solutions = ops.grouped_solve(grams, rhs, 0.1)
    for index, (ours, before) in enumerate(zip(solutions, clean, strict=True)):
        assert ours.isnan().all() if index in (1, 3, 4) else torch.equal(ours, before)


def test_solve_of_an_ill_conditioned_gram_with_little_damping() -> None:
    """σ₁ = 10, κ = 1e6: in fp64 a damping of 1e-6 is enough; B = 0 leaves the damping alone."""
    x = conditioned(300, 8, 1e6) * 10
    grams = torch.stack([x.mT @ x, torch.zeros(8, 8, dtype=torch.float64)])
    solutions = ops.grouped_solve(grams, torch.eye(8, dtype=torch.float64).expand(2, 8, 8), 1e-6)
    exact = torch.linalg.inv(grams + 1e-6 * torch.eye(8, dtype=torch.float64))
    assert (solutions - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_solve_does_not_depend_on_threads(threads: None) -> None:
    grams, rhs = positive_definite(3, 16, torch.float64), [torch.randn(d, 16) for d in (30000, 300, 200)]
    solutions = ops.grouped_solve(grams, rhs, 0.1, side="right")
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(solutions, ops.grouped_solve(grams, rhs, 0.1, side="right"), strict=True))


# --- grouped_eigh and grouped_damped_inverse --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 5, 16, 33])
def test_eigh_of_every_instruction_set(rank: int, dtype: torch.dtype, instruction_set: str) -> None:
    x = torch.randn(19, rank, rank, dtype=dtype)
    x = x + x.mT
    x[3], x[4] = 0, x[4, 0, 0] * torch.eye(rank)
    values, vectors = (torch.full(shape, torch.nan, dtype=dtype) for shape in ((19, rank), (19, rank, rank)))
    native.eigh.grouped_eigh(x, values, vectors)
    eps, wide_vectors = torch.finfo(dtype).eps, vectors.double()
    size = torch.linalg.matrix_norm(x.double())[:, None, None] + torch.finfo(dtype).tiny
    residual = x.double() @ wide_vectors - wide_vectors * values.double()[:, None, :]
    assert (residual.abs() / size).max() <= 8 * rank * eps
    assert (wide_vectors.mT @ wide_vectors - torch.eye(rank)).abs().max() <= 8 * rank * eps


@pytest.mark.parametrize("rank", [1, 4, 16, 33])
def test_damped_inverse_of_every_instruction_set(rank: int, instruction_set: str) -> None:
    r = torch.randn(19, rank, rank, dtype=torch.float64).triu() * 1e-2
    out = torch.full_like(r, torch.nan)
    native.damped_inverse.grouped_damped_inverse(r, 1e-3, out)
    inverse = torch.linalg.inv(r.mT @ r + 1e-3 * torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(out @ out.mT, inverse, rtol=1e-10, atol=1e-10 * inverse.abs().max().item())


@pytest.mark.parametrize("rank", [1, 3, 4, 8, 16, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_preconditioner_of_every_instruction_set(rank: int, dtype: torch.dtype, instruction_set: str) -> None:
    x, drifts = torch.randn(19, 2 * rank, rank, dtype=torch.float64), torch.randn(19, rank, rank, dtype=dtype)
    found, exact = ([torch.full_like(drifts, torch.nan) for _ in range(2)] for _ in range(2))
    for backend, out in ((native, found), (reference, exact)):
        backend.preconditioner.grouped_preconditioner(x.mT @ x, drifts, 1e-2, 0.5, True, *out)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    for a, b in zip(found, exact, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("rank", [1, 3, 4, 8, 16, 33])
def test_sylvester_of_every_instruction_set(rank: int, instruction_set: str) -> None:
    x, y, rhs = torch.randn(3, 19, rank, rank, dtype=torch.float64).unbind()
    left, right, out = x @ x.mT + torch.eye(rank), y @ y.mT, torch.full_like(rhs, torch.nan)
    native.sylvester.grouped_sylvester(left, right, rhs, out)
    assert (left @ out + out @ right - rhs).abs().max() <= 1e-12 * (left.abs().max() + right.abs().max()) * out.abs().max() * rank


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rank", [1, 3, 4, 8, 16, 33])
def test_square_right_hand_sides_of_every_instruction_set(rank: int, side: str, instruction_set: str) -> None:
    """Among others: of these some are square by chance, and each gets what it gets alone."""
    x = torch.randn(19, 2 * rank + 1, rank, dtype=torch.float64)
    grams, rows = x.mT @ x, [rank if index % 3 else rank + 1 for index in range(19)]
    rhs = [torch.randn((rank, d) if side == "left" else (d, rank), dtype=torch.float64) for d in rows]
    rhs[4] = rhs[4].mT.contiguous().mT
    solved = ops.grouped_solve(grams, rhs, 0.5, side=side)
    for index, (gram, c, found) in enumerate(zip(grams + 0.5 * torch.eye(rank), rhs, solved, strict=True)):
        residual = gram @ found - c if side == "left" else found @ gram - c
        assert residual.abs().max() <= 1e-13 * rank * (gram.abs().max() * found.abs().max() + c.abs().max())
        assert torch.equal(ops.grouped_solve(grams[index : index + 1], [c], 0.5, side=side)[0], found)
    indefinite = grams - 1e3 * torch.eye(rank) * (torch.arange(19) == 7)[:, None, None]
    again = ops.grouped_solve(indefinite, rhs, 0.5, side=side, out=[c.clone() for c in rhs])
    assert all(c.isnan().all() if index == 7 else torch.equal(c, solved[index]) for index, c in enumerate(again))


def test_small_stacks_do_not_depend_on_threads(threads: None) -> None:
    x = torch.randn(301, 16, 16, dtype=torch.float64)

    def work() -> tuple[Tensor, ...]:
        inverses = ops.grouped_damped_inverse(x.triu(), 0.1), *ops.grouped_preconditioner(x.mT @ x, 0.1, drifts=x)
        systems = ops.grouped_solve(x.mT @ x, x, 0.1), ops.grouped_sylvester(x.mT @ x, x @ x.mT, x)
        return (*ops.grouped_eigh(x), ops.grouped_eigvalsh(x), *inverses, *systems)

    results = [work() for _ in range(2)]
    torch.set_num_threads(1)
    results.append(work())
    assert all(torch.equal(a, b) for got in results[1:] for a, b in zip(results[0], got, strict=True))
