"""Custom-kernel accelerated low-rank adapters and optimizers for PyTorch: all layers of a model at once."""

from . import ops
from .adapters import LowRankLinear
from .explain import explain
from .optim import AdamW, SDSLoRA
from .pairs import Pair, pairs

__version__ = "0.1.0"
__all__ = ["AdamW", "LowRankLinear", "Pair", "SDSLoRA", "explain", "ops", "pairs"]
