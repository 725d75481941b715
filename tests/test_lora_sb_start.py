"""LoRA-SB's start and the others (svd, PiSSA, LoRA-GA): definitions, memory, two ranks, what must be as before afterwards."""

from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import torch
from _lora_sb import full_gradients, init, make_batches, mse, network, xs_model
from _models import loss_of, make_model, pair_delta
from _optimizers import run
from _ranks import Ranks
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lk
from benchmarks.naive.lora_sb import lora_sb_start
from lowrank_kernels import pairs

# ------------------------------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize("update", ["adam", "sgd"])
def test_the_start_is_the_definition_when_the_svd_is_exact(update: str) -> None:
    model = lk.adapt(network(), method="xs", rank=3, alpha=6.0)
    batches = make_batches()
    gradients = [full_gradients(network(), batch) for batch in batches]
    report = init(model, batches, update=update, oversample=20, iterations=4)
    assert report.samples == 24
    for pair in pairs(model):
        g = [gradient[pair.name] for gradient in gradients]
        b, r, a = lora_sb_start(g, 3, pair.scale, 0.1, update)
        torch.testing.assert_close(pair.core.detach(), r, rtol=1e-9, atol=1e-12)
        sign = (pair.B * b).sum(dim=0).sign()
        torch.testing.assert_close(pair.B * sign, b, rtol=0, atol=1e-8)
        torch.testing.assert_close(pair.A * sign[:, None], a, rtol=0, atol=1e-8)
        step = sum(g).sign() if update == "adam" else sum(g)
        share = (torch.linalg.svdvals(step)[:3].square().sum() / step.square().sum()).item()
        assert report.energy[pair.name] == pytest.approx(share, rel=1e-9)


def test_a_learning_rate_of_numpy_is_taken() -> None:
    model, twin = (lk.adapt(network(), method="xs", rank=2) for _ in range(2))
    init(model, make_batches(), lr=np.float32(0.5))
    init(twin, make_batches(), lr=0.5)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    with pytest.raises(TypeError, match="lr must be a number, got '0.5'"):
        init(model, make_batches(), lr="0.5")


def test_batches_weigh_as_many_as_they_have_samples_and_stop_at_samples() -> None:
    x, y = make_batches(1, rows=12)[0]
    whole, parts, first = (lk.adapt(network(), method="xs", rank=2) for _ in range(3))
    init(whole, [(x, y)], update="sgd")
    init(parts, [{"x": x[:9], "y": y[:9]}, {"x": x[9:], "y": y[9:]}], lambda m, b: mse(m, (b["x"], b["y"])), update="sgd")
    ignored = {"names": ["a"] * 12, "empty": []}
    report = init(first, [(ignored, x, y), (ignored, x * torch.nan, y)], lambda m, b: mse(m, b[1:]), update="sgd", samples=12)
    assert report.samples == 12
    for p, q, r in zip(pairs(whole), pairs(parts), pairs(first), strict=True):
        torch.testing.assert_close(pair_delta(p), pair_delta(q), rtol=1e-8, atol=1e-12)
        assert torch.equal(pair_delta(p), pair_delta(r))


def test_inputs_may_be_single_vectors() -> None:
    one, many = (lk.adapt(network(), method="xs", rank=1) for _ in range(2))
    x, y = make_batches(1, rows=1)[0]
    init(one, [(x[0], y[0])], update="sgd")
    init(many, [(x, y)], update="sgd")
    for p, q in zip(pairs(one), pairs(many), strict=True):
        torch.testing.assert_close(pair_delta(p), pair_delta(q), rtol=1e-8, atol=1e-12)


