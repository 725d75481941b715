"""Randomized truncated SVD of dense matrices: the specification of ``grouped_svd``."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from ..registry import implements
from ._common import always, compute_dtype

START_SEED = 0x5EED
#: Without a given number of iterations: at least this many, at most that many.
FEWEST, MOST = 2, 16


def _orthonormalize(block: Tensor, against: Tensor | None) -> Tensor:
    """An orthonormal basis of ``block`` (b, m, p), orthogonal to ``against`` (b, m, k).

    Projected twice, normalized in between: once a spectrum is exhausted, what is left of a block is rounding, which the first
    normalization blows up to unit vectors that need not be orthogonal to anything.
    """
    if against is None:
        return torch.linalg.qr(block)[0]
    for _ in range(2):
        block = torch.linalg.qr(block - against @ (against.mT @ block))[0]
    return block


def _block_krylov(x: Tensor, rank: int, width: int, iterations: int | None, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triples of a stack x (b, m, n)."""
    generator = torch.Generator(device="cpu").manual_seed(START_SEED)
    start = torch.randn(x.shape[2], width, generator=generator, dtype=torch.float64).to(x)
    basis = _orthonormalize(x @ start, None)
    images = x.mT @ basis
    captured: list[Tensor] = []
    most = MOST if iterations is None else iterations
    for step in range(1, most + 1):
        remaining = min(x.shape[1], x.shape[2]) - basis.shape[2]
        if remaining <= 0:
            break
        block = (x @ images[:, :, -width:])[:, :, :remaining]
        new = _orthonormalize(block, basis)
        basis = torch.cat([basis, new], dim=2)
        images = torch.cat([images, x.mT @ new], dim=2)
        if iterations is None:
            captured.append(torch.linalg.eigvalsh(images.mT @ images)[:, -rank:].sum(dim=1))
            if step >= FEWEST and _converged(captured, tolerance):
                break
    # X ≈ basis · imagesᵀ: the SVD of its small side gives all.
    q, r = torch.linalg.qr(images)
    u, s, vh = torch.linalg.svd(r.mT)
    return basis @ u[:, :, :rank], s[:, :rank], q @ vh[:, :rank].mT


def _converged(captured: list[Tensor], tolerance: float) -> bool:
    """Whether what is still missing, the tail of a geometric series through the last two increments, is small everywhere."""
    if len(captured) < 3:
        return False
    last, before = captured[-1] - captured[-2], captured[-2] - captured[-3]
    ratio = (last / before.clamp_min(torch.finfo(last.dtype).tiny)).clamp(0, 0.95)
    return bool((last * ratio / (1 - ratio) <= tolerance * captured[-1]).all())


@implements("grouped_svd", "reference", always)
def grouped_svd(
    xs: list[Tensor],
    oversample: int,
    iterations: int | None,
    tolerance: float,
    us: list[Tensor],
    ss: Tensor,
    vs: list[Tensor],
) -> None:
    """Write the leading ``ss.shape[1]`` singular triples of each X_i; same-shaped matrices go in one batch.

    Each matrix is scaled by a power of two first; one with a non-finite entry gives NaN in its own results.
    """
    rank = ss.shape[1]
    by_shape: defaultdict[torch.Size, list[int]] = defaultdict(list)
    for index, x in enumerate(xs):
        by_shape[x.shape].append(index)
    for shape, members in by_shape.items():
        stack = torch.stack([xs[i].to(compute_dtype(xs[i].dtype)) for i in members])
        finite = stack.isfinite().flatten(1).all(dim=1)
        stack = torch.where(finite[:, None, None], stack, 0)
        exponents = torch.frexp(stack.abs().flatten(1).amax(dim=1)).exponent
        stack = torch.ldexp(stack, -exponents[:, None, None])
        u, s, v = _block_krylov(stack, rank, min(rank + oversample, *shape), iterations, tolerance)
        s = torch.ldexp(s, exponents[:, None])
        for position, index in enumerate(members):
            for target, value in ((us[index], u), (ss[index], s), (vs[index], v)):
                target.copy_(torch.where(finite[position], value[position], torch.nan))
