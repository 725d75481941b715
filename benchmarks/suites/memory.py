"""What each optimizer keeps between steps (``state_mib``) and allocates during one (``peak_mib``), and the time of that step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from ..harness import Case, Trial
from ..methods import METHODS, Method, StepJudge, adapted_layers, kept_bytes
from . import Setting, suite
from .optimizer import HYPERPARAMETERS, Factors, Judge, bases, make_factors, naive


def torch_adamw(factors: Factors, judge: Judge, **kind: bool) -> Trial:
    """``torch.optim.AdamW``."""
    params = [nn.Parameter(p) for p in factors.params]
    for param, grad in zip(params, factors.grads, strict=True):
        param.grad = grad
    optimizer = torch.optim.AdamW(params, **HYPERPARAMETERS, **kind)
    return Trial(optimizer.step, lambda: judge([p.detach() for p in params]), state=lambda: kept_bytes(optimizer))


def ours(method: Method, factors: Factors) -> Trial:
    """One of our optimizers, on the backends that the registry chooses."""
    mine = factors.copy()
    judge = StepJudge(method, factors.layers())
    layers = adapted_layers(mine.layers(), bases(factors) if method.decoupled else None, method.kind)
    optimizer = method.build(layers)

    def judged() -> tuple[float, float]:
        return judge([(layer.lora_A, layer.lora_B) for layer in layers])  # type: ignore[misc]

    return Trial(optimizer.step, judged, ours=True, state=lambda: kept_bytes(optimizer, layers))


def step_case(setting: Setting, op: str) -> Case:
    """One step of every optimizer, gradients in place."""
    factors = make_factors(setting)
    judge = Judge(factors)
    providers: dict[str, Callable[[], Trial]] = {
        "naive": lambda: naive(factors.copy(), judge),
        "torch-foreach": lambda: torch_adamw(factors.copy(), judge, foreach=True),
        "torch-fused": lambda: torch_adamw(factors.copy(), judge, fused=True),
        **{f"ours-{name}": partial(ours, method, factors) for name, method in METHODS.items()},
    }
    elements, item, state = sum(p.numel() for p in factors.params), setting.dtype.itemsize, factors.moments()[0].itemsize
    return Case(
        op=op,
        shapes=setting.shapes,
        rank=setting.rank,
        dtype=setting.dtype,
        device=setting.device,
        bytes=elements * (3 * item + 4 * state),  # AdamW's, the yardstick's
        tensors=len(factors.params),
        providers=providers,
        rival="torch-fused",
    )


@suite("memory", "optimizer_step")
def cases(setting: Setting) -> Iterator[Case]:
    """State and temporaries of every optimizer."""
    yield step_case(setting, "optimizer_step")
