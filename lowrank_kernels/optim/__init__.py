"""Optimizers: ``torch.optim.Optimizer`` subclasses, one file per method, named as in its paper."""

from .adamw import AdamW
from .sds_lora import SDSLoRA

__all__ = ["AdamW", "SDSLoRA"]
