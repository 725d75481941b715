"""Adapted linear layers, forward and forward + backward: all layers of one block, plain and decoupled.

The floor is the frozen layers alone. The backward pass is that of a layer in the middle of a model: ∂x, ∂A and ∂B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from lowrank_kernels.backends.registry import implementations
from lowrank_kernels.ops import lora_down, lora_linear, lora_up

from ..compiled import compiled
from ..harness import Case, Trial, worst
from ..shapes import MODELS, SHARED, names
from . import Setting, on, suite

SCALE = 0.5
#: Of the rows with dropout.
DROPOUT = 1 / 8  # a multiple of 2⁻¹⁶: dropout by a seed rounds to these


@dataclass
class Layer:
    """x (n, d_in), W (d_out, d_in), A (r, d_in), B (d_out, r), Q_Aᵀ as A or None, Q_B as B or None, and ∂y (n, d_out)."""

    x: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor
    q_a: Tensor | None
    q_b: Tensor | None
    grad: Tensor

    def to(self, dtype: torch.dtype) -> Layer:
        """In another dtype, elsewhere in memory (W only if it must be), with gradients wanted."""
        copies = [None if t is None else t.to(dtype, copy=True) for t in (self.a, self.b, self.q_a, self.q_b)]
        a, b, q_a, q_b = copies
        assert a is not None and b is not None
        x, grad = self.x.to(dtype, copy=True), self.grad.to(dtype)
        return Layer(x.requires_grad_(), self.weight.to(dtype), a.requires_grad_(), b.requires_grad_(), q_a, q_b, grad)

    @property
    def wanted(self) -> list[Tensor]:
        return [self.x, self.a, self.b]


def make_block(setting: Setting, decoupled: bool) -> list[Layer]:
    """Gaussian layers of one block; the adapter's part is about as large as the frozen one."""
    generator = setting.generator()

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=setting.device) / shape[-1] ** 0.5).to(setting.dtype)

    rank, tokens, block = setting.rank, setting.tokens, []
    for d_out, d_in in setting.layers[: len(setting.layers) // MODELS[setting.model].blocks]:
        q_a, q_b = (draw(rank, d_in), draw(d_out, rank)) if decoupled else (None, None)
        x, grad = draw(tokens, d_in) * d_in**0.5, draw(tokens, d_out) * d_out**0.5
        block.append(Layer(x, draw(d_out, d_in), draw(rank, d_in), draw(d_out, rank), q_a, q_b, grad))
    return block


def make_shared(setting: Setting, decoupled: bool) -> list[Layer]:
    """The layers of one block that share an input: q, k and v, or what of them is adapted."""
    members = [
        layer for name, layer in zip(names(setting.model, setting.choice), make_block(setting, decoupled), strict=True) if name in SHARED
    ]
    for layer in members:
        layer.x = members[0].x
    return members


Forward = Callable[[Layer], Tensor]
#: From layers to a call that answers as :func:`results` does.
Prepare = Callable[[list[Layer]], Callable[[], list[Tensor | None]]]


def frozen(layer: Layer) -> Tensor:
    return linear(layer.x, layer.weight)


def naive(layer: Layer) -> Tensor:
    """What a user writes."""
    y = linear(layer.x, layer.weight)
    if layer.q_a is None or layer.q_b is None:
        return y + SCALE * linear(linear(layer.x, layer.a), layer.b)
    return y + SCALE * (linear(linear(layer.x, layer.a), layer.q_b) + linear(linear(layer.x, layer.q_a), layer.b))


def ours(layer: Layer) -> Tensor:
    return lora_linear(layer.x, layer.weight, None, layer.a, layer.b, SCALE, q_a=layer.q_a, q_b=layer.q_b)


def naive_dropout(layer: Layer) -> Tensor:
    return linear(layer.x, layer.weight) + SCALE * linear(linear(dropout(layer.x, DROPOUT), layer.a), layer.b)


def ours_dropout(layer: Layer) -> Tensor:
    return lora_linear(layer.x, layer.weight, None, layer.a, layer.b, SCALE, dropout=DROPOUT)


def results(forward: Forward, block: list[Layer], backward: bool) -> list[Tensor | None]:
    """The outputs, and with ``backward`` ∂x, ∂A and ∂B of all layers."""
    if not backward:
        with torch.no_grad():
            return [forward(layer) for layer in block]
    ys = [forward(layer) for layer in block]
    wanted = [tensor for layer in block for tensor in layer.wanted]
    return [*ys, *torch.autograd.grad(ys, wanted, [layer.grad for layer in block], allow_unused=True)]


def one_input(block: list[Layer], dtype: torch.dtype) -> list[Layer]:
    """Copies that share one x, a leaf."""
    copies = [layer.to(dtype) for layer in block]
    for layer in copies:
        layer.x = copies[0].x
    return copies


def together(block: list[Layer]) -> list[Tensor]:
    """All layers of one input by :func:`lora_down` and :func:`lora_up`."""
    bases = None if block[0].q_a is None else [layer.q_a for layer in block if layer.q_a is not None]
    x, hiddens, hiddens_q = lora_down(block[0].x, [layer.a for layer in block], bases)
    rest: Sequence[Tensor | None] = hiddens_q or [None] * len(block)
    parts = zip(block, hiddens, rest, strict=True)
    return [lora_up(x, layer.weight, None, h, layer.b, SCALE, hidden_q=h_q, q_b=layer.q_b) for layer, h, h_q in parts]


Together = Callable[[list[Layer]], list[Tensor]]


def shared_results(forward: Together, block: list[Layer], backward: bool) -> list[Tensor]:
    """The outputs, and with ``backward`` the one ∂x, then ∂A and ∂B of all layers."""
    if not backward:
        with torch.no_grad():
            return forward(block)
    ys = forward(block)
    wanted = [block[0].x, *(tensor for layer in block for tensor in (layer.a, layer.b))]
    return [*ys, *torch.autograd.grad(ys, wanted, [layer.grad for layer in block])]


def shared_trial(forward: Together, block: list[Layer], backward: bool, backend: str = "auto", is_ours: bool = False) -> Trial:
    mine = one_input(block, block[0].x.dtype)
    found: list[Tensor] = []

    def run() -> None:
        found[:] = shared_results(forward, mine, backward)

    def check() -> tuple[float, float]:
        exact = shared_results(apart(naive), one_input(block, torch.float64), backward)
        own = shared_results(apart(naive), one_input(block, block[0].x.dtype), backward)
        return worst([(difference(f, e), tolerance(o, e)) for f, o, e in zip(found, own, exact, strict=True)])

    return Trial(run, check, on(backend), ours=is_ours)


def apart(forward: Forward) -> Together:
    """One layer after the other."""
    return lambda block: [forward(layer) for layer in block]


def difference(found: Tensor, exact: Tensor) -> float:
    """The largest."""
    return (found.double() - exact).abs().max().item()


def tolerance(own: Tensor, exact: Tensor) -> float:
    """Twice the error of torch in the same dtype, and rounding."""
    return 2 * difference(own, exact) + 8 * torch.finfo(own.dtype).eps * exact.abs().max().item()


class Judge:
    """Twice the error of torch in the same dtype, and rounding, against ``forward`` in fp64."""

    def __init__(self, block: list[Layer], backward: bool, forward: Forward = naive) -> None:
        self.exact = results(forward, [layer.to(torch.float64) for layer in block], backward)
        own = results(forward, [layer.to(layer.x.dtype) for layer in block], backward)
        self.tolerances = [0.0 if e is None or o is None else tolerance(o, e) for e, o in zip(self.exact, own, strict=True)]

    def __call__(self, found: list[Tensor | None]) -> tuple[float, float]:
        rows = zip(found, self.exact, self.tolerances, strict=True)
        return worst([(difference(f, e), t) for f, e, t in rows if f is not None and e is not None])


class DropoutJudge:
    """Dropout draws what it likes, so each provider runs once more, on layers whose ∂x tells what was kept; the rest is then judged
    in fp64 with that mask.

    W = 0 and positive factors and gradients: ∂x is ``s ∂y B A`` (positive, never small) where an entry was kept, and 0 elsewhere.
    """

    def __init__(self, block: list[Layer]) -> None:
        self.block = [
            Layer(layer.x, torch.zeros_like(layer.weight), *(t.abs() + 0.1 for t in (layer.a, layer.b)), None, None, layer.grad.abs() + 0.1)
            for layer in block
        ]

    def __call__(self, prepare: Prepare) -> tuple[float, float]:
        dtype = self.block[0].x.dtype
        found = prepare([layer.to(dtype) for layer in self.block])()
        kept, judgements = [], []
        for layer, grad_x in zip(self.block, found[len(self.block) :: 3], strict=True):
            assert grad_x is not None
            kept.append(grad_x.double() > 0.5 * SCALE * layer.grad.double() @ layer.b.double() @ layer.a.double())
            share, count = kept[-1].double().mean().item(), kept[-1].numel()
            judgements.append((abs(share - 1 + DROPOUT), 6 * (DROPOUT * (1 - DROPOUT) / count) ** 0.5))

        def known(masks: Iterator[Tensor]) -> Forward:
            return lambda layer: SCALE * linear(linear(layer.x * next(masks) / (1 - DROPOUT), layer.a), layer.b)

        exact = results(known(iter(kept)), [layer.to(torch.float64) for layer in self.block], backward=True)
        own = results(known(iter(kept)), [layer.to(dtype) for layer in self.block], backward=True)
        rows = zip(found, own, exact, strict=True)
        judgements += ((difference(f, e), tolerance(o, e)) for f, o, e in rows if f is not None and o is not None and e is not None)
        return worst(judgements)


def trial(forward: Forward, block: list[Layer], backward: bool, judge: Judge, backend: str = "auto", is_ours: bool = False) -> Trial:
    mine, found = [layer.to(layer.x.dtype) for layer in block], []

    def run() -> None:
        found[:] = results(forward, mine, backward)

    return Trial(run, lambda: judge(found), on(backend), ours=is_ours)


def dropout_trial(prepare: Prepare, block: list[Layer], judge: DropoutJudge, backend: str = "auto", is_ours: bool = False) -> Trial:
    forced = on(backend)

    def check() -> tuple[float, float]:
        with forced():
            return judge(prepare)

    return Trial(prepare([layer.to(layer.x.dtype) for layer in block]), check, forced, ours=is_ours)


def compiled_trial(block: list[Layer], backward: bool, judge: Judge, seconds: float) -> Trial:
    """The naive forward of the whole block as one compiled graph."""
    mine, found = [layer.to(layer.x.dtype) for layer in block], []
    inputs = [(layer.x, layer.weight, layer.a, layer.b, layer.q_a, layer.q_b, layer.grad) for layer in mine]

    def run(forward: Callable[..., list[Tensor]]) -> None:
        if backward:
            ys = forward(inputs)
            found[:] = [*ys, *torch.autograd.grad(ys, [t for layer in mine for t in layer.wanted], [layer.grad for layer in mine])]
        else:
            with torch.no_grad():
                found[:] = forward(inputs)

    call = compiled(lambda tensors: [naive(Layer(*one)) for one in tensors], seconds, run)
    return Trial(lambda: run(call), lambda: judge(found))


def peft_results(block: list[Layer], backward: bool, lora_dropout: float = 0.0) -> Callable[[], list[Tensor | None]]:
    """PEFT's own layer; decoupled: an unmodified one of rank 2r, whose constant halves get their gradients all the same."""
    from peft import LoraConfig, get_peft_model

    rank, decoupled = block[0].a.shape[0], block[0].q_a is not None
    base = nn.Sequential()
    for layer in block:
        module = nn.Linear(1, 1, bias=False)
        module.in_features, module.out_features = layer.weight.shape[1], layer.weight.shape[0]
        module.weight = nn.Parameter(layer.weight, requires_grad=False)
        base.append(module)
    total = 2 * rank if decoupled else rank
    config = LoraConfig(
        r=total,
        lora_alpha=total * SCALE,  # type: ignore[arg-type]  # PEFT declares α an int, and only divides it
        target_modules=[str(i) for i in range(len(block))],
        lora_dropout=lora_dropout,
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    modules = [model.base_model.model[i] for i in range(len(block))]
    factors = [(module.lora_A["default"].weight, module.lora_B["default"].weight) for module in modules]
    for (a, b), layer in zip(factors, block, strict=True):
        a.data = layer.a.detach() if layer.q_a is None else torch.cat([layer.a.detach(), layer.q_a])
        b.data = layer.b.detach() if layer.q_b is None else torch.cat([layer.q_b, layer.b.detach()], dim=1)

    def run() -> list[Tensor | None]:
        if not backward:
            with torch.no_grad():
                return [module(layer.x) for module, layer in zip(modules, block, strict=True)]
        ys = [module(layer.x) for module, layer in zip(modules, block, strict=True)]
        wanted = [tensor for layer, pair in zip(block, factors, strict=True) for tensor in (layer.x, *pair)]
        grads = torch.autograd.grad(ys, wanted, [layer.grad for layer in block])
        trained = [g if i % 3 == 0 else g[:rank] if i % 3 == 1 else g[:, total - rank :] for i, g in enumerate(grads)]
        return [*ys, *trained]

    return run


def peft_trial(block: list[Layer], backward: bool, judge: Judge) -> Trial:
    call, found = peft_results([layer.to(layer.x.dtype) for layer in block], backward), []

    def run() -> None:
        found[:] = call()

    return Trial(run, lambda: judge(found))


@suite(
    "forward",
    *(f"{kind}_linear_{passes}" for kind in ("lora", "decoupled") for passes in ("forward", "forward_backward")),
    "lora_linear_dropout_forward_backward",
    *(f"{kind}_shared_input_{passes}" for kind in ("lora", "decoupled") for passes in ("forward", "forward_backward")),
)
def cases(setting: Setting) -> Iterator[Case]:
    """Forward, and forward + backward, of the plain and of the decoupled layer, alone and with others on the same input; with dropout."""
    for decoupled in (False, True):
        block = make_block(setting, decoupled)
        for backward in (False, True):
            judge, floor = Judge(block, backward), Judge(block, backward, frozen)
            arguments = (block, backward, judge)
            providers: dict[str, Callable[[], Trial]] = {
                "naive": partial(trial, naive, *arguments),
                "frozen-linear": partial(trial, frozen, block, backward, floor),
                "peft": partial(peft_trial, *arguments),
                **({"torch.compile": partial(compiled_trial, *arguments, setting.compile_seconds)} if setting.compile_seconds else {}),
                **{f"ours-{name}": partial(trial, ours, *arguments, name, True) for name in _backends(block, setting)},
            }
            yield _case("decoupled_linear" if decoupled else "lora_linear", block, backward, providers, setting)
        if not decoupled:
            yield dropout_case(block, setting)
        yield from shared_cases(setting, decoupled)


def _backends(block: list[Layer], setting: Setting) -> list[str]:
    """Those to time: compiled code where it takes such layers."""
    layer, native = block[0], implementations("lora_linear").get("native")
    arguments = (layer.x, layer.weight, None, layer.a, layer.b, layer.q_a, layer.q_b, SCALE, None, 1.0)
    taken = native is not None and native.verify(*arguments)[0]
    return [name for name in setting.backends if name != "native" or taken]


def _case(name: str, block: list[Layer], backward: bool, providers: dict[str, Callable[[], Trial]], setting: Setting) -> Case:
    """Of layers one after the other, and the frozen layers alone as rival."""
    weights = sum(layer.weight.numel() for layer in block)
    both, inputs = sum(sum(layer.weight.shape) for layer in block), sum(layer.weight.shape[1] for layer in block)
    passes, factors = (2 if backward else 1), 1 if block[0].q_a is None else 2
    moved = _moved(setting, inputs, both, weights, factors * setting.rank * both, setting.rank * both, backward)
    # Each factor is one product forward and one for ∂x; each trained one is another for its own gradient.
    rank_r = (factors * passes + (1 if backward else 0)) * setting.rank * both
    return Case(
        op=name + ("_forward_backward" if backward else "_forward"),
        shapes=setting.shapes,
        rank=setting.rank,
        dtype=setting.dtype,
        device=setting.device,
        bytes=moved * setting.dtype.itemsize,
        tensors=len(block),
        providers=providers,
        rival="frozen-linear",
        flops={setting.dtype: 2 * setting.tokens * (passes * weights + rank_r)},
        tokens=setting.tokens,
    )


def _moved(setting: Setting, inputs: int, both: int, weights: int, factors: int, trained: int, backward: bool) -> int:
    """Elements to move for layers of ``inputs`` columns of x, ``both`` of x and y together, and so many elements of W, of factors and of
    trained ones: x, W, the factors and y once; for the backward pass ∂y, x, W, the factors, ∂x and the gradients of the trained once."""
    forward = setting.tokens * both + weights + factors
    return forward + (forward + setting.tokens * inputs + trained if backward else 0)


def dropout_case(block: list[Layer], setting: Setting) -> Case:
    """Forward + backward; the floor is without any mask, which ours computes from a seed on a GPU and keeps as bytes elsewhere."""

    def prepare(forward: Forward) -> Prepare:
        return lambda layers: partial(results, forward, layers, True)

    judge = DropoutJudge(block)
    providers: dict[str, Callable[[], Trial]] = {
        "naive": partial(dropout_trial, prepare(naive_dropout), block, judge),
        "frozen-linear": partial(trial, frozen, block, True, Judge(block, True, frozen)),
        "peft": partial(dropout_trial, partial(peft_results, backward=True, lora_dropout=DROPOUT), block, judge),
        **{f"ours-{name}": partial(dropout_trial, prepare(ours_dropout), block, judge, name, True) for name in _backends(block, setting)},
    }
    return _case("lora_linear_dropout", block, True, providers, setting)


def shared_cases(setting: Setting, decoupled: bool) -> Iterator[Case]:
    """q, k and v of one block on one input: naive, our layers apart, and with their projections to the rank in one."""
    block = make_shared(setting, decoupled)
    if len(block) < 2:
        return
    both = sum(layer.weight.shape[0] for layer in block) + block[0].x.shape[1]
    weights, factors = sum(layer.weight.numel() for layer in block), 2 if decoupled else 1
    for backward in (False, True):
        passes = 2 if backward else 1
        thin = sum(setting.rank * sum(layer.weight.shape) for layer in block)
        yield Case(
            op=("decoupled" if decoupled else "lora") + "_shared_input" + ("_forward_backward" if backward else "_forward"),
            shapes=setting.shapes,
            rank=setting.rank,
            dtype=setting.dtype,
            device=setting.device,
            bytes=_moved(setting, block[0].x.shape[1], both, weights, factors * thin, thin, backward) * setting.dtype.itemsize,
            tensors=len(block),
            providers={
                "naive": partial(shared_trial, apart(naive), block, backward),
                "ours-apart": partial(shared_trial, apart(ours), block, backward, "auto", True),
                **{f"ours-{name}": partial(shared_trial, together, block, backward, name, True) for name in _backends(block, setting)},
            },
            rival="ours-apart",
            flops={setting.dtype: 2 * setting.tokens * (passes * weights + (factors * passes + (1 if backward else 0)) * thin)},
            tokens=setting.tokens,
        )
