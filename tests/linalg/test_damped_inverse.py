"""The inverse of a damped triangular factor."""

from __future__ import annotations

import pytest
import torch
from _linalg import DOUBLE, WORST_KAPPA, in_both_dtypes, on_every_backend, running
from _numerics import conditioned, orthogonality

from lowrank_kernels import ops


@on_every_backend
@in_both_dtypes
@pytest.mark.parametrize("rank", [1, 4, 8, 16, 33, 64, 128])
@pytest.mark.parametrize("damping", [0.0, 1e-5, 0.3])
def test_damped_inverse(backend: str, dtype: torch.dtype, rank: int, damping: float) -> None:
    """``R_δ⁻ᵀ (RᵀR + δI) R_δ⁻¹ = I`` to rounding times the condition number of ``[R; √δ I]``, not its square."""
    eps, identity = torch.finfo(dtype).eps, torch.eye(rank, dtype=DOUBLE)
    kappas = [1.0, 1e2, WORST_KAPPA[dtype] ** 0.5, WORST_KAPPA[dtype]]
    rs = torch.stack([10 * torch.linalg.qr(conditioned(2 * rank, rank, kappa), mode="r").R for kappa in kappas]).to(dtype)
    if damping:
        rs = torch.cat([rs, torch.zeros(1, rank, rank, dtype=dtype)])  # B = 0, as training starts
        kappas.append(1.0)
    rs = rs.mT.contiguous().mT
    with running("grouped_damped_inverse", backend), torch.no_grad():
        inverses = ops.grouped_damped_inverse(rs, damping)
    assert inverses.dtype == dtype and inverses.is_contiguous()
    for r, inverse in zip(rs.double(), inverses.double(), strict=True):
        assert torch.equal(inverse, inverse.triu()) and (inverse.diagonal() > 0).all()
        tall = torch.cat([r, damping**0.5 * identity])
        # The columns of [R; √δ I] R_δ⁻¹ are orthonormal.
        assert orthogonality(tall @ inverse) <= 8 * rank * eps * torch.linalg.cond(tall)
