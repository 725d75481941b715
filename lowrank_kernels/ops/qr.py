"""``grouped_qr``: thin QR of many factors, with column signs that follow the previous Q."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.registry import run
from ._library import accumulation_dtype, check_list, check_same_length, define, is_plain_eager, no_backward


def _check(xs: Sequence[Tensor], previous: Sequence[Tensor] | None, out: Sequence[Tensor] | None) -> None:
    check_list("grouped_qr", "xs", xs)
    shapes = [x.shape for x in xs]
    for index, (rows, rank) in enumerate(shapes):
        if rank != shapes[0][1]:
            raise ValueError(f"grouped_qr: xs[{index}] has rank {rank}, xs[0] has {shapes[0][1]}; call once per rank")
        if rows < rank:
            raise ValueError(f"grouped_qr: xs[{index}] must be tall, got {(rows, rank)}; pass its transpose (`.mT`, no copy)")
    for name, others in (("previous", previous), ("out", out)):
        if others is None:
            continue
        check_same_length("grouped_qr", xs=xs, **{name: others})
        check_list("grouped_qr", name, others, like=xs[0] if xs else None)
        if others is xs or (name == "out" and others is previous):
            continue
        if [other.shape for other in others] == shapes:
            continue
        for index, (shape, other) in enumerate(zip(shapes, others, strict=True)):
            if other.shape != shape:
                raise ValueError(f"grouped_qr: {name}[{index}] has shape {tuple(other.shape)}, xs[{index}] has {tuple(shape)}")


def grouped_qr(
    xs: Sequence[Tensor],
    previous: Sequence[Tensor] | None = None,
    *,
    out: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Thin QR ``X_i = Q_i R_i`` of all matrices of a list, with signs that make a refresh of Q continuous.

    Householder QR returns columns of arbitrary sign; a decoupled adapter whose Q flips jumps (METHODS §1). So each
    column's sign is fixed: ``⟨q_j, previous_j⟩ > 0``, or ``R_jj ≥ 0`` where there is no previous Q.

    Args:
        xs: tall matrices (d_i, r) of one r, dtype and device; any heights, any strides (``A.mT`` needs no copy).
        previous: the Qs to align with, of the same shapes.
        out: where to write the Qs, of the same shapes; may be the tensors of ``previous``.

    Returns:
        ``(qs, rs)``: the Qs (d_i, r) in the dtype of xs, and one stacked (N, r, r) tensor of Rs, fp32 at least.
        Q is a full orthonormal basis for a rank-deficient X too. A matrix with NaN or Inf in it gives NaN in its own
        Q and R; the others are not touched by it.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit; nothing was computed.

    The result is a constant for autograd (Q is one in every method); its backward says so.
    """
    _check(xs, previous, out)
    xs, previous = list(xs), None if previous is None else list(previous)
    eager = bool(xs) and is_plain_eager(*xs, *(previous or ()), *(out or ())) and not torch.is_grad_enabled()
    if out is None:
        return _grouped_qr(xs, previous) if eager else torch.ops.lowrank_kernels.grouped_qr(xs, previous)
    rank = xs[0].shape[1] if xs else 0
    rs = torch.empty(len(xs), rank, rank, dtype=accumulation_dtype(xs[0].dtype), device=xs[0].device) if xs else torch.empty(0, 0, 0)
    if xs:
        (_grouped_qr_out if eager else torch.ops.lowrank_kernels.grouped_qr_out)(xs, previous, list(out), rs)
        torch.autograd.graph.increment_version(list(out))
    return list(out), rs


def _empty_results(xs: list[Tensor], previous: list[Tensor] | None) -> tuple[list[Tensor], Tensor]:
    if not xs:
        return [], torch.empty(0, 0, 0)
    rank = xs[0].shape[1]
    return [torch.empty_like(x) for x in xs], xs[0].new_empty(len(xs), rank, rank, dtype=accumulation_dtype(xs[0].dtype))


def _grouped_qr(xs: list[Tensor], previous: list[Tensor] | None) -> tuple[list[Tensor], Tensor]:
    qs, rs = _empty_results(xs, previous)
    if xs:
        run("grouped_qr", xs[0].device.type, xs, previous, qs, rs)
    return qs, rs


def _grouped_qr_out(xs: list[Tensor], previous: list[Tensor] | None, qs: list[Tensor], rs: Tensor) -> None:
    run("grouped_qr", xs[0].device.type, xs, previous, qs, rs)


define("grouped_qr", "(Tensor[] xs, Tensor[]? previous) -> (Tensor[], Tensor)", _grouped_qr, _empty_results)
define(
    "grouped_qr_out",
    "(Tensor[] xs, Tensor[]? previous, Tensor(a!)[] qs, Tensor(b!) rs) -> ()",
    _grouped_qr_out,
    lambda xs, previous, qs, rs: None,
)
no_backward("grouped_qr", "the basis Q is a constant in every method of this package")
__all__ = ["grouped_qr"]
