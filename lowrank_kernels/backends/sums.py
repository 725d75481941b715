"""What a LoRSum takes, as the backends get it; ``ops/lorsum.py`` says what it means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

#: Factors of up to so many columns are contracted in fp64; wider ones (the tokens of G = SᵀX) in the dtype of the arithmetic. Compiled
#: code on the CPU, which is bound by its arithmetic, has fp64 up to max(r, 32) columns.
THIN = 128

#: Left factors (d_out, ·) and right factors (d_in, ·) of all layers.
FactorLists: TypeAlias = tuple[Sequence[Tensor], Sequence[Tensor]]


class Sums(NamedTuple):
    """``Σ_j c_ji P_ji Q_jiᵀ`` of N layers: at j·N + i stands what belongs to term j of layer i."""

    lefts: list[Tensor]
    #: None: the left one is the whole dense matrix.
    rights: list[Tensor | None]
    numbers: list[float]
    #: (J, N) on the device, in place of the ``numbers``; or None.
    coefficients: Tensor | None


class Sweeps(NamedTuple):
    """How the sums are approximated: K sweeps of two solves with λ, of which the first is for U or for V."""

    number: int
    proximal: float
    u_first: bool


def relative_ridge(rank: int, proximal: float, dtype: torch.dtype) -> float:
    """The least λ of a column, as a share of the Gram matrix's diagonal: large enough for a Cholesky in fp64.

    With λ = 0 it stands for the limit λ → 0, and for right-hand sides that were rounded to ``dtype``.
    """
    relative = 4 * rank * torch.finfo(torch.float64).eps
    return max(relative, torch.finfo(dtype).eps) if proximal == 0 else relative


def ridge(diagonals: Tensor, proximal: float, dtype: torch.dtype) -> Tensor:
    """The λ of each column (..., r), given the diagonals of the Gram matrices; 1 for a zero column."""
    values = (relative_ridge(diagonals.shape[-1], proximal, dtype) * diagonals).clamp_min(proximal)
    return torch.where(values == 0, 1.0, values)
