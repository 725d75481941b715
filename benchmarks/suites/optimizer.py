"""Steps of all factors of a model: ``grouped_adamw_`` and the optimizer around it, AltLoRA+, SDS-LoRA's refresh step, OPLoRA and LoRA-SB,
each against its naive loop and against torch's AdamW on the same parameters: the yardstick of what a step may cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_kernels as lrk
from lowrank_kernels.ops import grouped_adamw_
from lowrank_kernels.optim.preconditioned import DEFAULT_DAMPING

from ..harness import Case, Trial, worst
from ..methods import adapted_layers
from ..naive.adamw import adamw_
from ..naive.lora_sb import LoRASBLayer
from ..naive.oplora import OPLoRALayer
from ..naive.preconditioned import AltLoRALayer
from ..naive.sds_lora import SDSLoRALayer
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

    def layers(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """(A, B, ∂A, ∂B) of every layer."""
        return [(*self.params[i : i + 2], *self.grads[i : i + 2]) for i in range(0, len(self.params), 2)]  # type: ignore[misc]

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


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """What naive code computes in, which knows no factorization of bf16 matrices."""
    return torch.promote_types(dtype, torch.float32)


def after_one_step(factors: Factors) -> list[Tensor]:
    """The parameters after one naive step, which is taken in place."""
    adamw_(factors.params, factors.grads, factors.moments(), factors.moments(), step=1, **HYPERPARAMETERS)
    return factors.params


class Judge:
    """``|out − ref64| ≤ 2·|torch in the same dtype − ref64| + 8·eps·max|ref64|``.

    ``step`` answers what is judged, after one naive step on the factors it is given.
    """

    def __init__(
        self, factors: Factors, step: Callable[[Factors], list[Tensor]] = after_one_step, own_dtype: torch.dtype | None = None
    ) -> None:
        self.exact = step(factors.copy(torch.float64))
        own = [tensor.to(factors.params[0].dtype) for tensor in step(factors.copy(own_dtype))]
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


# ---------------------------------------------------------------------------------------------------------------- AltLoRA+

#: eps as large as a small gradient: with Adam's 1e-8 the rounding of an entry near zero would decide the sign of its first step.
ALTLORA = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.01, "damping": DEFAULT_DAMPING}


def naive_altlora(factors: Factors) -> Callable[[], None]:
    """AltLoRA+ of all layers, one layer after the other."""
    layers = [(AltLoRALayer(A, B, 1.0, plus=True, **ALTLORA), grad_A, grad_B) for A, B, grad_A, grad_B in factors.layers()]

    def run() -> None:
        for layer, grad_A, grad_B in layers:
            layer.step(grad_A, grad_B)

    return run


def after_one_altlora_step(factors: Factors) -> list[Tensor]:
    naive_altlora(factors)()
    return factors.params


def altlora(backend: str, factors: Factors, judge: Judge) -> Trial:
    """``AltLoRAPlus.step()`` on one backend, gradients in place; A and B take turns."""
    params = [nn.Parameter(p) for p in factors.params]
    for param, grad in zip(params, factors.grads, strict=True):
        param.grad = grad
    named = [(f"{index // 2}.lora_{'AB'[index % 2]}", param) for index, param in enumerate(params)]
    step = lrk.AltLoRAPlus(named, scale=1.0, **ALTLORA).step
    return Trial(step, lambda: judge([p.detach() for p in params]), on(backend), ours=True)


# ---------------------------------------------------------------------------------------------------------------- SDS-LoRA


def bases(factors: Factors) -> list[tuple[Tensor, Tensor]]:
    """(Q_A, Q_B) of the factors of every layer, in their dtype; found in fp64, so that all providers start from the same ones."""
    return [tuple(torch.linalg.qr(x.double())[0].to(x.dtype) for x in (A.mT, B)) for A, B, _, _ in factors.layers()]  # type: ignore[misc]


def naive_sds(factors: Factors) -> tuple[Callable[[], None], list[SDSLoRALayer]]:
    """SDS-LoRA's main run with a refresh in every step, one layer after the other."""
    layers = []
    for (A, B, _, _), (q_a, q_b) in zip(factors.layers(), bases(factors), strict=True):
        layer = SDSLoRALayer(A, B, 1.0, total_steps=2, warmup_steps=1, refresh_every=1, **HYPERPARAMETERS)
        layer.Q_A, layer.Q_B, layer.steps = q_a, q_b, 1
        layers.append(layer)

    def run() -> None:
        for layer, (_, _, grad_A, grad_B) in zip(layers, factors.layers(), strict=True):
            layer.step(grad_A, grad_B)

    return run, layers


