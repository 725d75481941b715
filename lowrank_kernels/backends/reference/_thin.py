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


def transposed(factors: list[Tensor], tokens: int) -> Tensor:
    """``[B₁ B₂ …]ᵀ`` of factors (d_out, r): its rows contiguous where that is faster in products with so many tokens."""
    rows, columns = factors[0].shape
    pays = tokens >= MANY_TOKENS and factors[0].device.type == "cpu"
    if len(factors) > 1:
        return torch.cat([factor.mT for factor in factors]) if pays else torch.cat(factors, dim=1).mT
    return factors[0].mT.contiguous() if pays and (columns < FEW_COLUMNS or rows >= MANY_ROWS) else factors[0].mT


def token_sum(grad: Tensor, hidden: Tensor) -> Tensor:
    """``∂yᵀ H`` (d_out, r), contiguous, for ∂y (tokens, d_out) and H (tokens, r)."""
    if grad.device.type == "cpu" and (hidden.shape[1] < FEW_COLUMNS or grad.dtype != torch.float32):
        return (hidden.mT @ grad).mT.contiguous()
    return grad.mT @ hidden
