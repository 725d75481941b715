"""What a LoRSum takes, as the backends get it; ``ops/lorsum.py`` says what it means."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from torch import Tensor

#: Left factors (d_out, r) and right factors (d_in, r) of all layers.
Factors: TypeAlias = tuple[list[Tensor], list[Tensor]]


class Sums(NamedTuple):
    """``Σ_j c_ji P_ji Q_jiᵀ`` of N layers: at j·N + i stands what belongs to term j of layer i."""

    lefts: list[Tensor]
    #: None: the left one is the whole dense matrix.
    rights: list[Tensor | None]
    numbers: list[float]
    #: (J, N) on the device, in place of the ``numbers``; or None.
    coefficients: Tensor | None


class Sweeps(NamedTuple):
    """How the sums are approximated: K sweeps of two solves with λ, of which the first is for U or for V."""

    number: int
    proximal: float
    u_first: bool
