"""The full gradients of several layers, as a term of LoRSum: what was held of each, averaged over ranks, and the number by which it is to
be multiplied to give what ``.grad`` says (loss scaling, clipping).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from ...backends.dtypes import compute_dtype
from ...backends.lists import on_device, widened
from ...ops import grouped_gram, grouped_lorsum_product
from ...parallel.ranks import DataParallelGroup
from .held_gradient import Dense, FullGradient, Probes, Sketch, TokenFactors, products_of, reconstruct
from .pairing import FactorPair

#: Above this share of ``.grad`` that is no multiple of the captured gradient, the two are of different backward passes. Rounding in bf16
#: stays an order of magnitude below.
MISMATCH = 0.3


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
            expected = products_of([sketch.mT for sketch in sketches], bases)  # type: ignore[union-attr]
            grads = products_of([probe.mT for probe in probes], grads)
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
