"""Sylvester equations with symmetric coefficients: the specification of ``grouped_sylvester``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import implements
from ._common import always
from .eigh import grouped_eigh


@implements("grouped_sylvester", "reference", always)
def grouped_sylvester(left: Tensor, right: Tensor, rhs: Tensor, out: Tensor) -> None:
    """``left[i] out[i] + out[i] right[i] = rhs[i]``; NaN for what is not finite."""
    values_l, vectors_l = _eigh(left)
    values_r, vectors_r = _eigh(right)
    sums = values_l[:, :, None] + values_r[:, None, :]
    negligible = sums.amax(dim=(1, 2), keepdim=True) * (sums.shape[1] * torch.finfo(sums.dtype).eps)  # as of a numerical rank
    rotated = vectors_l.mT @ rhs @ vectors_r
    out.copy_(vectors_l @ torch.where(sums <= negligible, 0, rotated / sums) @ vectors_r.mT)


def _eigh(xs: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = xs.new_empty(xs.shape[:2]), xs.new_empty(xs.shape)
    grouped_eigh(xs, values, vectors)
    return values, vectors
