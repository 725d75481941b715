"""``share_inputs``, ``ops.lora_down`` and ``ops.lora_up``: the same outputs and gradients as the layers apart, and nothing kept."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lrk
from lowrank_kernels import adapters, ops
from lowrank_kernels.backends import registry
from lowrank_kernels.backends.registry import call_counts, force

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
BACKENDS = [(device, backend) for device in DEVICES for backend in registry.PREFERENCE[device]]


class Block(nn.Module):
    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(d, d), nn.Linear(d, 6), nn.Linear(d, d, bias=False)
        self.o_proj = nn.Linear(d, d)
        self.gate_proj, self.up_proj = nn.Linear(d, 12), nn.Linear(d, 12)
        self.down_proj = nn.Linear(12, d)
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        other = h if memory is None else memory
        q, k, v = self.q_proj(h), self.k_proj(other), self.v_proj(other)
        x = x + self.o_proj(torch.tanh(q) * v + k.mean(-1, keepdim=True))
        return x + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def make(method: str = "sds", dtype: torch.dtype = torch.float64, **options: object) -> tuple[nn.Module, nn.Module]:
    """Two equal models: one with its layers apart, one that shares inputs."""
    apart = lrk.adapt(nn.Sequential(Block(), Block()).to(dtype), method, rank=2, **options)
    for layer in apart.modules():
        if isinstance(layer, lrk.LowRankLinear):
            with torch.no_grad():
                for tensor in layer.parameters() if method == "xs" else (layer.lora_A, layer.lora_B):
                    if not any(tensor is frozen for frozen in layer.base_layer.parameters()):
                        tensor.normal_(std=0.5)
                if method == "xs":
                    layer.lora_A.normal_(std=0.5)
                    layer.lora_B.normal_(std=0.5)
                if method == "sds":
                    layer.q_a.copy_(torch.linalg.qr(torch.randn(layer.in_features, 2))[0].mT)
                    layer.q_b.copy_(torch.linalg.qr(torch.randn(layer.out_features, 2))[0])
                    layer.decoupled = True
    shared = copy.deepcopy(apart)
    assert lrk.share_inputs(shared) == 4
    return apart, shared


def gradients(model: nn.Module, x: Tensor, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """The output, and the gradients of x and of every trained parameter."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x) if run is None else run(model, x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def assert_same(found: list[Tensor | None], expected: list[Tensor | None], tolerance: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:
            assert one is other
            continue
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * other.abs().max().item())


@contextmanager
def projections(expected: int) -> Iterator[None]:
    """``expected`` shared projections happen within."""
    before = sum(count for (name, _), count in call_counts().items() if name == "lora_down")
    yield
    assert sum(count for (name, _), count in call_counts().items() if name == "lora_down") - before == expected


def nothing_kept(model: nn.Module) -> bool:
    groups = {id(layer.shared_input): layer.shared_input for layer in model.modules() if isinstance(layer, lrk.LowRankLinear)}
    return all(group is None or (group._held.x is None and not group._held.parts) for group in groups.values())


X = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

# --- the operations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoupled", [False, True], ids=["plain", "decoupled"])
@pytest.mark.parametrize("base", [True, False], ids=["base", "delta"])
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_gradcheck(device: str, backend: str, base: bool, decoupled: bool) -> None:
    def draw(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=grad)

    ranks, widths = (1, 3), (4, 5)
    qs = [(draw(r, 6, grad=False), draw(d, r, grad=False)) for r, d in zip(ranks, widths, strict=True)]
    weights = [draw(d, 6, grad=False) for d in widths]

    def function(x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, ...]:
        passed, hiddens, hiddens_q = ops.lora_down(x, [a1, a2], [q for q, _ in qs] if decoupled else None)
        ys = []
        for i, b in enumerate((b1, b2)):
            options = {} if hiddens_q is None else {"hidden_q": hiddens_q[i], "q_b": qs[i][1]}
            first = (passed, weights[i], None) if base else (None, None, None)
            ys.append(ops.lora_up(*first, hiddens[i], b, 0.7, **options))
        return (*ys, passed.sin())

    inputs = (draw(2, 3, 6), draw(1, 6), draw(4, 1), draw(3, 6), draw(5, 3))
    with force(backend):
        assert torch.autograd.gradcheck(function, inputs)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            (first,) = torch.autograd.grad(function(*inputs)[0].square().sum(), inputs[0], create_graph=True)
            first.sum().backward()


