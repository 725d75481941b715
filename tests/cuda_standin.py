"""A CPU stand-in, in PyTorch, for the batched cuBLAS and cuSOLVER routines behind ``cuda_primitives.Primitives``."""

from __future__ import annotations

import torch
from torch import Tensor


class TorchPrimitives:
    """The contract of ``Primitives``, and a record of the calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def geqrf_(self, blocks_t: Tensor, taus: Tensor) -> None:
        self.calls.append("geqrf")
        assert blocks_t.is_contiguous() and taus.is_contiguous()
        packed, tau = torch.geqrf(blocks_t.mT)
        blocks_t.copy_(packed.mT)
        taus.copy_(tau)

    def matmul(self, a, b, out, *, transpose_a=False, transpose_b=False, alpha=1.0, beta=0.0) -> None:
        self.calls.append("matmul")
        assert all(x.stride(2) == 1 or x.shape[2] == 1 for x in (a, b, out))
        product = alpha * ((a.mT if transpose_a else a) @ (b.mT if transpose_b else b))
        out.copy_(product if beta == 0 else product + beta * out)

    def solve_upper_(self, upper: Tensor, x: Tensor) -> None:
        self.calls.append("solve")
        assert upper.is_contiguous() and x.is_contiguous()
        x.copy_(torch.linalg.solve_triangular(upper.triu(), x, upper=True))

    def svd(self, cores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append("svd")
        assert cores.shape[1] <= 32 and cores.is_contiguous()
        u, s, vh = torch.linalg.svd(cores)
        # cuSOLVER promises nothing for the vectors of a zero singular value.
        null = s <= s[:, :1] * 0
        u, v = (torch.where(null[:, None, :], torch.nan, x) for x in (u, vh.mT))
        cores.fill_(torch.nan)
        return u.mT.contiguous(), s, v.mT.contiguous()

    def eigh_(self, symmetric: Tensor) -> Tensor:
        self.calls.append("eigh")
        assert symmetric.is_contiguous() and symmetric.dtype == torch.float64
        values, vectors = torch.linalg.eigh(symmetric)
        symmetric.copy_(vectors.mT)
        return values
