"""``grouped_qr``: thin QR of many factors, with column signs that follow the previous Q."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.dtypes import compute_dtype
from ..backends.lists import Tall, as_stored, sizes, width
from ..backends.registry import run
from ._library import are_plain_eager, define, fitting_layouts, for_eager, is_eager, no_backward, records_nothing, resolved
from ._tensor_checks import check_apart, check_like, check_list, check_same_length, check_writable

_ops = torch.ops.lowrank_kernels


def _check(xs: Sequence[Tensor], previous: Sequence[Tensor] | None, out: Sequence[Tensor] | None) -> None:
    check_list("grouped_qr", "xs", xs)
    heights, ranks = sizes(xs, 0), sizes(xs, 1)
    if xs and (ranks.count(ranks[0]) < len(ranks) or min(heights) < ranks[0]):
        for index, shape in enumerate(zip(heights, ranks, strict=True)):
            if shape[1] != ranks[0]:
                raise ValueError(f"grouped_qr: xs[{index}] has rank {shape[1]}, xs[0] has {ranks[0]}; call once per rank")
            if shape[0] < shape[1]:
                raise ValueError(f"grouped_qr: xs[{index}] must be tall, got {shape}; pass its transpose (`.mT`, no copy)")
    for name, others in (("previous", previous), ("out", out)):
        if others is not None:
            check_same_length("grouped_qr", xs=xs, **{name: others})
            check_like("grouped_qr", name, others, "xs", xs, written=name == "out")


def grouped_qr(
    xs: Sequence[Tensor],
    previous: Sequence[Tensor] | None = None,
    *,
    out: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Thin QR ``X_i = Q_i R_i`` of all matrices of a list, with signs that make a refresh of Q continuous.

    Householder QR returns columns of arbitrary sign; when a Q flips, a decoupled adapter jumps, by more than
    30 % of ‖ΔW‖. So each column's sign is fixed: ``⟨q_j, previous_j⟩ > 0``, or ``R_jj ≥ 0`` where there is no previous Q.

    Args:
        xs: tall matrices (d_i, r) of one r, dtype and device; any heights, any strides (``A.mT`` needs no copy).
        previous: the Qs to align with, of the same shapes.
        out: where to write the Qs, of the same shapes; may be the tensors of ``xs`` or ``previous``, and shares no other memory.

    Returns:
        ``(qs, rs)``: the Qs (d_i, r) in the dtype of xs, and one stacked (N, r, r) tensor of Rs, fp32 at least.
        Q is a full orthonormal basis for a rank-deficient X too. A matrix with NaN or Inf in it gives NaN in its own
        Q and R; the others are unaffected.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or ``out`` shares memory; nothing was computed.
        RuntimeError: ``out`` is a leaf that requires a gradient, and autograd is on, or an inference tensor outside that mode; nothing was
            computed.

    The result is a constant for autograd (Q is one in every method): its backward raises an error that says so.
    """
    layouts = fitting_layouts(xs, previous, out)
    if layouts is None or not layouts[0].tall:
        layouts = None
        _check(xs, previous, out)
    eager = len(xs) > 0 and records_nothing(xs, previous, out) and (is_eager() if layouts else are_plain_eager(xs, previous, out))
    known = (layouts,) if eager else ()
    listed: Any = for_eager if eager else list
    xs, previous = listed(xs), for_eager(previous) if eager and previous is not None else resolved(previous)
    if out is None:
        return (_grouped_qr if eager else _ops.grouped_qr)(xs, previous, *known)
    if not xs:
        return [], torch.empty(0, 0, 0)
    check_writable("grouped_qr", out=out)
    if not isinstance(out, Tall):  # as a step has it, whose results are its own
        in_place = [pair for read in (xs, previous) if read is not None for pair in zip(read, out, strict=True)]
        check_apart("grouped_qr", {"out": out}, {"xs": xs, "previous": previous}, in_place)
    targets, rs = listed(out), _empty_rs(xs)
    (_grouped_qr_out if eager else _ops.grouped_qr_out)(xs, previous, targets, rs, *known)
    torch.autograd.graph.increment_version(as_stored(targets)[0])
    return (targets if isinstance(out, Tall) else list(out)), rs


def _empty_rs(xs: Sequence[Tensor]) -> Tensor:
    first, rank = as_stored(xs)[0][0], width(xs)
    return torch.empty(len(xs), rank, rank, dtype=compute_dtype(first.dtype), device=first.device)


def _empty_results(xs: Sequence[Tensor], previous: Sequence[Tensor] | None) -> tuple[list[Tensor], Tensor]:
    if not xs:
        return [], torch.empty(0, 0, 0)
    return [torch.empty_like(x) for x in xs], _empty_rs(xs)


def _grouped_qr(xs: Sequence[Tensor], previous: Sequence[Tensor] | None, layouts: Any = None) -> tuple[list[Tensor], Tensor]:
    qs, rs = _empty_results(xs, previous)
    if xs:
        run("grouped_qr", rs.device.type, xs, previous, qs, rs, layouts)
    return qs, rs


def _grouped_qr_out(xs: Sequence[Tensor], previous: Sequence[Tensor] | None, qs: Sequence[Tensor], rs: Tensor, layouts: Any = None) -> None:
    run("grouped_qr", rs.device.type, xs, previous, qs, rs, layouts)


define("grouped_qr", "(Tensor[] xs, Tensor[]? previous) -> (Tensor[], Tensor)", _grouped_qr, _empty_results)
define(
    "grouped_qr_out",
    "(Tensor[] xs, Tensor[]? previous, Tensor(a!)[] qs, Tensor(b!) rs) -> ()",
    _grouped_qr_out,
    lambda xs, previous, qs, rs: None,
)
no_backward("grouped_qr", "the basis Q is a constant in every method of this package")
__all__ = ["grouped_qr"]
