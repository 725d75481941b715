"""``grouped_sylvester``: the eigenvectors of all coefficients in one launch, and torch's batched products with them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.sylvester import solve_in_eigenvectors
from ..registry import Verdict, implements
from . import eigh


def verify(left: Tensor, right: Tensor, rhs: Tensor, out: Tensor) -> Verdict:
    """Takes what the kernel of ``grouped_eigh`` takes."""
    return eigh.verify(left, left, None)


@implements("grouped_sylvester", "triton", verify)
def grouped_sylvester(left: Tensor, right: Tensor, rhs: Tensor, out: Tensor) -> None:
    """See the reference; one launch of ours, nothing read on the host."""
    both = torch.stack([left, right])
    values, vectors = both.new_empty(both.shape[:3]), both.new_empty(both.shape)
    eigh.grouped_eigh(both.flatten(0, 1), values.flatten(0, 1), vectors.flatten(0, 1))
    out.copy_(solve_in_eigenvectors(values, vectors, rhs))
