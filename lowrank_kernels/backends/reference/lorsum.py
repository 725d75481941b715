"""Alternating least squares on sums of low-rank matrices: the specification of ``grouped_lorsum`` and its product."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..registry import implements
from ..sums import THIN, FactorLists, Sums, Sweeps, ridge
from ._common import always

#: A term ``c P Qᵀ`` as (c, P, Q), or as (c, dense matrix, None).
Weighted: TypeAlias = tuple[float | Tensor, Tensor, Tensor | None]


def contracted(right: Tensor | None, other: Tensor) -> Tensor:
    """``Qᵀ other`` in fp64; of a dense matrix ``other`` itself."""
    if right is None:
        return other.double()
    return right.mT.double() @ other.double() if right.shape[1] <= THIN else (right.mT @ other).double()


def half_sweep(start: Tensor, other: Tensor, terms: list[Weighted], proximal: float) -> Tensor:
    """``(Σ c P (Qᵀ other) + λ start) (otherᵀ other + λ I)⁻¹``.

    The small products are solved for, in fp64: rounded to fp32 first they would lose what the inverse magnifies; and an inverse itself
    has errors as large as its largest entries in all directions, where a solution's lie in those that ``other`` hardly spans.
    """
    wide = other.double()
    gram = wide.mT @ wide
    damping = ridge(gram.diagonal(), proximal, start.dtype)
    factor, info = torch.linalg.cholesky_ex(gram + damping.diag())

    def solved(rows: Tensor) -> Tensor:
        return torch.cholesky_solve(rows.mT, factor).mT.to(start.dtype)

    total = start @ solved(damping.diag())
    for c, left, right in terms:
        total = total + left @ solved(c * contracted(right, other))
    return torch.where((info == 0) & factor.isfinite().all(), total, torch.nan)


@implements("grouped_lorsum", "reference", always)
def grouped_lorsum(targets: FactorLists, sums: Sums, sweeps: Sweeps, out: FactorLists) -> None:
    """Write the factors of layer i into ``out[0][i]`` and ``out[1][i]``, which may be the start, ``targets``, themselves."""
    (us, vs), (lefts, rights, numbers, coefficients) = targets, sums
    layers = len(us)
    dtype = compute_dtype(us[0].dtype)
    for i in range(layers):
        forward: list[Weighted] = []
        mirrored: list[Weighted] = []
        for index in range(i, len(lefts), layers):
            c = numbers[index] if coefficients is None else coefficients[index // layers, i]
            left, right = lefts[index].to(dtype), rights[index]
            forward.append((c, left, None if right is None else right.to(dtype)))
            mirrored.append((c, left.mT, None) if right is None else (c, right.to(dtype), left))
        start_u, start_v = us[i].to(dtype), vs[i].to(dtype)
        u, v = start_u, start_v
        for turn in range(2 * sweeps.number):
            if sweeps.u_first == (turn % 2 == 0):
                u = half_sweep(start_u, v, forward, sweeps.proximal)
            else:
                v = half_sweep(start_v, u, mirrored, sweeps.proximal)
        finite = u.isfinite().all() & v.isfinite().all()
        out[0][i].copy_(torch.where(finite, u, torch.nan))
        out[1][i].copy_(torch.where(finite, v, torch.nan))


@implements("grouped_lorsum_product", "reference", always)
def grouped_lorsum_product(xs: list[Tensor], sums: Sums, ys: list[Tensor]) -> None:
    """Write ``Σ_j c P (Qᵀ X)`` of layer i into ``ys[i]``."""
    lefts, rights, numbers, coefficients = sums
    layers = len(xs)
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        total = torch.zeros_like(y)
        for index in range(i, len(lefts), layers):
            c = numbers[index] if coefficients is None else coefficients[index // layers, i]
            right = rights[index]
            product = c * contracted(None if right is None else right.to(y.dtype), x.to(y.dtype))
            total = total + lefts[index].to(y.dtype) @ product.to(y.dtype)
        y.copy_(total)
