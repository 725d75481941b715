"""SDS-LoRA: structurally decoupled singular values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch import Tensor

from .._checks import as_integer
from ._shared.arguments import AdamWOptions, ParamsT
from .decoupled import Action, DecoupledOptimizer


class SDSLoRA(DecoupledOptimizer):
    """SDS-LoRA (Algorithm 1): AdamW on A and B of ``ΔW = s(Q_B A + B Q_Aᵀ)`` (Eq. 5), whose bases follow the factors.

    1. ``warmup_steps`` steps of plain LoRA, ``ΔW = sBA``.
    2. Once: ``sBA = UΣVᵀ``; ``A = ΣVᵀ/2s``, ``B = UΣ/2s``, ``Q_A = V``, ``Q_B = U`` (Eq. 8; ΔW does not change); the
       factors' optimizer state is cleared, the step counter of Adam's bias correction too. (By the paper's "all
       optimizer states" those are meant, here as in :class:`ODLoRA`: they belong to coordinates that are gone. A head's do not.)
    3. Main run, t = 1, 2, …: AdamW on A and B with ``∂A = sQ_BᵀG``, ``∂B = sGQ_A`` (Eq. 6); after the update of step t, if
       ``t mod ⌈phases·t/(total_steps - warmup_steps)⌉ = 0``, the bases are refreshed by QR of Aᵀ and B.

    All of it happens in ``step()``. The model is one adapted by ``adapt(model, method="sds", rank=r)``, or an unmodified
    LoRA model of another library with layers of rank 2r (PEFT: ``LoraConfig(r=2*r, lora_alpha=2*r*s)``), of which A starts as
    the first r rows of ``lora_A``.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad: as ``torch.optim.AdamW``; see :class:`LowRankOptimizer`.
        total_steps: the number of ``step()`` calls of the whole run, warm-up included. Needed unless ``refresh_every`` is given.
        warmup_steps: T. 0 continues with layers that are decoupled already.
        phases: k, the number of refresh phases (intervals 1 … k).
        refresh_every: n; refresh after main steps n, 2n, … instead.
        basis: "qr", or "polar": ``Q = X(XᵀX)^{-1/2}`` in place of QR's.
        split_work: let the ranks of ``process_group`` (None: the default group) divide the layers among them where bases are made, one
            all-gather each time; see :class:`DecoupledOptimizer` for when it pays. Not in ``DistributedDataParallel.join()``: a rank that
            is out of data would be missing there, and the others fail or wait. Nothing detects that.

    The paper's setting: ``alpha=4, rank_scaling="rslora"`` (s = α/√r), cosine schedule, all linear layers.

    Raises:
        TypeError, ValueError: no pair of factors among ``params``, an argument of a wrong kind or out of range.
    """

    argument_names: Mapping[str, str] = {"start_steps": "warmup_steps"}

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
        warmup_steps: int = 10,
        phases: int = 5,
        refresh_every: int | None = None,
        basis: str = "qr",
        split_work: bool = False,
        process_group: Any = None,
        **options: Unpack[AdamWOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            start_steps=warmup_steps,
            total_steps=total_steps,
            phases=phases,
            refresh_every=refresh_every,
            basis=basis,
            split_work=split_work,
            process_group=process_group,
            **options,
        )

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        as_integer(type(self).__name__, "warmup_steps", group["start_steps"], 0)
        super()._check_hyperparameters(group)

    def _is_decoupled(self, group: dict[str, Any], step: int) -> bool:
        return step >= group["start_steps"]

    def _start_action(self, group: dict[str, Any], step: int) -> Action | None:
        return self._reparametrize if step == group["start_steps"] else None
