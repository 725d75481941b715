"""Matrices whose condition is known, and how far columns are from orthonormal ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lowrank_kernels.backends.extension import csrc


def same_bits_or(rtol: float, atol: float) -> Callable[[Tensor, Tensor], bool]:
    """Equality to the bit, where the extension is there. Without it torch's products depend on where memory begins, on strides and on how
    many there are, and tensors are as near as said."""
    return torch.equal if csrc is not None else partial(torch.allclose, rtol=rtol, atol=atol)


def conditioned(rows: int, columns: int, kappa: float) -> Tensor:
    """A random fp64 matrix with singular values spread evenly, on a logarithmic scale, from 1 down to 1/kappa."""
    u, v = (torch.linalg.qr(torch.randn(n, columns, dtype=torch.float64))[0] for n in (rows, columns))
    return u * torch.logspace(0, -math.log10(kappa), columns, dtype=torch.float64) @ v.mT


def orthogonality(q: Tensor) -> float:
    """``‖QᵀQ − I‖_max`` in fp64."""
    return float((q.double().mT @ q.double() - torch.eye(q.shape[1], dtype=torch.float64, device=q.device)).abs().max())
