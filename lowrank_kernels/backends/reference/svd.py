"""Randomized truncated SVD of dense matrices: the specification of ``grouped_svd``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..lists import partition
from ..registry import implements
from ._common import always

START_SEED = 0x5EED
#: Without a given number of iterations: at least this many, at most that many.
FEWEST, MOST = 2, 16
#: What is added to each column of a block, relative to its largest entry and in units of eps: above what the projections round away, far
#: below what a Krylov space would notice.
NOISE = 1024
#: Entries up to 2^±SAFE_EXPONENT have Gram matrices in fp32 that neither over- nor underflow.
SAFE_EXPONENT = 30


ThinQR: TypeAlias = Callable[[Tensor], Tensor]


def householder(block: Tensor) -> Tensor:
    """Orthonormal bases of a stack of tall blocks (b, m, p), complete for deficient ones too."""
    return torch.linalg.qr(block)[0]


def _orthonormalize(block: Tensor, against: Tensor, noise: Tensor, thin_qr: ThinQR) -> Tensor:
    """An orthonormal basis of ``block`` (b, m, p), orthogonal to ``against`` (b, m, k).

    Once a spectrum is exhausted (low rank, few distinct singular values), nothing is left of a block but rounding, or zeros, which a QR
    completes by the same directions in every step: they are in ``against`` already. A little of ``noise`` (m, p), another in each step,
    leaves something to normalize. Normalized after each projection, which blows rounding up that is orthogonal to
    nothing: so a second one, and a third where few directions are left, of which the noise has little.
    """
    number = torch.finfo(block.dtype)
    block = block / torch.linalg.vector_norm(block, torch.inf, dim=1, keepdim=True).clamp_min(number.tiny)
    block = torch.add(block, noise, alpha=NOISE * number.eps)
    for projections in range(3):
        overlap = against.mT @ block
        if projections == 2 and bool(overlap.abs().amax() <= 8 * number.eps):
            break
        block = thin_qr(torch.baddbmm(block, against, overlap, alpha=-1))
    return block


def block_krylov(
    x: Tensor, rank: int, width: int, iterations: int | None, tolerance: float, thin_qr: ThinQR
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triples of a stack x (b, m, n), finite and of moderate size."""
    generator = torch.Generator(device="cpu").manual_seed(START_SEED)
    start = torch.randn(x.shape[2], width, generator=generator, device="cpu", dtype=torch.float64).to(x)
    basis = thin_qr(x @ start)
    images = x.mT @ basis
    gram = images.mT @ images
    captured: list[Tensor] = []
    for step in range(1, (MOST if iterations is None else iterations) + 1):
        remaining = min(x.shape[1], x.shape[2]) - basis.shape[2]
        if remaining <= 0:
            break
        block = (x @ images[:, :, -width:])[:, :, :remaining]
        noise = torch.rand(x.shape[1], block.shape[2], generator=generator, device="cpu").sub_(0.5).to(x)
        block = _orthonormalize(block, basis, noise, thin_qr)
        image = x.mT @ block
        cross = images.mT @ image
        gram = torch.cat([torch.cat([gram, cross], dim=2), torch.cat([cross.mT, image.mT @ image], dim=2)], dim=1)
        basis, images = torch.cat([basis, block], dim=2), torch.cat([images, image], dim=2)
        if iterations is None:
            captured.append(torch.linalg.eigvalsh(gram.double())[:, -rank:].sum(dim=1))
            if step >= FEWEST and _converged(captured, tolerance):
                break
    # The small matrices in fp64: LAPACK squares what is left of exhausted spectra, which underflows in fp32 and ends in NaN or errors.
    # X ≈ basis · imagesᵀ. The Gram matrix picks the leading subspace; within it a QR, which does not square, gives the triples.
    leading = torch.linalg.eigh(gram.double())[1][:, :, -width:].to(x.dtype)
    basis, images = basis @ leading, images @ leading
    q = thin_qr(images)
    u, s, vh = (part.to(x.dtype) for part in torch.linalg.svd((images.mT @ q).double()))
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
    *,
    thin_qr: ThinQR = householder,
) -> None:
    """Write the leading ``ss.shape[1]`` singular triples of each X_i; same-shaped matrices go in one batch.

    A matrix out of the range where squares are safe is scaled by a power of two; one with a non-finite entry gives NaN in its
    own results. ``thin_qr`` is for backends that have a faster one.
    """
    rank = ss.shape[1]
    for shape, members in partition(range(len(xs)), lambda i: xs[i].shape).items():
        wide = [xs[i].to(compute_dtype(xs[i].dtype)) for i in members]
        stack = wide[0][None] if len(wide) == 1 else torch.stack(wide)
        low, high = stack.flatten(1).aminmax(dim=1)  # NaN if there is one
        largest = torch.maximum(-low, high)
        finite = largest.isfinite()
        exponents = torch.frexp(torch.where(finite, largest, 0)).exponent
        if not finite.all():
            stack = torch.where(finite[:, None, None], stack, 0)
        scaled = bool((exponents.abs() > SAFE_EXPONENT).any())
        if scaled:
            half = -exponents // 2
            stack = torch.ldexp(torch.ldexp(stack, half[:, None, None]), (-exponents - half)[:, None, None])
        u, s, v = block_krylov(stack, rank, min(rank + oversample, *shape), iterations, tolerance, thin_qr)
        if scaled:
            s = torch.ldexp(s, exponents[:, None])
        for position, index in enumerate(members):
            for target, value in ((us[index], u), (ss[index], s), (vs[index], v)):
                target.copy_(torch.where(finite[position], value[position], torch.nan))
