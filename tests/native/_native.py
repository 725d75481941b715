"""What the tests of the compiled CPU backend share; without the extension, whatever imports this is skipped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_kernels.backends.extension import csrc as _csrc

native = pytest.importorskip("lowrank_kernels.backends.native", reason="the native extension is not built", exc_type=ImportError)

RANKS = (1, 4, 8, 16, 33, 64, 128)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("rows", "transposed", "columns of a wider one", "strided")
INSTRUCTION_SETS = [name for name in ("avx512", "avx2", "portable") if _csrc.use_instruction_set(name)]
_csrc.use_instruction_set(INSTRUCTION_SETS[0])


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def matrix(rows: int, columns: int, dtype: torch.dtype, layout: str = "rows", scale: Tensor | float = 1.0) -> Tensor:
    """Random, in one of the layouts that factors come in: dense, transposed, a column slice, every second row and column."""
    values = (torch.randn(rows, columns, dtype=torch.float64) * scale).to(dtype)
    if layout == "rows":
        return values
    if layout == "transposed":
        return values.mT.contiguous().mT
    if layout == "columns of a wider one":
        out = torch.full((rows, 2 * columns), torch.nan, dtype=dtype)[:, columns:]
    else:
        out = torch.full((2 * rows, 2 * columns), torch.nan, dtype=dtype)[::2, ::2]
    return out.copy_(values)


def assert_close_to_fp64(out: Tensor, torch_out: Tensor, exact: Tensor, torch_single: Tensor | None = None) -> None:
    """The rule of the house: at most twice the error of torch in the same dtype, plus 8 eps of the largest entry.

    In fp64 torch's result is the exact one by definition: there its error is that of fp32 (``torch_single``), in proportion.
    """
    assert out.isfinite().all()
    error, torch_error = ((value.double() - exact).abs().max().item() for value in (out, torch_out))
    eps = torch.finfo(out.dtype).eps
    if out.dtype == torch.float64 and torch_single is not None:
        torch_error = (torch_single.double() - exact).abs().max().item() * eps / torch.finfo(torch.float32).eps
    bound = 2 * torch_error + 8 * eps * exact.abs().max().item()
    assert error <= bound, f"error {error:.3g}, torch's {torch_error:.3g}, bound {bound:.3g}"