def factors_and_bases(layers: list[SDSLoRALayer]) -> list[Tensor]:
    return [tensor for layer in layers for tensor in (layer.A, layer.B, layer.Q_A, layer.Q_B) if tensor is not None]


def after_one_sds_step(factors: Factors) -> list[Tensor]:
    run, layers = naive_sds(factors)
    run()
    return factors_and_bases(layers)


def sds(backend: str, factors: Factors, judge: Judge) -> Trial:
    """``SDSLoRA.step()`` on one backend, with a refresh in every step."""
    layers = adapted_layers(factors.layers(), bases(factors))
    step = lrk.SDSLoRA(layers, warmup_steps=0, refresh_every=1, **HYPERPARAMETERS).step

    def judged() -> tuple[float, float]:
        return judge([t.detach() for layer in layers for t in (layer.lora_A, layer.lora_B, layer.q_a.mT, layer.q_b)])

    return Trial(step, judged, on(backend), ours=True)


# ---------------------------------------------------------------------------------------------------------------- OPLoRA

OPLORA = {"lr": 0.1, "momentum": 0.9, "sweeps": 2, "proximal": 1e-3}


def lorsum_flops(setting: Setting, tokens: int, sweeps: int) -> int:
    """Of a LoRSum of the factors, a momentum and G = SᵀX: a half sweep multiplies one side of all three, which are 2r + tokens columns
    in all, by r columns, and the other side by what comes out."""
    widths = sum(d_out + d_in for d_out, d_in in setting.layers)
    return 4 * sweeps * (tokens + 2 * setting.rank) * setting.rank * widths


@dataclass
class Captured:
    """A, B, S and X of every layer, one after the other, and the first V of its momentum."""

    params: list[Tensor]
    seen: list[Tensor]
    starts: list[Tensor]

    def copy(self, dtype: torch.dtype | None = None) -> Captured:
        """The same elsewhere in memory."""
        return Captured(*([t.to(dtype or t.dtype, copy=True) for t in tensors] for tensors in (self.params, self.seen, self.starts)))

    def layers(self) -> list[tuple[Tensor, ...]]:
        """(A, B, S, X, V) of every layer."""
        params, seen = iter(self.params), iter(self.seen)
        return list(zip(params, params, seen, seen, self.starts, strict=True))


def make_captured(setting: Setting) -> Captured:
    """Gaussian everything: S as of the mean over the tokens, V of the momentum as the optimizer draws it."""
    factors, generator = make_factors(setting), setting.generator(1)

    def draw(rows: int, columns: int, divisor: float) -> Tensor:
        return (torch.randn(rows, columns, generator=generator, device=setting.device) / divisor).to(setting.dtype)

    sizes = [((setting.tokens, d_out), (setting.tokens, d_in)) for d_out, d_in in setting.layers]
    seen = [draw(*size, divisor) for both in sizes for size, divisor in zip(both, (setting.tokens, 1), strict=True)]
    return Captured(factors.params, seen, [draw(d_in, setting.rank, d_in**0.5) for _, d_in in setting.layers])


def naive_oplora(captured: Captured) -> tuple[Callable[[], None], list[OPLoRALayer]]:
    """Steps of all layers, one layer after the other, each from the same factors, as the optimizer's (see :func:`oplora`)."""
    layers = [(OPLoRALayer(A, B, 1.0, momentum_start=V, **OPLORA), A, B, S, X) for A, B, S, X, V in captured.layers()]  # type: ignore[arg-type]

    def run() -> None:
        for layer, A, B, S, X in layers:
            layer.U, layer.V = B, A.T
            layer.step(S, X)

    return run, [layer for layer, *_ in layers]


def factors_of(layers: list[OPLoRALayer]) -> list[Tensor]:
    return [tensor for layer in layers for tensor in (layer.V.T, layer.U)]


def after_one_oplora_step(captured: Captured) -> list[Tensor]:
    run, layers = naive_oplora(captured)
    run()
    return factors_of(layers)


