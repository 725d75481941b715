"""Which routine serves which size on CUDA: every crossover of the cuSOLVER/cuBLAS path, in one place, with its source.

None of these numbers has been measured on a GPU by us yet. What was considered for the QR and not taken:

* ``geqrf`` + ``orgqr`` of cuSOLVER, one matrix at a time over several streams: the launches grow with the layers. It is
  what ``torch.linalg.qr`` does, so the reference backend remains the fallback where this path cannot serve.
* ``geqrfBatched`` on whole factors: one shape per call, tall matrices are slow in it, and cuBLAS has no batched ``orgqr``.
* CholeskyQR2 (``potrfBatched``, ``trsmBatched``): in fp32 it breaks down at κ ≈ 3·10³, so it needs fp64 Grams (a
  sixty-fourth of the fp32 rate on consumer GPUs), and a guard whose outcome decides the next launch, which is a host
  synchronisation; and it does not complete a rank-deficient factor. The tree below (:mod:`.cuda_tsqr`) needs none of
  these for about the same number of operations.
"""

from __future__ import annotations

import torch

#: (largest rank, rows of one block of the QR tree). A block is at least 2r rows, else the tree does not shrink; about 4r
#: keeps the work on the upper levels below a third. Source: torch itself prefers ``geqrfBatched`` to a loop up to 256 rows
#: (pytorch/pytorch#56253).
BLOCK_ROWS: tuple[tuple[int, int], ...] = ((16, 64), (32, 128), (128, 256))

#: ``gesvdjBatched`` refuses matrices larger than this (cuSOLVER documentation).
GESVDJ_MAX = 32

#: ``XsyevBatched`` is used from this cuSOLVER on (11.7.1, of CUDA 12.6.2; pytorch/pytorch#155695).
XSYEV_VERSION = 11701


def block_rows(rank: int) -> int:
    """Rows of one block of the QR tree for factors with ``rank`` columns."""
    for largest, rows in BLOCK_ROWS:
        if rank <= largest:
            return rows
    return 2 * rank


def svd_path(k: int, dtype: torch.dtype) -> str:
    """How the k × k cores are decomposed: ``"jacobi"`` (``gesvdjBatched``), ``"gram"`` or ``"augmented"`` (batched ``syev``).

    =========  ========  ==============================================================================================
    k          dtype     path
    =========  ========  ==============================================================================================
    ≤ 32       any       ``gesvdjBatched`` in the compute dtype
    > 32       ≤ fp32    eigenvectors of the Gram MᵀM in fp64: its error, √eps64·σ₁ ≈ 1.5e-8·σ₁, is below fp32's own
    > 32       fp64      eigenvectors of [[0, M], [Mᵀ, 0]]: 2k × 2k, but backward stable, eps64·σ₁
    =========  ========  ==============================================================================================
    """
    if k <= GESVDJ_MAX:
        return "jacobi"
    return "augmented" if dtype == torch.float64 else "gram"
