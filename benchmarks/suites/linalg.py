"""Linear algebra of all factors of a model, against loops over torch; ``grouped_qr`` and ``grouped_lorsum`` against stacking too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowrank_kernels.ops import (
    grouped_gram,
    grouped_lorsum,
    grouped_polar,
    grouped_preconditioner,
    grouped_qr,
    grouped_solve,
    grouped_svd_product,
)
from lowrank_kernels.optim.preconditioned import DEFAULT_DAMPING

from ..harness import Case, Trial
from ..naive.oplora import lorsum
from ..naive.sds_lora import aligned_qr
from . import Setting, on, suite
from .optimizer import at_least_single, lorsum_flops


@dataclass
class Bases:
    """The tall matrices to factor (Aᵀ as a view of A, and B, of every layer), the previous Qs, and where to write the new ones."""

    xs: list[Tensor]
    previous: list[Tensor]
    out: list[Tensor]

    def copy(self) -> Bases:
        """The same inputs (and strides) elsewhere in memory, and outputs full of NaN."""
        return Bases([x.clone() for x in self.xs], [p.clone() for p in self.previous], [torch.full_like(q, math.nan) for q in self.out])


def make_bases(setting: Setting) -> Bases:
    """Gaussian factors, and previous Qs that are their own with random signs; Qs lie in memory as their factors do, as in SDS-LoRA."""
    generator = setting.generator()
    rank, dtype, device = setting.rank, setting.dtype, setting.device

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device).to(dtype)

    xs = [x for d_out, d_in in setting.layers for x in (draw(rank, d_in).mT, draw(d_out, rank))]
    signs = [torch.randint(0, 2, (rank,), generator=generator, device=device) * 2 - 1 for _ in xs]
    previous = [torch.empty_like(x).copy_(torch.linalg.qr(x.float())[0] * sign) for x, sign in zip(xs, signs, strict=True)]
    return Bases(xs, previous, [torch.full_like(x, math.nan) for x in xs])


def qr_error(x: Tensor, previous: Tensor, q: Tensor) -> float:
    """The larger of ``max|QᵀQ − I|`` and ``max|X − QQᵀX| / max|X|``, in fp64; infinite if a column is not aligned."""
    x, previous, q = x.double(), previous.double(), q.double()
    if not bool(((q * previous).sum(dim=0) > 0).all()):
        return math.inf
    orthogonality = (q.mT @ q - torch.eye(q.shape[1], dtype=q.dtype, device=q.device)).abs().max()
    residual = (x - q @ (q.mT @ x)).abs().max() / x.abs().max()
    return torch.maximum(orthogonality, residual).item()


def householder(x: Tensor, previous: Tensor) -> Tensor:
    """What a user writes: one QR, in fp32 at least, and the signs of its columns."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return aligned_qr(x.to(wide), previous.to(wide)).to(x.dtype)


class Judge:
    """The worst error over all matrices, against twice that of Householder QR in the same dtype, plus 8·eps."""

    def __init__(self, bases: Bases) -> None:
        own = max(qr_error(x, p, householder(x, p)) for x, p in zip(bases.xs, bases.previous, strict=True))
        self.tolerance = 2 * own + 8 * torch.finfo(bases.xs[0].dtype).eps

    def __call__(self, bases: Bases) -> tuple[float, float]:
        errors = [qr_error(*matrices) for matrices in zip(bases.xs, bases.previous, bases.out, strict=True)]
        return (math.nan if any(map(math.isnan, errors)) else max(errors)), self.tolerance


def naive(bases: Bases, judge: Judge) -> Trial:
    """A loop over ``torch.linalg.qr``, then the signs."""

    def run() -> None:
        for x, previous, out in zip(bases.xs, bases.previous, bases.out, strict=True):
            out.copy_(householder(x, previous))

    return Trial(run, lambda: judge(bases))


