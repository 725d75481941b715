"""Compiled code: C++ with threads and SIMD on the CPU, cuSOLVER and cuBLAS on CUDA (``csrc``). One file per operation."""

from ..extension import cause

if cause is not None:
    raise ImportError(str(cause)) from cause

from . import (
    adamw,
    altlora_turn,
    damped_inverse,
    eigh,
    gram,
    lora_linear,
    lora_shared,
    lorsum,
    polar,
    preconditioner,
    qr,
    solve,
    svd,
    svd_product,
    sylvester,
)

__all__ = [
    "adamw",
    "altlora_turn",
    "damped_inverse",
    "eigh",
    "gram",
    "lora_linear",
    "lora_shared",
    "lorsum",
    "polar",
    "preconditioner",
    "qr",
    "solve",
    "svd",
    "svd_product",
    "sylvester",
]
