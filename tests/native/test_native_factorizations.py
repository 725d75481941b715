"""The compiled factorizations of tall matrices: QR, the SVD of a product and the polar factor."""

from __future__ import annotations

import pytest
import torch
from _native import DTYPES, LAYOUTS, RANKS, assert_close_to_fp64, matrix
from _numerics import conditioned
from torch import Tensor

from lowrank_kernels import ops
from lowrank_kernels.backends import registry

# --- grouped_qr -------------------------------------------------------------------------------------------------------


def check_qr(xs: list[Tensor], qs: list[Tensor], rs: Tensor, previous: list[Tensor] | None = None, residual_slack: float = 0.0) -> None:
    dtype = xs[0].dtype
    eps = torch.finfo(dtype).eps
    orthogonal = {torch.float32: 1e-5, torch.float64: 1e-13}.get(dtype, 4 * eps)
    residual = {torch.float32: 1e-5, torch.float64: 1e-13}.get(dtype, 4 * eps)
    for index, (x, q, r) in enumerate(zip(xs, qs, rs, strict=True)):
        # One power of two out of everything, so that norms of 1e±18 and of denormals are in range.
        exponent = torch.frexp(x.double().abs().amax()).exponent
        x, r, q = torch.ldexp(x.double(), -exponent), torch.ldexp(r.double(), -exponent), q.double()
        assert q.isfinite().all() and r.isfinite().all()
        assert (q.mT @ q - torch.eye(q.shape[1])).abs().max() <= orthogonal
        assert torch.linalg.norm(q @ r - x) <= residual * torch.linalg.norm(x) + residual_slack
        assert torch.equal(r, r.triu())
        signs = r.diagonal() if previous is None else (q * previous[index].double()).sum(dim=0)
        assert (signs >= -10 * eps * signs.abs().max()).all()  # Q was rounded to its dtype after the choice


def heights(rank: int) -> list[int]:
    return sorted({rank, rank + 1, max(rank, 64), max(rank, 300), 1500})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
def test_qr_layouts(rank: int, dtype: torch.dtype) -> None:
    for shift in range(4):
        xs = [matrix(d, rank, dtype, LAYOUTS[(i + shift) % 4]) for i, d in enumerate(heights(rank))]
        previous = [matrix(d, rank, dtype, LAYOUTS[(i + 2 * shift) % 4]) for i, d in enumerate(heights(rank))]
        out = [torch.full_like(matrix(d, rank, dtype, LAYOUTS[(i + 3 * shift) % 4]), torch.nan) for i, d in enumerate(heights(rank))]
        copies = [x.clone() for x in xs]
        qs, rs = ops.grouped_qr(xs)
        check_qr(xs, qs, rs)
        qs, rs = ops.grouped_qr(xs, previous, out=out)
        check_qr(xs, qs, rs, previous)
        assert all(torch.equal(x, copy) for x, copy in zip(xs, copies, strict=True))