def batched(bases: Bases, judge: Judge) -> Trial:
    """The best one can do by stacking: CholeskyQR twice on all matrices of one height, the copies included."""
    by_height: dict[int, list[int]] = {}
    for index, x in enumerate(bases.xs):
        by_height.setdefault(x.shape[0], []).append(index)
    wide = torch.promote_types(bases.xs[0].dtype, torch.float32)

    def run() -> None:
        for indices in by_height.values():
            q = torch.stack([bases.xs[i] for i in indices]).to(wide)
            for _ in range(2):
                upper, _ = torch.linalg.cholesky_ex(q.mT @ q, upper=True)
                q = torch.linalg.solve_triangular(upper, q, upper=True, left=False)
            previous = torch.stack([bases.previous[i] for i in indices]).to(wide)
            q *= torch.where((q * previous).sum(dim=1, keepdim=True) < 0, -1.0, 1.0)
            torch._foreach_copy_([bases.out[i] for i in indices], list(q.unbind()))

    return Trial(run, lambda: judge(bases))


def operation(backend: str, bases: Bases, judge: Judge) -> Trial:
    """``ops.grouped_qr`` on one backend."""
    return Trial(lambda: grouped_qr(bases.xs, bases.previous, out=bases.out), lambda: judge(bases), on(backend), ours=True)


@dataclass
class Product:
    """An operation whose results can be compared with fp64 entry by entry.

    Attributes:
        inputs: lists of matrices.
        naive: the loop over torch, in the dtype of its inputs.
        ours: the operation of this package; both take the lists of ``inputs``.
        bytes: what must move.
        flops: what must be computed, as :class:`Case` has it.
        comparable: (inputs, results) → what does not depend on signs and other choices.
    """

    inputs: tuple[list[Tensor], ...]
    naive: Callable[..., list[Tensor]]
    ours: Callable[..., list[Tensor]]
    bytes: int
    flops: Mapping[torch.dtype, int]
    comparable: Callable[[tuple[list[Tensor], ...], list[Tensor]], list[Tensor]] = lambda inputs, results: results

    def case(self, op: str, setting: Setting) -> Case:
        """Judged by the largest error as a share of the largest entry, against twice that of the loop, plus 8·eps."""
        exact_inputs = tuple([x.double() for x in matrices] for matrices in self.inputs)
        exact = self.comparable(exact_inputs, self.naive(*exact_inputs))
        scale = max(x.abs().max().item() for x in exact)

        def error(results: list[Tensor]) -> float:
            found = self.comparable(exact_inputs, [x.double() for x in results])
            errors = [(x - e).abs().max().item() / scale for x, e in zip(found, exact, strict=True)]
            return math.nan if any(map(math.isnan, errors)) else max(errors)

        same = self.naive(*self.inputs)
        # Of fp64 sums the reference is one more rounding of the exact ones: its error grows with the root of their length.
        terms = max(len(x) for x in self.inputs[0])
        rounding = max(64, 2 * math.sqrt(terms)) if same[0].dtype == torch.float64 else 8
        tolerance = 2 * error(same) + rounding * torch.finfo(same[0].dtype).eps

        def trial(call: Callable[..., list[Tensor]], backend: str | None) -> Trial:
            inputs = tuple([x.clone() for x in matrices] for matrices in self.inputs)
            last: list[list[Tensor]] = [[]]

            def run() -> None:
                last[0] = call(*inputs)

            def check() -> tuple[float, float]:
                return error(last[0]), tolerance

            return Trial(run, check) if backend is None else Trial(run, check, on(backend), ours=True)

        providers = {"naive": partial(trial, self.naive, None)}
        providers |= {f"ours-{backend}": partial(trial, self.ours, backend) for backend in setting.backends}
        return Case(
            op, setting.shapes, setting.rank, setting.dtype, setting.device, self.bytes, len(self.inputs[0]), providers, flops=self.flops
        )


def _svd_comparable(inputs: tuple[list[Tensor], ...], results: list[Tensor]) -> list[Tensor]:
    """The singular values, and ``left rightᵀ V − U S``, which is zero."""
    lefts, rights = inputs
    n = len(lefts)
    us, ss, vs = results[:n], results[n : 2 * n], results[2 * n :]
    return [*ss, *(x @ (y.mT @ v) - u * s for x, y, u, s, v in zip(lefts, rights, us, ss, vs, strict=True))]