class Shared(nn.Module):
    """One layer that is called twice, two layers that share a weight, ``ReLU(inplace=True)`` on their outputs, recomputation."""

    def __init__(self, recompute: bool | None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second, self.third = (nn.Linear(8, 8).double() for _ in range(3))
        self.third.weight = self.second.weight
        self.recompute = recompute

    def part(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.third(torch.relu(self.second(self.first(x)))), inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.first(x), inplace=True)
        if self.recompute is None:
            return self.part(x)
        return checkpoint(self.part, x.requires_grad_() if x.is_leaf else x, use_reentrant=self.recompute)


@pytest.mark.parametrize("recompute", [None, False, True])
def test_shared_layers_and_weights_and_recomputation(recompute: bool | None) -> None:
    x, y = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    bare = Shared(None)
    own = nn.Parameter(bare.third.weight.detach().clone())  # each use of the shared weight has its own gradient
    bare.third.weight = own
    (bare(x) - y).square().mean().backward()
    model = lk.adapt(Shared(recompute), method="xs", rank=8)
    init(model, [(x, y)], update="sgd", lr=1.0)
    for name, delta in lk.delta_weights(model).items():
        torch.testing.assert_close(delta, -getattr(bare, name).weight.grad, rtol=1e-7, atol=1e-10)
    assert model.second.base_layer.weight is model.third.base_layer.weight


class Quantized(nn.Linear):
    """A layer whose weight is no floating-point parameter: int8 with one scale, and a forward of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, dtype=torch.float32)
        self.step = linear.weight.detach().abs().max().float() / 127
        self.weight = nn.Parameter((linear.weight.float() / self.step).round().to(torch.int8), requires_grad=False)
        self.bias.data.copy_(linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.float() * self.step, self.bias)


def test_quantized_weights_get_the_gradient_of_the_dequantized_weight() -> None:
    bare = network(dtype=torch.float32)
    model = nn.Sequential(*(Quantized(m) if isinstance(m, nn.Linear) else nn.Tanh() for m in bare))
    for quantized, linear in zip(model[::2], bare[::2], strict=True):
        linear.weight.data.copy_(quantized.weight.float() * quantized.step)
    lk.adapt(model, method="xs", rank=9)
    lk.initialize(model)
    for layer, linear in zip(model[::2], bare[::2], strict=True):
        singular = torch.linalg.svdvals(linear.weight)[:9].square().sum()
        torch.testing.assert_close(layer.lora_B.square().sum(), singular, rtol=1e-4, atol=0)
    batches = make_batches(2, dtype=torch.float32)
    init(model, batches, update="sgd", lr=1.0)
    gradients = [full_gradients(bare, batch) for batch in batches]
    for name, delta in lk.delta_weights(model).items():
        g = (gradients[0][name] + gradients[1][name]) / 2
        u, s, vh = torch.linalg.svd(g, full_matrices=False)
        torch.testing.assert_close(delta, -u[:, :9] * s[:9] @ vh[:9], rtol=1e-3, atol=1e-5 * float(s[0]))


def test_everything_is_as_before_also_after_an_exception() -> None:
    model = nn.Sequential(network(), nn.BatchNorm1d(9).double(), nn.Dropout(0.5))
    lk.adapt(model[0], method="xs", rank=2)
    model[2].eval()
    model[1].weight.grad = torch.ones_like(model[1].weight)
    model[1].bias.requires_grad_(False)
    init(model, make_batches(1))

    def state() -> list[object]:
        tensors = [t.clone() for t in model.state_dict().values()]
        asks = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
        return [tensors, asks, [m.training for m in model.modules()], torch.get_rng_state()]

    def same(a: object, b: object) -> bool:
        if isinstance(a, Tensor):
            return torch.equal(a, b)
        return all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b

    def fails_late(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        torch.rand(3)
        fails_late.calls += 1
        if fails_late.calls == 3:
            raise RuntimeError("half-way")
        return mse(m, batch)

    fails_late.calls = 0
    before = state()
    with pytest.raises(RuntimeError, match="half-way"):
        init(model, make_batches(), fails_late, training=True)
    assert same(state(), before)
    outputs = model.eval()(make_batches(1)[0][0])
    model.train(), model[2].eval()
    init(model, make_batches(), lr=0.2, training=True)
    after = state()
    factors = [i for i, name in enumerate(model.state_dict()) if "lora_" in name]
    assert all(same(a, b) for i, (a, b) in enumerate(zip(after[0], before[0], strict=True)) if i not in factors)
    assert same(after[1:], before[1:])
    assert not torch.equal(outputs, model.eval()(make_batches(1)[0][0])), "the adapter works again"


@pytest.mark.parametrize("method", ["xs", "lora"])
@pytest.mark.parametrize("enabled", [True, False])
def test_encoders_are_started_without_their_fast_path(method: str, enabled: bool) -> None:
    """In eval mode, with all parameters frozen, torch's encoder reads weights and calls no layer; its attention never calls out_proj."""
    base = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
    ).double()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    loss = lambda m, b: m(b).square().mean()  # noqa: E731

    def start(model: nn.Module, function=loss, **options) -> lk.InitReport:
        options |= {"batches": [x], "loss_fn": function, "progress": False}
        return lk.initialize(model, "lora-ga", **options) if method == "lora" else lk.lora_sb_init(model, lr=0.1, **options)

    def fails(m: nn.Module, b: Tensor) -> Tensor:
        raise RuntimeError("half-way")

    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(enabled)
        model, trained = (lk.adapt(copy.deepcopy(base), method, rank=2, target_modules=["linear1", "linear2"]) for _ in range(2))
        with pytest.raises(RuntimeError, match="half-way"):
            start(model, fails)
        assert torch.backends.mha.get_fastpath_enabled() is enabled
        assert start(model).energy == pytest.approx(start(trained, training=True).energy)
        assert torch.backends.mha.get_fastpath_enabled() is enabled
        whole = lk.adapt(copy.deepcopy(base), method, rank=2, target_modules=["linear1", "out_proj"])
        with pytest.raises(ValueError, match=r"no gradient can reach 'layers\.0\.self_attn\.out_proj'.*reads the weight.*leave it out"):
            start(whole)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_errors_change_nothing_and_say_what_to_do() -> None:
    model = lk.adapt(network(), method="xs", rank=2)
    model.unused = lk.LowRankLinear(nn.Linear(4, 4), 2, 1.0, method="xs")
    model.forward = lambda x: nn.Sequential(*list(model)[:5])(x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = make_batches()
    for arguments, error, message in (
        ((model, []), ValueError, "batches is empty"),
        ((model, batches[0][0]), TypeError, r"wrap it in \[ \]"),
        ((model, batches, lambda m, b: m(b[0])), ValueError, r"scalar tensor.*\(8, 9\)"),
        ((model, batches, lambda m, b: 1.0), ValueError, "returned float"),
        ((model, batches, lambda m, b: m(b[0]).sum() * torch.nan), ValueError, "loss of batch 0 is nan"),
        ((model, batches, lambda m, b: m(b[0]).sum().detach()), ValueError, "depends on no adapted layer"),
        ((model, batches), ValueError, "no gradient reached 'unused'"),
        ((model, batches, lambda m, b: m(b[0]).sum() * 0 + m.unused(torch.zeros(1, 4)).sum()), ValueError, "zero in every entry"),
        ((network(), batches), ValueError, "method='xs'"),
    ):
        with pytest.raises(error, match=message):
            init(*arguments)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for option, message in (
        ({"lr": 0.0}, "lr must be positive"),
        ({"update": "lion"}, "update must be"),
        ({"accumulate_on": "gpu"}, "accumulate_on must be"),
        ({"samples": 0}, "samples must be"),
        ({"iterations": -1}, "iterations must be"),
        ({"oversample": -1}, "oversample must be"),
    ):
        with pytest.raises(ValueError, match=message):
            init(lk.adapt(network(), method="xs", rank=2), batches, **option)

    def never(*_: object) -> Tensor:
        raise AssertionError("a backward pass was begun")

    for option in (
        {"loss_fn": None},
        {"batches": "ab"},
        {"training": "x"},
        {"progress": "x"},
        {"lr": 10**400},
        {"update": ["adam"]},
        *({"samples": samples} for samples in ("x", True, 1.5, float("inf"))),
        *({"oversample": oversample} for oversample in (-1, "x", 1.5)),
        {"iterations": "x"},
    ):
        with pytest.raises((TypeError, ValueError), match=f"lora_sb_init: {next(iter(option))} must be"):
            lk.lora_sb_init(lk.adapt(network(), method="xs", rank=2), **{"batches": batches, "loss_fn": never, "lr": 0.1, **option})
    with pytest.raises(ValueError, match=r"must return a real number; it returned torch\.complex128 for batch 0"):
        init(lk.adapt(network(), method="xs", rank=2), batches, lambda m, b: m(b[0]).sum() * 1j)
    with pytest.raises(ValueError, match=r"start must be one of .*got \['svd'\]"):
        lk.initialize(model, ["svd"])
    with pytest.raises(ValueError, match=r"rank 10 is too large for '4' \(9 × 15\)"):
        lk.adapt(network(), method="xs", rank=10)
    with pytest.raises(ValueError, match="start must be"):
        lk.initialize(model, "random")
    with pytest.raises(ValueError, match="no core lora_R"):
        lk.LoRASB(make_model("ours"))
    for optimizer_class in (lk.LoRASB, lk.AdamW):
        fresh = lk.adapt(network(), method="xs", rank=2)
        optimizer = optimizer_class(fresh)
        loss_of(fresh, 0).backward()
        with pytest.raises(ValueError, match="factors of 0 are zero"):
            optimizer.step()
    model = xs_model()
    pairs(model)[1].B[:, 2] = pairs(model)[1].B[:, 0]
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match="factor of 2 is zero, rank deficient"):
        lk.LoRASB(model).step()


