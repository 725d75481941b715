"""``grouped_eigh`` and ``grouped_eigvalsh``: eigenvalues and eigenvectors of many small symmetric matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.registry import run
from ._library import define, is_plain_eager, no_backward, records_nothing
from ._tensor_checks import check_stack


def grouped_eigh(xs: Tensor) -> tuple[Tensor, Tensor]:
    """``X_i = V_i diag(λ_i) V_iᵀ`` for all symmetric matrices of a stack.

    Args:
        xs: (N, r, r), fp32 or fp64, any strides; what stands above the diagonals is taken to be what stands below.

    Returns:
        ``(values, vectors)``: (N, r), ascending, and (N, r, r), the eigenvectors as columns, in the dtype of xs. Backward stable:
        ``‖X V − V Λ‖ / ‖X‖`` and ``‖VᵀV − I‖`` are of the order of r·eps. A matrix with NaN or Inf gives NaN in its own results only.

    Raises:
        TypeError, ValueError: shape or dtype do not fit; nothing was computed.

    The results are constants for autograd; their backward says so.
    """
    eager = _check("grouped_eigh", xs)
    return (_grouped_eigh if eager else torch.ops.lowrank_kernels.grouped_eigh)(xs)


def grouped_eigvalsh(xs: Tensor) -> Tensor:
    """The eigenvalues (N, r) of :func:`grouped_eigh` alone, to rounding, at a fraction of its cost.

    Raises:
        TypeError, ValueError: shape or dtype do not fit; nothing was computed.
    """
    eager = _check("grouped_eigvalsh", xs)
    return (_grouped_eigvalsh if eager else torch.ops.lowrank_kernels.grouped_eigvalsh)(xs)


def _check(name: str, xs: Tensor) -> bool:
    """Whether nothing needs the operation as a node, once the argument is found to be right."""
    check_stack(name, "xs", xs)
    return records_nothing(xs) and is_plain_eager(xs)


def _empty_values(xs: Tensor) -> Tensor:
    return xs.new_empty(xs.shape[:2])


def _empty_results(xs: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_values(xs), xs.new_empty(xs.shape)


def _grouped_eigh(xs: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = _empty_results(xs)
    if xs.numel():
        run("grouped_eigh", xs.device.type, xs, values, vectors)
    return values, vectors


def _grouped_eigvalsh(xs: Tensor) -> Tensor:
    values = _empty_values(xs)
    if xs.numel():
        run("grouped_eigh", xs.device.type, xs, values, None)
    return values


define("grouped_eigh", "(Tensor xs) -> (Tensor, Tensor)", _grouped_eigh, _empty_results)
define("grouped_eigvalsh", "(Tensor xs) -> Tensor", _grouped_eigvalsh, _empty_values)
for _name in ("grouped_eigh", "grouped_eigvalsh"):
    no_backward(_name, "preconditioners are constants in every method of this package")
__all__ = ["grouped_eigh", "grouped_eigvalsh"]
