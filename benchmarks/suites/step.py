"""A whole training step (forward, backward, optimizer) of a transformer of the named shapes, all linear layers adapted.

Random weights; at most six blocks, which is enough to see the proportions, since all blocks are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, mse_loss, scaled_dot_product_attention, silu

import lowrank_kernels as lrk

from ..harness import Case, Trial, worst
from ..methods import METHODS, Method
from ..naive.adamw import adamw_
from ..shapes import MODELS, Shape
from . import Setting, suite
from .memory import kept_bytes

MOST_BLOCKS, SEQUENCE, HEAD, SCALE = 6, 64, 64, 0.5
#: Small: the timed steps should not change what is timed.
HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-7}


class Block(nn.Module):
    """Attention and MLP (gated where the table has a gate), pre-norm without weights."""

    def __init__(self, linears: dict[str, nn.Module]) -> None:
        super().__init__()
        self.linears = nn.ModuleDict(linears)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, d) → the same."""
        layers = self.linears
        h = layer_norm(x, x.shape[-1:])
        q, k, v = (layers[name](h).unflatten(-1, (-1, HEAD)).transpose(1, 2) for name in ("q", "k", "v"))
        attended = scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
        x = x + layers["o"](attended.transpose(1, 2).flatten(2))
        h = layer_norm(x, x.shape[-1:])
        inner = silu(layers["gate"](h)) * layers["up"](h) if "gate" in layers else silu(layers["up"](h))
        return x + layers["down"](inner)