@pytest.mark.parametrize("dynamic, decoupled, base", [(None, False, True), (True, True, True), (None, True, False)])
def test_operations_compile_as_nodes(dynamic: bool | None, decoupled: bool, base: bool) -> None:
    """Without graph breaks, and with the same results as eager calls, whatever wants gradients."""

    def draw(*shape: int, grad: bool = False) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)

    a, b, q_a, q_b = [draw(2, 6), draw(3, 6)], [draw(5, 2), draw(4, 3)], [draw(2, 6), draw(3, 6)], [draw(5, 2), draw(4, 3)]
    weights, seen = [draw(5, 6), draw(4, 6)], []

    def function(x: Tensor, a: list[Tensor], b: list[Tensor]) -> Tensor:
        passed, hiddens, hiddens_q = ops.lora_down(x, a, q_a if decoupled else None)
        total = passed.sin().sum()
        for i in range(2):
            options = {} if hiddens_q is None else {"hidden_q": hiddens_q[i], "q_b": q_b[i]}
            first = (passed, weights[i], None) if base else (None, None, None)
            total = total + ops.lora_up(*first, hiddens[i], b[i], 0.7, **options).sin().sum()
        return total

    def backend(graph: torch.fx.GraphModule, examples: object) -> Callable[..., object]:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.backends.debugging.aot_eager(graph, examples)

    for wanted in ("xab", "ab", "b"):
        torch._dynamo.reset()
        x = draw(2, 4, 6, grad="x" in wanted)
        for name, tensors in (("a", a), ("b", b)):
            for tensor in tensors:
                tensor.requires_grad_(name in wanted)
        leaves = [tensor for tensor in (x, *a, *b) if tensor.requires_grad]
        expected = torch.autograd.grad(function(x, a, b), leaves)
        compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
        assert_same(list(torch.autograd.grad(compiled(x, a, b), leaves)), list(expected))
    assert {"lowrank_kernels.lora_down", "lowrank_kernels.lora_up"} <= set(seen)


@pytest.mark.parametrize("decoupled", [False, True], ids=["plain", "decoupled"])
def test_opcheck(decoupled: bool) -> None:
    def draw(*shape: int, grad: bool = False) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)

    x, a, b = draw(2, 4, 6, grad=True), draw(3, 6, grad=True), draw(5, 3, grad=True)
    q, q_b, hidden_q = (draw(3, 6), draw(5, 3), draw(8, 3, grad=True)) if decoupled else (None, None, None)
    check = torch.library.opcheck
    check(torch.ops.lowrank_kernels.lora_down, (x, a, q))
    check(torch.ops.lowrank_kernels.lora_down, (x.detach(), a, q))
    on_a, on_q = draw(2, 4, 3), draw(2, 4, 3) if decoupled else None
    for inputs in ((on_a, on_q, x.detach(), a.detach(), q), (on_a, None, x.detach(), None, None), (on_a, on_q, None, a.detach(), q)):
        check(torch.ops.lowrank_kernels.lora_down_backward, inputs)
    flat, weight, bias, hidden = draw(8, 6, grad=True), draw(5, 6), draw(5), draw(8, 3, grad=True)
    check(torch.ops.lowrank_kernels.lora_up, (flat, weight, bias, hidden, b, hidden_q, q_b, 0.5))
    check(torch.ops.lowrank_kernels.lora_up, (None, None, None, hidden, b, hidden_q, q_b, 0.5))
    for needs in ([True, True, True, decoupled], [False, False, True, False], [False, True, False, decoupled], [True, False, False, False]):
        check(torch.ops.lowrank_kernels.lora_up_backward, (draw(8, 5), weight, hidden.detach(), b.detach(), q_b, 0.5, needs))


