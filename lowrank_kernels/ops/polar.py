"""``grouped_polar``: orthonormal polar factors of many thin matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.registry import run
from ._library import define, no_backward
from ._tensor_checks import check_apart, check_like, check_list, check_writable


def grouped_polar(xs: Sequence[Tensor], *, out: Sequence[Tensor] | None = None) -> list[Tensor]:
    """``X_i (X_iᵀX_i)^{-1/2}``: the matrix with orthonormal columns nearest to X_i, for all matrices of a list.

    An alternative to QR for the bases of the decoupled methods: it has no signs to fix and treats all columns alike.

    Args:
        xs: tall matrices (d_i, r) of one r, dtype and device; any heights, any strides.
        out: where to write the results, of the same shapes; no memory shared with xs.

    Returns:
        (d_i, r) with orthonormal columns; for a rank-deficient X completed to a full orthonormal basis. A matrix with NaN or
        Inf gives NaN in its own result only.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or ``out`` shares memory; nothing was computed.
        RuntimeError: ``out`` is a leaf that requires a gradient, and autograd is on, or an inference tensor outside that mode; nothing was
            computed.

    The result is a constant for autograd; its backward says so.
    """
    check_list("grouped_polar", "xs", xs)
    for index, x in enumerate(xs):
        if x.shape[1] != xs[0].shape[1] or x.shape[0] < x.shape[1]:
            raise ValueError(f"grouped_polar: xs[{index}] must be tall with {xs[0].shape[1]} columns, got {tuple(x.shape)}")
    if out is None:
        return torch.ops.lowrank_kernels.grouped_polar(list(xs))
    check_like("grouped_polar", "out", out, "xs", xs, written=True)
    check_writable("grouped_polar", out=out)
    check_apart("grouped_polar", {"out": out}, {"xs": xs})
    if xs:
        torch.ops.lowrank_kernels.grouped_polar_out(list(xs), list(out))
        torch.autograd.graph.increment_version(list(out))
    return list(out)


def _grouped_polar(xs: list[Tensor]) -> list[Tensor]:
    out = [torch.empty_like(x) for x in xs]
    if xs:
        run("grouped_polar", xs[0].device.type, xs, out)
    return out


def _grouped_polar_out(xs: list[Tensor], out: list[Tensor]) -> None:
    run("grouped_polar", xs[0].device.type, xs, out)


define("grouped_polar", "(Tensor[] xs) -> Tensor[]", _grouped_polar, lambda xs: [torch.empty_like(x) for x in xs])
define("grouped_polar_out", "(Tensor[] xs, Tensor(a!)[] out) -> ()", _grouped_polar_out, lambda xs, out: None)
no_backward("grouped_polar", "bases are constants in every method of this package")
__all__ = ["grouped_polar"]
