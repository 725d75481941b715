"""The SVD of a product of two factors, which is never formed."""

from __future__ import annotations

import operator
import resource
import sys

import pytest
import torch
from _linalg import AWKWARD, BOUND, DOUBLE, HEIGHTS, SINGLE, awkward, in_both_dtypes, on_every_backend, running, transposed_places
from _numerics import conditioned, orthogonality
from torch import Tensor

from benchmarks.harness import peak_temporary_bytes
from lowrank_kernels import ops


def projector_distance(a: Tensor, b: Tensor) -> float:
    """``‖AAᵀ − BBᵀ‖₂`` of orthonormal bases of one rank, without forming a projector: the sine of the largest angle."""
    rest = b.double() - a.double() @ (a.double().mT @ b.double())
    return float(torch.linalg.matrix_norm(rest, 2))


@on_every_backend
@in_both_dtypes
@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize("kappa", [1.0, 30.0, 1e3])
def test_svd_product(backend: str, dtype: torch.dtype, k: int, kappa: float) -> None:
    lefts = [conditioned(rows, k, kappa).to(dtype) for rows in HEIGHTS]
    rights = [conditioned(rows, k, kappa).to(dtype).mT.contiguous().mT for rows in reversed(HEIGHTS)]
    rank = max(1, k // 2)
    bound = BOUND[dtype]
    with running("grouped_svd_product", backend):
        us, ss, vs = ops.grouped_svd_product(lefts, rights, rank)
    for left, right, u, s, v in zip(lefts, rights, us, ss, vs, strict=True):
        exact_u, exact, exact_vh = torch.linalg.svd(left.double() @ right.double().mT, full_matrices=False)
        assert orthogonality(u) <= bound and orthogonality(v) <= bound
        assert (s.diff() <= 0).all()
        assert (s.double() - exact[:rank]).abs().max() <= bound * exact[0]
        gap = exact[rank - 1] - exact[rank]
        for got, basis in ((u, exact_u[:, :rank]), (v, exact_vh[:rank].mT)):
            assert projector_distance(got, basis) <= bound * float(exact[0] / gap)
        image = left.double() @ (right.double().mT @ v.double())
        assert (image - u.double() * s.double()).abs().max() <= bound * exact[0], "the triples belong together"


@on_every_backend
@in_both_dtypes
def test_svd_product_of_awkward_factors(backend: str, dtype: torch.dtype) -> None:
    kinds = [kind for kind in AWKWARD if kind not in ("huge", "tiny", "both")]
    lefts, rights = ([awkward(kind, rows, 5, dtype) for kind in kinds] for rows in (70, 130))
    big, small = (1e18, 1e-18) if dtype == SINGLE else (1e150, 1e-150)
    for scale_left, scale_right in ((big, big), (small, small), (big, small)):
        # The product itself is to be in range: singular values that overflow are rightly Inf.
        lefts.append((torch.randn(70, 5, dtype=DOUBLE) * scale_left).to(dtype))
        rights.append((torch.randn(130, 5, dtype=DOUBLE) * scale_right).to(dtype))
    with running("grouped_svd_product", backend):
        us, ss, vs = ops.grouped_svd_product(lefts, rights, 5)
        again = ops.grouped_svd_product(lefts, rights, 5, out=(out := transposed_places(us), transposed_places(vs)))
    for index, (left, right, u, s, v) in enumerate(zip(lefts, rights, us, ss, vs, strict=True)):
        assert orthogonality(u) <= BOUND[dtype] and orthogonality(v) <= BOUND[dtype], index
        exact = torch.linalg.svdvals(torch.linalg.qr(left.double())[1] @ torch.linalg.qr(right.double())[1].mT)
        if exact[0] < torch.finfo(dtype).max and exact.isfinite().all():
            assert (s.double() - exact).abs().max() <= BOUND[dtype] * exact[0] + 8 * torch.finfo(dtype).tiny, index
    assert all(map(operator.is_, out, again[0]))
    assert torch.equal(ss, again[1]) and all(map(torch.equal, us + vs, again[0] + again[2])), "not deterministic"


def peak_rss() -> int:
    """Highest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@on_every_backend
def test_svd_product_never_forms_the_product(backend: str) -> None:
    rows = 40_000
    left, right = torch.randn(rows, 4), torch.randn(rows, 4)
    product_bytes = 4 * rows**2  # 6.4 GB
    with running("grouped_svd_product", backend):
        before = peak_rss()
        ops.grouped_svd_product([left], [right], 4)
        assert peak_rss() - before < 0.02 * product_bytes
        allocated = peak_temporary_bytes(lambda: ops.grouped_svd_product([left], [right], 4), torch.device("cpu"))
    assert allocated <= 16 * left.nbytes
