"""Preconditioners from Gram matrices: the specification of ``grouped_preconditioner``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import implements
from ._common import always


@implements("grouped_preconditioner", "reference", always)
def grouped_preconditioner(
    grams: Tensor, drifts: Tensor | None, damping: float, weight: float, transposed: bool, maps: Tensor, realigned: Tensor
) -> None:
    """``maps[i] = w (G_i + δI)⁻¹``, ``realigned[i] = I - (G_i + δI)⁻¹ K_i`` or its transpose, in fp64."""
    identity = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device)
    factors, info = torch.linalg.cholesky_ex(grams.tril() + damping * identity)
    good = (info == 0) & factors.isfinite().flatten(1).all(dim=1)
    inverses = torch.where(good[:, None, None], torch.cholesky_inverse(torch.where(good[:, None, None], factors, identity)), torch.nan)
    maps.copy_(weight * inverses)
    if drifts is not None:
        product = identity - inverses @ drifts.to(grams.dtype)
        realigned.copy_(product.mT if transposed else product)
