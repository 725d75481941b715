"""The moment step of all factors of a model: ``grouped_adamw_`` and the optimizer around it against torch's AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lowrank_kernels as lrk
from lowrank_kernels.ops import grouped_adamw_

from ..harness import Case, Trial, worst
from ..naive import adamw_
from . import Setting, on, suite

#: A learning rate at which a step that was not taken is seen in bf16 too.
HYPERPARAMETERS = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


@dataclass
class Factors:
    """A and B of every layer, one after the other, and their gradients."""

    params: list[Tensor]
    grads: list[Tensor]

    def moments(self) -> list[Tensor]:
        """Zero moments, fp32 at least."""
        return [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in self.params]

    def copy(self, dtype: torch.dtype | None = None) -> Factors:
        """The same factors and gradients elsewhere in memory."""
        return Factors(*([t.to(dtype or t.dtype, copy=True) for t in tensors] for tensors in (self.params, self.grads)))


def make_factors(setting: Setting) -> Factors:
    """Gaussian factors and gradients of all layers."""
    shapes = [shape for d_out, d_in in setting.layers for shape in ((setting.rank, d_in), (d_out, setting.rank))]
    generator = setting.generator()

    def draw() -> list[Tensor]:
        return [torch.randn(shape, generator=generator, device=setting.device).to(setting.dtype) for shape in shapes]

    return Factors(draw(), draw())


def after_one_step(factors: Factors) -> list[Tensor]:
    """The parameters after one naive step, which is taken in place."""
    adamw_(factors.params, factors.grads, factors.moments(), factors.moments(), step=1, **HYPERPARAMETERS)
    return factors.params


class Judge:
    """DESIGN's tolerance for kernels: ``|out − ref64| ≤ 2·|torch in the same dtype − ref64| + 8·eps·max|ref64|``."""

    def __init__(self, factors: Factors) -> None:
        self.exact = after_one_step(factors.copy(torch.float64))
        own = after_one_step(factors.copy())
        eps = torch.finfo(own[0].dtype).eps
        self.tolerances = [
            2 * (mine.double() - exact).abs().max().item() + 8 * eps * exact.abs().max().item()
            for mine, exact in zip(own, self.exact, strict=True)
        ]

    def __call__(self, params: list[Tensor]) -> tuple[float, float]:
        errors = [(p.double() - exact).abs().max().item() for p, exact in zip(params, self.exact, strict=True)]
        return worst(list(zip(errors, self.tolerances, strict=True)))


def naive(factors: Factors, judge: Judge) -> Trial:
    """The loop over tensors that a paper's repository ships."""
    moments, squares, step = factors.moments(), factors.moments(), [0]

    def run() -> None:
        step[0] += 1
        adamw_(factors.params, factors.grads, moments, squares, step=step[0], **HYPERPARAMETERS)

    return Trial(run, lambda: judge(factors.params))


def operation(backend: str, factors: Factors, judge: Judge) -> Trial:
    """``ops.grouped_adamw_`` on one backend."""
    moments, squares, step = factors.moments(), factors.moments(), [0]

    def run() -> None:
        step[0] += 1
        grouped_adamw_(factors.params, factors.grads, moments, squares, step=step[0], **HYPERPARAMETERS)

    return Trial(run, lambda: judge(factors.params), on(backend), ours=True)


def optimizer(make: Callable[..., Any], ours: bool, factors: Factors, judge: Judge) -> Trial:
    """``.step()`` of a ``torch.optim.Optimizer``, gradients in place."""
    params = [torch.nn.Parameter(p) for p in factors.params]
    for param, grad in zip(params, factors.grads, strict=True):
        param.grad = grad
    return Trial(make(params, **HYPERPARAMETERS).step, lambda: judge([p.detach() for p in params]), ours=ours)


@suite("optimizer")
def cases(setting: Setting) -> Iterator[Case]:
    """``grouped_adamw_`` over all factors of the adapted layers."""
    factors = make_factors(setting)
    judge = Judge(factors)
    providers: dict[str, Callable[[Factors, Judge], Trial]] = {
        "naive": naive,
        "torch-foreach": partial(optimizer, partial(torch.optim.AdamW, foreach=True), False),
        "torch-fused": partial(optimizer, partial(torch.optim.AdamW, fused=True), False),
        **{f"ours-{backend}": partial(operation, backend) for backend in setting.backends},
        "ours-optimizer": partial(optimizer, lrk.AdamW, True),
    }
    elements, item = sum(p.numel() for p in factors.params), factors.params[0].element_size()
    state = factors.moments()[0].element_size()
    yield Case(
        op="grouped_adamw_",
        shapes=setting.shapes,
        rank=setting.rank,
        dtype=setting.dtype,
        device=setting.device,
        # Read the parameter and the gradient, write the parameter; read and write both moments.
        bytes=elements * (3 * item + 4 * state),
        tensors=len(factors.params),
        providers={name: lambda build=build: build(factors.copy(), judge) for name, build in providers.items()},
        rival="torch-fused",
    )
