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
    """``maps[i] = w (G_i + δI)⁻¹``, ``realigned[i] = I - (G_i + δI)⁻¹ K_i`` or its transpose, in fp64.

    The second is solved for: K times the inverse would have an error of cond(G) where the solution has one of its square root.
    """
    identity = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device)
    factors, info = torch.linalg.cholesky_ex(grams.tril() + damping * identity)
    good = ((info == 0) & factors.isfinite().flatten(1).all(dim=1))[:, None, None]
    factors = torch.where(good, factors, identity)
    maps.copy_(weight * torch.where(good, torch.cholesky_inverse(factors), torch.nan))
    if drifts is not None:
        difference = torch.where(good, identity - torch.cholesky_solve(drifts.to(grams.dtype), factors), torch.nan)
        realigned.copy_(difference.mT if transposed else difference)
