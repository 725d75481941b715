"""Damped inverses of triangular factors: the specification of ``grouped_damped_inverse``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import implements
from ._common import always


@implements("grouped_damped_inverse", "reference", always)
def grouped_damped_inverse(rs: Tensor, damping: float, out: Tensor) -> None:
    """``out[i] = R_δ⁻¹``, ``R_δ`` being the triangular factor of ``[R_i; √δ I]`` with a diagonal ≥ 0."""
    finite = rs.isfinite().flatten(1).all(dim=1)[:, None, None]
    identity = torch.eye(rs.shape[1], dtype=rs.dtype, device=rs.device).expand_as(rs)
    damped = torch.linalg.qr(torch.cat([torch.where(finite, rs.triu(), 0), damping**0.5 * identity], dim=1), mode="r").R
    signs = torch.where(damped.diagonal(dim1=1, dim2=2) < 0, -1, 1)
    inverse = torch.linalg.solve_triangular(signs[:, :, None] * damped, identity, upper=True)
    out.copy_(torch.where(finite, inverse, torch.nan))
