"""OD-LoRA: overcoming the dilemma between a good gradient and a free spectrum."""

from __future__ import annotations

import math
from typing import Any, Unpack

from torch import Tensor

from .._checks import as_integer
from ._shared.arguments import AdamWOptions, ParamsT
from .decoupled import Action, DecoupledOptimizer


class ODLoRA(DecoupledOptimizer):
    """OD-LoRA (Algorithm 1): AdamW on A and B of ``ΔW = s(Q_B A + B Q_Aᵀ)`` (Eq. 4), from bases that short rounds have found.

    1. ``rounds`` rounds of ``round_steps`` steps, the first as plain LoRA, the others decoupled. After each: ``ΔW ≈ U_rΣ_rV_rᵀ``,
       ``Q_A = V_r``, ``Q_B = U_r``, ``A = B = 0``, the factors' optimizer state cleared (a head's is not, as in :class:`SDSLoRA`): the
       adapted layers are back at W0.
    2. Main run, t = 1, 2, …: up to t = ``round_steps`` on fixed bases; then once ``A = Σ_rV_rᵀ/2s``, ``B = U_rΣ_r/2s``, ``Q_A = V_r``,
       ``Q_B = U_r`` (Eq. 5), state cleared; from there on, after the update of step t, if
       ``t mod ⌈phases·t/(total_steps - rounds·round_steps)⌉ = 0``, the bases are refreshed by QR of Aᵀ and B.

    It differs from :class:`SDSLoRA` in its start only, and takes the same models.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad: as ``torch.optim.AdamW``; see :class:`LowRankOptimizer`.
        total_steps: the number of ``step()`` calls of the whole run, rounds included. Needed unless ``refresh_every`` is given.
        rounds: N.
        round_steps: T.
        phases, refresh_every, basis, split_work, process_group: see :class:`SDSLoRA`.

    Raises:
        TypeError, ValueError: no pair of factors among ``params``, an argument of a wrong kind or out of range.
    """

    fixed = DecoupledOptimizer.fixed | {"round_steps"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        amsgrad: bool = False,
        *,
        total_steps: int | None = None,
        rounds: int = 5,
        round_steps: int = 10,
        phases: int = 5,
        refresh_every: int | None = None,
        basis: str = "qr",
        split_work: bool = False,
        process_group: Any = None,
        **options: Unpack[AdamWOptions],
    ) -> None:
        rounds, round_steps = as_integer("ODLoRA", "rounds", rounds), as_integer("ODLoRA", "round_steps", round_steps)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            start_steps=rounds * round_steps,
            total_steps=total_steps,
            phases=phases,
            refresh_every=refresh_every,
            basis=basis,
            split_work=split_work,
            process_group=process_group,
            method_defaults={"round_steps": round_steps},
            **options,
        )

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        as_integer(type(self).__name__, "round_steps", group["round_steps"])
        as_integer(type(self).__name__, "start_steps", group["start_steps"], 0, math.inf)
        super()._check_hyperparameters(group)

    def _is_decoupled(self, group: dict[str, Any], step: int) -> bool:
        return step >= group["round_steps"]

    def _start_action(self, group: dict[str, Any], step: int) -> Action | None:
        return self._restart if step % group["round_steps"] == 0 else None

    def _main_action(self, group: dict[str, Any], t: int) -> Action | None:
        if t < group["round_steps"]:
            return None
        return self._reparametrize if t == group["round_steps"] else super()._main_action(group, t)