def oplora(backend: str, captured: Captured, judge: Judge) -> Trial:
    """``OPLoRA.step()`` on one backend. ∂B, which is measured against SᵀX, is that of the first factors: so each step starts from these."""
    layers = [(A, B, torch.zeros_like(A), S.mT @ (X @ A.mT)) for A, B, S, X, _ in captured.layers()]
    modules = adapted_layers(layers, None, "lora")
    optimizer = lrk.OPLoRA(modules, **OPLORA)  # type: ignore[arg-type]
    params = [p.detach() for module in modules for p in (module.lora_A, module.lora_B)]
    start, holders = [p.clone() for p in params], [recorder.gradient for recorder in optimizer._recorders]

    def run() -> None:
        torch._foreach_copy_(params, start)
        for holder, (_, _, S, X, _) in zip(holders, captured.layers(), strict=True):
            holder.add(X, S)
        optimizer.step()

    return Trial(run, lambda: judge(params), on(backend), ours=True)


# ---------------------------------------------------------------------------------------------------------------- LoRA-SB


def naive_lora_sb(factors: Factors) -> tuple[Callable[[], None], list[LoRASBLayer]]:
    """Steps on the cores of all layers, one layer after the other; the gradients ``∂R`` are there."""
    layers = [(LoRASBLayer(B, B.new_zeros(len(A), len(A)), A, 1.0, lr=0.1), core_gradient(B, A)) for A, B, _, _ in factors.layers()]

    def run() -> None:
        for layer, gradient in layers:
            layer.step_core(gradient)

    return run, [layer for layer, _ in layers]


def core_gradient(B: Tensor, A: Tensor) -> Tensor:
    """Something (r, r) to step on, of the size of ``BᵀGAᵀ``."""
    rank = len(A)
    return B[:rank].to(torch.float64).mul(A[:, :rank].to(torch.float64)).add(1.0).mul(B.shape[0]).to(B.dtype)


def after_one_lora_sb_step(factors: Factors) -> list[Tensor]:
    run, layers = naive_lora_sb(factors)
    run()
    return [layer.R for layer in layers]


def lora_sb(backend: str, factors: Factors, judge: Judge) -> Trial:
    """``LoRASB.step()`` on one backend, gradients in place."""
    modules = adapted_layers([(A, B, None, None) for A, B, _, _ in factors.layers()], None, "xs")  # type: ignore[misc]
    cores: list[Any] = [module.lora_R for module in modules]
    for core, (A, B, _, _) in zip(cores, factors.layers(), strict=True):
        core.grad = core_gradient(B, A).to(core.dtype)
    optimizer = lrk.LoRASB(modules, lr=0.1)

    def judged() -> tuple[float, float]:
        assert len(modules) == len(cores)  # they hold A and B
        return judge([core.detach() for core in cores])

    return Trial(optimizer.step, judged, on(backend), ours=True)


# ---------------------------------------------------------------------------------------------------------------- the cases


def method_case(
    setting: Setting,
    op: str,
    factors: Factors,
    bytes_moved: int,
    flops: Mapping[torch.dtype, int],
    naive_run: Callable[[], Trial],
    ours: Callable[[str], Trial],
    tokens: int | None = None,
) -> Case:
    """A method's whole step: naive, torch's fused AdamW on the same parameters, ours on each backend and as the registry chooses."""
    adamw = Judge(factors)
    return Case(
        op=op,
        shapes=setting.shapes,
        rank=setting.rank,
        dtype=setting.dtype,
        device=setting.device,
        bytes=bytes_moved,
        flops=flops,
        tensors=len(factors.params),
        providers={
            "naive": naive_run,
            "torch-fused-adamw": lambda: optimizer(partial(torch.optim.AdamW, fused=True), False, factors.copy(), adamw),
            **{f"ours-{backend}": partial(ours, backend) for backend in setting.backends},
            "ours-optimizer": partial(ours, "auto"),
        },
        rival="torch-fused-adamw",
        tokens=tokens,
    )


@suite("optimizer", "grouped_adamw_", "altlora_plus_step", "sds_lora_refresh_step", "oplora_step", "lora_sb_step")
def cases(setting: Setting) -> Iterator[Case]:
    """``grouped_adamw_`` over all factors of the adapted layers; steps of AltLoRA+, SDS-LoRA with a refresh, OPLoRA and LoRA-SB."""
    factors = make_factors(setting)
    for case in (adamw_case, altlora_case, sds_case, oplora_case, lora_sb_case):
        yield case(setting, factors)


