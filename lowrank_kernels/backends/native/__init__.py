"""Compiled code: C++ with threads and SIMD on the CPU, cuSOLVER and cuBLAS on CUDA (``csrc``). One file per operation.

The extension must be loaded after torch, whose copy of the OpenMP runtime it then shares; the line below sees to it.
"""

from importlib import import_module
from typing import Any

import torch  # noqa: F401

#: What this package asks of the extension; ``kInterface`` in csrc/bindings.cpp, where it says when to raise both.
INTERFACE = 4

try:
    _csrc: Any = import_module("._csrc", __package__)
except ImportError as error:
    raise ImportError(
        f"the compiled extension did not load ({error}). Install a C++17 compiler and reinstall the package with "
        "LOWRANK_KERNELS_REQUIRE_NATIVE=1, which shows the compiler's own error"
    ) from error
else:
    found = getattr(_csrc, "interface", None)
    if found != INTERFACE:
        raise ImportError(
            f"the compiled extension is of another version ({_csrc.__file__} has interface {found}, this package needs {INTERFACE}); "
            "reinstall the package: `pip install .`, or `pip install -e .` for a checkout"
        )

from . import adamw, altlora_turn, damped_inverse, eigh, gram, lora_linear, lorsum, polar, preconditioner, qr, solve, svd, svd_product  # noqa: E402 (they use the extension)

__all__ = [
    "_csrc",
    "adamw",
    "altlora_turn",
    "damped_inverse",
    "eigh",
    "gram",
    "lora_linear",
    "lorsum",
    "polar",
    "preconditioner",
    "qr",
    "solve",
    "svd",
    "svd_product",
]
