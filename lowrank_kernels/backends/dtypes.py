"""Which dtypes factors, gradients and activations come in, and which they are computed in."""

from __future__ import annotations

import torch

#: dtypes of factors, gradients and activations; what is narrower than fp32 is computed in fp32.
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: The numbers by which compiled code names them (``DType`` in csrc/cpu/common.h).
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 in, fp64 out; everything narrower is computed, and keeps its state, in fp32: sums, r×r matrices, moments."""
    return torch.float64 if dtype == torch.float64 else torch.float32
