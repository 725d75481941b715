"""Every method as plain PyTorch, one layer at a time, the way its authors would ship it.

These files are the page to read first (they follow the papers' algorithm boxes line by line), the oracle of the tests
(run them in fp64) and the baseline of the benchmarks. They import nothing of ``lowrank_kernels``.
"""

from .adamw import adamw_
from .sds_lora import SDSLoRALayer, aligned_qr, is_refresh_step, svd_of_product

__all__ = ["SDSLoRALayer", "adamw_", "aligned_qr", "is_refresh_step", "svd_of_product"]
