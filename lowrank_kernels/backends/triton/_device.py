"""Device functions that several kernels use."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scalar(value, DTYPE: tl.constexpr):
    """A launch argument as a tensor of DTYPE (the interpreter passes plain numbers)."""
    return (tl.full((), 0.0, tl.float64) + value).to(DTYPE)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """fp64 ``value`` in DTYPE, by way of fp32 for narrower ones (the interpreter converts fp64 to bf16 wrongly)."""
    if tl.float64 == DTYPE:
        return value
    else:
        return value.to(tl.float32).to(DTYPE)


@triton.jit
def divide(x, y, COMPUTE: tl.constexpr):
    """``x / y`` correctly rounded (``/`` is approximate in fp32)."""
    if tl.float32 == COMPUTE:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def root(x, COMPUTE: tl.constexpr):
    """``√x`` correctly rounded."""
    if tl.float32 == COMPUTE:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)