@pytest.mark.parametrize("kappa", [1.0, 1e1, 1e2, 1e3, 1e4, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_qr_conditioning(dtype: torch.dtype, kappa: float) -> None:
    if dtype == torch.float32 and kappa > 1e6:
        pytest.skip("beyond what fp32 can hold")
    for rank in (2, 8, 16, 33, 128):
        xs = [conditioned(d, rank, kappa).to(dtype) for d in heights(rank)]
        check_qr(xs, *ops.grouped_qr(xs))


def hard_matrices(rank: int, dtype: torch.dtype) -> dict[str, tuple[list[Tensor], float]]:
    """What breaks a plain CholeskyQR, with the residual that may be added (relative to the scaled matrix)."""
    tiny = torch.finfo(dtype).smallest_normal
    huge, denormal = (1e18, 1e-42) if dtype == torch.float32 else (1e150, 1e-318)
    plain = [matrix(d, rank, dtype) for d in heights(rank)]

    def changed(change) -> list[Tensor]:
        copies = [x.clone() for x in plain]
        for x in copies:
            change(x)
        return copies

    steps = torch.logspace(-1, 1, rank, dtype=torch.float64)
    return {
        "zero column": (changed(lambda x: x[:, rank // 2].zero_()), 0),
        "zero first column": (changed(lambda x: x[:, 0].zero_()), 0),
        "duplicate columns": (changed(lambda x: x[:, -1].copy_(x[:, 0])), 0),
        "rank one": (changed(lambda x: x.copy_(x[:, :1].expand_as(x))), 0),
        "all zero": (changed(lambda x: x.zero_()), 0),
        "identity": (changed(lambda x: x.copy_(torch.eye(*x.shape))), 0),
        "a single entry": (changed(lambda x: x.zero_()[-1, -1].fill_(3)), 0),
        "huge": ([x * huge for x in plain], 0),
        "small": ([x / huge for x in plain], 0),
        "huge and small columns": ([(x.double() * huge ** (steps.log10())).to(dtype) for x in plain], 0),
        # R itself is denormal there: every entry of it may be off by half of the smallest number.
        "denormal": ([x * denormal for x in plain], rank**1.5 * tiny * torch.finfo(dtype).eps / denormal * 4),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 8, 16, 33, 128])
def test_qr_robustness(rank: int, dtype: torch.dtype, instruction_set: str) -> None:
    for name, (xs, slack) in hard_matrices(rank, dtype).items():
        qs, rs = ops.grouped_qr(xs)
        try:
            check_qr(xs, qs, rs, residual_slack=slack)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        again, rs_again = ops.grouped_qr(xs)
        assert torch.equal(rs, rs_again) and all(torch.equal(a, b) for a, b in zip(qs, again, strict=True)), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_qr_of_what_is_not_finite(bad: float) -> None:
    for dtype in DTYPES:
        xs = [matrix(d, 8, dtype) for d in (8, 100, 1500)]
        clean, clean_rs = ops.grouped_qr(xs)
        xs[1][57, 3] = bad
        qs, rs = ops.grouped_qr(xs)
        assert qs[1].isnan().all() and rs[1].isnan().all()
        for i in (0, 2):
            assert torch.equal(qs[i], clean[i]) and torch.equal(rs[i], clean_rs[i])


def test_qr_follows_its_previous_q_in_place() -> None:
    """A small change of X changes Q little, with ``out`` the previous Q itself, in the columns of a wider matrix."""
    for dtype in (torch.float32, torch.float64):
        xs = [matrix(d, 8, dtype) for d in (64, 700, 3000)]
        parents = [torch.randn(x.shape[0], 16, dtype=dtype) for x in xs]
        qs = [parent[:, :8] for parent in parents]
        right_halves = [parent[:, 8:].clone() for parent in parents]
        bases = [torch.linalg.qr(x)[0] * torch.where(torch.rand(8) < 0.5, -1, 1) for x in xs]
        for q, basis in zip(qs, bases, strict=True):
            q.copy_(basis)
        moved = [x + 1e-3 * torch.randn_like(x) for x in xs]
        out, rs = ops.grouped_qr(moved, qs, out=qs)
        check_qr(moved, out, rs, bases)
        for q, basis, parent, right in zip(qs, bases, parents, right_halves, strict=True):
            assert (q - basis).abs().max() < 0.05
            assert torch.equal(parent[:, 8:], right)


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("rank", [4, 8, 12, 16, 24, 48])
@pytest.mark.parametrize("target", ["new", "previous", "x"])
def test_all_rows_decide_which_columns_of_q_change_their_sign(target: str, rank: int, rows: bool, instruction_set: str) -> None:
    """Also where the first ones, by which a fast kernel guesses, point the other way."""
    xs = [matrix(d, rank, torch.float32, "rows" if rows else "transposed") for d in (100, 129, 1024, 2100)]
    bases = [torch.linalg.qr(x)[0] * torch.where(torch.rand(rank) < 0.5, -1, 1) for x in xs]
    previous = [x.clone() for x in xs]  # keeps strides
    for old, basis in zip(previous, bases, strict=True):
        old.copy_(basis)
        old[:64] *= -1e-3
    wanted, before = [old.clone() for old in previous], [x.clone() for x in xs]
    qs, rs = ops.grouped_qr(xs, previous, out={"new": None, "previous": previous, "x": xs}[target])
    check_qr(before, qs, rs, wanted)
    for q, basis in zip(qs, bases, strict=True):
        torch.testing.assert_close(q, basis, rtol=0, atol=1e-5)


def test_qr_matches_the_reference() -> None:
    """Where the QR is unique (full rank, signs fixed), it is the reference's."""
    xs = [matrix(d, 16, torch.float32) for d in (64, 768, 3000)]
    previous = [torch.randn_like(x) for x in xs]
    qs, rs = ops.grouped_qr(xs, previous)
    with registry.force("reference"):
        same, same_rs = ops.grouped_qr(xs, previous)
        exact, exact_rs = ops.grouped_qr([x.double() for x in xs], [p.double() for p in previous])
    for ours, theirs, truth in zip([*qs, rs], [*same, same_rs], [*exact, exact_rs], strict=True):
        assert_close_to_fp64(ours, theirs, truth)


@pytest.mark.parametrize("rank", [1, 16, 64, 128])
def test_qr_does_not_depend_on_threads(rank: int, threads: None) -> None:
    """One matrix that is split among threads, beside small ones: the same bits as on one thread."""
    xs = [matrix(d, rank, torch.float32, layout) for d, layout in ((200000 // rank, "rows"), (150, "rows"), (300, "transposed"))]
    previous = [torch.randn_like(x) for x in xs]
    deficient = [x.clone() for x in xs]
    for x in deficient:
        x[:, -1] = x[:, 0]
    for group in (xs, deficient):
        qs, rs = ops.grouped_qr(group, previous)
        torch.set_num_threads(1)
        alone, alone_rs = ops.grouped_qr(group, previous)
        torch.set_num_threads(2)
        assert torch.equal(rs, alone_rs) and all(torch.equal(a, b) for a, b in zip(qs, alone, strict=True))
        check_qr(group, qs, rs, previous)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("layout", ["rows", "transposed"])
@pytest.mark.parametrize("rank", [4, 8, 16, 24, 64])
def test_qr_past_the_caches_is_what_it_is_in_them(rank: int, layout: str, offset: int, instruction_set: str) -> None:
    """Some 34 MB in one call, and one matrix after the other; ``offset`` elements past a vector's boundary nothing can be streamed."""
    xs = [matrix(d, rank, torch.float32, layout) for d in ((1 << 21) // rank, max(37, rank + 1), (1 << 21) // rank + 5, 4099)]
    previous = [torch.randn_like(x) for x in xs]
    memory = [torch.full((x.numel() + offset,), torch.nan)[offset:] for x in xs]
    out = [m.view(x.mT.shape).mT if layout == "transposed" else m.view(x.shape) for m, x in zip(memory, xs, strict=True)]
    qs, rs = ops.grouped_qr(xs, previous, out=out)
    check_qr(xs, qs, rs, previous)
    for x, q, r, p in zip(xs, qs, rs, previous, strict=True):
        (alone,), alone_r = ops.grouped_qr([x], [p])
        assert torch.equal(q, alone) and torch.equal(r, alone_r[0])


# --- grouped_svd_product ----------------------------------------------------------------------------------------------


def check_svd(lefts: list[Tensor], rights: list[Tensor], us: list[Tensor], ss: Tensor, vs: list[Tensor]) -> None:
    dtype = lefts[0].dtype
    eps = torch.finfo(dtype).eps
    orthogonal = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 4 * eps)
    accurate = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 1e-5)
    for left, right, u, s, v in zip(lefts, rights, us, ss, vs, strict=True):
        left, right, u, v, s = (t.double() for t in (left, right, u, v, s))
        assert u.isfinite().all() and v.isfinite().all() and s.isfinite().all()
        for basis in (u, v):
            assert (basis.mT @ basis - torch.eye(len(s))).abs().max() <= orthogonal
        # The spectrum of the product, from its core in fp64.
        exact = torch.linalg.svdvals(torch.linalg.qr(left)[1] @ torch.linalg.qr(right)[1].mT)[: len(s)]
        assert (s - exact).abs().max() <= accurate * exact[0]
        assert (s.diff() <= 0).all() and (s >= 0).all()
        # uᵢᵀ M vⱼ is diagonal with the singular values: the triples belong together.
        core = (u.mT @ left) @ (v.mT @ right).mT
        assert (core - torch.diag(exact)).abs().max() <= max(10 * accurate, 8 * eps) * exact[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", RANKS)
def test_svd_product(k: int, dtype: torch.dtype) -> None:
    shapes = [(k, k + 3), (200, 150), (1500, 300)]
    for rank in {k, max(1, k // 2)}:
        lefts = [matrix(max(m, k), k, dtype, LAYOUTS[i]) for i, (m, _) in enumerate(shapes)]
        rights = [matrix(max(n, k), k, dtype, LAYOUTS[i + 1]) for i, (_, n) in enumerate(shapes)]
        check_svd(lefts, rights, *ops.grouped_svd_product(lefts, rights, rank))


@pytest.mark.parametrize("k", [1, 8, 33, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_svd_product_robustness(dtype: torch.dtype, k: int, instruction_set: str) -> None:
    plain = [matrix(m, k, dtype) for m in (max(k, 100), 900)]
    rights = [matrix(n, k, dtype, "transposed") for n in (max(k, 130), 200)]
    half = max(1, k // 2)
    cases = {
        "zero": [torch.zeros_like(x) for x in plain],
        "deficient": [torch.cat([x[:, :half], x[:, : k - half]], dim=1) for x in plain],
        "decaying": [(x.double() * torch.logspace(0, -6, k, dtype=torch.float64)).to(dtype) for x in plain],
        "equal singular values": [torch.linalg.qr(x)[0] for x in plain],
    }
    for lefts in cases.values():
        others = [torch.linalg.qr(r)[0] for r in rights] if lefts is cases["equal singular values"] else rights
        check_svd(lefts, others, *ops.grouped_svd_product(lefts, others, k))
    us, ss, vs = ops.grouped_svd_product([x * 1e18 for x in plain], [x * 1e-18 for x in rights], k)
    check_svd(plain, rights, us, ss, vs)


def test_svd_product_of_what_is_not_finite() -> None:
    lefts, rights = ([matrix(d, 8, torch.float32) for d in (50, 60, 1500)] for _ in range(2))
    clean = ops.grouped_svd_product(lefts, rights, 4)
    rights[1][3, 3] = torch.inf
    us, ss, vs = ops.grouped_svd_product(lefts, rights, 4)
    assert us[1].isnan().all() and ss[1].isnan().all() and vs[1].isnan().all()
    for i in (0, 2):
        assert all(torch.equal(ours[i], before[i]) for ours, before in zip((us, ss, vs), clean, strict=True))


def test_svd_product_does_not_depend_on_threads(threads: None) -> None:
    lefts, rights = [matrix(20000, 16, torch.float32), matrix(64, 16, torch.float32)], [matrix(3000, 16, torch.float32) for _ in range(2)]
    us, ss, vs = ops.grouped_svd_product(lefts, rights, 8)
    torch.set_num_threads(1)
    alone = ops.grouped_svd_product(lefts, rights, 8)
    assert torch.equal(ss, alone[1])
    assert all(torch.equal(a, b) for a, b in zip([*us, *vs], [*alone[0], *alone[2]], strict=True))


# --- grouped_polar ----------------------------------------------------------------------------------------------------


def check_polar(xs: list[Tensor], polars: list[Tensor]) -> None:
    """Orthonormal columns, and PᵀX symmetric and positive semidefinite with P PᵀX = X: what defines the polar factor."""
    for x, p in zip(xs, polars, strict=True):
        eps = torch.finfo(x.dtype).eps
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-13}.get(x.dtype, 8 * eps)
        x = torch.ldexp(x.double(), -torch.frexp(x.double().abs().amax()).exponent)
        p, norm = p.double(), torch.linalg.norm(x)
        assert p.isfinite().all()
        assert (p.mT @ p - torch.eye(p.shape[1])).abs().max() <= tolerance
        stretch = p.mT @ x
        assert (stretch - stretch.mT).abs().max() <= tolerance * norm
        assert torch.linalg.eigvalsh(stretch + stretch.mT).min() >= -tolerance * norm
        assert torch.linalg.norm(p @ stretch - x) <= tolerance * norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
def test_polar(rank: int, dtype: torch.dtype) -> None:
    for shift in range(4):
        xs = [matrix(d, rank, dtype, LAYOUTS[(i + shift) % 4]) for i, d in enumerate(heights(rank))]
        out = [torch.full_like(matrix(d, rank, dtype, LAYOUTS[(i + 3 * shift) % 4]), torch.nan) for i, d in enumerate(heights(rank))]
        check_polar(xs, ops.grouped_polar(xs))
        check_polar(xs, ops.grouped_polar(xs, out=out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 8, 33, 128])
def test_polar_robustness(rank: int, dtype: torch.dtype, instruction_set: str) -> None:
    for name, (xs, _) in hard_matrices(rank, dtype).items():
        if name == "denormal":  # its digits are few, so the residual of a denormal X is not small
            continue
        try:
            check_polar(xs, ops.grouped_polar(xs))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_polar_of_what_is_not_finite() -> None:
    xs = [matrix(d, 8, torch.float32) for d in (8, 100, 1500)]
    clean = ops.grouped_polar(xs)
    xs[1][57, 3] = torch.inf
    polars = ops.grouped_polar(xs)
    assert polars[1].isnan().all() and torch.equal(polars[0], clean[0]) and torch.equal(polars[2], clean[2])
