"""Truncated SVD of a product of thin factors: the specification of ``grouped_svd_product``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..registry import implements
from ._common import always


@implements("grouped_svd_product", "reference", always)
def grouped_svd_product(lefts: list[Tensor], rights: list[Tensor], us: list[Tensor], ss: Tensor, vs: list[Tensor]) -> None:
    """``lefts[i] @ rights[i]ᵀ ≈ U diag(s) Vᵀ``, truncated to ``ss.shape[1]`` columns; the d_out × d_in product is never formed.

    Two thin QRs and one k × k SVD. Each factor is first scaled by one power of two, so that its squares are in range.
    A pair with a non-finite entry gives NaN in its own results, only there.
    """
    rank = ss.shape[1]
    for index, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        left, right = (factor.to(compute_dtype(factor.dtype)) for factor in (left, right))
        finite = left.isfinite().all() & right.isfinite().all()
        exponents = [torch.frexp(torch.where(finite, factor.abs().amax(), 0)).exponent for factor in (left, right)]
        scaled = [torch.ldexp(torch.ldexp(f, -e // 2), -e - (-e // 2)) for f, e in zip((left, right), exponents, strict=True)]
        q_left, r_left = torch.linalg.qr(torch.where(finite, scaled[0], 0))
        q_right, r_right = torch.linalg.qr(torch.where(finite, scaled[1], 0))
        u, s, vh = torch.linalg.svd(r_left @ r_right.mT)
        s = torch.ldexp(torch.ldexp(s, exponents[0]), exponents[1])
        us[index].copy_(torch.where(finite, q_left @ u[:, :rank], torch.nan))
        ss[index].copy_(torch.where(finite, s[:rank], torch.nan))
        vs[index].copy_(torch.where(finite, q_right @ vh[:rank].mT, torch.nan))
