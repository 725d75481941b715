"""Device functions that several kernels use."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scalar(value, DTYPE: tl.constexpr):
    """A launch argument as a tensor of DTYPE (the interpreter passes plain numbers)."""
    return (tl.full((), 0.0, tl.float64) + value).to(DTYPE)