def _svd_loop(lefts: list[Tensor], rights: list[Tensor]) -> list[Tensor]:
    us, ss, vs = [], [], []
    for left, right in zip(lefts, rights, strict=True):
        (q, r), (p, t) = torch.linalg.qr(left), torch.linalg.qr(right)
        u, s, vh = torch.linalg.svd(r @ t.mT)
        us.append(q @ u)
        ss.append(s)
        vs.append(p @ vh.mT)
    return us + ss + vs


def _svd_grouped(lefts: list[Tensor], rights: list[Tensor]) -> list[Tensor]:
    us, ss, vs = grouped_svd_product(lefts, rights, lefts[0].shape[1])
    return [*us, *ss, *vs]


def _polar_loop(xs: list[Tensor]) -> list[Tensor]:
    factors = (torch.linalg.svd(x, full_matrices=False) for x in xs)
    return [u @ vh for u, _, vh in factors]


def _solve_loop(xs: list[Tensor], grams: list[Tensor]) -> list[Tensor]:
    factors = [torch.linalg.cholesky(gram) for gram in grams[0]]
    return [torch.cholesky_solve(x.mT, factor).mT.contiguous() for x, factor in zip(xs, factors, strict=True)]


def _preconditioner_loop(grams: list[Tensor], drifts: list[Tensor]) -> list[Tensor]:
    """``(G + δI)⁻¹`` and ``I - (G + δI)⁻¹ K`` of every layer."""
    maps, realigned = [], []
    for gram, drift in zip(grams[0], drifts[0], strict=True):
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor = torch.linalg.cholesky(gram + DEFAULT_DAMPING * identity)
        maps.append(torch.cholesky_inverse(factor).to(drift.dtype))
        realigned.append((identity - torch.cholesky_solve(drift.to(gram.dtype), factor)).to(drift.dtype))
    return [torch.stack(maps), torch.stack(realigned)]


def _preconditioner_grouped(grams: list[Tensor], drifts: list[Tensor]) -> list[Tensor]:
    found = grouped_preconditioner(grams[0], DEFAULT_DAMPING, drifts=drifts[0], dtype=drifts[0].dtype)
    return [x for x in found if x is not None]


def products(bases: Bases, setting: Setting) -> Iterator[Case]:
    """Everything but QR: Gram matrices (summed in fp32 and in fp64), preconditioners, solves, polar factors, SVDs of B·A."""
    xs, size, small, r = bases.xs, bases.xs[0].element_size(), setting.rank**2 * len(bases.xs), setting.rank
    elements = sum(x.numel() for x in xs)
    factors, wide = elements * size, at_least_single(setting.dtype)
    gram, product = elements * (r + 1), 2 * elements * r  # XᵀX is symmetric
    loop = lambda xs: [x.mT @ x for x in xs]  # noqa: E731
    yield Product((xs,), loop, lambda xs: list(grouped_gram(xs)), factors + 4 * small, {wide: gram}).case("grouped_gram", setting)
    wide_loop = lambda xs: [(y := x.double()).mT @ y for x in xs]  # noqa: E731
    double = lambda xs: list(grouped_gram(xs, dtype=torch.float64))  # noqa: E731
    yield Product((xs,), wide_loop, double, factors + 8 * small, {torch.float64: gram}).case("grouped_gram fp64", setting)
    grams = [torch.stack([x.float().mT @ x.float() / len(x) for x in xs])]
    solved = [torch.empty_like(x) for x in xs]  # where torch's loop has its fresh results, this has memory that is there
    solve = lambda xs, grams: grouped_solve(grams[0], xs, side="right", out=solved)  # noqa: E731
    if setting.dtype == torch.float32:
        maps = ([grams[0].double()], [0.1 * grams[0]])
        inverse = {torch.float64: 3 * r * small}  # LLᵀ, (LLᵀ)⁻¹ and (LLᵀ)⁻¹K, of 1/3, 2/3 and 2 r³
        yield Product(maps, _preconditioner_loop, _preconditioner_grouped, 20 * small, inverse).case("grouped_preconditioner", setting)
        yield Product((xs, grams), _solve_loop, solve, 2 * factors + 4 * small, {wide: product}).case("grouped_solve", setting)
        yield Product((xs,), _polar_loop, grouped_polar, 2 * factors, {wide: gram + product}).case("grouped_polar", setting)
        pairs = (xs[1::2], xs[::2])
        svd = {wide: 2 * product}  # orthogonalize, and turn what came out
        yield Product(pairs, _svd_loop, _svd_grouped, 2 * factors, svd, _svd_comparable).case("grouped_svd_product", setting)


