"""Products with factors, in the layouts that are fast on a CPU.

MKL's time for a product with few columns depends on their layout: ``∂yᵀ H`` with fewer than 16 columns takes 2 to 5 times as long as its
transpose ``Hᵀ ∂y``, and ``∂y B`` up to twice as long as with the rows of Bᵀ in a row; in bf16, and mostly in fp64, at any rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: With fewer columns a product in fp32 is slow.
FEW_COLUMNS = 16
#: With fewer tokens, or fewer rows of a factor of more columns, a copy of the factor costs as much as it saves.
MANY_TOKENS, MANY_ROWS = 128, 1024
#: With fewer tokens the direct product is the faster one, though it is the slow kind.
SOME_TOKENS = 32


def stacked(factors: list[Tensor], tokens: int) -> Tensor:
    """``[B₁ B₂ …]`` (d_out, k) of factors (d_out, r): with contiguous columns where that is faster in products with so many tokens."""
    if tokens < MANY_TOKENS or factors[0].device.type != "cpu":
        return factors[0] if len(factors) == 1 else torch.cat(factors, dim=1)
    if len(factors) > 1:
        return torch.cat([factor.mT for factor in factors]).mT
    rows, columns = factors[0].shape
    return factors[0].mT.contiguous().mT if columns < FEW_COLUMNS or rows >= MANY_ROWS else factors[0]


def token_sum(grad: Tensor, hidden: Tensor) -> Tensor:
    """``∂yᵀ H`` (d_out, r), contiguous, for ∂y (tokens, d_out) and H (tokens, r)."""
    few = hidden.shape[1] < FEW_COLUMNS or grad.dtype != torch.float32
    if few and len(grad) >= SOME_TOKENS and grad.device.type == "cpu":
        return (hidden.mT @ grad).mT.contiguous()
    return grad.mT @ hidden
