"""The full gradient ``G = SᵀX`` of one layer, held in one of three ways between the backward passes and ``step()``; and of several
layers as a term of LoRSum.

X (tokens, d_in) is the adapter's input and S (tokens, d_out) the gradient of its output. Micro-batches add up in each of them.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from ...backends.dtypes import compute_dtype
from ...backends.lists import on_device, partition, widened
from ...ops import grouped_gram, grouped_lorsum_product, grouped_qr
from ...parallel.ranks import DataParallelGroup
from .pairing import FactorPair

#: Above this share of ``.grad`` that is no multiple of the captured gradient, the two are of different backward passes. Rounding in bf16
#: stays an order of magnitude below.
MISMATCH = 0.3


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
        inner_qs, inner_rs = grouped_qr(_times([sketches[index].psi.mT for index in members], qs))
        inverses = torch.linalg.solve_triangular(inner_rs, torch.stack(inner_qs).mT.to(inner_rs.dtype), upper=True)
        products = _times([sketches[index].z for index in members], list(inverses.mT))  # type: ignore[misc]
        for index, q, product in zip(members, qs, products, strict=True):
            lefts[index], rights[index] = q, product
    return lefts, rights


def _times(matrices: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """The products of all of them; the others may differ in width."""
    products: list[Tensor] = [torch.empty(0)] * len(others)
    for members in partition(range(len(others)), lambda i: others[i].shape[1]).values():
        found = grouped_lorsum_product([[matrices[index] for index in members]], [others[index] for index in members], [1.0])
        for index, product in zip(members, found, strict=True):
            products[index] = product
    return products


def _traces(xs: list[Tensor], ys: list[Tensor] | None = None) -> Tensor:
    """``⟨X_i, Y_i⟩`` (N,) in fp64, of thin matrices of one width."""
    return grouped_gram(xs, ys, dtype=torch.float64).diagonal(dim1=1, dim2=2).sum(dim=1)


class FullGradients:
    """The full gradients of layers that agree in rank, dtype and device: as a term of LoRSum.

    What stands in the term is the mean over ranks only for sketches; else it is this rank's part, and :meth:`times` is the mean.

    Args:
        pairs: the layers.
        factors: their (A, B), as matrices.
        held: what was captured of each, ``m_i G_i``.
        multipliers: m_i.
        ranks: over which to average; None: this process alone.

    Attributes:
        term: ``(lefts, rights)`` or dense matrices, as ``grouped_lorsum`` takes them.
        coefficients: (N,) fp64, by which the term's matrices are to be multiplied to give G as ``.grad`` has it.
    """

    def __init__(
        self,
        pairs: list[FactorPair],
        factors: list[tuple[Tensor, Tensor]],
        held: list[FullGradient],
        multipliers: list[float],
        ranks: DataParallelGroup | None,
    ) -> None:
        self.pairs, self.factors, self.held, self.multipliers, self.ranks = pairs, factors, held, multipliers, ranks
        self.dtype = compute_dtype(factors[0][0].dtype)
        self.lefts: list[Tensor] = []
        self.rights: list[Tensor] | None = None
        self._with_a: list[Tensor] | None = None
        if isinstance(held[0], Sketch):
            self._hold_sketches()
        elif isinstance(held[0], Dense):
            self.lefts = [self._dense(h, *f) for h, f in zip(held, factors, strict=True)]  # type: ignore[arg-type]
        else:
            self.lefts, self.rights = map(list, zip(*map(self._thin, held, factors), strict=True))  # type: ignore[arg-type]

    def _thin(self, held: TokenFactors, factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        a, b = factors
        return (b.new_empty(len(b), 0), a.new_empty(a.shape[1], 0)) if held.empty else held.factors()

    def _dense(self, held: Dense, a: Tensor, b: Tensor) -> Tensor:
        return b.new_zeros(len(b), a.shape[1], dtype=self.dtype) if held.matrix is None else held.matrix

    def _hold_sketches(self) -> None:
        for held, (a, b) in zip(self.held, self.factors, strict=True):
            assert isinstance(held, Sketch)
            if held.empty:
                held.add(a.new_zeros(1, a.shape[1]), b.new_zeros(1, len(b)))
        if self.ranks is not None:
            means = iter(self.ranks.mean([part for held in self.held for part in (held.y, held.z)]))  # type: ignore[union-attr, misc]
            for held in self.held:
                held.y, held.z = next(means), next(means)  # type: ignore[union-attr]
        self.lefts, self.rights = reconstruct(self.held)  # type: ignore[arg-type]

    @property
    def local(self) -> bool:
        """Whether ``term`` is the whole gradient."""
        return self.ranks is None or isinstance(self.held[0], Sketch)

    @property
    def term(self) -> Any:
        return self.lefts if self.rights is None else (self.lefts, self.rights)

    def tensors(self) -> list[Tensor]:
        """All that is read where it is used: the term's matrices, the coefficients and the factors."""
        return [*self.lefts, *(self.rights or ()), self.coefficients, *(factor for pair in self.factors for factor in pair)]

    def times(self, others: list[Tensor], transposed: bool = False) -> list[Tensor]:
        """``GV``, or ``GᵀU`` if transposed, for all layers: of the term's matrices without the coefficients, averaged over ranks."""
        term = self.term
        if transposed:
            term = [matrix.mT for matrix in self.lefts] if self.rights is None else (self.rights, self.lefts)
        products = grouped_lorsum_product([term], others, [1.0])
        return products if self.local else self.ranks.mean(products)  # type: ignore[union-attr]

    def times_a(self) -> list[Tensor]:
        """``G`` times Aᵀ, the factors' own, as :meth:`times`."""
        if self._with_a is None:
            self._with_a = self.times([a.mT for a, _ in self.factors])
        return self._with_a

    def of(self, members: list[int]) -> FullGradients:
        """Those of some layers."""
        some = copy.copy(self)
        for name in ("pairs", "factors", "held", "multipliers", "lefts"):
            setattr(some, name, [getattr(self, name)[index] for index in members])
        some.rights = None if self.rights is None else [self.rights[index] for index in members]
        some.coefficients, some._with_a = self.coefficients[members], None
        return some

    def measure(self, a_grads: list[Tensor], b_grads: list[Tensor], method: str) -> None:
        """Find the coefficients: by what ``.grad`` is, ``∂B = c·s·GAᵀ`` and ``∂A = c·s·BᵀG``.

        Raises:
            RuntimeError: something is not finite, or ``.grad`` is no multiple of what was captured.
        """
        ratios, shares, known = self._ratios(b_grads, transposed=False)
        if not all(known):  # no gradient at all, or A = 0: then A's own gradient tells
            others = self._ratios([grad.mT for grad in a_grads], transposed=True)
            for index, of_b in enumerate(known):
                if not of_b:
                    ratios[index], shares[index] = (others[0][index], others[1][index]) if others[2][index] else (1.0, 0.0)
        for pair, ratio, share in zip(self.pairs, ratios, shares, strict=True):
            if not (math.isfinite(ratio) and math.isfinite(share)):
                raise RuntimeError(
                    f"{method}: the gradient of {pair.name} is not finite; nothing was changed. Steps in fp16 go through GradScaler, "
                    "which skips such steps; else find where the loss or an activation overflows, and zero_grad() before going on"
                )
            if share > MISMATCH:
                raise RuntimeError(
                    f"{method}: the .grad of {pair.name} is not the gradient that was captured ({share:.0%} of it is something else); "
                    "nothing was changed. Scaling and clipping by norms are followed, element by element changes are not; gradients must "
                    "be cleared by zero_grad(), and under data parallelism averaged over process_group before step(); factors must not be "
                    "tied to another layer's"
                )
        self.coefficients = on_device([c / m for c, m in zip(ratios, self.multipliers, strict=True)], self.factors[0][0].device)

    def _ratios(self, grads: list[Tensor], transposed: bool) -> tuple[list[float], list[float], list[bool]]:
        """For each layer: c, the share of the gradient (as a norm) that no c explains, and whether it says anything."""
        bases = [b if transposed else a.mT for a, b in self.factors]
        grads = widened(grads, self.dtype)
        if isinstance(self.held[0], Sketch):  # exact products with the probes, of the same G
            probes = [held.omega if transposed else held.psi for held in self.held]  # type: ignore[union-attr]
            sketches = [held.y if transposed else held.z for held in self.held]  # type: ignore[union-attr]
            expected = _times([sketch.mT for sketch in sketches], bases)  # type: ignore[union-attr]
            grads = _times([probe.mT for probe in probes], grads)
        else:
            expected = self.times(bases, True) if transposed else self.times_a()
        both, own, theirs = torch.stack([_traces(grads, expected), _traces(expected), _traces(grads)]).tolist()
        ratios, shares = [], []
        for pair, m, ge, ee, gg in zip(self.pairs, self.multipliers, both, own, theirs, strict=True):
            if not math.isfinite(ge + ee + gg):
                ratios.append(math.nan)
                shares.append(math.nan)
            elif ee == 0:
                ratios.append(1.0)
                shares.append(1.0 if gg else 0.0)
            else:
                ratios.append(ge / ee * m / pair.scale)
                shares.append(math.sqrt(max(0.0, 1.0 - (ge / ee) * (ge / gg))) if gg else 0.0)
        return ratios, shares, [bool(ee or gg) for ee, gg in zip(own, theirs, strict=True)]

    def squared_norms(self, probes: int, seed: int) -> Tensor:
        """(N,) fp64: ``‖G‖²_F``, exact for matrices held whole, else ``‖GΩ‖²_F/p`` for Gaussian Ω (d_in, p), the same on all ranks."""
        products, columns = list(self.lefts), [1] * len(self.lefts)
        if isinstance(self.held[0], Sketch):
            products = [held.y for held in self.held]  # type: ignore[union-attr, misc]
            columns = [product.shape[1] for product in products]
        elif self.rights is not None or self.ranks is not None:
            random = Probes(seed)
            products = self.times([random.matrix(a.shape[1], probes, a, 0) for a, _ in self.factors])
            columns = [probes] * len(products)
        norms = torch.stack(list(torch._foreach_norm(products, 2, dtype=torch.float64))) * self.coefficients
        return norms.square() / on_device(columns, norms.device)
