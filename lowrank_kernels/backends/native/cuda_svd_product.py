"""``grouped_svd_product`` on CUDA: one QR tree for all factors, then a batched SVD of the k × k cores."""

from __future__ import annotations

import torch
from torch import Tensor

from .cuda_choices import block_rows, svd_path
from .cuda_libraries import cuda_status, problem
from .cuda_lists import Bucket, buckets, stack_transposed, to_bucket_order, to_list_order, write_transposed
from .cuda_primitives import Primitives, has_xsyev, primitives_for
from .cuda_qr import SYMBOLS, verify_tensors
from .cuda_tsqr import apply_q, factor, orthonormalize_rows

SOLVER_SYMBOLS = ("cusolverDnCreate", "cusolverDnSetStream")
JACOBI_SYMBOLS = (
    "cusolverDnCreateGesvdjInfo",
    *(f"cusolverDn{precision}gesvdjBatched{suffix}" for precision in "SD" for suffix in ("", "_bufferSize")),
)
XSYEV_SYMBOLS = ("cusolverDnCreateParams", "cusolverDnXsyevBatched", "cusolverDnXsyevBatched_bufferSize")
SYEVJ_SYMBOLS = ("cusolverDnCreateSyevjInfo", "cusolverDnDsyevjBatched", "cusolverDnDsyevjBatched_bufferSize")


def verify(lefts: list[Tensor], rights: list[Tensor], us: list[Tensor], ss: Tensor, vs: list[Tensor]) -> tuple[bool, str]:
    """Whether :func:`grouped_svd_product` takes the call, and why not; reads no data."""
    ok, reason = verify_tensors([*lefts, *rights, *us, *vs], SYMBOLS + SOLVER_SYMBOLS)
    if not ok:
        return ok, reason
    k = lefts[0].shape[1]
    if svd_path(k, ss.dtype) == "jacobi":
        symbols, name = JACOBI_SYMBOLS, "gesvdjBatched"
    elif has_xsyev(cuda_status()):
        symbols, name = XSYEV_SYMBOLS, "XsyevBatched"
    else:
        symbols, name = SYEVJ_SYMBOLS, "DsyevjBatched"
    found = problem(*symbols)
    return (True, f"cuBLAS geqrfBatched for the factors, cuSOLVER {name} for the {k} × {k} cores") if found is None else (False, found)


def grouped_svd_product(lefts: list[Tensor], rights: list[Tensor], us: list[Tensor], ss: Tensor, vs: list[Tensor]) -> None:
    """``grouped_svd_product`` as the reference specifies it; asynchronous on the current stream."""
    with torch.no_grad():
        compute_svd_product(primitives_for(lefts[0].device), lefts, rights, us, ss, vs)


