"""Every optimizer of the package beside its naive twin, for the suites that compare all of them on one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import lowrank_kernels as lrk

from .harness import worst
from .naive.preconditioned import AltLoRALayer, LoRAProLayer, LoRARITELayer, ScaledLayer
from .naive.sds_lora import SDSLoRALayer

#: eps as large as a small gradient: with Adam's 1e-8 the rounding of an entry near zero would decide the sign of its first step.
SGD: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.01}
ADAM: dict[str, Any] = {**SGD, "betas": (0.9, 0.999), "eps": 1e-3}
#: More steps than any benchmark takes.
FOREVER = 1 << 30


class NaiveLayer(Protocol):
    """What all naive layers have in common."""

    def step(self, grad_A: Tensor, grad_B: Tensor) -> None: ...


@dataclass(frozen=True)
class Method:
    """One optimizer.

    Attributes:
        optimizer: its class.
        twin: (A, B, s) of a layer → the same method in plain PyTorch, for one layer.
        options, own: its hyperparameters: those that it shares, and those that only it has.
        kind: "sds" for layers that have bases.
        decoupled: whether those are in use, ``ΔW = s(Q_B A + B Q_Aᵀ)``, when it starts.
        largest_rank: up to which the twin is worth its time (LoRA-Pro's solves an r² × r² system).
    """

    optimizer: Callable[..., torch.optim.Optimizer]
    twin: Callable[..., NaiveLayer]
    options: dict[str, Any] = field(default_factory=lambda: ADAM)
    own: dict[str, Any] = field(default_factory=dict)
    kind: str = "lora"
    decoupled: bool = False
    largest_rank: int = 1024

    def build(self, model: nn.Module, **replaced: Any) -> torch.optim.Optimizer:
        """The optimizer of an adapted model; ``replaced`` hyperparameters, such as ``lr``."""
        return self.optimizer(model, **{**self.options, **self.own, **replaced})


_adamw = partial(SDSLoRALayer, total_steps=FOREVER, warmup_steps=FOREVER - 1, **ADAM)  # its warm-up is AdamW
_damped = {"damping": 1e-5}
_main_run = {"warmup_steps": 0}
METHODS: dict[str, Method] = {
    "AdamW": Method(lrk.AdamW, _adamw),
    "SDSLoRA": Method(lrk.SDSLoRA, _adamw, own={**_main_run, "refresh_every": FOREVER}, kind="sds", decoupled=True),
    "SDSLoRA-refresh": Method(lrk.SDSLoRA, _adamw, own={**_main_run, "refresh_every": 1}, kind="sds", decoupled=True),
    "ODLoRA": Method(lrk.ODLoRA, _adamw, own={"round_steps": FOREVER, "rounds": 1, "total_steps": 2 * FOREVER}, kind="sds"),
    "AltLoRA": Method(lrk.AltLoRA, partial(AltLoRALayer, betas=(0.9, 0.0), **SGD, **_damped), SGD, _damped),
    "AltLoRAPlus": Method(lrk.AltLoRAPlus, partial(AltLoRALayer, plus=True, **ADAM, **_damped), own=_damped),
    "ScaledGD": Method(lrk.ScaledGD, partial(ScaledLayer, adam=False, **SGD, **_damped), SGD, _damped),
    "ScaledAdamW": Method(lrk.ScaledAdamW, partial(ScaledLayer, adam=True, **ADAM, **_damped), own=_damped),
    "LoRAPro": Method(lrk.LoRAPro, partial(LoRAProLayer, sylvester=True, **ADAM, **_damped), own=_damped, largest_rank=32),
    "LoRARITE": Method(lrk.LoRARITE, partial(LoRARITELayer, **ADAM, **_damped), own=_damped),
}
#: What steps by other gradients than (∂A, ∂B): by the full gradient's factors, or by ∂R of a core (suite "optimizer").
OTHER_GRADIENTS = frozenset({lrk.OPLoRA, lrk.LoRASB})
#: (A, B, ∂A, ∂B) of one layer.
LayerTensors = tuple[Tensor, Tensor, Tensor, Tensor]


def adapted_layers(layers: Iterable[LayerTensors], bases: Iterable[tuple[Tensor, Tensor]] | None, kind: str = "sds") -> nn.ModuleList:
    """Adapted layers over frozen weights without memory, with these factors and gradients; decoupled if (Q_A, Q_B) are given."""
    modules = nn.ModuleList()
    for A, B, grad_A, grad_B in layers:
        base = nn.Linear(1, 1, bias=False)
        base.in_features, base.out_features = A.shape[1], B.shape[0]
        base.weight = nn.Parameter(A.new_zeros(1).expand(B.shape[0], A.shape[1]), requires_grad=False)  # a step does not read it
        layer = lrk.LowRankLinear(base, A.shape[0], 1.0, method=kind, dtype=A.dtype)
        layer.lora_A.data, layer.lora_B.data = A, B
        layer.lora_A.grad, layer.lora_B.grad = grad_A, grad_B
        modules.append(layer)
    for layer, (q_a, q_b) in zip(modules, bases or (), strict=bases is not None):
        layer.decoupled = True
        layer.q_a.copy_(q_a.mT)
        layer.q_b.copy_(q_b)
    return modules


def kept_bytes(optimizer: torch.optim.Optimizer, layers: nn.Module | None = None) -> int:
    """What a method keeps beside the factors: the optimizer's state and the layers' buffers."""
    state = [value for per_parameter in optimizer.state.values() for value in per_parameter.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in [*state, *(layers.buffers() if layers is not None else ())])


class StepJudge:
    """The first step of a method against its twin's in fp64, on some of the layers.

    Tolerance: twice the error of the twin in the factors' own dtype (fp32 at least), a thousandth of the step, and the rounding of the
    factors: the operations are judged more strictly in their own suites; here it must be the right method on every layer.
    """

    def __init__(self, method: Method, layers: list[LayerTensors], judged: int = 6) -> None:
        rank, dtype = layers[0][0].shape[0], layers[0][0].dtype
        chosen = sorted({round(i * (len(layers) - 1) / max(1, judged - 1)) for i in range(judged)}) if rank <= method.largest_rank else []
        self.tolerances: dict[int, tuple[float, float]] = {}
        self.exact: dict[int, tuple[Tensor, Tensor]] = {}
        for index in chosen:
            start = layers[index][:2]
            exact, own = (self._step(method, layers[index], wide) for wide in (torch.float64, torch.promote_types(dtype, torch.float32)))
            self.exact[index] = exact
            self.tolerances[index] = tuple(  # type: ignore[assignment]
                2 * (mine - e).abs().max().item() + 1e-3 * (e - s).abs().max().item() + 8 * torch.finfo(dtype).eps * e.abs().max().item()
                for e, mine, s in zip(exact, own, start, strict=True)
            )

    @staticmethod
    def _step(method: Method, layer: LayerTensors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        A, B, grad_A, grad_B = (tensor.to(dtype, copy=True) for tensor in layer)
        method.twin(A, B, 1.0).step(grad_A, grad_B)
        return A.double(), B.double()

    def __call__(self, factors: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        if not self.exact:
            return (0.0 if all(bool(t.isfinite().all()) for pair in factors for t in pair) else float("nan")), 1.0
        judgements = [
            ((mine.detach().double() - exact).abs().max().item(), tolerance)
            for index, both in self.exact.items()
            for mine, exact, tolerance in zip(factors[index], both, self.tolerances[index], strict=True)
        ]
        return worst(judgements)
