"""The specification of every operation in plain PyTorch. Runs on any device; each other backend is tested against it."""

from . import adamw, lora_linear, qr, svd_product

__all__ = ["adamw", "lora_linear", "qr", "svd_product"]
