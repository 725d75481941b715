"""The full gradient ``G = SᵀX`` of one layer, held in one of three ways between the backward passes and ``step()``.

X (tokens, d_in) is the adapter's input and S (tokens, d_out) the gradient of its output. Micro-batches add up in each of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends.dtypes import compute_dtype
from ...backends.lists import partition
from ...ops import grouped_lorsum_product, grouped_qr


class TokenFactors:
    """X and S as they are, in their own dtype: exact; memory tokens·(d_in + d_out), of which X is the one that autograd held; of a
    tensor of the user's, which may be refilled before ``step()``, a copy."""

    def __init__(self) -> None:
        self.pieces: list[tuple[Tensor, Tensor]] = []

    @property
    def empty(self) -> bool:
        return not self.pieces

    def add(self, x: Tensor, s: Tensor) -> None:
        self.pieces.append((x, s))

    def clear(self) -> None:
        self.pieces = []

    def factors(self) -> tuple[Tensor, Tensor]:
        """``(Sᵀ, Xᵀ)``, both (width, tokens)."""
        # Terms of their own would save the copy, and no product: but K-FAC needs all tokens in one matrix, and compiled code takes 16.
        if len(self.pieces) > 1:
            self.pieces = [tuple(torch.cat(parts) for parts in zip(*self.pieces, strict=True))]  # type: ignore[list-item]
        x, s = self.pieces[0]
        return s.mT, x.mT


class Dense:
    """The sum of SᵀX itself, fp32 at least: exact; memory d_out·d_in, less than the factors' once there are more than
    d_in·d_out/(d_in + d_out) tokens, for a weight gradient's GEMM in every backward pass."""

    def __init__(self) -> None:
        self.matrix: Tensor | None = None

    @property
    def empty(self) -> bool:
        return self.matrix is None

    def add(self, x: Tensor, s: Tensor) -> None:
        dtype = compute_dtype(s.dtype)
        if self.matrix is None:
            self.matrix = (s.mT @ x).to(dtype)
        elif s.dtype == dtype:
            self.matrix.addmm_(s.mT, x)
        else:
            self.matrix += s.mT @ x

    def clear(self) -> None:
        self.matrix = None


def random_matrix(like: Tensor, seed: int, rows: int, columns: int, *more: int) -> Tensor:
    """Standard normal (rows, columns), where ``like`` is and in the dtype of its optimizer state: the same on every device and rank."""
    for number in (rows, columns, *more):
        seed = (seed * 1_000_003 + number) % 2**63
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    return made.to(like.device, compute_dtype(like.dtype))


class Probes:
    """The random matrices of the sketches, the same for every layer, micro-batch and rank of a step, others in the next; made when asked
    for, and kept for the step."""

    def __init__(self, seed: int) -> None:
        self.seed, self._step = seed, 0
        self._made: dict[object, Tensor] = {}

    @property
    def step(self) -> int:
        """Which step it is; part of the seed."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        if step != self._step:
            self._step, self._made = step, {}

    def matrix(self, rows: int, columns: int, like: Tensor, kind: int) -> Tensor:
        """Standard normal, (rows, columns), in the dtype that ``like`` has as optimizer state; kinds are independent."""
        key = (rows, columns, kind, like.device, compute_dtype(like.dtype))
        if key not in self._made:
            self._made[key] = random_matrix(like, self.seed, rows, columns, self.step, kind)
        return self._made[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}


class Sketch:
    """``Y = GΩ`` (d_out, p) and ``Z = GᵀΨ`` (d_in, 2p+1) with Gaussian Ω, Ψ, from which ``G ≈ Q (ΨᵀQ)⁺ Zᵀ``, Q = orth(Y) (Tropp,
    Yurtsever, Udell & Cevher 2017, Algorithm 4). Linear in G: micro-batches and ranks add up.

    Exact if rank G ≤ p; else, by their Theorem 4.3 with ℓ = 2p+1, for every ρ < p-1::

        E ‖G - Ĝ‖²_F ≤ 2 (1 + ρ/(p-ρ-1)) Σ_{j>ρ} σ_j²(G)
    """

    def __init__(self, width: int, probes: Probes) -> None:
        self.width, self.probes = width, probes
        self.y: Tensor | None = None
        self.z: Tensor | None = None

    @property
    def empty(self) -> bool:
        return self.y is None

    def add(self, x: Tensor, s: Tensor) -> None:
        dtype = compute_dtype(s.dtype)
        x, s = x.to(dtype), s.to(dtype)
        width = min(self.width, x.shape[1], s.shape[1])
        y, z = s.mT @ (x @ self.probes.matrix(x.shape[1], width, x, 0)), x.mT @ (s @ self._psi(s.shape[1], width, s))
        self.y = y if self.y is None else self.y + y
        self.z = z if self.z is None else self.z + z

    def clear(self) -> None:
        self.y = self.z = None

    def _psi(self, d_out: int, width: int, like: Tensor) -> Tensor:
        return self.probes.matrix(d_out, 2 * width + 1, like, 1)

    @property
    def omega(self) -> Tensor:
        """Ω (d_in, p)."""
        assert self.y is not None and self.z is not None
        return self.probes.matrix(len(self.z), self.y.shape[1], self.y, 0)

    @property
    def psi(self) -> Tensor:
        """Ψ (d_out, 2p+1)."""
        assert self.y is not None
        return self._psi(self.y.shape[0], self.y.shape[1], self.y)


FullGradient = TokenFactors | Dense | Sketch
KINDS = ("factors", "dense", "sketch")


def reconstruct(sketches: list[Sketch]) -> tuple[list[Tensor], list[Tensor]]:
    """The thin factors of the sketched matrices: lefts Q (d_out, p) and rights ``Z (ΨᵀQ)⁺ᵀ`` (d_in, p)."""
    lefts, rights = ([torch.empty(0)] * len(sketches) for _ in range(2))
    for members in partition(range(len(sketches)), lambda i: sketches[i].y.shape[1]).values():  # type: ignore[union-attr]
        qs, _ = grouped_qr([sketches[index].y for index in members])  # type: ignore[misc]
        inner_qs, inner_rs = grouped_qr(products_of([sketches[index].psi.mT for index in members], qs))
        inverses = torch.linalg.solve_triangular(inner_rs, torch.stack(inner_qs).mT.to(inner_rs.dtype), upper=True)
        products = products_of([sketches[index].z for index in members], list(inverses.mT))  # type: ignore[misc]
        for index, q, product in zip(members, qs, products, strict=True):
            lefts[index], rights[index] = q, product
    return lefts, rights


def products_of(matrices: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """The products of all of them; the others may differ in width."""
    products: list[Tensor] = [torch.empty(0)] * len(others)
    for members in partition(range(len(others)), lambda i: others[i].shape[1]).values():
        found = grouped_lorsum_product([[matrices[index] for index in members]], [others[index] for index in members], [1.0])
        for index, product in zip(members, found, strict=True):
            products[index] = product
    return products