def test_second_derivatives_of_nodes_are_refused_and_transforms_work() -> None:
    x, a, b = (torch.randn(s, dtype=torch.float64) for s in ((4, 6), (2, 6), (5, 2)))

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ops.lora_up(None, None, None, ops.lora_down(x, [a])[1][0], b, 0.5)

    direct = torch.ops.lowrank_kernels.lora_down(x, a.requires_grad_(), None)[0]
    (first,) = torch.autograd.grad(direct.square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        first.sum().backward()
    batched = torch.func.vmap(function, (0, None, None))(x, a, b)
    torch.testing.assert_close(batched, function(x, a, b))


def test_operations_give_what_lora_linear_gives() -> None:
    a, b, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((2, 8), (6, 2), (6, 8), (6,)))
    passed, (hidden,), none = ops.lora_down(X, [a])
    assert none is None and passed is X
    torch.testing.assert_close(ops.lora_up(passed, weight, bias, hidden, b, 0.3), ops.lora_linear(X, weight, bias, a, b, 0.3))


A = torch.zeros(2, 8)


def test_up_casts_what_came_through_the_bases() -> None:
    hidden, b = torch.randn(3, 2), torch.randn(6, 2)
    expected = ops.lora_up(None, None, None, hidden, b, hidden_q=hidden, q_b=b)
    torch.testing.assert_close(ops.lora_up(None, None, None, hidden, b, hidden_q=hidden.double(), q_b=b.double()), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.lora_down(X, []), "one factor at least"),
        (lambda: ops.lora_down(X, [torch.zeros(2, 7)]), r"factors\[0\] must be \(r, 8\)"),
        (lambda: ops.lora_down(X, [torch.zeros(2, 8)], [torch.zeros(3, 8)]), r"bases\[0\] must be \(2, 8\)"),
        (lambda: ops.lora_down(X.long(), [torch.zeros(2, 8)]), "lora_down: x has dtype torch.int64"),
        (lambda: ops.lora_up(X, None, None, torch.zeros(3, 5, 2), torch.zeros(6, 2)), "x and weight come together"),
        (lambda: ops.lora_up(X, torch.zeros(6, 8), None, torch.zeros(3, 4, 2), torch.zeros(6, 2)), r"x must be \(3, 4, 8\)"),
        (lambda: ops.lora_up(None, None, None, torch.zeros(3, 2), torch.zeros(6, 3)), r"hidden must be \(3, 3\)"),
        (
            lambda: ops.lora_up(None, None, None, torch.zeros(3, 2), torch.zeros(6, 2, dtype=torch.int32)),
            "lora_up: b has dtype torch.int32",
        ),
        (lambda: ops.lora_down(None, [A]), "lora_down: x must be a tensor, got NoneType"),
        (lambda: ops.lora_down(X[0, 0, 0], [A]), r"lora_down: x must be \(..., d_in\)"),
        (lambda: ops.lora_down(X, None), "lora_down: factors must be a list, got NoneType"),
        (lambda: ops.lora_down(X, A), "lora_down: factors must be a list, got Tensor"),
        (lambda: ops.lora_down(X, [A], A), "lora_down: bases must be a list, got Tensor"),
        (lambda: ops.lora_down(X, [None]), r"lora_down: factors\[0\] must be a tensor, got NoneType"),
        (lambda: ops.lora_down(X, [A.to_sparse()]), r"lora_down: factors\[0\] is torch.sparse_coo"),
        (lambda: ops.lora_down(X, [A.to("meta")]), r"lora_down: factors\[0\] is on meta, x on cpu"),
        (
            lambda: ops.lora_up(None, None, None, torch.zeros(3, 2, dtype=torch.complex64), A.mT),
            "lora_up: hidden has dtype torch.complex64",
        ),
        (lambda: ops.lora_up(None, None, None, torch.zeros(3, 2).long(), A.mT), "lora_up: hidden has dtype torch.int64"),
        (lambda: ops.lora_up(None, None, None, [1], A.mT), "lora_up: hidden must be a tensor, got list"),
        (lambda: ops.lora_up(None, None, None, torch.zeros(3, 2), None), "lora_up: b must be a tensor, got NoneType"),
        (lambda: ops.lora_up(None, None, None, torch.zeros(3, 2), A.to("meta").mT), "lora_up: b is on meta, hidden on cpu"),
        (lambda: ops.lora_up(torch.zeros(()), A, None, torch.zeros(2), A[:, :2]), r"lora_up: x must be"),
        (lambda: ops.lora_up(None, None, None, torch.zeros(3, 2), A.mT, math.nan), "lora_up: scale must be finite, got nan"),
        (lambda: ops.lora_up(None, None, None, torch.zeros(3, 2), A.mT, torch.ones(())), "lora_up: scale must be a number"),
        (lambda: lrk.share_inputs(nn.Sequential(), "q_proj"), "groups of child names"),
        (lambda: lrk.share_inputs(nn.Sequential(), ["q_proj"]), "groups of child names"),
        (lambda: lrk.share_inputs(nn.Sequential(), None), "groups of child names"),
        (lambda: lrk.share_inputs(nn.Sequential(), [None]), "groups of child names"),
        (lambda: lrk.share_inputs(nn.Sequential(), [("q", 1)]), "groups of child names"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_groups_may_be_generators() -> None:
    layers = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q", "k")})
    model = lrk.adapt(nn.Sequential(layers, copy.deepcopy(layers)), rank=2)
    assert lrk.share_inputs(model, (group for group in [("q", "k")])) == 2
    assert lrk.share_inputs(model, [(name for name in ("q", "k"))]) == 2
    assert all(layer.shared_input is not None for layer in model.modules() if isinstance(layer, lrk.LowRankLinear))


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "sds"])
def test_gradients_are_those_of_the_layers_apart_and_accumulate(method: str) -> None:
    apart, shared = make(method)
    with projections(4):
        found = gradients(shared, X)
    assert_same(found, gradients(apart, X))
    for model in (apart, shared):  # a second backward pass adds to the gradients that are there
        model(2 * X).square().sum().backward()
    pairs = zip(shared.parameters(), apart.parameters(), strict=True)
    assert_same(*map(list, zip(*((p.grad, q.grad) for p, q in pairs if p.requires_grad), strict=True)))
    assert nothing_kept(shared)
    with torch.no_grad(), projections(4):
        assert_same([shared(X)], [apart(X)])
    assert nothing_kept(shared)


