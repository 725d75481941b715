"""Variants of OD-LoRA that give up one of its two properties (OD-LoRA Table 4 and Appendix I, SDS-LoRA Table 5)."""

from __future__ import annotations

from typing import Any

import torch

from lowrank_kernels import ODLoRA
from lowrank_kernels.ops import grouped_qr
from lowrank_kernels.optim._shared.pairing import FactorPair
from lowrank_kernels.optim.decoupled import Action
from lowrank_kernels.pairs import owners


class OrthonormalLoRA(ODLoRA):
    """``ΔW = sQ_BQ_Aᵀ`` with trained Q_A and Q_B: optimal G̃ (``∂Q_Aᵀ = sQ_BᵀG``, ``∂Q_B = sGQ_A``), but all singular values of ΔW are s.

    After an update the factors are drawn back to orthonormal columns by QR (signs kept), on the schedule of OD-LoRA (its
    Appendix I) or, with ``refresh_every=1``, after each step (SDS-LoRA Section 4.7). The gradient does not pass through the QR.

    With ``initialized=True`` the rounds of OD-LoRA find the first Q_A and Q_B ("OD-LoRA w/ Cap < ∞"); without, they are the
    bases of LoRA's A and of a random B ("rsLoRA w/ optimal G̃").

    Neither paper says how training can start at the pretrained model when ΔW cannot be zero. Here the first ``sQ_BQ_Aᵀ`` is
    subtracted from the base weight, as PiSSA does; so a run cannot be resumed from an adapter's file alone.

    The model is adapted with ``method="sds"`` and given itself, like ``ODLoRA``'s.
    """

    def __init__(self, params: Any, *args: Any, initialized: bool = True, **options: Any) -> None:
        super().__init__(params, *args, **options)
        self.initialized = initialized
        if not all(pair.holds_bases for pair in self._pairs):
            raise ValueError("OrthonormalLoRA: adapt the model with lowrank_kernels.adapt(model, method='sds')")
        if not initialized:
            for group in self.param_groups:
                group["start_steps"] = 0
            with torch.no_grad():
                for pair in self._pairs:
                    torch.nn.init.normal_(self._at(pair.b))
                self._retract(self._pairs)
                self._subtract(self._pairs)

    def _is_decoupled(self, group: dict[str, Any], step: int) -> bool:
        return group["round_steps"] <= step < group["start_steps"]

    def _start_action(self, group: dict[str, Any], step: int) -> Action | None:
        return self._become_orthonormal if step == group["start_steps"] else super()._start_action(group, step)

    def _main_action(self, group: dict[str, Any], t: int) -> Action | None:
        return self._retract if super(ODLoRA, self)._main_action(group, t) is not None else None

    def _become_orthonormal(self, due: list[FactorPair]) -> None:
        """The end of the rounds: what they have found are the factors from now on."""
        self._restart(due)
        layers = owners()
        for pair in due:
            a, b, layer = self._at(pair.a), self._at(pair.b), layers[id(self._at(pair.a))]
            a.copy_(layer.q_a)  # type: ignore[arg-type]
            b.copy_(layer.q_b)  # type: ignore[arg-type]
            layer.decoupled = False  # type: ignore[assignment]
        self._subtract(due)

    def _retract(self, due: list[FactorPair]) -> None:
        for pairs in self._alike(due):
            factors = [self._at(pair.a).mT for pair in pairs] + [self._at(pair.b) for pair in pairs]
            grouped_qr(factors, previous=[factor.clone() for factor in factors], out=factors)

    def _subtract(self, due: list[FactorPair]) -> None:
        layers = owners()
        for pair in due:
            layer = layers[id(self._at(pair.a))]
            weight = layer.base_layer.weight  # type: ignore[union-attr]
            weight.data = weight - layer.delta_weight()  # a new tensor: the old one may be another model's too


class AnisotropicODLoRA(ODLoRA):
    """``ΔW = s(Q_B diag(R_B) A + B (Q_A diag(R_A))ᵀ)``: full capacity, but the gradient is scaled again ("OD-LoRA w/ suboptimal G̃").

    The bases are replaced by ``Q diag(R)`` whenever they are set from the factors. At the re-parametrization the factors are
    ``A = Σ^½Vᵀ/√(2s)``, ``B = UΣ^½/√(2s)``, so that ``R = Σ^½/√(2s)`` and ΔW stays ``UΣVᵀ``, as Eq. 5 has it for the method itself.
    """

    def _reparametrize(self, due: list[FactorPair]) -> None:
        for new, u, sigma, v in self._truncated_svds(due):  # of ΔW/s: the factor 1/√(2s) becomes 1/√2
            root = (sigma / 2).sqrt()
            new.a.copy_(root[:, None] * v.mT)
            new.b.copy_(u * root)
            new.q_a.copy_(root[:, None] * v.mT)
            new.q_b.copy_(u * root)
        self._clear_factor_state(due)

    def _refresh(self, due: list[FactorPair]) -> None:
        layers = owners()
        for pairs in self._alike(due):
            views = [self._views(pair, layers, decoupled=True) for pair in pairs]
            factors, bases = [v.a.mT for v in views] + [v.b for v in views], [v.q_a.mT for v in views] + [v.q_b for v in views]
            qs, rs = grouped_qr(factors)
            for base, q, r in zip(bases, qs, rs, strict=True):
                base.copy_(q * r.diagonal().to(q.dtype))
