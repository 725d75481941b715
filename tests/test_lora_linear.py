"""``ops.lora_linear``: forward and backward against fp64, by the tolerance rule of the package, and what it must not compute."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_kernels import ops
from lowrank_kernels.backends import registry

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
BACKENDS = [(device, backend) for device in DEVICES for backend in registry.PREFERENCE[device]]
NAMES = ("x", "weight", "bias", "a", "b")


@pytest.fixture(autouse=True)
def _nan_filled_memory() -> Iterator[None]:
    """``torch.empty`` returns NaN, so that whatever a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def make(
    tokens: int, d_in: int, d_out: int, rank: int, dtype: torch.dtype = torch.float64, device: str = "cpu", decoupled: bool = False
) -> dict[str, Tensor | None]:
    """Inputs of a layer at the sizes of a real one: y and both parts of it are of order one."""
    f64 = {"dtype": torch.float64, "device": device}
    tensors: dict[str, Tensor | None] = {
        "x": torch.randn(tokens, d_in, **f64),
        "weight": torch.randn(d_out, d_in, **f64) / d_in**0.5,
        "bias": torch.randn(d_out, **f64),
        "a": torch.randn(rank, d_in, **f64) / d_in**0.5,
        "b": torch.randn(d_out, rank, **f64) / rank**0.5,
        "q_a": torch.linalg.qr(torch.randn(d_in, rank, **f64))[0].mT if decoupled else None,
        "q_b": torch.linalg.qr(torch.randn(d_out, rank, **f64))[0] if decoupled else None,
    }
    return {name: None if t is None else t.to(dtype) for name, t in tensors.items()}


def naive(x, weight, bias, a, b, scale, q_a=None, q_b=None, mask=None, keep=1.0):
    """The formula, as one would write it in plain PyTorch; Q are constants."""
    x_adapter = x if mask is None else x * mask / keep
    delta = (x_adapter @ a.mT) @ b.mT if q_a is None else (x_adapter @ a.mT) @ q_b.mT + (x_adapter @ q_a.mT) @ b.mT
    return scale * delta if weight is None else F.linear(x, weight, bias) + scale * delta


