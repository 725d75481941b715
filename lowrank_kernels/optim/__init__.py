"""Optimizers: ``torch.optim.Optimizer`` subclasses, one file per method, named as in its paper.

Families: ``decoupled`` (SDS-LoRA, OD-LoRA) and ``preconditioned`` (ScaledGD, ScaledAdamW, AltLoRA, LoRA-Pro, LoRA-RITE). The rest of what
methods share is in ``_shared``; what all of them take is described in ``_shared.base.LowRankOptimizer``.
"""

from ..parallel.shards import average_gradients
from .adamw import AdamW
from .altlora import AltLoRA, AltLoRAPlus
from .lora_pro import LoRAPro
from .lora_rite import LoRARITE
from .lora_sb import LoRASB
from .od_lora import ODLoRA
from .oplora import OPLoRA
from .scaled import ScaledAdamW, ScaledGD
from .sds_lora import SDSLoRA

__all__ = [
    "AdamW",
    "AltLoRA",
    "AltLoRAPlus",
    "LoRAPro",
    "LoRARITE",
    "LoRASB",
    "ODLoRA",
    "OPLoRA",
    "SDSLoRA",
    "ScaledAdamW",
    "ScaledGD",
    "average_gradients",
]