def test_sharded_models_are_refused() -> None:
    model = lk.adapt(network(), method="xs", rank=2)

    class DTensor(Tensor):
        placements = device_mesh = None

    model[0].base_layer.weight = nn.Parameter(model[0].base_layer.weight.detach().as_subclass(DTensor), requires_grad=False)
    with pytest.raises(ValueError, match=r"'0' is sharded \(DTensor\)"):
        init(model, make_batches())


def test_svd_is_lora_xs_start() -> None:
    model = lk.adapt(network(), method="xs", rank=3)
    report = lk.initialize(model, "svd", oversample=20)
    for pair, layer in zip(pairs(model), (m for m in model if isinstance(m, lk.LowRankLinear)), strict=True):
        u, s, vh = torch.linalg.svd(layer.base_layer.weight, full_matrices=False)
        torch.testing.assert_close(pair.B @ pair.A, u[:, :3] * s[:3] @ vh[:3], rtol=0, atol=1e-9)
        assert not pair.core.any()
        assert report.energy[pair.name] == pytest.approx((s[:3].square().sum() / s.square().sum()).item(), rel=1e-9)
    loss_of(model, 0).backward()
    assert all(pair.core.grad.any() for pair in pairs(model))


def started(start: str, dtype: torch.dtype = torch.float64, **options) -> tuple[nn.Module, lk.InitReport]:
    """A LoRA model at the start of that name."""
    model = lk.adapt(network(dtype=dtype), rank=3, alpha=4.0, rank_scaling="rslora")
    data = {"batches": make_batches(dtype=dtype), "loss_fn": mse} if start == "lora-ga" else {}
    return model, lk.initialize(model, start, oversample=20, iterations=4, progress=False, **data, **options)


