"""Inverted dropout, as operations and backends agree on it."""

from __future__ import annotations

import torch
from torch import Tensor

#: Keep probabilities of dropout by seed are multiples of one over this.
RESOLUTION = 1 << 16


def dropped(x: Tensor, mask: Tensor | None, keep: float) -> Tensor:
    """``x ∘ mask / keep`` (True = kept); what is dropped is 0, whatever it was."""
    return x if mask is None else torch.where(mask, x * (1.0 / keep), 0.0)
