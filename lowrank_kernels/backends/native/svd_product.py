"""``grouped_svd_product`` on the CPU: the QRs of ``grouped_qr``, Jacobi rotations on the small core; one call for all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import DTYPE_CODES
from ..extension import csrc
from ..registry import count_launch, implements
from . import cuda_svd_product
from ._common import COMPILED, addresses, refuse, refuse_gaps, strides, table


def verify(lefts: list[Tensor], rights: list[Tensor], us: list[Tensor], ss: Tensor, vs: list[Tensor]) -> tuple[bool, str]:
    """Takes CPU factors of any strides, up to 128 columns; CUDA ones where cuSOLVER and cuBLAS are found."""
    if lefts[0].device.type == "cuda":
        return cuda_svd_product.verify(lefts, rights, us, ss, vs)
    reason = refuse(lefts[0], lefts[0].shape[1]) or refuse_gaps("ss", ss)
    if reason is not None:
        return False, reason
    return True, f"{COMPILED}, CholeskyQR and one-sided Jacobi"


@implements("grouped_svd_product", "native", verify)
def grouped_svd_product(lefts: list[Tensor], rights: list[Tensor], us: list[Tensor], ss: Tensor, vs: list[Tensor]) -> None:
    """See the reference."""
    if lefts[0].device.type == "cuda":
        return cuda_svd_product.grouped_svd_product(lefts, rights, us, ss, vs)
    rows = table(
        *[addresses(tensors) for tensors in (lefts, rights, us, vs)],
        *[[tensor.shape[0] for tensor in tensors] for tensors in (lefts, rights)],
        *[section for tensors in (lefts, rights, us, vs) for section in strides(tensors)],
    )
    count_launch()
    rank, code = ss.shape[1], DTYPE_CODES[lefts[0].dtype]
    csrc.svd_product(len(lefts), rows, code, lefts[0].shape[1], rank, ss.data_ptr(), torch.get_num_threads())
