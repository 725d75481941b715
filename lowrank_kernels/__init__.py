"""Custom-kernel accelerated low-rank adapters and optimizers for PyTorch: all layers of a model at once."""

from . import ops
from .adapters import (
    InitReport,
    LowRankLinear,
    adapt,
    adapter_state_dict,
    delta_weights,
    export_peft,
    initialize,
    load_adapter,
    load_adapter_state_dict,
    lora_sb_init,
    merge,
    save_adapter,
    share_inputs,
    unmerge,
)
from .explain import explain
from .optim import AdamW, AltLoRA, AltLoRAPlus, LoRAPro, LoRARITE, LoRASB, ODLoRA, OPLoRA, ScaledAdamW, ScaledGD, SDSLoRA, average_gradients
from .pairs import Pair, pairs, shard_placement

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "AltLoRA",
    "AltLoRAPlus",
    "InitReport",
    "LoRAPro",
    "LoRARITE",
    "LoRASB",
    "LowRankLinear",
    "ODLoRA",
    "OPLoRA",
    "Pair",
    "SDSLoRA",
    "ScaledAdamW",
    "ScaledGD",
    "__version__",
    "adapt",
    "adapter_state_dict",
    "average_gradients",
    "delta_weights",
    "explain",
    "export_peft",
    "initialize",
    "load_adapter",
    "load_adapter_state_dict",
    "lora_sb_init",
    "merge",
    "ops",
    "pairs",
    "save_adapter",
    "shard_placement",
    "share_inputs",
    "unmerge",
]
