"""``grouped_qr`` on CUDA by cuBLAS: one QR tree for the whole ragged list (:mod:`.cuda_tsqr`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .cuda_choices import block_rows
from .cuda_libraries import problem
from .cuda_lists import buckets, stack_transposed, to_list_order, write_transposed
from .cuda_primitives import Primitives, primitives_for
from .cuda_tsqr import apply_q, factor, identity, normalize_rows, scale_rows

SYMBOLS = (
    *("cublasCreate_v2", "cublasSetStream_v2", "cublasSetWorkspace_v2", "cudaGetDevice", "cudaSetDevice"),
    *(f"cublas{precision}{name}" for precision in "SD" for name in ("geqrfBatched", "gemmStridedBatched", "trsmBatched")),
)


def verify_tensors(tensors: list[Tensor], symbols: tuple[str, ...]) -> tuple[bool, str]:
    """What every call on this path needs: plain CUDA tensors, a stream that is not being captured, the libraries."""
    for index, x in enumerate(tensors):
        if type(x) not in (Tensor, torch.nn.Parameter):
            return False, f"tensor {index} is a {type(x).__name__}; the native CUDA path reads addresses of plain tensors"
        if not x.is_cuda:
            return False, f"tensor {index} is on {x.device}; the native CUDA path takes CUDA tensors"
    if tensors[0].shape[1] == 0:
        return False, "the rank is 0"
    found = problem(*symbols)
    if found is not None:
        return False, found
    if torch.cuda.is_current_stream_capturing():
        return False, "the stream is being captured, which cuBLAS's factorizations do not promise to support"
    return True, "cuBLAS"


def verify(xs: list[Tensor], previous: list[Tensor] | None, qs: list[Tensor], rs: Tensor) -> tuple[bool, str]:
    """Whether :func:`grouped_qr` takes the call, and why not; reads no data."""
    ok, reason = verify_tensors([*xs, *(previous or ()), *qs], SYMBOLS)
    return (ok, "cuBLAS geqrfBatched over one tree of blocks of the whole list") if ok else (ok, reason)


def grouped_qr(xs: list[Tensor], previous: list[Tensor] | None, qs: list[Tensor], rs: Tensor) -> None:
    """``grouped_qr`` as the reference specifies it; asynchronous on the current stream."""
    with torch.no_grad():
        compute_qr(primitives_for(xs[0].device), xs, previous, qs, rs)


def compute_qr(primitives: Primitives, xs: list[Tensor], previous: list[Tensor] | None, qs: list[Tensor], rs: Tensor) -> None:
    """The algorithm, over any :class:`Primitives`."""
    rank = xs[0].shape[1]
    groups = buckets(xs, qs, previous)
    finite, exponents, scaled = [], [], []
    for bucket in groups:
        x_t = stack_transposed(xs, bucket).to(rs.dtype)
        finite.append(x_t.isfinite().all(dim=2).all(dim=1))
        x_t, exponent = normalize_rows(torch.where(finite[-1][:, None, None], x_t, 0))
        scaled.append(x_t)
        exponents.append(exponent)
    levels, r_t = factor(primitives, scaled, rank, block_rows(rank))
    del scaled
    diagonal = r_t.diagonal(dim1=1, dim2=2)
    q_groups = apply_q(primitives, levels, identity(len(xs), rank, r_t))
    signs, start = [], 0
    for bucket, q_t, is_finite in zip(groups, q_groups, finite, strict=True):
        q_t = q_t[:, :, : bucket.height]
        negative = diagonal[start : start + len(bucket.indices)] < 0
        start += len(bucket.indices)
        if previous is not None:
            alignment = (q_t * stack_transposed(previous, bucket)).sum(dim=2)
            # Where the previous Q says nothing (orthogonal, or NaN) R's diagonal decides.
            negative = torch.where((alignment > 0) | (alignment < 0), alignment < 0, negative)
        sign = torch.where(negative, -1.0, 1.0).to(r_t.dtype)
        signs.append(sign)
        write_transposed(qs, bucket, torch.where(is_finite[:, None, None], q_t * sign[:, :, None], torch.nan))
    all_signs, all_finite = torch.cat(signs), torch.cat(finite)
    # Row i of R is row i of Q's coefficients: columns of Rᵀ take the signs, its rows (columns of X) the scales.
    result_t = torch.where(all_finite[:, None, None], scale_rows(r_t * all_signs[:, None, :], torch.cat(exponents)), torch.nan)
    rs.copy_(to_list_order(result_t, groups).mT)
