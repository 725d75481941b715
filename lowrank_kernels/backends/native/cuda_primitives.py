"""The batched primitives that the CUDA path composes, as an interface over tensors, and its cuBLAS/cuSOLVER implementation.

The algorithms (:mod:`.cuda_tsqr`, :mod:`.cuda_svd_product`) know only :class:`Primitives`; the tests run them on a CPU
with a PyTorch stand-in.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..extension import csrc
from ..registry import count_launch
from .cuda_choices import XSYEV_VERSION
from .cuda_libraries import routines

#: cuBLAS scratch per (device, stream). Batched products of small matrices do not split their inner dimension: the 4 MiB that
#: NVIDIA recommends for most architectures are plenty.
WORKSPACE_BYTES = 4 << 20


class Primitives(Protocol):
    """Batched dense routines. P: batch, all matrices row-major with unit stride in the last dimension."""

    def geqrf_(self, blocks_t: Tensor, taus: Tensor) -> None:
        """Householder QR in place. ``blocks_t`` (P, r, b) contiguous holds each X (b, r) transposed; afterwards, in LAPACK's
        packed form (transposed): R, and the reflectors v_j with ``H_j = I − tau_j v_j v_jᵀ``; ``taus`` (P, r)."""

    def matmul(self, a: Tensor, b: Tensor, out: Tensor, *, transpose_a: bool = False, transpose_b: bool = False,
               alpha: float = 1.0, beta: float = 0.0) -> None:  # fmt: skip
        """``out = alpha·op(a) @ op(b) + beta·out`` in full precision of the dtype (never TF32)."""

    def solve_upper_(self, upper: Tensor, x: Tensor) -> None:
        """``x ← upper⁻¹ x``; ``upper`` (P, r, r), whose lower triangle is not read, ``x`` (P, r, c), both contiguous."""

    def svd(self, cores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``cores[i] = uhᵀ diag(s) vh``, s descending; (P, k, k), k ≤ 32, destroyed. Returns (uh, s, vh), vectors as rows;
        s is NaN where the iteration did not converge."""

    def eigh_(self, symmetric: Tensor) -> Tensor:
        """Ascending eigenvalues (P, n) of fp64 matrices (P, n, n), contiguous, which become the eigenvectors, as rows;
        NaN where the iteration did not converge."""


class CudaPrimitives:
    """:class:`Primitives` by cuBLAS and cuSOLVER on one (device, stream). Row-major here is column-major transposed there."""

    def __init__(self, library: Any, device_index: int, stream: int, workspace: Tensor | None) -> None:
        self._routines = library
        self._has_xsyev = has_xsyev(library.status())
        self._workspace = workspace  # keeps it alive as long as the handles know its address
        address, size = (0, 0) if workspace is None else (workspace.data_ptr(), workspace.numel())
        self._place = csrc.CudaPlace(device_index, stream, address, size)

    @staticmethod
    def _addresses(batch: Tensor) -> Tensor:
        """Device table (int64) of the addresses of ``batch[i]``; made on the device, so nothing is copied from the host."""
        start, step = batch.data_ptr(), batch.stride(0) * batch.element_size()
        return torch.arange(start, start + batch.shape[0] * step, step, dtype=torch.int64, device=batch.device)

    @staticmethod
    def _is_double(tensor: Tensor) -> bool:
        return tensor.dtype == torch.float64

    def geqrf_(self, blocks_t: Tensor, taus: Tensor) -> None:
        count, rank, rows = blocks_t.shape
        a, tau = self._addresses(blocks_t), self._addresses(taus)
        count_launch()
        self._routines.geqrf(self._place, self._is_double(taus), rows, rank, a.data_ptr(), rows, tau.data_ptr(), count)

    def matmul(self, a: Tensor, b: Tensor, out: Tensor, *, transpose_a: bool = False, transpose_b: bool = False,
               alpha: float = 1.0, beta: float = 0.0) -> None:  # fmt: skip
        count, m, n = out.shape
        k = a.shape[1] if transpose_a else a.shape[2]
        count_launch()
        # Row-major out = op(a) op(b) is column-major outᵀ = op(b)ᵀ op(a)ᵀ, and each operand is stored transposed already.
        self._routines.gemm(
            self._place, self._is_double(out), transpose_b, transpose_a, n, m, k, alpha,
            b.data_ptr(), b.stride(1), b.stride(0), a.data_ptr(), a.stride(1), a.stride(0),
            beta, out.data_ptr(), out.stride(1), out.stride(0), count,
        )  # fmt: skip

    def solve_upper_(self, upper: Tensor, x: Tensor) -> None:
        count, rank, columns = x.shape
        a, b = self._addresses(upper), self._addresses(x)
        count_launch()
        # Stored column-major: upperᵀ (lower) and xᵀ (c × r); solve Yᵀ upperᵀ = xᵀ from the right.
        self._routines.trsm(
            self._place, self._is_double(x), True, False, False, columns, rank, a.data_ptr(), rank, b.data_ptr(), columns, count
        )

    def svd(self, cores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count, k, _ = cores.shape
        double = self._is_double(cores)
        s, uh, vh = cores.new_empty(count, k), torch.empty_like(cores), torch.empty_like(cores)
        info = torch.empty(count, dtype=torch.int32, device=cores.device)
        # Column-major reads coreᵀ = V S Uᵀ, and what it calls U comes back column-major: its columns are our rows.
        arguments = (cores.data_ptr(), s.data_ptr(), vh.data_ptr(), uh.data_ptr())
        length = self._routines.gesvdj(self._place, double, k, *arguments, 0, 0, info.data_ptr(), count)
        work = cores.new_empty(max(length, 1))
        count_launch()
        self._routines.gesvdj(self._place, double, k, *arguments, work.data_ptr(), length, info.data_ptr(), count)
        return uh, s.masked_fill_((info != 0)[:, None], torch.nan), vh

    def eigh_(self, symmetric: Tensor) -> Tensor:
        count, n, _ = symmetric.shape
        values = symmetric.new_empty(count, n)
        info = torch.empty(count, dtype=torch.int32, device=symmetric.device)
        arguments = (self._place, not self._has_xsyev, n, symmetric.data_ptr(), values.data_ptr())
        size = self._routines.syev(*arguments, 0, 0, info.data_ptr(), count)
        work = torch.empty(max(size, 1), dtype=torch.uint8, device=symmetric.device)
        count_launch()
        self._routines.syev(*arguments, work.data_ptr(), size, info.data_ptr(), count)
        return values.masked_fill_((info != 0)[:, None], torch.nan)


def has_xsyev(status: dict[str, Any]) -> bool:
    """Whether ``cusolverDnXsyevBatched`` is there (of the libraries' ``status``) and recent enough; else ``DsyevjBatched``."""
    return "cusolverDnXsyevBatched" not in status["missing_symbols"] and status["cusolver_version"] >= XSYEV_VERSION


_primitives: dict[tuple[int, int], CudaPrimitives] = {}


def primitives_for(device: torch.device) -> CudaPrimitives:
    """The primitives of the current stream of ``device``; handles and scratch are made once for each (device, stream)."""
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = torch.cuda.current_stream(index).cuda_stream
    found = _primitives.get((index, stream))
    if found is None:
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=torch.device("cuda", index))
        # setdefault: of two threads that come here at once, one wins, and both use its workspace.
        found = _primitives.setdefault((index, stream), CudaPrimitives(routines(), index, stream, workspace))
    return found
