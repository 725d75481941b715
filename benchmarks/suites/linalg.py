"""Factorizations of all factors of a model: ``grouped_qr`` against a loop over ``torch.linalg.qr`` and against stacking."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowrank_kernels.ops import grouped_qr

from ..harness import Case, Trial
from ..naive import aligned_qr
from . import Setting, on, suite


@dataclass
class Bases:
    """The tall matrices to factor (Aᵀ as a view of A, and B, of every layer), the previous Qs, and where to write the new ones."""

    xs: list[Tensor]
    previous: list[Tensor]
    out: list[Tensor]

    def copy(self) -> Bases:
        """The same inputs (and strides) elsewhere in memory, and outputs full of NaN."""
        return Bases([x.clone() for x in self.xs], [p.clone() for p in self.previous], [torch.full_like(q, math.nan) for q in self.out])


def make_bases(setting: Setting) -> Bases:
    """Gaussian factors, and previous Qs that are their own with random signs."""
    generator = setting.generator()
    rank, dtype, device = setting.rank, setting.dtype, setting.device

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device).to(dtype)

    xs = [x for d_out, d_in in setting.layers for x in (draw(rank, d_in).mT, draw(d_out, rank))]
    signs = [torch.randint(0, 2, (rank,), generator=generator, device=device) * 2 - 1 for _ in xs]
    previous = [(torch.linalg.qr(x.float())[0] * sign).to(dtype) for x, sign in zip(xs, signs, strict=True)]
    return Bases(xs, previous, [torch.full_like(x, math.nan, memory_format=torch.contiguous_format) for x in xs])


def qr_error(x: Tensor, previous: Tensor, q: Tensor) -> float:
    """The larger of ``max|QᵀQ − I|`` and ``max|X − QQᵀX| / max|X|``, in fp64; infinite if a column is not aligned."""
    x, previous, q = x.double(), previous.double(), q.double()
    if not bool(((q * previous).sum(dim=0) > 0).all()):
        return math.inf
    orthogonality = (q.mT @ q - torch.eye(q.shape[1], dtype=q.dtype, device=q.device)).abs().max()
    residual = (x - q @ (q.mT @ x)).abs().max() / x.abs().max()
    return torch.maximum(orthogonality, residual).item()


def householder(x: Tensor, previous: Tensor) -> Tensor:
    """What a user writes: one QR, in fp32 at least, and the signs of its columns."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return aligned_qr(x.to(wide), previous.to(wide)).to(x.dtype)


class Judge:
    """The worst error over all matrices, against twice that of Householder QR in the same dtype, plus 8·eps."""

    def __init__(self, bases: Bases) -> None:
        own = max(qr_error(x, p, householder(x, p)) for x, p in zip(bases.xs, bases.previous, strict=True))
        self.tolerance = 2 * own + 8 * torch.finfo(bases.xs[0].dtype).eps

    def __call__(self, bases: Bases) -> tuple[float, float]:
        errors = [qr_error(*matrices) for matrices in zip(bases.xs, bases.previous, bases.out, strict=True)]
        return (math.nan if any(map(math.isnan, errors)) else max(errors)), self.tolerance


def naive(bases: Bases, judge: Judge) -> Trial:
    """A loop over ``torch.linalg.qr``, then the signs."""

    def run() -> None:
        for x, previous, out in zip(bases.xs, bases.previous, bases.out, strict=True):
            out.copy_(householder(x, previous))

    return Trial(run, lambda: judge(bases))


def batched(bases: Bases, judge: Judge) -> Trial:
    """The best one can do by stacking: CholeskyQR twice on all matrices of one height, the copies included."""
    by_height: dict[int, list[int]] = {}
    for index, x in enumerate(bases.xs):
        by_height.setdefault(x.shape[0], []).append(index)
    wide = torch.promote_types(bases.xs[0].dtype, torch.float32)

    def run() -> None:
        for indices in by_height.values():
            q = torch.stack([bases.xs[i] for i in indices]).to(wide)
            for _ in range(2):
                upper, _ = torch.linalg.cholesky_ex(q.mT @ q, upper=True)
                q = torch.linalg.solve_triangular(upper, q, upper=True, left=False)
            previous = torch.stack([bases.previous[i] for i in indices]).to(wide)
            q *= torch.where((q * previous).sum(dim=1, keepdim=True) < 0, -1.0, 1.0)
            torch._foreach_copy_([bases.out[i] for i in indices], list(q.unbind()))

    return Trial(run, lambda: judge(bases))


def operation(backend: str, bases: Bases, judge: Judge) -> Trial:
    """``ops.grouped_qr`` on one backend."""
    return Trial(lambda: grouped_qr(bases.xs, bases.previous, out=bases.out), lambda: judge(bases), on(backend), ours=True)


@suite("linalg")
def cases(setting: Setting) -> Iterator[Case]:
    """``grouped_qr`` of Aᵀ and B of all adapted layers: one refresh of SDS-LoRA."""
    bases = make_bases(setting)
    judge = Judge(bases)
    providers: dict[str, Callable[[Bases, Judge], Trial]] = {
        "naive": naive,
        "torch-batched": batched,
        **{f"ours-{backend}": partial(operation, backend) for backend in setting.backends},
    }
    elements, item = sum(x.numel() for x in bases.xs), bases.xs[0].element_size()
    yield Case(
        op="grouped_qr",
        shapes=setting.shapes,
        rank=setting.rank,
        dtype=setting.dtype,
        device=setting.device,
        # Read X and the previous Q, write Q and R.
        bytes=3 * elements * item + len(bases.xs) * setting.rank**2 * max(item, 4),
        tensors=len(bases.xs),
        providers={name: lambda build=build: build(bases.copy(), judge) for name, build in providers.items()},
        rival="torch-batched",
    )
