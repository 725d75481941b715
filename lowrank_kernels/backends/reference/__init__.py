"""The specification of every operation in plain PyTorch. Runs on any device; each other backend is tested against it."""

from . import (
    adamw,
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

__all__ = [
    "adamw",
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
