"""Custom-kernel accelerated low-rank adapters and optimizers for PyTorch: all layers of a model at once."""

from . import ops
from .adapters import (
    LowRankLinear,
    adapt,
    adapter_state_dict,
    delta_weights,
    export_peft,
    load_adapter,
    load_adapter_state_dict,
    merge,
    save_adapter,
    unmerge,
)
from .explain import explain
from .optim import AdamW, AltLoRA, AltLoRAPlus, LoRAPro, LoRARITE, ODLoRA, ScaledAdamW, ScaledGD, SDSLoRA
from .pairs import Pair, pairs

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "AltLoRA",
    "AltLoRAPlus",
    "LoRAPro",
    "LoRARITE",
    "LowRankLinear",
    "ODLoRA",
    "Pair",
    "SDSLoRA",
    "ScaledAdamW",
    "ScaledGD",
    "__version__",
    "adapt",
    "adapter_state_dict",
    "delta_weights",
    "explain",
    "export_peft",
    "load_adapter",
    "load_adapter_state_dict",
    "merge",
    "ops",
    "pairs",
    "save_adapter",
    "unmerge",
]