def _descending(uh: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Triples (vectors as rows) in the order of falling singular values."""
    s, order = s.sort(dim=1, descending=True)
    rows = order[:, :, None].expand_as(uh)
    return uh.gather(1, rows), s, vh.gather(1, rows)


def core_svd(primitives: Primitives, cores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of finite cores (N, k, k), which are destroyed: (uh, s, vh), vectors as rows, complete for any rank, s descending.

    The paths are :func:`.cuda_choices.svd_path`'s. What the libraries leave open for zero singular values is settled by
    orthonormalizing the vectors from the largest singular value down, which moves those of distinct ones by rounding only.
    A core whose iteration did not converge gives NaN (the reference raises, which would take a host synchronisation).
    """
    count, k, _ = cores.shape
    path = svd_path(k, cores.dtype)
    if path == "jacobi":
        uh, s, vh = _descending(*primitives.svd(cores))
        uh, vh = (orthonormalize_rows(primitives, x.nan_to_num())[0] for x in (uh, vh))
    elif path == "gram":
        wide = cores.double()
        grams = torch.empty_like(wide)
        primitives.matmul(wide, wide, grams, transpose_a=True)
        values = primitives.eigh_(grams)
        vh = grams.flip(1).contiguous()
        images = torch.empty_like(wide)
        primitives.matmul(vh, wide, images, transpose_b=True)  # rows M v_j = s_j u_j
        uh, r_t = orthonormalize_rows(primitives, images)
        s = torch.where(values.isnan(), torch.nan, r_t.diagonal(dim1=1, dim2=2).clamp_min(0))
        uh, s, vh = _descending(uh, s, vh)
    else:
        augmented = cores.new_zeros(count, 2 * k, 2 * k)
        augmented[:, :k, k:].copy_(cores)
        augmented[:, k:, :k].copy_(cores.mT)
        values = primitives.eigh_(augmented)
        vectors = augmented.flip(1)[:, :k]  # (u, v)/√2, largest first
        uh, vh = (orthonormalize_rows(primitives, x.contiguous())[0] for x in (vectors[:, :, :k], vectors[:, :, k:]))
        s = values.flip(1)[:, :k].clamp_min(0)
    failed = s.isnan().any(dim=1)[:, None]
    uh, vh = (x.masked_fill(failed[:, :, None], torch.nan).to(cores.dtype) for x in (uh, vh))
    return uh, s.masked_fill(failed, torch.nan).to(cores.dtype), vh


def _scaled(factors: list[Tensor], groups: list[Bucket], dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """Stacked factors, each scaled by one power of two to a largest entry in [1/2, 1) (zero if not finite); the exponents
    (N,) and whether it was finite (N,), in the list's order."""
    stacked, exponents, finite = [], [], []
    for bucket in groups:
        x_t = stack_transposed(factors, bucket).to(dtype)
        finite.append(x_t.isfinite().all(dim=2).all(dim=1))
        x_t = torch.where(finite[-1][:, None, None], x_t, 0)
        exponent = torch.frexp(x_t.abs().amax(dim=2).amax(dim=1)).exponent
        half = exponent.div(2, rounding_mode="floor")
        stacked.append(torch.ldexp(torch.ldexp(x_t, -half[:, None, None]), (half - exponent)[:, None, None]))
        exponents.append(exponent)
    return stacked, to_list_order(torch.cat(exponents), groups), to_list_order(torch.cat(finite), groups)


def compute_svd_product(
    primitives: Primitives, lefts: list[Tensor], rights: list[Tensor], us: list[Tensor], ss: Tensor, vs: list[Tensor]
) -> None:
    """The algorithm, over any :class:`Primitives`."""
    count, k, rank = len(lefts), lefts[0].shape[1], ss.shape[1]
    sides = [(buckets(lefts, us), lefts, us), (buckets(rights, vs), rights, vs)]
    scaled = [_scaled(factors, groups, ss.dtype) for groups, factors, _ in sides]
    levels, r_t = factor(primitives, [x for stacked, _, _ in scaled for x in stacked], k, block_rows(k))
    r_left, r_right = (to_list_order(half, groups) for half, (groups, _, _) in zip(r_t.split(count), sides, strict=True))
    cores = ss.new_empty(count, k, k)
    primitives.matmul(r_left.contiguous(), r_right.contiguous(), cores, transpose_a=True)  # R_L R_Rᵀ, both given transposed
    uh, s, vh = core_svd(primitives, cores)
    coefficients = [x for (groups, _, _), half in zip(sides, (uh, vh), strict=True) for x in to_bucket_order(half[:, :rank], groups)]
    products = iter(apply_q(primitives, levels, torch.cat(coefficients)))
    finite = scaled[0][2] & scaled[1][2]
    for groups, _, targets in sides:
        for bucket, is_finite in zip(groups, to_bucket_order(finite, groups), strict=True):
            values = next(products)[:, :, : bucket.height]
            write_transposed(targets, bucket, torch.where(is_finite[:, None, None], values, torch.nan))
    s = torch.ldexp(torch.ldexp(s[:, :rank], scaled[0][1][:, None]), scaled[1][1][:, None])
    ss.copy_(torch.where(finite[:, None], s, torch.nan))
