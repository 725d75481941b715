"""Damped r×r systems: the specification of ``grouped_solve``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import implements
from ._common import always


@implements("grouped_solve", "reference", always)
def grouped_solve(grams: Tensor, rhs: list[Tensor] | Tensor, damping: float, left: bool, out: list[Tensor] | Tensor) -> None:
    """``out[i] = (G_i + δI)⁻¹ rhs[i]`` or, from the right, ``rhs[i] (G_i + δI)⁻¹``, in the dtype of the Grams.

    Stacked matrices come as one tensor.
    """
    for index, matrix in enumerate(rhs):
        gram = grams[index].tril()
        gram = gram + gram.tril(-1).mT
        gram.diagonal().add_(damping)
        factor, info = torch.linalg.cholesky_ex(gram)
        wide = matrix.to(grams.dtype)
        solution = torch.cholesky_solve(wide if left else wide.mT, factor)
        solved = (info == 0) & factor.isfinite().all()
        out[index].copy_(torch.where(solved, solution if left else solution.mT, torch.nan))