STARTS = pytest.mark.parametrize("start", ["pissa", "lora-ga"])


def test_pissa_and_lora_ga_are_their_definitions() -> None:
    model, report = started("pissa")
    for name, layer in ((str(i), model[i]) for i in (0, 2, 4)):
        u, s, vh = torch.linalg.svd(network()[int(name)].weight, full_matrices=False)
        torch.testing.assert_close(layer.scale * layer.lora_B @ layer.lora_A, u[:, :3] * s[:3] @ vh[:3], rtol=0, atol=1e-9)
        for factor in (layer.lora_B, layer.lora_A.mT):  # both carry the root of the singular values
            torch.testing.assert_close(factor.mT @ factor, torch.diag(s[:3] / layer.scale), rtol=0, atol=1e-9)
        torch.testing.assert_close(layer.base_layer.weight, u[:, 3:] * s[3:] @ vh[3:], rtol=0, atol=1e-9)
        assert report.energy[name] == pytest.approx((s[:3].square().sum() / s.square().sum()).item(), rel=1e-9)
    model, report = started("lora-ga", gamma=4.0)
    gradients = [full_gradients(network(), batch) for batch in make_batches()]
    assert report.samples == 24 and report.accumulator_bytes == sum(layer.base_layer.weight.nbytes for layer in model[::2])
    for name, layer in ((str(i), model[i]) for i in (0, 2, 4)):
        u, s, vh = torch.linalg.svd(sum(g[name] for g in gradients), full_matrices=False)
        c = layer.out_features**0.25 / 2
        for mine, exact in ((layer.lora_A, vh[:3]), (layer.lora_B.mT, u[:, 3:6].mT)):
            torch.testing.assert_close(mine.mT @ mine, c * c * exact.mT @ exact, rtol=0, atol=1e-7)
        assert report.energy[name] == pytest.approx((s[:6].square().sum() / s.square().sum()).item(), rel=1e-9)


