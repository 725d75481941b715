"""``grouped_sylvester``: ``L X + X R = C`` for many small symmetric matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.registry import run
from ._library import define, is_plain_eager, no_backward, records_nothing
from ._tensor_checks import check_stack, check_stack_of


def grouped_sylvester(left: Tensor, right: Tensor, rhs: Tensor) -> Tensor:
    """X_i of ``L_i X_i + X_i R_i = C_i`` for symmetric positive semidefinite L_i and R_i.

    Through the eigenvectors of both, in which X is C divided by ``λ_j(L) + λ_k(R)``. Where that sum is at most r·eps of the largest one
    (neither matrix has anything there but rounding), X is zero: of all solutions the smallest, and of an equation without one the best.

    Args:
        left, right: L and R (N, r, r), fp64, any strides; what stands above the diagonals is taken to be what stands below.
        rhs: C (N, r, r), fp64.

    Returns:
        (N, r, r), fp64. A matrix with NaN or Inf in L, R or C gives NaN in its own result only.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit; nothing was computed.

    The result is a constant for autograd: its backward raises an error that says so.
    """
    name = "grouped_sylvester"
    check_stack(name, "left", left, (torch.float64,))
    for argument, stack in (("right", right), ("rhs", rhs)):
        check_stack_of(name, argument, stack, tuple(left.shape), left.dtype, left.device)
    eager = records_nothing(left, right, rhs) and is_plain_eager(left, right, rhs)
    return (_grouped_sylvester if eager else torch.ops.lowrank_kernels.grouped_sylvester)(left, right, rhs)


def _empty_result(left: Tensor, right: Tensor, rhs: Tensor) -> Tensor:
    return rhs.new_empty(rhs.shape)


def _grouped_sylvester(left: Tensor, right: Tensor, rhs: Tensor) -> Tensor:
    out = _empty_result(left, right, rhs)
    if out.numel():
        run("grouped_sylvester", out.device.type, left, right, rhs, out)
    return out


define("grouped_sylvester", "(Tensor left, Tensor right, Tensor rhs) -> Tensor", _grouped_sylvester, _empty_result)
no_backward("grouped_sylvester", "maps of factors are constants in every method of this package")
__all__ = ["grouped_sylvester"]