@pytest.mark.parametrize("method", ["lora", "sds"])
@pytest.mark.parametrize("x_grad", [False, True])
def test_a_layer_that_is_not_used_gets_no_gradient(x_grad: bool, method: str) -> None:
    """None, as apart: an optimizer takes zeros for a step."""

    def run(model: nn.Module, x: Tensor) -> list[Tensor | None]:
        model.zero_grad()
        x = x.detach().requires_grad_(x_grad)
        block = model[0]
        outputs = block.q_proj(x), block.k_proj(x), block.v_proj(x)
        (outputs[0].square().sum() + outputs[2].sum()).backward()
        return [x.grad, *(p.grad for p in block.parameters())]

    apart, shared = make(method)
    assert shared[0].k_proj.shared_input is not None
    found = run(shared, X)
    assert shared[0].k_proj.lora_A.grad is None and shared[0].v_proj.lora_A.grad is not None
    assert_same(found, run(apart, X))
    with torch.no_grad():  # x Aᵀ of a layer whose outputs are used, but not differentiated, is no use of it either
        shared[0].k_proj.lora_A.requires_grad_(False)
        apart[0].k_proj.lora_A.requires_grad_(False)
    assert_same(run(shared, X), run(apart, X))


def test_a_frozen_input_gets_no_gradient_and_no_product() -> None:
    apart, shared = make()
    ys = [model[0].q_proj(X) + model[0].v_proj(X) for model in (apart, shared)]
    nodes, names = [ys[1].grad_fn], set()
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [next_node for next_node, _ in node.next_functions if next_node is not None]
    assert "_DownBackward" in names
    for model, y in zip((apart, shared), ys, strict=True):
        y.square().sum().backward()
        for name in ("q_proj", "v_proj"):
            layer = model[0].get_submodule(name)
            assert layer.lora_A.grad.abs().max() > 0 and layer.lora_B.grad.abs().max() > 0
    assert_same([shared[0].q_proj.lora_A.grad, shared[0].v_proj.lora_B.grad], [apart[0].q_proj.lora_A.grad, apart[0].v_proj.lora_B.grad])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("what", ["blocks", "layers"])
