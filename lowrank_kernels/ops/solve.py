"""``grouped_solve``: damped r×r systems of all layers, from the left or from the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._checks import as_number, check_choice
from ..backends.dtypes import FLOATING
from ..backends.lists import sizes
from ..backends.registry import run
from ._library import are_plain_eager, define, is_plain_eager, no_backward, records_nothing
from ._tensor_checks import (
    check_apart,
    check_like,
    check_list,
    check_stack,
    check_strided,
    check_writable,
    refuse_negated,
    refuse_tangents,
)

_ops = torch.ops.lowrank_kernels


@overload
def grouped_solve(grams: Tensor, rhs: Tensor, damping: float = ..., *, side: str = ..., out: Tensor | None = ...) -> Tensor: ...
@overload
def grouped_solve(
    grams: Tensor, rhs: Sequence[Tensor], damping: float = ..., *, side: str = ..., out: Sequence[Tensor] | None = ...
) -> list[Tensor]: ...
def grouped_solve(
    grams: Tensor,
    rhs: Sequence[Tensor] | Tensor,
    damping: float = 0.0,
    *,
    side: str = "left",
    out: Sequence[Tensor] | Tensor | None = None,
) -> list[Tensor] | Tensor:
    """``(G_i + δI)⁻¹ R_i`` (left) or ``R_i (G_i + δI)⁻¹`` (right) for symmetric positive definite G_i, by Cholesky.

    Args:
        grams: (N, r, r), fp32 or fp64; the arithmetic is done in this dtype. Only the lower triangles are read.
        rhs: N matrices (r, d_i) for ``side="left"``, (d_i, r) for ``"right"``, of one dtype; or one stacked tensor (N, r, k)
            or (N, k, r).
        damping: δ ≥ 0, absolute.
        side: "left" or "right".
        out: where to write the results, like ``rhs`` in everything but strides; may be ``rhs`` itself, but not overlap it otherwise.

    Returns:
        What ``rhs`` is, of the same shapes and dtype. A matrix ``G_i + δI`` that is not positive definite in the arithmetic
        of its dtype (or not finite) gives NaN in its own result; the others are not touched by it.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or ``damping`` do not fit, or ``out`` shares memory with anything but the rhs that it
            is; nothing was computed.
        RuntimeError: ``out`` is a leaf that requires a gradient, and autograd is on, or an inference tensor outside that mode; nothing was
            computed.

    The result is a constant for autograd: its backward raises an error that says so.
    """
    name = "grouped_solve"
    check_stack(name, "grams", grams)
    if forward_ad._current_level >= 0:
        refuse_tangents(name, "grams or rhs", (grams, rhs))
    check_choice(name, "side", side, ("left", "right"))
    damping = as_number(name, "damping", damping, 0.0)
    left = side == "left"
    if isinstance(rhs, Tensor):
        check_strided(name, "rhs", rhs)
        if rhs.ndim != 3:
            raise ValueError(f"{name}: a stacked rhs must have 3 dimensions, got {tuple(rhs.shape)}")
        samples: Sequence[Tensor] = [rhs[0]] if len(rhs) else []  # all are like the first
    else:
        check_list(name, "rhs", rhs)
        samples = rhs
    if len(rhs) != len(grams):
        raise ValueError(f"{name}: rhs must be as many matrices as grams, {len(grams)}, got {len(rhs)}")
    rank, dim = grams.shape[1], 0 if left else 1
    for index, width in enumerate(sizes(samples, dim)):
        if width != rank:
            raise ValueError(
                f"{name}: rhs[{index}] of shape {tuple(samples[index].shape)} does not fit {rank} × {rank} Grams from the {side}"
            )
    if samples and samples[0].dtype not in FLOATING:
        raise TypeError(f"{name}: rhs has dtype {samples[0].dtype}; use one of {', '.join(map(str, FLOATING))}")
    if samples and samples[0].device != grams.device:
        raise ValueError(f"{name}: rhs is on {samples[0].device}, grams is on {grams.device}; move both to one device")
    if out is not None:
        _check_out(rhs, out)
        check_writable(name, out=out)
        in_place = [(rhs, out)] if isinstance(rhs, Tensor) else zip(rhs, out, strict=True)
        check_apart(name, {"out": out}, {"grams": grams, "rhs": rhs}, in_place)  # type: ignore[arg-type]
    unrecorded = records_nothing(grams, rhs, out)
    if isinstance(rhs, Tensor):
        eager = unrecorded and is_plain_eager(grams, rhs, out)  # type: ignore[arg-type]
        if out is None:
            return (_grouped_solve_stacked if eager else _ops.grouped_solve_stacked)(grams, rhs, damping, left)
        (_into if eager else _ops.grouped_solve_stacked_out)(grams, rhs, damping, left, out)  # type: ignore[arg-type]
    else:
        eager = unrecorded and are_plain_eager([grams], rhs, out)  # type: ignore[arg-type]
        if out is None:
            return (_grouped_solve if eager else _ops.grouped_solve)(grams, list(rhs), damping, left)
        out = list(out)
        (_into if eager else _ops.grouped_solve_out)(grams, list(rhs), damping, left, out)
    torch.autograd.graph.increment_version(out)
    return out  # type: ignore[return-value]


def _check_out(rhs: Sequence[Tensor] | Tensor, out: Any) -> None:
    if isinstance(rhs, Tensor):
        fits = isinstance(out, Tensor) and out.shape == rhs.shape and out.dtype == rhs.dtype and out.device == rhs.device
        if not fits:
            got = f"{tuple(out.shape)} {out.dtype} on {out.device}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"grouped_solve: out must be {tuple(rhs.shape)} {rhs.dtype} on {rhs.device}, like rhs; got {got}")
        check_strided("grouped_solve", "out", out)
        if out.is_neg():
            refuse_negated("grouped_solve", "out")
        return
    check_like("grouped_solve", "out", out, "rhs", rhs, written=True)


def _empty_result(grams: Tensor, rhs: list[Tensor], damping: float, left: bool) -> list[Tensor]:
    return [torch.empty_like(matrix, memory_format=torch.contiguous_format) for matrix in rhs]


def _grouped_solve(grams: Tensor, rhs: list[Tensor], damping: float, left: bool) -> list[Tensor]:
    solutions = _empty_result(grams, rhs, damping, left)
    _into(grams, rhs, damping, left, solutions)
    return solutions


def _empty_stack(grams: Tensor, rhs: Tensor, damping: float, left: bool) -> Tensor:
    return torch.empty_like(rhs, memory_format=torch.contiguous_format)


def _grouped_solve_stacked(grams: Tensor, rhs: Tensor, damping: float, left: bool) -> Tensor:
    solutions = _empty_stack(grams, rhs, damping, left)
    _into(grams, rhs, damping, left, solutions)
    return solutions


def _into(grams: Tensor, rhs: list[Tensor] | Tensor, damping: float, left: bool, out: list[Tensor] | Tensor) -> None:
    if len(rhs):
        run("grouped_solve", grams.device.type, grams, rhs, damping, left, out)


define("grouped_solve", "(Tensor grams, Tensor[] rhs, float damping, bool left) -> Tensor[]", _grouped_solve, _empty_result)
define("grouped_solve_stacked", "(Tensor grams, Tensor rhs, float damping, bool left) -> Tensor", _grouped_solve_stacked, _empty_stack)
define("grouped_solve_out", "(Tensor grams, Tensor[] rhs, float damping, bool left, Tensor(a!)[] out) -> ()", _into, lambda *args: None)
define("grouped_solve_stacked_out", "(Tensor grams, Tensor rhs, float damping, bool left, Tensor(a!) out) -> ()", _into, lambda *args: None)
for _name in ("grouped_solve", "grouped_solve_stacked"):
    no_backward(_name, "preconditioned gradients are constants in every method of this package")
__all__ = ["grouped_solve"]