@STARTS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_starts_leave_the_output_and_come_back_from_files(start: str, dtype: torch.dtype, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    eps = torch.finfo(dtype).eps
    x, _ = make_batches(1, dtype=dtype)[0]
    model, _ = started(start, dtype)
    before = network(dtype=dtype)(x)
    torch.testing.assert_close(model(x), before, rtol=0, atol=40 * eps)
    wide = 40 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert all(delta.abs().max() <= wide for delta in lk.delta_weights(model).values())

    for pair in pairs(model):  # as if trained
        for factor in (pair.A, pair.B):
            factor.data += 0.05 * torch.randn_like(factor)
    y = model(x)
    assert (y - before).abs().max() > 2e-2
    lk.save_adapter(model, tmp_path / "started.safetensors")
    fresh = lk.load_adapter(network(dtype=dtype), tmp_path / "started.safetensors")
    assert torch.equal(fresh(x), y), "a bare model"
    adapted = lk.adapt(network(dtype=dtype), rank=3, alpha=4.0, rank_scaling="rslora")
    assert torch.equal(lk.load_adapter(adapted, tmp_path / "started.safetensors")(x), y), "an adapted model"
    again, _ = started(start, dtype)
    lk.load_adapter_state_dict(again, lk.adapter_state_dict(model))
    assert torch.equal(again(x), y), "a model that was started alike"
    whole = lk.adapt(network(dtype=dtype, seed=1), rank=3, alpha=4.0, rank_scaling="rslora")
    whole.load_state_dict(model.state_dict())
    assert torch.equal(whole(x), y) and torch.equal(copy.deepcopy(model)(x), y), "the whole state"

    # Relative to the weights before the start: the differences that leave fp32 products are those of the residual's rounding.
    bare = network(dtype=dtype)
    for module, delta in zip(bare[::2], lk.delta_weights(model).values(), strict=True):
        module.weight.data = (module.weight.double() + delta.double()).to(dtype)
    torch.testing.assert_close(bare(x), y, rtol=0, atol=60 * eps)
    assert set(lk.export_peft(model, tmp_path / "peft").values()) == {0.0}
    theirs = peft.PeftModel.from_pretrained(network(dtype=dtype), str(tmp_path / "peft"), autocast_adapter_dtype=dtype == torch.bfloat16)
    assert theirs.peft_config["default"].r == 6
    torch.testing.assert_close(theirs(x), y, rtol=0, atol=60 * eps)
    deltas = lk.delta_weights(model)
    for name, delta in lk.delta_weights(theirs).items():
        torch.testing.assert_close(delta, deltas[name], rtol=0, atol=float(deltas[name].abs().max()) * wide)
    merged = lk.merge(model.eval(), unload=True)
    torch.testing.assert_close(merged(x), y, rtol=0, atol=60 * eps)


def test_reset_parameters_goes_back_to_the_start() -> None:
    model, _ = started("pissa")
    x = make_batches(1)[0][0]
    y = model(x)
    run(model, lk.AdamW(model, lr=1e-2), 0, 3)
    for layer in model[::2]:
        layer.reset_parameters()
    assert torch.equal(model(x), y)


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_starts_refuse_what_they_cannot_change() -> None:
    quantized = nn.Sequential(network(dtype=torch.float32), Quantized(nn.Linear(9, 9)))
    tied = Shared(None)
    computed = network()
    weight_norm(computed[0])
    hooked = network()
    hooked[2].register_forward_hook(lambda module, inputs, output: 2 * output)
    subclassed = nn.Sequential(network(), Doubling(9, 9).double())
    sum_of = lambda m, b: m(b).sum()  # noqa: E731
    for model, arguments, error, message in (
        (lk.adapt(hooked, rank=2), {}, ValueError, "'2' would not compute what it did: its Linear has hooks"),
        (lk.adapt(subclassed, rank=2), {}, ValueError, "'1' would .* its Doubling has hooks or a forward of its own"),
        (lk.adapt(nn.Sequential(Doubling(9, 9)), rank=2), {"start": "lora-ga", "batches": [], "loss_fn": sum_of}, ValueError, "Doubling"),
        (lk.adapt(quantized, rank=2), {}, ValueError, "'1' has a Parameter of torch.int8"),
        (lk.adapt(tied, rank=2), {}, ValueError, "'second' is shared with another module"),
        (lk.adapt(computed, rank=2), {}, ValueError, "that of '0' is no parameter but computed"),
        (lk.adapt(network(), method="sds", rank=2), {}, ValueError, r"no adapter ΔW = s·B A; adapt\(model, method='lora'"),
        (lk.adapt(network(), method="xs", rank=2), {}, ValueError, "method='lora'"),
        (lk.adapt(network(), rank=2), {"batches": []}, TypeError, "the other starts take neither"),
        (lk.adapt(network(), rank=2), {"start": "lora-ga"}, TypeError, "needs batches= and loss_fn="),
        (lk.adapt(network(), rank=2), {"start": "lora-ga", "batches": [], "loss_fn": sum_of}, ValueError, "initialize: batches is empty"),
        (lk.adapt(network(), rank=5), {"start": "lora-ga", "batches": [], "loss_fn": sum_of}, ValueError, "too many for '4' with r = 5"),
        (lk.adapt(network(), rank=2), {"start": "lora-ga", "batches": [], "loss_fn": sum_of, "gamma": 0}, ValueError, "gamma must be"),
    ):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(error, match=message):
            lk.initialize(model, **{"start": "pissa", "progress": False, **arguments})
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model, _ = started("pissa")
    with pytest.raises(ValueError, match="an earlier start has changed the base weight of '0'"):
        lk.initialize(model, "pissa")
    other, _ = started("lora-ga")
    plain = lk.adapt(network(), rank=3, alpha=4.0, rank_scaling="rslora")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for state in (lk.adapter_state_dict(other), lk.adapter_state_dict(plain)):
        with pytest.raises(ValueError, match="'0' was started by other factors"):
            lk.load_adapter_state_dict(model, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --------------------------------------------------------------------------------------------------------------------- memory


def peak_allocated(function) -> int:
    """The largest sum of live CPU allocations during ``function``, from the profiler's allocation events, beyond what lived before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("d", [256, pytest.param(1024, marks=pytest.mark.large)])
def test_memory_of_the_start_is_one_layers_gradient_and_the_accumulator(d: int) -> None:
    """A LoRA step holds its activations; the start must hold no more than those, the stated accumulator and 1.2 times the largest layer."""
    depth, tokens, rank = 12, 512, 8
    shapes = [(d, d)] * depth
    x, y = torch.randn(tokens, d), torch.randn(tokens, d)

    def step(model: nn.Module) -> None:
        mse(model, (x, y)).backward()

    lora = lk.adapt(network(shapes, torch.float32), rank=rank)
    step(lora)
    lora.zero_grad()
    training = peak_allocated(lambda: step(lora))
    model = lk.adapt(network(shapes, torch.float32), method="xs", rank=rank)
    reports: list[lk.InitReport] = []
    extra = peak_allocated(lambda: reports.append(init(model, [(x, y)]))) - training
    assert reports[0].accumulator_bytes == depth * d * d * 4
    assert extra <= 1.2 * d * d * 4 + reports[0].accumulator_bytes, (extra, training)


# ------------------------------------------------------------------------------------------------------------------ distributed


def start_on_rank(rank: int, world: int, model: nn.Module) -> tuple[int, dict[str, np.ndarray]]:
    """What ``lora_sb_init`` leaves on one of two ranks: two batches here, one there."""
    torch.manual_seed(rank)
    wrapped = nn.parallel.DistributedDataParallel(model)
    report = init(wrapped, make_batches(3)[rank::world], update="sgd")
    return report.samples, {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.mark.skipif(sys.platform == "win32" or not torch.distributed.is_available(), reason="needs gloo")
def test_two_ranks_average_gradients_and_have_identical_factors(ranks: Ranks) -> None:
    alone, together = (lk.adapt(network(), method="xs", rank=2) for _ in range(2))
    (samples, first), (_, second) = ranks(start_on_rank, together)
    assert samples == 24
    assert all(np.array_equal(first[name], second[name]) for name in first)
    init(alone, make_batches(3), update="sgd")
    together.load_state_dict({name: torch.from_numpy(value) for name, value in first.items()})
    for name, delta in lk.delta_weights(alone).items():
        torch.testing.assert_close(lk.delta_weights(together)[name], delta, rtol=1e-8, atol=1e-12)


def test_bert_with_two_labels_starts_from_orthonormal_bases() -> None:
    """The pooler's gradient is nearly of rank one: its signs have few distinct rows."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=100, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config)
    batches = [{"input_ids": torch.randint(0, 100, (8, 12)), "labels": torch.randint(0, 2, (8,))} for _ in range(2)]
    lk.adapt(model, method="xs", rank=8)
    init(model, batches, lambda m, b: m(**b).loss)
    for pair in pairs(model):
        b = pair.B.detach().double()
        assert (b.T @ b - torch.eye(8, dtype=torch.float64)).abs().max() <= 1e-5, pair.name
