"""``grouped_svd_product``: truncated SVD of ``left @ rightᵀ`` from thin factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import as_integer
from ..backends.registry import run
from ._library import define, no_backward
from ._tensor_checks import check_list, check_same_length
from ._triples import check_out, empty_values


def grouped_svd_product(
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    rank: int,
    *,
    out: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Truncated SVD ``left_i @ right_iᵀ ≈ U_i diag(s_i) V_iᵀ`` for all pairs of a list; the product is never formed.

    Args:
        lefts: (m_i, k) with m_i ≥ k; k, dtype and device agree over the whole call, heights may differ.
        rights: (n_i, k) with n_i ≥ k.
        rank: how many singular triples, 1 … k.
        out: ``(us, vs)``, where to write U_i and V_i; any strides, no memory shared with the factors.

    Returns:
        ``(us, ss, vs)``: U_i (m_i, rank) and V_i (n_i, rank) with orthonormal columns (completed where the product has
        a lower rank) in the dtype of the factors, and one (N, rank) tensor of singular values, descending, fp32 at least.
        A pair with NaN or Inf gives NaN in its own results only.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or ``rank`` do not fit, or ``out`` shares memory; nothing was computed.
        RuntimeError: ``out`` is a leaf that requires a gradient, and autograd is on, or an inference tensor outside that mode; nothing was
            computed.

    Two thin QRs and a k × k SVD per pair. The result is a constant for autograd; its backward says so.
    """
    check_same_length("grouped_svd_product", lefts=lefts, rights=rights)
    check_list("grouped_svd_product", "lefts", lefts)
    check_list("grouped_svd_product", "rights", rights, like=lefts[0] if lefts else None)
    for name, factors in (("lefts", lefts), ("rights", rights)):
        for index, factor in enumerate(factors):
            if factor.shape[1] != lefts[0].shape[1]:
                raise ValueError(
                    f"grouped_svd_product: {name}[{index}] has {factor.shape[1]} columns, lefts[0] has {lefts[0].shape[1]}; "
                    "call once per inner rank"
                )
            if factor.shape[0] < factor.shape[1]:
                raise ValueError(f"grouped_svd_product: {name}[{index}] must be tall, got {tuple(factor.shape)}")
    rank = as_integer("grouped_svd_product", "rank", rank, 1)
    if lefts and rank > lefts[0].shape[1]:
        raise ValueError(f"grouped_svd_product: rank must be between 1 and {lefts[0].shape[1]} (the factors' columns), got {rank}")
    if out is None:
        return torch.ops.lowrank_kernels.grouped_svd_product(list(lefts), list(rights), rank)
    first, shapes = lefts[0] if lefts else None, ([(len(x), rank) for x in lefts], [(len(x), rank) for x in rights])
    check_out("grouped_svd_product", out, shapes, first, lefts=lefts, rights=rights)
    us, vs = list(out[0]), list(out[1])
    ss = empty_values(lefts, rank)
    if lefts:
        torch.ops.lowrank_kernels.grouped_svd_product_out(list(lefts), list(rights), us, ss, vs)
        torch.autograd.graph.increment_version([*us, *vs])
    return us, ss, vs


def _empty_results(lefts: list[Tensor], rights: list[Tensor], rank: int) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    us = [left.new_empty(left.shape[0], rank) for left in lefts]
    vs = [right.new_empty(right.shape[0], rank) for right in rights]
    return us, empty_values(lefts, rank), vs


def _grouped_svd_product(lefts: list[Tensor], rights: list[Tensor], rank: int) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    us, ss, vs = _empty_results(lefts, rights, rank)
    if lefts:
        run("grouped_svd_product", lefts[0].device.type, lefts, rights, us, ss, vs)
    return us, ss, vs


def _grouped_svd_product_out(lefts: list[Tensor], rights: list[Tensor], us: list[Tensor], ss: Tensor, vs: list[Tensor]) -> None:
    run("grouped_svd_product", lefts[0].device.type, lefts, rights, us, ss, vs)


define(
    "grouped_svd_product",
    "(Tensor[] lefts, Tensor[] rights, int rank) -> (Tensor[], Tensor, Tensor[])",
    _grouped_svd_product,
    _empty_results,
)
define(
    "grouped_svd_product_out",
    "(Tensor[] lefts, Tensor[] rights, Tensor(a!)[] us, Tensor(b!) ss, Tensor(c!)[] vs) -> ()",
    _grouped_svd_product_out,
    lambda lefts, rights, us, ss, vs: None,
)
no_backward("grouped_svd_product", "the bases U and V are constants in every method of this package")
__all__ = ["grouped_svd_product"]
