"""What all reference implementations share."""

from __future__ import annotations

from typing import Any

import torch


def always(*args: Any) -> tuple[bool, str]:
    """The reference takes every call."""
    return True, "reference PyTorch takes every call"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 in, fp64 out; everything narrower is computed in fp32 (METHODS, Numerics)."""
    return torch.float64 if dtype == torch.float64 else torch.float32
