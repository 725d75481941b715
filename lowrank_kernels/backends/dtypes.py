"""Which dtypes factors, gradients and activations come in, and which they are computed in."""

from __future__ import annotations

import torch
from torch import Tensor

#: dtypes of factors, gradients and activations; what is narrower than fp32 is computed in fp32.
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: The numbers by which compiled code names them (``DType`` in csrc/cpu/common.h).
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 in, fp64 out; everything narrower is computed, and keeps its state, in fp32: sums, r×r matrices, moments."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which takes longer than to see that there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def under_autocast(device_type: str) -> bool:
    """Whether autocast is on for the device."""
    return torch._C._is_any_autocast_enabled() and device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What ``F.linear`` would cast x to: its own dtype without autocast."""
    dtype = x.dtype
    # First what takes a tenth of the time to ask: every layer does.
    if not torch._C._is_any_autocast_enabled() or dtype == torch.float64 or not under_autocast(x.device.type):
        return dtype
    return torch.get_autocast_dtype(x.device.type)
