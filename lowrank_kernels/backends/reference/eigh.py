"""Eigenvalues and eigenvectors of symmetric matrices: the specification of ``grouped_eigh``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import implements
from ._common import always


@implements("grouped_eigh", "reference", always)
def grouped_eigh(xs: Tensor, values: Tensor, vectors: Tensor | None) -> None:
    """``xs[i] vectors[i] = vectors[i] diag(values[i])``; NaN for a matrix that is not finite, where torch's raises."""
    if xs.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"grouped_eigh: torch.linalg.eigh, which takes these matrices of {xs.shape[1]} rows, waits for the device and cannot be "
            "captured in a CUDA graph; Triton's kernel, which can, takes up to 64 rows"
        )
    finite = xs.isfinite().flatten(1).all(dim=1)[:, None, None]
    clean = torch.where(finite, xs, 0)
    if vectors is None:
        found = torch.linalg.eigvalsh(clean)
    else:
        found, columns = torch.linalg.eigh(clean)
        vectors.copy_(torch.where(finite, columns, torch.nan))
    values.copy_(torch.where(finite[:, 0], found, torch.nan))
