"""``grouped_preconditioner``: from Gram matrices to the r×r maps of a preconditioned moment step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._checks import as_flag, as_number
from ..backends.registry import run
from ._library import define, is_plain_eager, no_backward, records_nothing
from ._tensor_checks import check_stack, check_stack_of, refuse_tangents

_NAME = "grouped_preconditioner"


def grouped_preconditioner(
    grams: Tensor,
    damping: float = 0.0,
    *,
    weight: float = 1.0,
    drifts: Tensor | None = None,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``P = w (G + δI)⁻¹`` and, with drifts K, ``C = I - (G + δI)⁻¹ K``, for all matrices of a stack.

    These are the ``grad_maps`` and the ``momentum_maps`` of :func:`grouped_adamw_`: with ``G = XᵀX`` of the partners X of the factors
    to be stepped, ``w = s⁻²`` and ``K = δI + Xᵀ(X - X_old)``, P is AltLoRA's preconditioner (Theorem 1) and C its realignment of the
    momentum (Theorem 2), ``(XᵀX + δI)⁻¹ XᵀX_old``. Both are computed in fp64 and rounded once.

    Args:
        grams: G, (N, r, r), fp64 and symmetric positive definite with the damping, as from
            ``grouped_gram(…, dtype=torch.float64)``. Only the lower triangles are read.
        damping: δ ≥ 0, absolute.
        weight: w, of P only.
        drifts: K, (N, r, r), in ``dtype``.
        transposed: Cᵀ instead of C, for factors (d, r), whose momentum it is applied to from the right.
        dtype: of the results: fp64 (None means that) or fp32.

    Returns:
        P (N, r, r), symmetric, and C (N, r, r), or None without drifts. Where ``G + δI`` is not positive definite in fp64, or not finite,
        they are NaN; the other matrices of the stack are not touched by that.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or numbers do not fit; nothing was computed.

    The results are constants for autograd; their backward says so.
    """
    check_stack(_NAME, "grams", grams, (torch.float64,))
    if forward_ad._current_level >= 0:
        refuse_tangents(_NAME, "grams or drifts", (grams, drifts))
    dtype = torch.float64 if dtype is None else dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{_NAME}: dtype must be torch.float64 or torch.float32, got {dtype}")
    if drifts is not None:
        check_stack_of(_NAME, "drifts", drifts, grams.shape, dtype, grams.device)
    damping, weight = as_number(_NAME, "damping", damping, 0.0), as_number(_NAME, "weight", weight)
    as_flag(_NAME, "transposed", transposed)
    eager = records_nothing(grams, drifts) and is_plain_eager(grams, drifts)
    call = _grouped_preconditioner if eager else torch.ops.lowrank_kernels.grouped_preconditioner
    maps, realigned = call(grams, drifts, damping, weight, bool(transposed), dtype)
    return maps, None if drifts is None else realigned


def _empty_result(
    grams: Tensor, drifts: Tensor | None, damping: float, weight: float, transposed: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    maps = torch.empty(grams.shape, dtype=dtype, device=grams.device)
    return maps, torch.empty((0,) if drifts is None else grams.shape, dtype=dtype, device=grams.device)


def _grouped_preconditioner(
    grams: Tensor, drifts: Tensor | None, damping: float, weight: float, transposed: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    maps, realigned = _empty_result(grams, drifts, damping, weight, transposed, dtype)
    if maps.numel():
        run(_NAME, grams.device.type, grams, drifts, damping, weight, transposed, maps, realigned)
    return maps, realigned


define(
    _NAME,
    "(Tensor grams, Tensor? drifts, float damping, float weight, bool transposed, ScalarType dtype) -> (Tensor, Tensor)",
    _grouped_preconditioner,
    _empty_result,
)
no_backward(_NAME, "preconditioners are constants in every method of this package")
__all__ = ["grouped_preconditioner"]
