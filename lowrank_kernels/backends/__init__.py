"""Where operations run: the registry of implementations, and how one is chosen for a call.

Three rooms, one file per operation in each: ``reference`` (plain PyTorch, any device, the specification),
``native`` (C++ on the CPU, cuSOLVER/cuBLAS on CUDA), ``triton`` (CUDA kernels).
"""

from .registry import (
    BackendError,
    Selection,
    call_counts,
    count_launch,
    force,
    implementations,
    implements,
    launch_count,
    select,
)

__all__ = [
    "BackendError",
    "Selection",
    "call_counts",
    "count_launch",
    "force",
    "implementations",
    "implements",
    "launch_count",
    "select",
]
