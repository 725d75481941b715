"""What the tests of the factorizations, Grams and solves share: the backends and dtypes, matrices that are hard to take, measures of error.

Factorizations are judged by orthogonality, residual and projectors, never against another library's signs or bases.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from lowrank_kernels import ops
from lowrank_kernels.backends import BackendError, force, implementations

SINGLE, DOUBLE = torch.float32, torch.float64
DTYPES = [SINGLE, DOUBLE]
#: ‖QᵀQ − I‖_max, and residuals relative to ‖X‖.
BOUND = {SINGLE: 1e-5, DOUBLE: 1e-13}
#: The worst condition number that QR must take.
WORST_KAPPA = {SINGLE: 1e6, DOUBLE: 1e12}
HEIGHTS = (57, 400, 129)


@contextlib.contextmanager
def running(operation: str, backend: str) -> Iterator[None]:
    """Force a backend for one operation; skip where it does not have it, or says that it cannot take the call."""
    if backend not in implementations(operation):
        pytest.skip(f"{backend} does not implement {operation}")
    with force(f"{operation}={backend}"):
        try:
            yield
        except BackendError as error:
            pytest.skip(str(error))


on_every_backend = pytest.mark.parametrize("backend", ["reference", "native"])
in_both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp64"])


def relative(error: Tensor, of: Tensor) -> float:
    """``‖error‖_F / ‖of‖_F`` in fp64, scaled first so that no square under- or overflows."""
    peak = of.double().abs().max().clamp_min(torch.finfo(DOUBLE).tiny)
    return float((error.double() / peak).norm() / (of.double() / peak).norm())


def awkward(kind: str, rows: int, rank: int, dtype: torch.dtype) -> Tensor:
    """The matrices on which QR by Cholesky alone breaks down."""
    x = torch.randn(rows, rank, dtype=DOUBLE)
    if kind == "zero columns":
        x[:, ::2] = 0
    elif kind == "duplicate columns":
        x[:, rank // 2 :] = x[:, : rank - rank // 2]
    elif kind == "all zero":
        x.zero_()
    elif kind == "huge":
        x *= 1e18 if dtype == SINGLE else 1e180
    elif kind == "tiny":
        x *= 1e-18 if dtype == SINGLE else 1e-180
    elif kind == "both":  # columns of 1e18 beside columns of 1e-18
        x *= torch.tensor([1e18, 1e-18] * rank, dtype=DOUBLE)[:rank]
    elif kind == "denormal":
        x *= torch.finfo(dtype).tiny / 64
    elif kind == "one row twice":  # rank one
        x = x[:1].expand(rows, -1).clone()
    return x.to(dtype)


AWKWARD = ("zero columns", "duplicate columns", "all zero", "huge", "tiny", "both", "denormal", "one row twice")


def transposed_places(xs: list[Tensor]) -> list[Tensor]:
    """Where tensors like xs may be written, stored the other way round."""
    return [torch.full_like(x.mT, math.nan, memory_format=torch.contiguous_format).mT for x in xs]


CALLS: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "grouped_gram": lambda xs: list(ops.grouped_gram(xs)),
    "grouped_qr": lambda xs: ops.grouped_qr(xs)[0],
    "grouped_solve": lambda xs: ops.grouped_solve(torch.eye(4).expand(len(xs), 4, 4).to(xs[0].dtype).contiguous(), xs, 0.5, side="right"),
    "grouped_svd_product": lambda xs: ops.grouped_svd_product(xs, [x.flip(0) for x in xs], 3)[0],
    "grouped_svd": lambda xs: ops.grouped_svd(xs, 3)[0],
    "grouped_polar": lambda xs: ops.grouped_polar(xs),
    "grouped_eigh": lambda xs: list(ops.grouped_eigh(torch.stack([x.mT @ x for x in xs]))[1]),
    "grouped_sylvester": lambda xs: list(ops.grouped_sylvester(*[torch.stack([x.mT @ x for x in xs]).double()] * 3)),
    "grouped_damped_inverse": lambda xs: list(ops.grouped_damped_inverse(torch.stack([(x.mT @ x).triu() for x in xs]), 0.1)),
    "grouped_preconditioner": lambda xs: list(ops.grouped_preconditioner(torch.stack([x.mT @ x for x in xs]).double(), 0.1)[0]),
}
for_every_operation = pytest.mark.parametrize("operation", CALLS)


def negated(x: Tensor) -> Tensor:
    """x, as a view of memory that holds −x."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg() and torch.equal(view, x)
    return view
