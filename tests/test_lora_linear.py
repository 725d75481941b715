"""``ops.lora_linear``: forward and backward against fp64, by the tolerance rule of the package, and what it must not compute."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import checkpoint

from lowrank_kernels import ops
from lowrank_kernels.backends import reference, registry

module = importlib.import_module("lowrank_kernels.ops.lora_linear")
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
    for name, truth in exact.items():
        assert ours[name].dtype == dtype
        error, floor = ((t[name].double() - truth).abs().max() for t in (ours, torchs))
        assert error <= 2 * floor + 8 * torch.finfo(dtype).eps * truth.abs().max(), f"{name}: {error:.3g}, torch has {floor:.3g}"


@pytest.mark.parametrize("decoupled", [False, True], ids=["plain", "decoupled"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_forward_and_gradients(device: str, backend: str, dtype: torch.dtype, decoupled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0
    for tokens, d_in, d_out, rank, whole, dropped in [
        (37, 40, 24, 5, True, None),
        (64, 64, 96, 16, True, "mask"),
        (1, 96, 80, 8, True, None),
        (20, 33, 17, 1, True, "seed"),
        (50, 48, 31, 8, False, "mask"),
        (50, 48, 31, 8, False, "seed"),
        (130, 160, 144, 64, True, "seed"),
    ]:
        tensors = make(tokens, d_in, d_out, rank, dtype, device, decoupled)
        if not whole:
            tensors |= {"weight": None, "bias": None}
        # One mask for all three: what the operation draws is ours.
        keep = 0.75 if dropped else 1.0
        mask, seed = torch.rand(tokens, d_in, device=device) < keep if dropped else None, torch.randint(2**62, (1,), device=device)
        drawn = (mask, None, keep)
        if dropped == "seed":
            mask, drawn = reference.dropout.dropout_mask(seed, tokens, d_in, keep), (None, seed, keep)
        monkeypatch.setattr(module, "_draw", lambda x, rank, p, drawn=drawn: drawn)
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


@pytest.mark.parametrize("leading", [(7,), (2, 3)], ids=str)
@pytest.mark.parametrize("wanted", ["x", "a", "none"])
def test_the_output_may_be_written_in_place(leading: tuple[int, ...], wanted: str) -> None:
    t = make(1, 6, 5, 2, decoupled=True)
    t["x"] = torch.randn(*leading, 6, dtype=torch.float64)
    if wanted != "none":
        t[wanted].requires_grad_()
    results = []
    for function in (ops.lora_linear, naive):
        y = function(t["x"], t["weight"], t["bias"], t["a"], t["b"], 0.7, q_a=t["q_a"], q_b=t["q_b"])
        y = F.relu(y.mul_(2.0), inplace=True)
        results.append([y.detach(), *(torch.autograd.grad(y.sum(), t[wanted]) if wanted != "none" else ())])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


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
    seed = torch.tensor([7])
    torch.library.opcheck(torch.ops.lowrank_kernels.lora_linear, (*leaves, t["q_a"], t["q_b"], 0.5, mask, 0.5, None))
    torch.library.opcheck(torch.ops.lowrank_kernels.lora_linear, (*leaves, t["q_a"], t["q_b"], 0.5, None, 0.5, None, seed))
    torch.library.opcheck(
        torch.ops.lowrank_kernels.lora_linear, (t["x"], None, None, t["a"], t["b"], t["q_a"], t["q_b"], 0.5, None, 1.0, None)
    )
    grad, hidden = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    x, weight, _, a, b = (leaf.detach() for leaf in leaves)
    for needs in ([True] * 5, [False, False, False, True, True], [True, False, False, False, False]):
        args = (grad, x, weight, a, b, t["q_a"], t["q_b"], hidden, 0.5, mask, 0.5, [*needs, False], None)
        torch.library.opcheck(torch.ops.lowrank_kernels.lora_linear_backward, args)
        torch.library.opcheck(torch.ops.lowrank_kernels.lora_linear_backward, (*args[:9], None, 0.5, [*needs, False], None, seed))


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


T, D_IN, D_OUT, R = 41, 13, 17, 3  # all different, and no sum of two of them is a third


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
    # ∂B as its transpose: on the CPU that is faster with few columns.
    expected += [(R, T, D_IN)] * ("a" in wanted) + [(R, T, D_OUT)] * ("b" in wanted) + [(D_OUT, T, D_IN)] * ("weight" in wanted)
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
    with pytest.raises(RuntimeError, match="a torch.func transform .* captures no full gradients"):
        torch.func.grad(lambda a: ops.lora_linear(x, None, None, a, t["b"], capture=print).sum())(t["a"])


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", ["plain", "decoupled", "core", "dropout", "alone"])
def test_second_derivatives(kind: str, dims: int) -> None:
    t = make(6, 5, 4, 2, decoupled=kind == "decoupled")
    x = torch.randn({1: (5,), 2: (6, 5), 3: (3, 5, 2)}[dims], dtype=torch.float64)
    x = x.mT if dims == 3 else x  # which is not contiguous
    options = {"q_a": t["q_a"], "q_b": t["q_b"], "dropout": 0.4 if kind == "dropout" else 0.0}
    inputs = [x, *(None if kind == "alone" and n in ("weight", "bias") else t[n] for n in ("weight", "bias", "a", "b"))]
    inputs.append(torch.randn(2, 2, dtype=torch.float64) if kind == "core" else None)
    given = [tensor.detach().requires_grad_() for tensor in inputs if tensor is not None]

    def function(*given: Tensor) -> Tensor:
        found = iter(given)
        x, weight, bias, a, b, core = (None if tensor is None else next(found) for tensor in inputs)
        torch.manual_seed(0)
        return ops.lora_linear(x, weight, bias, a, b, 0.7, core=core, **options)

    assert torch.autograd.gradgradcheck(function, given)


@pytest.mark.parametrize("trained", ["x", "a", "b", "xa", "ab"])
@pytest.mark.parametrize("kind", ["plain", "decoupled"])
def test_second_derivatives_where_parts_are_frozen(kind: str, trained: str) -> None:
    """Through x before the layer, and what comes after it: a gradient penalty. Only what is trained is kept for them."""
    t = make(6, 5, 4, 2, decoupled=kind == "decoupled")
    penalties = []
    for function in (ops.lora_linear, naive):
        inputs = {n: t[n].clone().requires_grad_(n in trained) for n in ("x", "a", "b")}
        y = function(inputs["x"], t["weight"], t["bias"], inputs["a"], inputs["b"], 0.7, q_a=t["q_a"], q_b=t["q_b"])
        wanted = [inputs[n] for n in trained]
        first = torch.autograd.grad(y.sin().sum(), wanted, create_graph=True)
        penalties.append(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))
    for ours, expected in zip(*penalties, strict=True):
        torch.testing.assert_close(ours, expected)


def test_second_derivatives_without_the_input_are_refused() -> None:
    t = make(T, D_IN, D_OUT, R)
    t["x"].requires_grad_(), t["b"].requires_grad_()
    y = ops.lora_linear(t["x"], t["weight"], t["bias"], t["a"], t["b"])
    (grad,) = torch.autograd.grad(y.square().sum(), t["b"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"not kept where A is frozen and B or the core trains\. Let A train, or use torch\.func\.grad"):
        grad.sum().backward()

    def penalty(x: Tensor) -> Tensor:
        of_b = torch.func.grad(lambda b: ops.lora_linear(x, t["weight"], t["bias"], t["a"], b).square().sum())(t["b"].detach())
        return of_b.square().sum()

    assert torch.func.grad(penalty)(t["x"].detach()).abs().max() > 0


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


# --- dropout by seed --------------------------------------------------------------------------------------------------


def unsigned(*words: int) -> int:
    """64 bits as the int64 that holds them."""
    value = sum(word << 32 * i for i, word in enumerate(words))
    return value - 2**64 if value >= 2**63 else value


PI = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))


@pytest.mark.parametrize(
    ("counter", "key", "rounds", "expected"),
    [
        ((0,) * 4, (0,) * 2, 10, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, 10, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (*PI, 10, "d16cfe09 94fdcceb 5001e420 24126ea1"),
        ((0,) * 4, (0,) * 2, 7, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, 7, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (*PI, 7, "4dfccaba 190a87f0 c47362ba b6b5242a"),
    ],
)
def test_random_bits_are_philoxs(counter: tuple[int, ...], key: tuple[int, int], rounds: int, expected: str) -> None:
    """The known answers of the authors' library, Random123."""
    seed, words = torch.tensor([unsigned(*key)]), tuple(torch.tensor([word]) for word in counter)
    assert " ".join(f"{int(word):08x}" for word in reference.dropout.philox4x32(seed, words, rounds)) == expected


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9, 1 / 65536, 1.0])
def test_masks_of_seeds_look_random(keep: float) -> None:
    tokens, columns = 4096, 100
    keep = round(keep * 65536) / 65536
    masks = torch.stack([reference.dropout.dropout_mask(torch.tensor([seed]), tokens, columns, keep) for seed in (1, 2, 2**32 + 1, -1)])
    noise = masks.double() - keep
    deviation = (keep * (1 - keep)) ** 0.5

    def unbiased(values: Tensor, of: float) -> bool:
        """Whether the means over the tokens (or more) could be those of independent values: none beyond 5.5 sigma, 800 of them at most."""
        return bool((values.mean(1).abs() <= 5.5 * of / math.sqrt(values.shape[1]) + 1e-12).all())

    assert unbiased(noise.flatten(1), deviation)
    assert unbiased(noise.movedim(1, 2).flatten(0, 1), deviation)
    for shift, dim in ((1, 1), (1, 2), (2, 2), (4, 2), (8, 2)):  # neighbours, halves and words of one counter, neighbouring counters
        products = (noise * noise.roll(shift, dim)).movedim(1, 2).flatten(0, 1)
        assert unbiased(products, deviation**2) or keep < 0.01  # where hardly any entry is kept, products are far from Gaussian
    for other in (1, 2, 3):
        assert unbiased((noise[0] * noise[other]).flatten()[None], deviation**2) or keep < 0.01
    assert keep < 1 or masks.all()


