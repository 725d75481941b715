"""Thin QR with fixed column signs: the specification of ``grouped_qr``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..registry import implements
from ._common import always


def power_of_two_exponents(x: Tensor) -> Tensor:
    """For each column of x (d, r) the exponent e with max|x_j| in [2^(e-1), 2^e); 0 for a zero or non-finite column."""
    largest = x.abs().amax(dim=0)
    return torch.frexp(torch.where(largest.isfinite(), largest, 0)).exponent


def scale_columns(x: Tensor, exponents: Tensor) -> Tensor:
    """``x · diag(2^exponents)``, exactly; in two halves, because 2^e alone may over- or underflow where the product does not."""
    half = exponents.div(2, rounding_mode="floor")
    return torch.ldexp(torch.ldexp(x, half), exponents - half)


def column_signs(q: Tensor, r: Tensor, previous: Tensor | None) -> Tensor:
    """The sign (±1) of each column: ``⟨q_j, previous_j⟩ > 0``; without a previous Q, or on a tie, ``r_jj ≥ 0``."""
    fallback = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    if previous is None:
        return fallback
    alignment = (q * previous.to(q.dtype)).sum(dim=0)
    return torch.where(alignment == 0, fallback, torch.where(alignment < 0, -1.0, 1.0).to(q.dtype))


@implements("grouped_qr", "reference", always)
def grouped_qr(xs: list[Tensor], previous: list[Tensor] | None, qs: list[Tensor], rs: Tensor, layouts: object = None) -> None:
    """Write ``Q_i`` into ``qs[i]`` (d_i, r) and ``R_i`` into ``rs[i]``; ``qs`` may be the tensors of ``previous``.

    Columns are scaled by powers of two first (so no square over- or underflows) and Householder QR completes a
    rank-deficient X to a full orthonormal Q. A matrix with a non-finite entry gives NaN in its own Q and R, only there.
    """
    for index, x in enumerate(xs):
        wide = x.to(compute_dtype(x.dtype))
        exponents = power_of_two_exponents(wide)
        q, r = torch.linalg.qr(scale_columns(wide, -exponents))
        signs = column_signs(q, r, None if previous is None else previous[index])
        finite = wide.isfinite().all()
        qs[index].copy_(torch.where(finite, q * signs, torch.nan))
        rs[index].copy_(torch.where(finite, scale_columns(r * signs[:, None], exponents), torch.nan))