def run_with_grads(function, tensors, grad, dtype, **kwargs) -> dict[str, Tensor]:
    """y and all gradients of ``function`` in ``dtype``."""
    inputs = {n: None if t is None else t.to(dtype).detach().requires_grad_(n in NAMES) for n, t in tensors.items()}
    leaves = {n: inputs[n] for n in NAMES if inputs[n] is not None}
    y = function(**inputs, **kwargs)
    grads = torch.autograd.grad(y, list(leaves.values()), grad.to(dtype))
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def assert_as_good_as_torch(ours: dict[str, Tensor], torchs: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> None:
    """|out − ref64| ≤ 2·|torch in the same dtype − ref64| + 8·eps·max|ref64|, maxima over elements."""
    assert ours.keys() == exact.keys()
    for name, reference in exact.items():
        assert ours[name].dtype == dtype
        error, floor = ((t[name].double() - reference).abs().max() for t in (ours, torchs))
        assert error <= 2 * floor + 8 * torch.finfo(dtype).eps * reference.abs().max(), f"{name}: {error:.3g}, torch has {floor:.3g}"


@pytest.mark.parametrize("decoupled", [False, True], ids=["plain", "decoupled"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_forward_and_gradients(device: str, backend: str, dtype: torch.dtype, decoupled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0
    for tokens, d_in, d_out, rank, whole, dropped in [
        (37, 40, 24, 5, True, False),
        (64, 64, 96, 16, True, True),
        (1, 96, 80, 8, True, False),
        (20, 33, 17, 1, True, False),
        (50, 48, 31, 8, False, True),
        (130, 160, 144, 64, True, True),
    ]:
        tensors = make(tokens, d_in, d_out, rank, dtype, device, decoupled)
        if not whole:
            tensors |= {"weight": None, "bias": None}
        # One mask for all three: the operation draws it by bernoulli_, which is answered with ours.
        keep = 0.75 if dropped else 1.0
        mask = torch.rand(tokens, d_in, device=device) < keep if dropped else None
        if mask is not None:
            monkeypatch.setattr(Tensor, "bernoulli_", lambda self, p, mask=mask: self.copy_(mask))
        grad = torch.randn(tokens, d_out, dtype=torch.float64, device=device).to(dtype)
        exact = run_with_grads(naive, tensors, grad, torch.float64, scale=0.7, mask=mask, keep=keep)
        plain = run_with_grads(naive, tensors, grad, dtype, scale=0.7, mask=mask, keep=keep)
        try:
            with registry.force(f"{backend},lora_linear_backward={backend}"):
                ours = run_with_grads(ops.lora_linear, tensors, grad, dtype, scale=0.7, dropout=1 - keep)
        except registry.BackendError:  # this backend leaves the call to another one, which has its own turn
            continue
        taken += 1
        assert_as_good_as_torch(ours, plain, exact, dtype)
    if not taken:
        pytest.skip(f"{backend} does not take lora_linear on {device}")


@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (2, 3, 4), (0,), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("decoupled", [False, True], ids=["plain", "decoupled"])
def test_leading_dimensions(leading: tuple[int, ...], decoupled: bool) -> None:
    t = make(1, 6, 5, 2, decoupled=decoupled)
    t["x"] = torch.randn(*leading, 6, dtype=torch.float64)
    grad = torch.randn(*leading, 5, dtype=torch.float64)
    ours = run_with_grads(ops.lora_linear, t, grad, torch.float64, scale=2.0)
    expected = run_with_grads(naive, t, grad, torch.float64, scale=2.0)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-12, atol=1e-12)


def test_strided_inputs_are_read_where_they_are() -> None:
    t = make(9, 6, 5, 2, decoupled=True)
    strided = {
        n: (torch.full((*v.shape[:-1], 2 * v.shape[-1]), torch.nan, dtype=v.dtype)[..., ::2]).copy_(v) if n != "b" else v.mT.contiguous().mT
        for n, v in t.items()
    }
    grad = torch.randn(5, 9, dtype=torch.float64).mT
    ours = run_with_grads(ops.lora_linear, strided, grad, torch.float64, scale=2.0)
    expected = run_with_grads(naive, t, grad, torch.float64, scale=2.0)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decoupled", [False, True], ids=["plain", "decoupled"])
def test_gradcheck_and_opcheck(decoupled: bool) -> None:
    t = make(4, 6, 5, 2, decoupled=decoupled)
    leaves = [t[n].requires_grad_() for n in NAMES]
    assert torch.autograd.gradcheck(lambda *args: ops.lora_linear(*args, 0.5, q_a=t["q_a"], q_b=t["q_b"]), leaves)
    adapter = [t["x"], t["a"], t["b"]]
    assert torch.autograd.gradcheck(lambda x, a, b: ops.lora_linear(x, None, None, a, b, 0.5, q_a=t["q_a"], q_b=t["q_b"]), adapter)
    mask = torch.rand(4, 6) < 0.5
    torch.library.opcheck(torch.ops.lowrank_kernels.lora_linear, (*leaves, t["q_a"], t["q_b"], 0.5, mask, 0.5, None))
    torch.library.opcheck(
        torch.ops.lowrank_kernels.lora_linear, (t["x"], None, None, t["a"], t["b"], t["q_a"], t["q_b"], 0.5, None, 1.0, None)
    )
    grad, hidden = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    x, weight, _, a, b = (leaf.detach() for leaf in leaves)
    for needs in ([True] * 5, [False, False, False, True, True], [True, False, False, False, False]):
        args = (grad, x, weight, a, b, t["q_a"], t["q_b"], hidden, 0.5, mask, 0.5, [*needs, False], None)
        torch.library.opcheck(torch.ops.lowrank_kernels.lora_linear_backward, args)


def gemms(function) -> list[tuple[int, int, int]]:
    """The (m, k, n) of every matrix product that ``function`` executes, wherever it does."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        function()
    found = []
    for event in profile.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::mv", "aten::dot"):
            assert event.name.startswith(("aten::mm", "aten::addmm")), event.name
            left, right = event.input_shapes[-2:] if event.name == "aten::mm" else event.input_shapes[1:3]
            found.append((left[0], left[1], right[1]))
    return sorted(found)


T, D_IN, D_OUT, R = 11, 13, 17, 3  # all different, and no sum of two of them is a third


@pytest.mark.parametrize("decoupled", [False, True], ids=["plain", "decoupled"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    "wanted", [("x", "a", "b"), ("a", "b"), ("a",), ("b",), ("x",), ("x", "weight", "bias", "a", "b"), ("bias",)], ids=str
)
def test_no_gemm_for_a_gradient_that_nobody_asked_for(wanted: tuple[str, ...], dropout: float, decoupled: bool) -> None:
    t = make(T, D_IN, D_OUT, R, decoupled=decoupled)
    for name in wanted:
        t[name].requires_grad_()
    with registry.force("reference"):
        y = ops.lora_linear(t["x"], t["weight"], t["bias"], t["a"], t["b"], 2.0, q_a=t["q_a"], q_b=t["q_b"], dropout=dropout)
        executed = gemms(lambda: y.backward(torch.ones_like(y)))
    inner = 2 * R if decoupled else R
    expected = []
    if "x" in wanted:  # ∂y W0, and through the whole low-rank product
        expected += [(T, D_OUT, D_IN), (T, D_OUT, inner), (T, inner, D_IN)]
    elif "a" in wanted:  # ∂y B or ∂y Q_B alone
        expected += [(T, D_OUT, R)]
    expected += [(R, T, D_IN)] * ("a" in wanted) + [(D_OUT, T, R)] * ("b" in wanted) + [(D_OUT, T, D_IN)] * ("weight" in wanted)
    assert executed == sorted(expected)
    for name in NAMES:
        assert (t[name].grad is not None) == (name in wanted)


def test_nothing_is_kept_for_gradients_that_nobody_asked_for() -> None:
    t = make(T, D_IN, D_OUT, R, decoupled=True)
    t["b"].requires_grad_()
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: (kept.append(tuple(s.shape)), s)[1], lambda s: s):
        ops.lora_linear(t["x"], t["weight"], t["bias"], t["a"], t["b"], q_a=t["q_a"], q_b=t["q_b"])
    assert (T, D_IN) not in kept and (D_OUT, D_IN) not in kept and (T, R) in kept


def test_double_use_in_one_graph_adds_up() -> None:
    t = make(T, D_IN, D_IN, R, decoupled=True)
    ours = {n: v.clone().requires_grad_(n in ("x", "a", "b")) for n, v in t.items()}
    theirs = {n: v.clone().requires_grad_(n in ("x", "a", "b")) for n, v in t.items()}
    for function, s in ((ops.lora_linear, ours), (naive, theirs)):
        y = s["x"]
        for _ in range(2):
            y = function(y, s["weight"], s["bias"], s["a"], s["b"], 0.3, q_a=s["q_a"], q_b=s["q_b"])
        y.square().sum().backward()
    for name in ("x", "a", "b"):
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["plain", "decoupled", "core"])
def test_transforms_of_torch_func(kind: str) -> None:
    t = make(T, D_IN, D_OUT, R, decoupled=kind == "decoupled")
    options = {name: t[name] for name in ("q_a", "q_b") if name in t}
    delta = t["b"] @ t["a"]
    if kind == "core":
        options["core"] = torch.randn(R, R, dtype=t["a"].dtype)
        delta = t["b"] @ options["core"] @ t["a"]
    elif kind == "decoupled":
        delta = t["q_b"] @ t["a"] + t["b"] @ t["q_a"]

    def ours(x: Tensor, a: Tensor) -> Tensor:
        return ops.lora_linear(x, t["weight"], t["bias"], a, t["b"], 0.3, **options)

    weight, x, v = t["weight"] + 0.3 * delta, t["x"].detach(), torch.randn_like(t["x"])
    close = functools.partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)
    close(torch.func.jvp(lambda x: ours(x, t["a"]), (x,), (v,))[1], v @ weight.mT)
    close(torch.func.jacfwd(lambda x: ours(x, t["a"]))(x[0]), weight)
    with torch.autograd.forward_ad.dual_level():
        y = ours(torch.autograd.forward_ad.make_dual(x, v), t["a"].clone().requires_grad_())
        close(torch.autograd.forward_ad.unpack_dual(y).tangent.detach(), v @ weight.mT)
    a = t["a"].detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(ours(x, a).square().sum(), a)
    close(torch.func.grad(lambda a: ours(x, a).square().sum())(a.detach()), expected)
    per_row = torch.func.vmap(torch.func.grad(lambda a, x: ours(x, a).square().sum()), (None, 0))(a.detach(), x)
    close(per_row.sum(0), expected)
    with pytest.raises(RuntimeError, match="cannot be captured under torch.func"):
        torch.func.grad(lambda a: ops.lora_linear(x, None, None, a, t["b"], capture=print).sum())(t["a"])


def test_second_derivatives_are_refused() -> None:
    t = make(T, D_IN, D_OUT, R)
    t["a"].requires_grad_()
    y = ops.lora_linear(t["x"], t["weight"], t["bias"], t["a"], t["b"])
    (grad,) = torch.autograd.grad(y.square().sum(), t["a"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


def test_dropout_drops_the_adapters_input_only_and_only_in_training() -> None:
    t = make(4096, 8, 6, 2)
    args = (t["x"], t["weight"], t["bias"], t["a"], t["b"], 1.5)
    base = F.linear(t["x"], t["weight"], t["bias"])
    undropped = ops.lora_linear(*args)
    assert torch.equal(ops.lora_linear(*args, dropout=0.4, training=False), undropped)
    torch.manual_seed(5)
    dropped = ops.lora_linear(*args, dropout=0.4)
    torch.manual_seed(5)
    assert torch.equal(ops.lora_linear(*args, dropout=0.4), dropped)
    # A is a projection on one input: the adapter's hidden unit is then x or 0, and 1/keep undoes the mean loss.
    one = torch.zeros(1, 8, dtype=torch.float64)
    one[0, 3] = 1
    b = torch.ones(6, 1, dtype=torch.float64)
    ratio = (ops.lora_linear(t["x"], t["weight"], t["bias"], one, b, dropout=0.4) - base)[:, 0] / t["x"][:, 3]
    kept = ratio.abs() > 1e-6
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.6), rtol=1e-6, atol=0)
    assert abs(kept.double().mean() - 0.6) < 5 * (0.24 / 4096) ** 0.5


@pytest.mark.parametrize("decoupled", [False, True], ids=["plain", "decoupled"])
def test_autocast_casts_as_linear_does(decoupled: bool) -> None:
    t = make(T, D_IN, D_OUT, R, torch.float32, decoupled=decoupled)
    leaves = {n: t[n].requires_grad_() for n in ("x", "a", "b")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.lora_linear(t["x"], t["weight"], t["bias"], t["a"], t["b"], 0.5, q_a=t["q_a"], q_b=t["q_b"])
        assert y.dtype == F.linear(t["x"], t["weight"], t["bias"]).dtype == torch.bfloat16
        y.float().sum().backward()  # inside, as a training loop may well do
    low = {n: None if v is None else v.detach().bfloat16() for n, v in t.items()}
    expected = run_with_grads(ops.lora_linear, low, torch.ones(T, D_OUT), torch.bfloat16, scale=0.5)
    assert torch.equal(y, expected["y"])
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, expected[f"d{name}"].float())


def test_factors_of_another_dtype_get_gradients_in_their_own() -> None:
    t = make(T, D_IN, D_OUT, R, torch.bfloat16)
    a, b = t["a"].float().requires_grad_(), t["b"].float().requires_grad_()
    ops.lora_linear(t["x"], t["weight"], t["bias"], a, b).sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32


@pytest.mark.parametrize("decoupled", [False, True], ids=["plain", "decoupled"])
def test_compiles_without_graph_breaks(decoupled: bool) -> None:
    t = make(T, D_IN, D_OUT, R, torch.float32, decoupled=decoupled)

    def function(x, weight, bias, a, b, q_a, q_b, scale):
        return ops.lora_linear(x, weight, bias, a, b, scale, q_a=q_a, q_b=q_b)

    grad = torch.randn(T, D_OUT)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours = run_with_grads(compiled, t, grad, torch.float32, scale=0.5)
    eager = run_with_grads(function, t, grad, torch.float32, scale=0.5)
    for name in eager:
        assert torch.equal(ours[name], eager[name]), name


def test_meta_tensors_give_shapes() -> None:
    t = {n: None if v is None else v.to("meta") for n, v in make(T, D_IN, D_OUT, R, decoupled=True).items()}
    y = ops.lora_linear(t["x"].expand(2, T, D_IN), t["weight"], t["bias"], t["a"], t["b"], q_a=t["q_a"], q_b=t["q_b"])
    assert y.is_meta and y.shape == (2, T, D_OUT)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": torch.randn(2, 7)}, ValueError, r"a must be \(2, 6\)"),
        ({"b": torch.randn(5, 3)}, ValueError, r"b must be \(5, 2\)"),
        ({"weight": torch.randn(4, 6)}, ValueError, r"weight must be \(5, 6\)"),
        ({"bias": torch.randn(4)}, ValueError, r"bias must be \(5,\)"),
        ({"q_a": torch.randn(2, 6)}, ValueError, "q_a and q_b come together, got only q_a"),
        ({"q_b": torch.randn(5, 2)}, ValueError, "q_a and q_b come together, got only q_b"),
        ({"q_a": torch.randn(2, 6), "q_b": torch.randn(5, 3)}, ValueError, "q_b must be"),
        ({"x": torch.randn(())}, ValueError, "need x"),
        ({"a": torch.randn(6)}, ValueError, "need x"),
        ({"x": torch.randint(0, 9, (4, 6))}, TypeError, "x has dtype torch.int64"),
        ({"a": torch.zeros(2, 6, dtype=torch.int8)}, TypeError, "a has dtype torch.int8"),
        ({"weight": torch.randn(5, 6).bfloat16()}, TypeError, "weight is torch.bfloat16, x is torch.float32"),
        ({"a": torch.randn(2, 6, device="meta")}, ValueError, "a is on meta, x on cpu"),
        ({"weight": None}, ValueError, "bias without a weight"),
        ({"dropout": 1.0}, ValueError, "dropout must be"),
        ({"dropout": -0.1}, ValueError, "dropout must be"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = make(4, 6, 5, 2, torch.float32)
    ops.lora_linear(**arguments)
    with pytest.raises(error, match=message):
        ops.lora_linear(**(arguments | change))


class _Record(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("decoupled", [False, True], ids=["plain", "decoupled"])
def test_dispatch_modes_see_the_operation_and_eager_calls_give_the_same(decoupled: bool) -> None:
    t = make(T, D_IN, D_OUT, R, torch.float32, decoupled=decoupled)
    grad = torch.randn(T, D_OUT)
    eager = run_with_grads(ops.lora_linear, t, grad, torch.float32, scale=0.5)
    with _Record() as mode:
        node = run_with_grads(ops.lora_linear, t, grad, torch.float32, scale=0.5)
    assert {"lowrank_kernels::lora_linear", "lowrank_kernels::lora_linear_backward"} <= set(mode.seen)
    assert all(torch.equal(node[name], eager[name]) for name in eager)


def test_the_result_may_be_changed_in_place() -> None:
    t = make(T, D_IN, D_OUT, R)
    a = t["a"].requires_grad_()
    expected = naive(t["x"], t["weight"], t["bias"], a, t["b"], 1.0).relu().sum()
    y = ops.lora_linear(t["x"], t["weight"], t["bias"], a, t["b"])
    (ours,) = torch.autograd.grad(F.relu(y, inplace=True).sum(), a)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, a)[0], rtol=1e-12, atol=1e-12)
