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
    both = torch.stack([left, right])
    values, vectors = both.new_empty(both.shape[:3]), both.new_empty(both.shape)
    grouped_eigh(both.flatten(0, 1), values.flatten(0, 1), vectors.flatten(0, 1))
    out.copy_(solve_in_eigenvectors(values, vectors, rhs))


def solve_in_eigenvectors(values: Tensor, vectors: Tensor, rhs: Tensor) -> Tensor:
    """X (N, r, r), from the eigenvalues (2, N, r) and the eigenvectors (2, N, r, r) of L and R."""
    (values_l, values_r), (vectors_l, vectors_r) = values, vectors
    sums = values_l[:, :, None] + values_r[:, None, :]
    negligible = sums.amax(dim=(1, 2), keepdim=True) * (sums.shape[1] * torch.finfo(sums.dtype).eps)  # as of a numerical rank
    rotated = vectors_l.mT @ rhs @ vectors_r
    return vectors_l @ torch.where(sums <= negligible, 0, rotated / sums) @ vectors_r.mT
