"""``grouped_polar``: ``X = QR``, the SVD ``R = U Σ Vᵀ`` of all cores by Jacobi, and ``Q (U Vᵀ)``.

Nine launches whatever the number of matrices: the six of ``qr``, the batched Jacobi of ``svd_product`` (on the product
of R with the identity), ``U Vᵀ``, and the application. Both steps complete a rank-deficient matrix, so that the result is
always a full orthonormal basis; a Newton-Schulz iteration would leave the missing directions at zero.

Floor: QR's bytes (read X twice, write Q), then read Q and write the result; the cores are N·r² words.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import compute_dtype
from ..registry import Verdict, implements
from ._launch import launch, on_device
from .qr import Sizes, factorize
from .svd_product import apply_cores, decompose_cores
from .svd_product import verify as verify_product


@triton.jit
def join_kernel(cores, joined, matrices, K: tl.constexpr, TILE: tl.constexpr):
    """``U Vᵀ`` of each matrix: U in ``cores[i]``, V in ``cores[matrices + i]``."""
    index = tl.program_id(0).to(tl.int64)
    u = cores + index * (K * K)
    v = cores + (matrices + index) * (K * K)
    i = tl.arange(0, TILE)
    for left in range(0, K, TILE):
        for right in range(0, K, TILE):
            total = tl.zeros([TILE, TILE], tl.float64)
            for first in range(0, K, 16):
                k = first + tl.arange(0, 16)
                a = tl.load(u + (left + i[:, None]) * K + k[None, :])
                b = tl.load(v + (right + i[None, :]) * K + k[:, None])
                total = tl.dot(a, b, total, input_precision="ieee", out_dtype=tl.float64)
            tl.store(joined + index * (K * K) + (left + i[:, None]) * K + right + i[None, :], total)


def verify(xs: list[Tensor], out: list[Tensor]) -> Verdict:
    """Refuses ranks above 64 and other devices than a GPU."""
    return verify_product(xs, xs, out, xs[0], out)


@implements("grouped_polar", "triton", verify)
def grouped_polar(xs: list[Tensor], out: list[Tensor]) -> None:
    """Write the orthonormal polar factors; nine launches, nothing read on the host. See the module's text, and the reference."""
    first, rank, count = xs[0], xs[0].shape[1], len(xs)
    sizes, compute = Sizes(rank), compute_dtype(first.dtype)
    heights = [x.shape[0] for x in xs]
    qs = list(torch.empty(sum(heights), rank, dtype=compute, device=first.device).split(heights))
    # The Jacobi kernel decomposes R_L R_Rᵀ.
    rs = torch.empty(2 * count, rank, rank, dtype=torch.float64, device=first.device)
    rs[count:].copy_(torch.eye(rank, dtype=torch.float64, device=first.device))
    factorize(xs, None, qs, rs[:count])
    sigmas = torch.empty(count, rank, dtype=compute, device=first.device)
    cores = decompose_cores(rs, sigmas, compute)
    joined = torch.empty(count, sizes.R, sizes.R, dtype=torch.float64, device=first.device)
    with on_device(first):
        launch(join_kernel, (count,), cores, joined, count, K=sizes.R, TILE=min(sizes.R, 32), num_warps=4)
    apply_cores("grouped_polar", qs, joined, out)
