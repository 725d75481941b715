"""What a moment step takes, as the backends get it; ``ops/adamw.py`` has the same for callers, and says what it means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

from torch import Tensor


class StepNumbers(TypedDict):
    """What a moment step takes beside tensors, by the names of ``grouped_adamw_``'s arguments."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    step: int | Tensor
    missed: NotRequired[Sequence[int]]
    bias_correction: NotRequired[bool]
    maximize: NotRequired[bool]


def scalar(value: Any) -> Any:
    """A number; a tensor of one element as one without dimensions, which would become those of the result: a view, so that what a schedule
    writes into the one is seen in the other."""
    return value.reshape(()) if isinstance(value, Tensor) and value.ndim else value


class Numbers(NamedTuple):
    """:class:`StepNumbers` in a fixed order, defaults filled in. ``lr`` and ``step`` may be tensors without dimensions."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int | Tensor
    missed: list[int]
    bias_correction: bool
    maximize: bool

    @classmethod
    def of(
        cls,
        *,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        step: int | Tensor,
        missed: Sequence[int] = (),
        bias_correction: bool = True,
        maximize: bool = False,
    ) -> Numbers:
        return cls(scalar(lr), *betas, eps, weight_decay, scalar(step), list(missed), bool(bias_correction), bool(maximize))


class Stepped(NamedTuple):
    """The tensors of a moment step. Empty moments: there are none."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    #: Where all of them lie, as ``lists.gather`` has found; None: whoever needs it looks.
    layout: Any = None


class Maps(NamedTuple):
    """The r×r maps (N, r, r) P, C, T and D of a moment step; None: the identity, and no T."""

    grad: Tensor | None = None
    momentum: Tensor | None = None
    param: Tensor | None = None
    direction: Tensor | None = None

    def rank(self, drifts: Tensor | None) -> int:
        """r, of the maps or the drifts; 0 without any."""
        return next((stack.shape[-1] for stack in (*self, drifts) if stack is not None), 0)
