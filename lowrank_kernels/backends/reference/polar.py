"""Orthonormal polar factor: the specification of ``grouped_polar``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..registry import implements
from ._common import always


@implements("grouped_polar", "reference", always)
def grouped_polar(xs: list[Tensor], out: list[Tensor]) -> None:
    """``out[i] = U Vᵀ`` of the thin SVD ``X_i = U Σ Vᵀ``, by QR and an r × r SVD, which completes a rank-deficient X.

    X is first scaled by one power of two, so that no square over- or underflows.
    """
    for index, x in enumerate(xs):
        wide = x.to(compute_dtype(x.dtype))
        finite = wide.isfinite().all()
        exponent = torch.frexp(torch.where(finite, wide.abs().amax(), 0)).exponent
        scaled = torch.ldexp(torch.ldexp(wide, -exponent // 2), -exponent - (-exponent // 2))
        q, r = torch.linalg.qr(torch.where(finite, scaled, 0))
        u, _, vh = torch.linalg.svd(r)
        out[index].copy_(torch.where(finite, q @ (u @ vh), torch.nan))
