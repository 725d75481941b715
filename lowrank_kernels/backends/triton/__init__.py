"""Triton kernels: one launch, or a constant number of them, for a whole ragged list of factors.

Every list operation works from device tables (``_tables.py``): int64 rows of addresses, sizes and strides, and a list
of chunks that says which piece of which tensor a program works on. Nothing is read back on the host, so the calls can
be captured in a CUDA graph. Without a GPU the same kernels run in Triton's interpreter (``TRITON_INTERPRET=1``, set
before the first import of triton).
"""

try:
    import triton
    import triton.language  # noqa: F401

    from . import (
        adamw,
        altlora_turn,
        damped_inverse,
        dropout,
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
except Exception as error:  # a broken installation raises more than ImportError, and an old one lacks what the kernels are made of
    raise ImportError(f"triton cannot be imported: {type(error).__name__}: {error}") from error

__all__ = [
    "adamw",
    "altlora_turn",
    "damped_inverse",
    "dropout",
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