#: Of the LoRSum: rows of S and X, sweeps, λ, and the coefficients of the weights, of G and of the momentum.
TOKENS, SWEEPS, PROXIMAL, WEIGHTS = 256, 2, 1e-3, (1.0, -0.1, -0.09)


@dataclass
class Sums:
    """OPLoRA's step of every layer: the start (U, V), the terms UVᵀ, G = SᵀX and M, and where to write."""

    start: tuple[list[Tensor], list[Tensor]]
    terms: list[tuple[list[Tensor], list[Tensor]]]
    out: tuple[list[Tensor], list[Tensor]]

    def copy(self) -> Sums:
        """Factors elsewhere in memory, outputs full of NaN; S, X and M, which nobody writes, are shared."""
        start = [x.clone() for x in self.start[0]], [x.clone() for x in self.start[1]]
        out = [torch.full_like(x, math.nan) for x in start[0]], [torch.full_like(x, math.nan) for x in start[1]]
        return Sums(start, [start, *self.terms[1:]], out)

    def layer(self, i: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Listing 1 for layer i, computed in ``dtype``."""
        factors = [(left[i].to(dtype), right[i].to(dtype)) for left, right in self.terms]
        return lorsum(factors[0], factors, list(WEIGHTS), SWEEPS, PROXIMAL)


def make_sums(setting: Setting) -> Sums:
    """Gaussian everything; V and X as the optimizer has them, transposed views of (r, d_in) and (tokens, d_in)."""
    generator = setting.generator()

    def draw(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator, device=setting.device) / columns**0.5).to(setting.dtype)

    def pairs(columns: int, *, left_rows: bool) -> tuple[list[Tensor], list[Tensor]]:
        lefts = [draw(d_out, columns) if left_rows else draw(columns, d_out).mT for d_out, _ in setting.layers]
        return lefts, [draw(columns, d_in).mT for _, d_in in setting.layers]

    start, gradient, momentum = (pairs(setting.rank, left_rows=True), pairs(TOKENS, left_rows=False), pairs(setting.rank, left_rows=True))
    return Sums(start, [start, gradient, momentum], ([], [])).copy()


class SumJudge:
    """The worst error of all factors over their largest entry, against fp64; bound: twice that of Listing 1 in fp32, plus 8·eps."""

    def __init__(self, sums: Sums) -> None:
        layers = range(len(sums.start[0]))
        self.exact = [sums.layer(i, torch.float64) for i in layers]
        own = [tuple(x.to(sums.start[0][0].dtype) for x in sums.layer(i, torch.float32)) for i in layers]
        self.tolerance = 2 * self.error(own) + 8 * torch.finfo(sums.start[0][0].dtype).eps

    def error(self, results: Iterable[tuple[Tensor, ...]]) -> float:
        errors = [
            ((x.double() - truth).abs().max() / truth.abs().max()).item()
            for result, exact in zip(results, self.exact, strict=True)
            for x, truth in zip(result, exact, strict=True)
        ]
        return math.nan if any(map(math.isnan, errors)) else max(errors)

    def __call__(self, sums: Sums) -> tuple[float, float]:
        return self.error(zip(*sums.out, strict=True)), self.tolerance


def naive_sums(sums: Sums, judge: SumJudge) -> Trial:
    """Listing 1, layer by layer."""
    wide = torch.promote_types(sums.start[0][0].dtype, torch.float32)

    def run() -> None:
        for i, (u, v) in enumerate(zip(*sums.out, strict=True)):
            for out, result in zip((u, v), sums.layer(i, wide), strict=True):
                out.copy_(result)

    return Trial(run, lambda: judge(sums))


def batched_sums(sums: Sums, judge: SumJudge) -> Trial:
    """Listing 1 on stacks of the layers of one shape; S and X lie stacked already, U, V and M are copied."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, (u, v) in enumerate(zip(*sums.start, strict=True)):
        by_shape.setdefault((u.shape[0], v.shape[0]), []).append(index)
    groups = [
        (indices, torch.stack([sums.terms[1][0][i].mT for i in indices]).mT, torch.stack([sums.terms[1][1][i].mT for i in indices]).mT)
        for indices in by_shape.values()
    ]
    wide = torch.promote_types(sums.start[0][0].dtype, torch.float32)

    def run() -> None:
        for indices, S, X in groups:
            start, momentum = (tuple(torch.stack([side[i] for i in indices]).to(wide) for side in pair) for pair in sums.terms[::2])
            terms = list(zip(WEIGHTS, (start, (S.to(wide), X.to(wide)), momentum), strict=True))
            now = list(start)
            for turn in range(2 * SWEEPS):
                side, other = turn % 2, now[1 - turn % 2]
                total = PROXIMAL * start[side]
                for c, factors in terms:
                    total = total + c * (factors[side] @ (factors[1 - side].mT @ other))
                gram = other.mT @ other
                gram.diagonal(dim1=1, dim2=2).add_(PROXIMAL)
                now[side] = torch.cholesky_solve(total.mT, torch.linalg.cholesky_ex(gram)[0]).mT
            for out, stacked in zip(sums.out, now, strict=True):
                torch._foreach_copy_([out[i] for i in indices], list(stacked.unbind()))

    return Trial(run, lambda: judge(sums))


def grouped_sums(backend: str, sums: Sums, judge: SumJudge) -> Trial:
    """``ops.grouped_lorsum`` on one backend."""

    def run() -> None:
        with torch.no_grad():
            grouped_lorsum(sums.start, sums.terms, WEIGHTS, SWEEPS, PROXIMAL, out=sums.out)

    return Trial(run, lambda: judge(sums), on(backend), ours=True)


@suite(
    "linalg",
    "grouped_qr",
    "grouped_gram",
    "grouped_gram fp64",
    "grouped_preconditioner",
    "grouped_solve",
    "grouped_polar",
    "grouped_svd_product",
    "grouped_lorsum",
)
def cases(setting: Setting) -> Iterator[Case]:
    """``grouped_qr`` of Aᵀ and B, one refresh of SDS-LoRA; :func:`products`; ``grouped_lorsum``, one step of OPLoRA."""
    bases = make_bases(setting)
    yield qr_case(setting, bases)
    yield from products(bases, setting)
    yield lorsum_case(setting)


def lorsum_case(setting: Setting) -> Case:
    sums = make_sums(setting)
    judge = SumJudge(sums)
    providers: dict[str, Callable[[Sums, SumJudge], Trial]] = {
        "naive": naive_sums,
        "torch-batched": batched_sums,
        **{f"ours-{backend}": partial(grouped_sums, backend) for backend in setting.backends},
    }
    widths = sum(d_out + d_in for d_out, d_in in setting.layers)
    return Case(
        op="grouped_lorsum",
        shapes=setting.shapes,
        rank=setting.rank,
        dtype=setting.dtype,
        device=setting.device,
        # Read U, V, M, S and X, write U and V.
        bytes=widths * (3 * setting.rank + TOKENS) * sums.start[0][0].element_size(),
        tensors=2 * len(setting.layers),
        providers={name: lambda build=build: build(sums.copy(), judge) for name, build in providers.items()},
        rival="torch-batched",
        flops={at_least_single(setting.dtype): lorsum_flops(setting, TOKENS, SWEEPS)},
    )


def qr_case(setting: Setting, bases: Bases) -> Case:
    judge = Judge(bases)
    providers: dict[str, Callable[[Bases, Judge], Trial]] = {
        "naive": naive,
        "torch-batched": batched,
        **{f"ours-{backend}": partial(operation, backend) for backend in setting.backends},
    }
    elements, item = sum(x.numel() for x in bases.xs), bases.xs[0].element_size()
    return Case(
        op="grouped_qr",
        shapes=setting.shapes,
        rank=setting.rank,
        dtype=setting.dtype,
        device=setting.device,
        # Read X and the previous Q, write Q and R.
        bytes=3 * elements * item + len(bases.xs) * setting.rank**2 * max(item, 4),
        tensors=len(bases.xs),
        providers={name: lambda build=build: build(bases.copy(), judge) for name, build in providers.items()},
        rival="torch-batched",
        flops={at_least_single(setting.dtype): 2 * elements * setting.rank},
    )