def test_checkpointing(reentrant: bool, what: str) -> None:
    apart, shared = make()

    def blocks(model: nn.Module, x: Tensor) -> Tensor:
        for block in model:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return x

    def layers(model: nn.Module, x: Tensor) -> Tensor:
        for block in model:
            q, k, v = (checkpoint(layer, x, use_reentrant=reentrant) for layer in (block.q_proj, block.k_proj, block.v_proj))
            x = x + torch.tanh(q) * v + k.mean(-1, keepdim=True)
        return x

    run = blocks if what == "blocks" else layers
    assert_same(gradients(shared, X, run), gradients(apart, X, run))
    assert what == "layers" or nothing_kept(shared)


def test_different_inputs_in_one_forward() -> None:
    apart, shared = make()
    memory = torch.randn_like(X)

    def run(model: nn.Module, x: Tensor) -> Tensor:
        for block in model:
            x = block(x, memory)
        return x

    with projections(6):  # the queries alone, keys with values, gate with up
        assert_same(gradients(shared, X, run), gradients(apart, X, run))
    assert nothing_kept(shared)


def test_an_input_changed_in_place_is_projected_anew() -> None:
    apart, shared = make()
    with torch.no_grad():
        x = X.clone()
        first = shared[0].q_proj(x)
        x.mul_(2)
        assert_same([first, shared[0].k_proj(x)], [apart[0].q_proj(X), apart[0].k_proj(2 * X)])


@pytest.mark.parametrize("what", ["A", "replaced", "Q_A", "decoupled", "thawed"])
def test_a_factor_changed_between_the_layers_is_projected_anew(what: str) -> None:
    apart, shared = make("sds" if what in ("Q_A", "decoupled") else "lora")
    for model in (apart, shared):
        layer = model[0].k_proj
        if what == "decoupled":
            layer.decoupled = False
            model[0].q_proj.decoupled = model[0].v_proj.decoupled = False
        if what == "thawed":
            layer.lora_A.requires_grad_(False)
    found = []
    for model in (apart, shared):
        layer, first = model[0].k_proj, model[0].q_proj(X)
        with torch.no_grad():
            if what == "A":
                layer.lora_A.mul_(2)
            elif what == "Q_A":
                layer.q_a.mul_(2)
        if what == "replaced":
            layer.lora_A = nn.Parameter(2 * layer.lora_A.detach())
        elif what == "decoupled":
            layer.decoupled = True
        elif what == "thawed":
            layer.lora_A.requires_grad_(True)
        second = layer(X)
        second.square().sum().backward()
        found.append([first, second, model[0].v_proj(X), layer.lora_A.grad])
    assert_same(found[1], found[0])


def test_the_grad_mode_and_autocast_are_those_of_each_layer() -> None:
    apart, shared = make(dtype=torch.float32)
    x = X.float().requires_grad_()
    with torch.no_grad():
        shared[0].q_proj(x)
    assert shared[0].k_proj(x).requires_grad
    small = X.float() / 16  # the blocks multiply what they get: on large numbers their gradients magnify rounding
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert shared[0].v_proj(x).dtype == torch.bfloat16
        with projections(4):
            narrow = gradients(shared, small)
        other = gradients(apart, small)
    assert narrow[0].dtype == other[0].dtype
    exact = gradients(apart, small)
    for a, b, e in zip(narrow, other, exact, strict=True):
        assert (a - e).abs().max() <= 3 * (b - e).abs().max() + 2**-8 * e.abs().max()


