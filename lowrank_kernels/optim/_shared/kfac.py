"""The K-FAC metrics of scaled OPLoRA: running averages of ``XᵀX`` and ``SᵀS``, of rank k, tracked by LoRSum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...backends.lists import on_device, partition
from ...ops import grouped_lorsum_product, grouped_svd_product
from ...ops.lorsum import lorsum_in_step
from .full_gradient import FullGradients
from .lorsum import composed_lorsum


class Kronecker:
    """``D = W diag(σ) Wᵀ + δI`` of one side of all layers, W (d, k) with orthonormal columns; k may differ from layer to layer."""

    def __init__(self, bases: list[Tensor], stretched: list[Tensor], shrunk: list[Tensor], damping: float) -> None:
        self.bases, self.stretched, self.shrunk, self.damping = bases, stretched, shrunk, damping

    def times(self, ys: list[Tensor]) -> list[Tensor]:
        """``D Y``."""
        return self._apply(self.stretched, ys, self.damping)

    def solve(self, ys: list[Tensor]) -> list[Tensor]:
        """``D⁻¹ Y``, by Woodbury's identity, whose inner system is diagonal here."""
        return self._apply(self.shrunk, ys, 1.0 / self.damping)

    def _apply(self, scaled: list[Tensor], ys: list[Tensor], shift: float) -> list[Tensor]:
        products = grouped_lorsum_product([(scaled, self.bases)], ys, [1.0])
        torch._foreach_add_(products, ys, alpha=shift)
        return products


def _columns_times(bases: list[Tensor], values: Tensor) -> list[Tensor]:
    """``W diag(σ)`` for all layers of one k; values (N, k)."""
    return grouped_lorsum_product([bases], list(values.to(bases[0].dtype).diag_embed()), [1.0])


def track(
    gradients: FullGradients,
    bases: list[Tensor],
    values: list[Tensor],
    updates: list[int],
    decay: float,
    damping: float,
    sweeps: int,
    begin_writing: Callable[[], object],
) -> tuple[Kronecker, Kronecker]:
    """Take this step's X and S into the running averages, in place, and return the metrics (D_U, D_V).

    ``D ← LoRSum(βD + (1-β)·statistic)`` (Algorithm 1, line 8) from D = 0, and used as ``D/(1-βᵗ)``. What LoRSum gives, ``PD`` with a
    projection P, is not symmetric; of its singular value decomposition ``WΣZᵀ`` the symmetric ``WΣWᵀ`` is kept, which is positive
    semidefinite and tends, as LoRSum does, to the truncated eigendecomposition. While fewer than k tokens were seen in all, D has a lower
    rank, and which orthonormal columns W has beside those that D spans is for rounding to decide: D does not depend on it, but
    the next LoRSum starts there, so that later steps differ from backend to backend by what one start or another finds.

    Args:
        gradients: held as X and S.
        bases, values: W (d, k) and σ (k,) of all Us, then of all Vs.
        updates: t of each layer, this step counted.
        decay, damping: β and δ.
        begin_writing: called before bases and values are written.
    """
    lefts, rights = gradients.lefts, gradients.rights
    assert rights is not None
    device, ranks = bases[0].device, gradients.ranks
    tokens = on_device([left.shape[1] for left in lefts], device)
    parts = 1
    if ranks is not None:  # G is the mean over ranks: the whole batch's S are the ranks' S divided by their number
        (tokens,), parts = ranks.mean([tokens]), ranks.size
    tokens = tokens.clamp_min(1 / parts)  # no rank saw any: its S and X are zero
    shares = (1.0 - decay) * torch.cat([(gradients.coefficients / parts).square(), torch.ones_like(tokens)]) / torch.cat([tokens] * 2)
    known = 1.0 - decay ** on_device(updates * 2, device)[:, None]
    stretched, shrunk = ([torch.empty(0)] * len(bases) for _ in range(2))
    by_rank = partition(range(len(bases)), lambda i: bases[i].shape[1])
    for rank, members in by_rank.items():
        old, old_values = [bases[i] for i in members], [values[i] for i in members]
        seen = [(lefts + rights)[i] for i in members]
        average = old, _columns_times(old, torch.stack(old_values))
        all_alike = len(by_rank) == 1  # then no list of indices is copied to the device, which would wait for it
        share, bias = (shares, known) if all_alike else (shares[members], known[members])
        kept = torch.full_like(share, decay)
        # No λ: an absolute one would hold D_U, whose size is that of S², where it is.
        if ranks is None:
            found = lorsum_in_step((old, old), [average, (seen, seen)], [kept, share], sweeps)
        else:

            def gradient(others: list[Tensor], _: bool, seen: list[Tensor] = seen) -> list[Tensor]:
                return ranks.mean(grouped_lorsum_product([(seen, seen)], others, [1.0]))

            found = composed_lorsum((old, old), [average], [kept], gradient, share, sweeps, 0.0)
        new, new_values, _ = grouped_svd_product(*found, rank)
        begin_writing()
        torch._foreach_copy_([*old, *old_values], [*new, *new_values])
        unbiased = new_values.double() / bias
        weights = torch.cat([unbiased, -unbiased / (damping * (unbiased + damping))])
        scaled = _columns_times(old * 2, weights)
        for position, i in enumerate(members):
            stretched[i], shrunk[i] = scaled[position], scaled[position + len(members)]
    n = len(lefts)
    us, vs = (Kronecker(bases[part], stretched[part], shrunk[part], damping) for part in (slice(None, n), slice(n, None)))
    return us, vs
