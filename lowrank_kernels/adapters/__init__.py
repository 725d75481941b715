"""Modules that hold low-rank factors, and what turns a model into an adapted one and back."""

from .adapt import adapt
from .export import export_peft
from .io import load_adapter, save_adapter
from .layer import LowRankLinear
from .merge import delta_weights, merge, unmerge
from .shared import share_inputs
from .starts import InitReport, initialize, lora_sb_init
from .state_dict import adapter_state_dict, load_adapter_state_dict

__all__ = [
    "InitReport",
    "LowRankLinear",
    "adapt",
    "adapter_state_dict",
    "delta_weights",
    "export_peft",
    "initialize",
    "load_adapter",
    "load_adapter_state_dict",
    "lora_sb_init",
    "merge",
    "save_adapter",
    "share_inputs",
    "unmerge",
]
