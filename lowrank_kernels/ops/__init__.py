"""Operations: schemas, checks, meta implementations and autograd. What runs them is in ``backends/``."""

from .adamw import grouped_adamw_
from .altlora_turn import grouped_altlora_turn_
from .damped_inverse import grouped_damped_inverse
from .eigh import grouped_eigh, grouped_eigvalsh
from .gram import grouped_gram
from .lora_linear import lora_linear
from .lora_shared import lora_down, lora_up
from .lorsum import grouped_lorsum, grouped_lorsum_product
from .polar import grouped_polar
from .preconditioner import grouped_preconditioner
from .qr import grouped_qr
from .solve import grouped_solve
from .svd import grouped_svd
from .svd_product import grouped_svd_product
from .sylvester import grouped_sylvester

__all__ = [
    "grouped_adamw_",
    "grouped_altlora_turn_",
    "grouped_damped_inverse",
    "grouped_eigh",
    "grouped_eigvalsh",
    "grouped_gram",
    "grouped_lorsum",
    "grouped_lorsum_product",
    "grouped_polar",
    "grouped_preconditioner",
    "grouped_qr",
    "grouped_solve",
    "grouped_svd",
    "grouped_svd_product",
    "grouped_sylvester",
    "lora_down",
    "lora_linear",
    "lora_up",
]
