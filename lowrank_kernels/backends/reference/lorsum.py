"""Alternating least squares on sums of low-rank matrices: the specification of ``grouped_lorsum`` and its product."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..registry import implements
from ._common import always

#: A term ``c P Qᵀ`` as (c, P, Q), or as (c, dense matrix, None).
Weighted: TypeAlias = tuple[float | Tensor, Tensor, Tensor | None]

#: Factors of up to so many columns are contracted in fp64; wider ones (the tokens of G = SᵀX) in the dtype of the arithmetic.
THIN = 128


def ridge(diagonal: Tensor, proximal: float, dtype: torch.dtype) -> Tensor:
    """The λ of each column (r,), given the Gram's diagonal: large enough for a Cholesky in fp64, 1 for a zero column.

    With λ = 0 it stands for the limit λ → 0, and for right-hand sides that were rounded to ``dtype``.
    """
    relative = 4 * len(diagonal) * torch.finfo(torch.float64).eps
    if proximal == 0:
        relative = max(relative, torch.finfo(dtype).eps)
    values = (relative * diagonal).clamp_min(proximal)
    return torch.where(values == 0, 1.0, values)


def contracted(right: Tensor | None, other: Tensor) -> Tensor:
    """``Qᵀ other`` in fp64; of a dense matrix ``other`` itself."""
    if right is None:
        return other.double()
    return right.mT.double() @ other.double() if right.shape[1] <= THIN else (right.mT @ other).double()


def half_sweep(start: Tensor, other: Tensor, terms: list[Weighted], proximal: float) -> Tensor:
    """``(Σ c P (Qᵀ other) + λ start) (otherᵀ other + λ I)⁻¹``.

    The inverse is applied to the small products, in fp64: rounded to fp32 first they would lose what it magnifies.
    """
    wide = other.double()
    gram = wide.mT @ wide
    damping = ridge(gram.diagonal(), proximal, start.dtype)
    factor, info = torch.linalg.cholesky_ex(gram + damping.diag())
    inverse = torch.cholesky_solve(torch.eye(len(gram), dtype=gram.dtype, device=gram.device), factor)
    total = start @ (damping[:, None] * inverse).to(start.dtype)
    for c, left, right in terms:
        total = total + left @ (c * contracted(right, other) @ inverse).to(start.dtype)
    return torch.where((info == 0) & factor.isfinite().all(), total, torch.nan)


@implements("grouped_lorsum", "reference", always)
def grouped_lorsum(
    us: list[Tensor],
    vs: list[Tensor],
    lefts: list[Tensor],
    rights: list[Tensor | None],
    numbers: list[float],
    coefficients: Tensor | None,
    sweeps: int,
    proximal: float,
    u_first: bool,
    out_us: list[Tensor],
    out_vs: list[Tensor],
) -> None:
    """Write the factors of layer i into ``out_us[i]`` and ``out_vs[i]``, which may be the start ``us[i]`` and ``vs[i]``.

    Term j of layer i is ``c P Qᵀ`` with P = ``lefts[j·N + i]`` and Q = ``rights[j·N + i]``, or the dense matrix P where that is None;
    c = ``coefficients[j, i]``, or ``numbers[j·N + i]`` without this tensor.
    """
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
        for turn in range(2 * sweeps):
            if u_first == (turn % 2 == 0):
                u = half_sweep(start_u, v, forward, proximal)
            else:
                v = half_sweep(start_v, u, mirrored, proximal)
        finite = u.isfinite().all() & v.isfinite().all()
        out_us[i].copy_(torch.where(finite, u, torch.nan))
        out_vs[i].copy_(torch.where(finite, v, torch.nan))


@implements("grouped_lorsum_product", "reference", always)
def grouped_lorsum_product(
    xs: list[Tensor],
    lefts: list[Tensor],
    rights: list[Tensor | None],
    numbers: list[float],
    coefficients: Tensor | None,
    ys: list[Tensor],
) -> None:
    """Write ``Σ_j c P (Qᵀ X)`` of layer i into ``ys[i]``, terms and coefficients as :func:`grouped_lorsum` has them."""
    layers = len(xs)
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        total = torch.zeros_like(y)
        for index in range(i, len(lefts), layers):
            c = numbers[index] if coefficients is None else coefficients[index // layers, i]
            right = rights[index]
            product = c * contracted(None if right is None else right.to(y.dtype), x.to(y.dtype))
            total = total + lefts[index].to(y.dtype) @ product.to(y.dtype)
        y.copy_(total)
