"""Gram and cross-Gram matrices: the specification of ``grouped_gram``."""

from __future__ import annotations

from torch import Tensor

from ..registry import implements
from ._common import always


@implements("grouped_gram", "reference", always)
def grouped_gram(xs: list[Tensor], ys: list[Tensor] | None, grams: Tensor, layouts: object = None) -> None:
    """``grams[i] = xs[i]ᵀ ys[i]`` (N, r, k), accumulated in the dtype of ``grams``; without ys, ``xs[i]ᵀ xs[i]``."""
    for index, x in enumerate(xs):
        wide = x.to(grams.dtype)
        if ys is None:
            gram = wide.mT @ wide
            grams[index].copy_(gram.tril() + gram.tril(-1).mT)
        else:
            grams[index].copy_(wide.mT @ ys[index].to(grams.dtype))