@pytest.mark.parametrize("what", ["dropout", "core", "merged", "capture"])
def test_what_is_not_shared(what: str) -> None:
    apart, shared = make("xs" if what == "core" else "sds", dropout=0.4 if what == "dropout" else 0.0)
    if what == "capture":
        for model in (apart, shared):
            for layer in model.modules():
                if isinstance(layer, lrk.LowRankLinear):
                    layer.capture = lambda x, grad, new: None
    if what == "merged":
        for model in (apart, shared):
            lrk.merge(model.eval())
        with torch.no_grad(), projections(0):
            assert_same([shared(X)], [apart(X)])
        return
    results = []
    for model in (apart, shared):
        torch.manual_seed(5)
        with projections(0):
            results.append(gradients(model, X))
    assert_same(results[1], results[0])
    if what == "dropout":
        with projections(4):
            assert_same(gradients(shared.eval(), X), gradients(apart.eval(), X))


def test_a_quantized_or_hooked_base_is_called_as_a_module() -> None:
    apart, shared = make()
    for model in (apart, shared):
        model[0].k_proj.base_layer.register_forward_hook(lambda module, args, y: 2 * y)
    with projections(4):
        assert_same(gradients(shared, X), gradients(apart, X))


def test_compiled_models_compute_apart_without_graph_breaks() -> None:
    apart, shared = make()
    expected = gradients(apart, X)
    compiled = torch.compile(shared, fullgraph=True, backend="aot_eager")
    with projections(0):
        assert_same(gradients(compiled, X), expected)
    with projections(4):
        assert_same(gradients(shared, X), expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_share_among_themselves(how: str) -> None:
    _, shared = make()
    twin = copy.deepcopy(shared) if how == "deepcopy" else pickle.loads(pickle.dumps(shared))
    with torch.no_grad():
        twin[0].k_proj.lora_B.zero_()
    apart = copy.deepcopy(twin)
    assert lrk.share_inputs(apart, ()) == 0
    with projections(4):
        found = gradients(twin, X)
    with projections(0):
        assert_same(found, gradients(apart, X))
    with projections(0):
        alone = copy.deepcopy(shared[0].q_proj)(X)
    torch.testing.assert_close(alone, shared[0].q_proj(X))


def test_threads_that_call_one_model_do_not_get_each_others_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread leads the group between a layer's look at its part and the taking of it."""
    apart, shared = make()
    factors = adapters.shared._factors

    def interrupted(layer: lrk.LowRankLinear) -> object:
        monkeypatch.setattr(adapters.shared, "_factors", factors)
        other = threading.Thread(target=lambda: shared[0].q_proj(X + 1))
        other.start()
        other.join()
        return factors(layer)

    with projections(2):
        shared[0].q_proj(X)
        monkeypatch.setattr(adapters.shared, "_factors", interrupted)
        assert_same([shared[0].k_proj(X), shared[0].v_proj(X)], [apart[0].k_proj(X), apart[0].v_proj(X)])
    assert adapters.shared._factors is factors


def test_no_activation_outlives_the_forward() -> None:
    _, shared = make()
    seen: list[weakref.ref[Tensor]] = []
    shared[0].norm.register_forward_hook(lambda module, args, y: seen.append(weakref.ref(y)))
    with torch.no_grad():
        shared[0](X)
        shared[0](X, torch.randn_like(X))  # the part of k and v in the queries' input is never taken
        with pytest.raises(ValueError, match="d_in=7"):
            shared[0](X, torch.randn(3, 5, 7, dtype=torch.float64))
    gc.collect()
    assert nothing_kept(shared)
    assert len(seen) == 3 and all(reference() is None for reference in seen)


def test_unloading_takes_the_groups_away() -> None:
    apart, shared = make()
    expected = gradients(apart, X)[0]
    lrk.merge(shared, unload=True)
    assert not any(module._forward_hooks for module in shared.modules())
    torch.testing.assert_close(shared(X), expected)
