"""Operations: schemas, checks, meta implementations and autograd. What runs them is in ``backends/``."""

from .adamw import grouped_adamw_
from .lora_linear import lora_linear
from .qr import grouped_qr
from .svd_product import grouped_svd_product

__all__ = ["grouped_adamw_", "grouped_qr", "grouped_svd_product", "lora_linear"]
