"""Optimizers: ``torch.optim.Optimizer`` subclasses, one file per method, named as in its paper."""

from .adamw import AdamW
from .altlora import AltLoRA, AltLoRAPlus
from .lora_pro import LoRAPro
from .lora_rite import LoRARITE
from .od_lora import ODLoRA
from .scaled import ScaledAdamW, ScaledGD
from .sds_lora import SDSLoRA

__all__ = ["AdamW", "AltLoRA", "AltLoRAPlus", "LoRAPro", "LoRARITE", "ODLoRA", "SDSLoRA", "ScaledAdamW", "ScaledGD"]
