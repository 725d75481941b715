"""``grouped_damped_inverse``: inverses of many triangular factors, damped without squaring the condition number."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import as_number
from ..backends.registry import run
from ._library import define, is_plain_eager, no_backward, records_nothing
from ._tensor_checks import check_stack


def grouped_damped_inverse(rs: Tensor, damping: float = 0.0) -> Tensor:
    """``R_δ⁻¹`` for all R of a stack, with ``R_δᵀ R_δ = RᵀR + δI``, from the QR of ``[R; √δ I]``.

    Cholesky of ``RᵀR + δI`` would have the square of the condition number.

    Args:
        rs: (N, r, r), upper triangular, fp32 or fp64, any strides, as from :func:`grouped_qr`; the arithmetic is done in this dtype at
            least.
        damping: δ ≥ 0, absolute.

    Returns:
        (N, r, r) in the dtype of rs, upper triangular, with a diagonal ≥ 0. A matrix with NaN or Inf gives NaN in its own result only;
        a singular one without damping gives Inf or NaN.

    Raises:
        TypeError, ValueError: shape, dtype or damping do not fit; nothing was computed.

    The result is a constant for autograd; its backward says so.
    """
    name = "grouped_damped_inverse"
    check_stack(name, "rs", rs)
    damping = as_number(name, "damping", damping, 0.0)
    eager = records_nothing(rs) and is_plain_eager(rs)
    return (_grouped_damped_inverse if eager else torch.ops.lowrank_kernels.grouped_damped_inverse)(rs, damping)


def _empty_result(rs: Tensor, damping: float) -> Tensor:
    return rs.new_empty(rs.shape)


def _grouped_damped_inverse(rs: Tensor, damping: float) -> Tensor:
    out = _empty_result(rs, damping)
    if rs.numel():
        run("grouped_damped_inverse", rs.device.type, rs, damping, out)
    return out


define("grouped_damped_inverse", "(Tensor rs, float damping) -> Tensor", _grouped_damped_inverse, _empty_result)
no_backward("grouped_damped_inverse", "preconditioners are constants in every method of this package")
__all__ = ["grouped_damped_inverse"]
