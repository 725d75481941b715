"""Matrices whose condition is known, and how far columns are from orthonormal ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def conditioned(rows: int, columns: int, kappa: float) -> Tensor:
    """A random fp64 matrix with singular values spread evenly, on a logarithmic scale, from 1 down to 1/kappa."""
    u, v = (torch.linalg.qr(torch.randn(n, columns, dtype=torch.float64))[0] for n in (rows, columns))
    return u * torch.logspace(0, -math.log10(kappa), columns, dtype=torch.float64) @ v.mT


def orthogonality(q: Tensor) -> float:
    """``‖QᵀQ − I‖_max`` in fp64."""
    return float((q.double().mT @ q.double() - torch.eye(q.shape[1], dtype=torch.float64, device=q.device)).abs().max())