class NaiveLayer(nn.Module):
    """LoRA, or decoupled LoRA, as one writes it."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, q_a: Tensor | None = None, q_b: Tensor | None = None) -> None:
        super().__init__()
        self.base, self.lora_A, self.lora_B = base, nn.Parameter(A), nn.Parameter(B)
        self.q_a, self.q_b = q_a, q_b

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.q_a is None or self.q_b is None:
            return y + SCALE * linear(linear(x, self.lora_A), self.lora_B)
        return y + SCALE * (linear(linear(x, self.lora_A), self.q_b) + linear(linear(x, self.q_a), self.lora_B))


class Task:
    """Base layers (shared by all providers), factors, bases, and one batch."""

    def __init__(self, setting: Setting) -> None:
        generator = setting.generator()

        def draw(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=setting.device) / shape[-1] ** 0.5).to(setting.dtype)

        model, rank = MODELS[setting.model], setting.rank
        self.blocks = min(model.blocks, MOST_BLOCKS)
        self.tables: list[dict[str, Shape]] = [model.linears] * self.blocks
        shapes = [shape for table in self.tables for shape in table.values()]
        self.weights = [draw(*shape) for shape in shapes]
        self.factors = [(draw(rank, d_in), draw(d_out, rank)) for d_out, d_in in shapes]
        self.bases = [(draw(rank, d_in), draw(d_out, rank)) for d_out, d_in in shapes]
        width = model.linears["q"][1]
        self.x, self.y = (draw(max(1, setting.tokens // SEQUENCE), min(SEQUENCE, setting.tokens), width) * width**0.5 for _ in range(2))

    def base_layers(self, dtype: torch.dtype) -> list[nn.Linear]:
        """Linears without a bias over the (shared, where the dtype is theirs) weights."""
        found = []
        for weight in self.weights:
            base = nn.Linear(1, 1, bias=False, device="meta")
            base.out_features, base.in_features = weight.shape
            base.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            found.append(base)
        return found

    def assemble(self, modules: list[Any]) -> nn.Sequential:
        """The model whose linear layers are ``modules``."""
        rest = iter(modules)
        return nn.Sequential(*(Block({name: next(rest) for name in table}) for table in self.tables))

    def naive_model(self, dtype: torch.dtype, decoupled: bool) -> nn.Sequential:
        tensors = [(*f, *(q if decoupled else ())) for f, q in zip(self.factors, self.bases, strict=True)]
        copies = [tuple(t.to(dtype, copy=True) for t in layer) for layer in tensors]
        return self.assemble([NaiveLayer(base, *mine) for base, mine in zip(self.base_layers(dtype), copies, strict=True)])

    def backward(self, model: nn.Module) -> None:
        """The forward and backward pass of the batch."""
        dtype = next(model.parameters()).dtype
        mse_loss(model(self.x.to(dtype)), self.y.to(dtype)).backward()


def gradients(model: nn.Module) -> list[Tensor]:
    """Of all factors, in the order of the layers."""
    return [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]


class Judge:
    """The gradients against those of the naive model in fp64. (Steps are judged in their own suites.)"""

    def __init__(self, task: Task, dtype: torch.dtype, decoupled: bool) -> None:
        found = []
        for wide in (torch.float64, dtype):
            model = task.naive_model(wide, decoupled)
            task.backward(model)
            found.append([grad.double() for grad in gradients(model)])
        self.exact, own = found
        eps = torch.finfo(dtype).eps
        self.tolerances = [
            2 * (mine - exact).abs().max().item() + 8 * eps * exact.abs().max().item() for mine, exact in zip(own, self.exact, strict=True)
        ]

    def __call__(self, model: nn.Module) -> tuple[float, float]:
        rows = zip(gradients(model), self.exact, self.tolerances, strict=True)
        return worst([((mine.double() - exact).abs().max().item(), tolerance) for mine, exact, tolerance in rows])


def trial(task: Task, judge: Judge, model: nn.Module, step: Callable[[], object], **more: Any) -> Trial:
    def run() -> None:
        model.zero_grad()
        task.backward(model)
        step()

    return Trial(run, lambda: judge(model), **more)


def naive(task: Task, judge: Judge, dtype: torch.dtype) -> Trial:
    """Naive layers and the naive AdamW loop."""
    model, steps = task.naive_model(dtype, False), [0]
    params = [p for p in model.parameters() if p.requires_grad]
    moments, squares = ([torch.zeros_like(p) for p in params] for _ in range(2))

    def step() -> None:
        steps[0] += 1
        adamw_([p.detach() for p in params], gradients(model), moments, squares, step=steps[0], **HYPERPARAMETERS)

    return trial(task, judge, model, step)


def peft_fused(task: Task, judge: Judge, dtype: torch.dtype) -> Trial:
    """PEFT's LoRA and torch's fused AdamW: what most people run."""
    from peft import LoraConfig, get_peft_model

    rank = task.factors[0][0].shape[0]
    # PEFT declares α an int, and only divides it.
    config = LoraConfig(r=rank, lora_alpha=rank * SCALE, target_modules=list(task.tables[0]))  # type: ignore[arg-type]
    model = get_peft_model(task.assemble(task.base_layers(dtype)), config, autocast_adapter_dtype=False)
    _set_factors(model, task)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True, **HYPERPARAMETERS)
    return trial(task, judge, model, optimizer.step, state=lambda: kept_bytes(optimizer))


def ours(task: Task, judge: Judge, dtype: torch.dtype, method: Method) -> Trial:
    """Our layers and one of our optimizers."""
    rank = task.factors[0][0].shape[0]
    layers = [lrk.LowRankLinear(base, rank, SCALE, method=method.kind, dtype=dtype) for base in task.base_layers(dtype)]
    model = task.assemble(layers)
    _set_factors(model, task)
    for layer, (q_a, q_b) in zip(layers if method.decoupled else (), task.bases, strict=method.decoupled):
        layer.q_a.copy_(q_a)
        layer.q_b.copy_(q_b)
        layer.decoupled = True
    optimizer = method.build(model, **HYPERPARAMETERS)
    return trial(task, judge, model, optimizer.step, ours=True, state=lambda: kept_bytes(optimizer, model))


@torch.no_grad()
def _set_factors(model: nn.Module, task: Task) -> None:
    for pair, (A, B) in zip(lrk.pairs(model), task.factors, strict=True):
        pair.A.copy_(A)
        pair.B.copy_(B)


@suite("step", "training_step")
def cases(setting: Setting) -> Iterator[Case]:
    """PEFT with torch's fused AdamW against our layers with each of our optimizers."""
    if setting.choice != "all" or "q" not in MODELS[setting.model].linears:
        return
    task = Task(setting)
    judges = {decoupled: Judge(task, setting.dtype, decoupled) for decoupled in (False, True)}
    providers: dict[str, Callable[[], Trial]] = {
        "naive": partial(naive, task, judges[False], setting.dtype),
        "peft-torch-fused": partial(peft_fused, task, judges[False], setting.dtype),
        **{f"ours-{name}": partial(ours, task, judges[m.decoupled], setting.dtype, m) for name, m in METHODS.items()},
    }
    parameters, adapter = sum(w.numel() for w in task.weights), sum(t.numel() for pair in task.factors for t in pair)
    yield Case(
        op="training_step",
        shapes=setting.shapes if task.blocks == MODELS[setting.model].blocks else f"{setting.model}×{task.blocks}/all",
        rank=setting.rank,
        dtype=setting.dtype,
        device=setting.device,
        bytes=(2 * parameters + 3 * adapter) * setting.dtype.itemsize + 16 * adapter,  # weights twice, factors, gradients, moments
        tensors=2 * len(task.factors),
        providers=providers,
        rival="peft-torch-fused",
        flops={setting.dtype: 2 * setting.tokens * (2 * parameters + 3 * adapter)},
        tokens=setting.tokens,
    )