def sizes(factors: Factors) -> tuple[int, int, int]:
    """How many elements the factors have, the bytes of one, and of one of a moment."""
    return sum(p.numel() for p in factors.params), factors.params[0].element_size(), factors.moments()[0].element_size()


def adamw_case(setting: Setting, factors: Factors) -> Case:
    judge = Judge(factors)
    providers: dict[str, Callable[[Factors, Judge], Trial]] = {
        "naive": naive,
        "torch-foreach": partial(optimizer, partial(torch.optim.AdamW, foreach=True), False),
        "torch-fused": partial(optimizer, partial(torch.optim.AdamW, fused=True), False),
        **{f"ours-{backend}": partial(operation, backend) for backend in setting.backends},
        "ours-optimizer": partial(optimizer, lrk.AdamW, True),
    }
    elements, item, state = sizes(factors)
    return Case(
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


def altlora_case(setting: Setting, factors: Factors) -> Case:
    wide, r = at_least_single(setting.dtype), setting.rank
    elements, item, state = sizes(factors)
    judge = Judge(factors, after_one_altlora_step, wide)

    def naive_trial() -> Trial:
        mine = factors.copy(wide)
        return Trial(naive_altlora(mine), lambda: judge([p.to(setting.dtype) for p in mine.params]))

    return method_case(
        setting,
        "altlora_plus_step",
        factors,
        # On average over the two turns: AdamW's traffic for half of the factors, one read of the other half for its Grams.
        elements * (3 * item + 4 * state + item) // 2,
        # So much for the maps of the gradient and of the momentum and for how far the factor moved, and for the Grams.
        {wide: elements // 2 * 6 * r, torch.float64: elements // 2 * (r + 1)},
        naive_trial,
        lambda backend: altlora(backend, factors.copy(), judge),
    )


def sds_case(setting: Setting, factors: Factors) -> Case:
    wide = at_least_single(setting.dtype)
    elements, item, state = sizes(factors)
    judge = Judge(factors, after_one_sds_step, wide)

    def naive_trial() -> Trial:
        run, layers = naive_sds(factors.copy(wide))
        return Trial(run, lambda: judge([t.to(setting.dtype) for t in factors_and_bases(layers)]))

    return method_case(
        setting,
        "sds_lora_refresh_step",
        factors,
        # AdamW; then read the factors and the old bases, write the new bases.
        elements * (6 * item + 4 * state),
        {wide: 2 * elements * setting.rank},
        naive_trial,
        lambda backend: sds(backend, factors.copy(), judge),
    )


def oplora_case(setting: Setting, factors: Factors) -> Case:
    wide = at_least_single(setting.dtype)
    elements, item, state = sizes(factors)
    captured = make_captured(setting)
    judge = Judge(captured, after_one_oplora_step, wide)

    def naive_trial() -> Trial:
        run, layers = naive_oplora(captured.copy(wide))
        return Trial(run, lambda: judge([t.to(setting.dtype) for t in factors_of(layers)]))

    return method_case(
        setting,
        "oplora_step",
        factors,
        # Read and write the factors and the momentum, read their gradients; read S and X once.
        elements * (3 * item + 2 * state) + sum(t.nbytes for t in captured.seen),
        {wide: 2 * lorsum_flops(setting, setting.tokens, int(OPLORA["sweeps"]))},  # of the momentum, and of the weights
        naive_trial,
        lambda backend: oplora(backend, captured.copy(), judge),
        tokens=setting.tokens,
    )


def lora_sb_case(setting: Setting, factors: Factors) -> Case:
    wide = at_least_single(setting.dtype)
    _, item, state = sizes(factors)
    judge = Judge(factors, after_one_lora_sb_step, wide)

    def naive_trial() -> Trial:
        run, layers = naive_lora_sb(factors.copy(wide))
        return Trial(run, lambda: judge([layer.R.to(setting.dtype) for layer in layers]))

    gradients = [core_gradient(B, A) for A, B, _, _ in factors.layers()]
    return method_case(
        setting,
        "lora_sb_step",
        Factors([torch.zeros_like(gradient) for gradient in gradients], gradients),
        len(gradients) * setting.rank**2 * (3 * item + 4 * state),  # AdamW's traffic of the cores
        {},
        naive_trial,
        lambda backend: lora_sb(backend, factors.copy(), judge),
    )