def test_a_mask_depends_on_seed_token_and_column_alone() -> None:
    seed = torch.tensor([2**62 + 12345])
    whole = reference.dropout.dropout_mask(seed, 70, 70, 0.5)
    for tokens, columns in ((1, 1), (70, 8), (3, 69), (0, 5), (64, 64)):
        assert torch.equal(reference.dropout.dropout_mask(seed, tokens, columns, 0.5), whole[:tokens, :columns])


def test_who_draws_seeds() -> None:
    pytest.importorskip("triton")
    assert module._by_seed(torch.device("cuda"), torch.bfloat16, 128)
    assert not module._by_seed(torch.device("cuda"), torch.bfloat16, 129)  # a rank that Triton refuses
    assert not module._by_seed(torch.device("cpu"), torch.float32, 8)
    assert not module._by_seed(torch.device("meta"), torch.float32, 8)
    with registry.force("reference"):
        assert not module._by_seed(torch.device("cuda"), torch.bfloat16, 8)
    with registry.force("lora_linear=triton"):
        assert module._by_seed(torch.device("cuda"), torch.float32, 8)


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout by seed on every backend, also on those that would draw a mask."""
    monkeypatch.setattr(module, "_by_seed", lambda *args: True)


def test_a_seed_is_all_that_is_kept(seeded: None) -> None:
    t = make(T, D_IN, D_OUT, R, decoupled=True)
    leaves = [t[name].requires_grad_() for name in ("x", "a", "b")]
    kept: list[Tensor] = []
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(lambda s: (kept.append(s), s)[1], lambda s: s):
        y = ops.lora_linear(t["x"], t["weight"], None, t["a"], t["b"], q_a=t["q_a"], q_b=t["q_b"], dropout=0.4)
    assert not any(s.dtype == torch.bool for s in kept)
    (seed,) = (s for s in kept if s.dtype == torch.int64)
    # Forward, ∂x and ∂A used its mask, with the rounded probability.
    keep = round(0.6 * 65536) / 65536
    mask = reference.dropout.dropout_mask(seed, T, D_IN, keep)
    expected = naive(t["x"], t["weight"], None, t["a"], t["b"], 1.0, t["q_a"], t["q_b"], mask, keep)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    # The generator decides.
    torch.manual_seed(3)
    assert torch.equal(ops.lora_linear(t["x"], t["weight"], None, t["a"], t["b"], q_a=t["q_a"], q_b=t["q_b"], dropout=0.4), y)
    assert not torch.equal(ops.lora_linear(t["x"], t["weight"], None, t["a"], t["b"], q_a=t["q_a"], q_b=t["q_b"], dropout=0.4), y)


def test_what_is_captured_is_the_input_behind_the_seeds_mask(seeded: None) -> None:
    t = make(T, D_IN, D_OUT, R)
    a = t["a"].requires_grad_()
    found: list[Tensor] = []
    y = ops.lora_linear(t["x"], t["weight"], None, a, t["b"], 0.7, dropout=0.4, capture=lambda x, grad: found.extend((x, grad)))
    (of_a,) = torch.autograd.grad(y.square().sum(), a)
    x, grad = found
    torch.testing.assert_close(0.7 * t["b"].mT @ (grad.mT @ x), of_a, rtol=1e-11, atol=1e-11)
    assert (x == 0).any() and not (x == 0).all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_a_seed(seeded: None, reentrant: bool) -> None:
    t = make(T, D_IN, D_IN, R)
    leaves = [t[name].requires_grad_() for name in ("x", "a", "b")]

    def function(x: Tensor) -> Tensor:
        for _ in range(2):
            x = ops.lora_linear(x, t["weight"], None, t["a"], t["b"], 0.7, dropout=0.4)
        return x.square().sum()

    found = []
    for run in (function, lambda x: checkpoint.checkpoint(function, x, use_reentrant=reentrant)):
        torch.manual_seed(11)
        found.append([y := run(t["x"]), *torch.autograd.grad(y, leaves)] if not reentrant else _backward(run, t["x"], leaves))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def _backward(run, x: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """As torch.autograd.grad, which reentrant checkpointing refuses."""
    for leaf in leaves:
        leaf.grad = None
    y = run(x)
    y.backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(
    "backend, dynamic", [("aot_eager", None), ("aot_eager", True), pytest.param("inductor", None, marks=pytest.mark.large)]
)
def test_seeds_compile_without_graph_breaks(backend: str, dynamic: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    device = DEVICES[-1]
    if device == "cpu" and not importlib.import_module("lowrank_kernels.backends.triton._launch").INTERPRET:
        pytest.skip("Triton needs a GPU or its interpreter")
    t = make(T, D_IN, D_OUT, R, torch.float32, device)
    leaves = [t[name].requires_grad_() for name in ("x", "a", "b")]

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ops.lora_linear(x, t["weight"], None, a, b, 0.5, dropout=0.4)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    with registry.force("triton"):
        torch.manual_seed(2)
        y = compiled(*leaves)
        grads = torch.autograd.grad(y.sum(), leaves)
        assert not torch.equal(compiled(*leaves), y)
        # Linear in x: only the forward pass's own mask gives back its sum.
        torch.testing.assert_close((grads[0] * t["x"]).sum(), y.sum(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close((grads[1] * t["a"]).sum(), (grads[2] * t["b"]).sum(), rtol=1e-4, atol=1e-4)
        if backend == "aot_eager":  # inductor has a generator of its own
            torch.manual_seed(2)
            assert torch.equal(function(*leaves), y)


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
        *[({"dropout": value}, TypeError, "dropout must be a number") for value in ("x", None, [1], torch.ones(()))],
        *[({"scale": value}, TypeError, "scale must be a number") for value in (None, "x", [1], 1j, torch.ones((), requires_grad=True))],
        *[({"scale": value}, ValueError, "scale must be finite") for value in (math.nan, math.inf, 10**400)],
        ({"training": "x"}, TypeError, "training must be True or False"),
        ({"capture": "x"}, TypeError, "capture must be a function"),
        *[({name: torch.zeros(5, 6).to_sparse()}, TypeError, f"{name} is torch.sparse_coo") for name in ("x", "weight", "b", "core")],
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


def test_what_is_captured_is_the_input_behind_dropout() -> None:
    """As the forward has it: 0 where an entry was dropped, whatever it was."""
    t = {"a": torch.randn(3, 6, requires_grad=True), "b": torch.randn(5, 3, requires_grad=True)}
    x, seen = torch.full((40, 6), 2.0), []
    x[7] = torch.inf
    y = ops.lora_linear(x, None, None, **t, dropout=0.5, capture=lambda x, grad: seen.append(x))
    y[torch.arange(40) != 7].sum().backward()
    (captured,) = seen
    assert set(captured[:7].unique().tolist()) == {0.0, 4.0} and set(captured[7].unique().tolist()) == {0.0, torch.inf}
