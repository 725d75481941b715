"""Seeing why a method works: alignment with the full gradient, ranks, drift and spectra of the layers in training.

The measures and what is known about them (Theorem 1 of OD-LoRA is false as printed) are described in :mod:`.measures`.
"""

from .measures import (
    RULES,
    Frames,
    Projections,
    Rule,
    alignment,
    delta_spectrum,
    effective_rank,
    frames,
    gradient_ranks,
    stable_rank,
    stable_ranks,
    subspace_drift,
)
from .plot import plot
from .probe import FullGradientProbe
from .record import read

__all__ = [
    "RULES",
    "Frames",
    "FullGradientProbe",
    "Projections",
    "Rule",
    "alignment",
    "delta_spectrum",
    "effective_rank",
    "frames",
    "gradient_ranks",
    "plot",
    "read",
    "stable_rank",
    "stable_ranks",
    "subspace_drift",
]
