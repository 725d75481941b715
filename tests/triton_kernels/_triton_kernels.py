"""What the tests of Triton's kernels have in common."""

from __future__ import annotations

import torch
from torch import Tensor

WIDE = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float16: torch.float32}


def assert_accurate(out: Tensor, torch_out: Tensor, exact: Tensor, name: str) -> None:
    """``|out − ref64| ≤ 2·|torch in the same dtype − ref64| + 8·eps(dtype)·max|ref64|``."""
    if not exact.numel():
        return
    error, theirs = (out.double() - exact).abs().max(), (torch_out.double() - exact).abs().max()
    # In fp64 ``exact`` is rounded as much as ``out`` is, and torch's result is ``exact`` itself.
    bound = 2 * theirs + (32 if out.dtype == torch.float64 else 8) * torch.finfo(out.dtype).eps * exact.abs().max()
    assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"
