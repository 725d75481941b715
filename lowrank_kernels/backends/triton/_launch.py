"""What all Triton kernels share on the host: where they can run, dtypes, and the launch itself."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..registry import Verdict, count_launch

#: Whether kernels run in Triton's interpreter (decided when triton is imported).
INTERPRET: bool = bool(triton.knobs.runtime.interpret)

TL_DTYPE = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_NOWHERE: AbstractContextManager[Any] = contextlib.nullcontext()


def padded_rank(rank: int) -> int:
    """The rank, padded to a power of two that ``tl.dot`` takes."""
    return max(16, triton.next_power_of_2(rank))


def square_warps(padded: int) -> int:
    """How many warps take one padded r×r matrix of fp64, r ≤ 64: a warp alone waits for no other."""
    return {16: 1, 32: 4, 64: 8}[padded]


def device_verdict(tensors: Sequence[Tensor]) -> Verdict:
    """Whether Triton kernels can run where the tensors are; a reason in either case."""
    device = tensors[0].device
    if device.type == "cuda":
        return True, "Triton kernels"
    if INTERPRET:
        return True, "Triton's interpreter (TRITON_INTERPRET=1)"
    return False, f"Triton kernels need a CUDA or ROCm device (or TRITON_INTERPRET=1); the tensors are on {device}"


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which launches go to the device of ``tensor``; free of charge when that is the current one."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return _NOWHERE
    return torch.cuda.device(tensor.device)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch ``kernel`` once, and note it in the registry's count."""
    count_launch()
    # FP contraction is stated because its default differs between versions of Triton.
    kernel[grid](*args, enable_fp_fusion=True, **options)
