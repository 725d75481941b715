"""OPLoRA against its algorithm box, and the capture of full gradients under everything that training loops do to a backward pass."""

from __future__ import annotations

import contextlib
import copy
import gc
import multiprocessing
import pickle
import weakref

import numpy as np
import oplora_ranks
import peft
import pytest
import torch
from _models import batch, loss_of, pair_delta, trainable
from _models import make_model as make_any_model
from _ranks import Ranks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lk
from benchmarks.naive.oplora import Kronecker, OPLoRALayer
from lowrank_kernels import LowRankLinear, OPLoRA, pairs
from lowrank_kernels.optim import early
from lowrank_kernels.optim.full_gradient import Factors, Probes, Sketch, random_matrix, reconstruct

LR = 0.05
GRADIENTS = ("factors", "dense", "sketch")
every_gradient = pytest.mark.parametrize("gradient", GRADIENTS)
every_road = pytest.mark.parametrize("road", ["ours", "peft"])
#: Three ways to hold G, and the scaled variant, whose metrics are as wide as a test's layers allow.
KFAC = {"metric": "kfac", "metric_damping": 0.05, "metric_decay": 0.9, "lr": 1e-3}
every_kind = pytest.mark.parametrize("kind", [*({"gradient": gradient} for gradient in GRADIENTS), KFAC], ids=[*GRADIENTS, "kfac"])


def make_model(road: str, **options) -> nn.Module:
    torch.manual_seed(0)  # half of PEFT's factors start at random
    return make_any_model(road, **options)


def make(params, **options) -> OPLoRA:
    return OPLoRA(params, **{"lr": LR, "momentum": 0.8, **options})


def deltas(model: nn.Module) -> list[Tensor]:
    return [pair_delta(pair) for pair in pairs(model)]


def assert_alike(model: nn.Module, other: nn.Module, tolerance: float) -> None:
    for mine, theirs in zip(deltas(model), deltas(other), strict=True):
        assert theirs.norm() > 1e-3
        assert float((mine - theirs).norm() / theirs.norm()) <= tolerance


def bases(model: nn.Module) -> list[nn.Linear]:
    return [module.base_layer for module in model.modules() if hasattr(module, "base_layer")]


def naive_gradients(model: nn.Module, layers: list[OPLoRALayer], step: int) -> list[tuple[Tensor, Tensor]]:
    """(S, X) of every layer of :func:`make_model`'s network, by plain autograd through a dense network."""
    x, y = batch(step)
    seen = []
    for index, (base, layer) in enumerate(zip(bases(model), layers, strict=True)):
        output = x @ (base.weight + layer.delta_weight()).T + base.bias
        output = output if output.requires_grad else output.requires_grad_()
        output.retain_grad()
        seen.append((output, x))
        x = torch.tanh(output) if index < len(layers) - 1 else output
    (x - y).square().mean().backward()
    return [(output.grad, x.detach()) for output, x in seen]


CASES = [
    {},
    {"momentum": 0.0, "sweeps": 1},
    {"sweeps": 3, "proximal": 0.1, "weight_decay": 0.3},
    {"momentum_rank": 5},
    {"momentum_rank": 100, "sweeps": 1},
    {"momentum_mode": "projected"},
    {"momentum_mode": "naive", "lr": 0.02},
]


def naive_twins(model: nn.Module, optimizer: OPLoRA) -> list[OPLoRALayer]:
    """The algorithm box of every layer, from the state with which the optimizer starts."""
    group, state = optimizer.param_groups[0], optimizer.state
    optimizer._create_state()
    layers = []
    for pair in pairs(model):
        start = state[pair.A]["momentum_v"].clone() if "momentum_v" in state[pair.A] else torch.zeros_like(pair.A.T)
        keys = ("lr", "momentum", "sweeps", "proximal", "momentum_mode")
        settings = {key: group[key] for key in keys} | {"weight_decay": optimizer._factor_decay(group)}
        if group["metric"]:
            settings["metrics"] = tuple(
                Kronecker(state[p]["metric_basis"].clone(), group["metric_decay"], group["metric_damping"], group["sweeps"])
                for p in (pair.B, pair.A)
            )
        layers.append(OPLoRALayer(pair.A.detach().clone(), pair.B.detach().clone(), pair.scale, momentum_start=start, **settings))
    return layers


def follow(model: nn.Module, optimizer: OPLoRA, layers: list[OPLoRALayer], steps: int = 50) -> None:
    """Train both, each on its own gradients, and compare ΔW."""
    for step in range(steps):
        for layer, (s, x) in zip(layers, naive_gradients(model, layers, step), strict=True):
            layer.step(s, x)
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    for delta, layer in zip(deltas(model), layers, strict=True):
        expected = layer.delta_weight()
        assert expected.norm() > 1e-2
        assert float((delta - expected).norm() / expected.norm()) <= 1e-9


@every_road
@every_gradient
@pytest.mark.parametrize("options", CASES, ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "default")
def test_follows_the_algorithm_box(options: dict, gradient: str, road: str) -> None:
    model = make_model(road)
    # The sketch is as wide as the matrices: then it is exact.
    optimizer = make(model, gradient=gradient, sketch_width=100, **options)
    follow(model, optimizer, naive_twins(model, optimizer))


SCALED = [
    {},
    {"momentum": 0.0, "sweeps": 1, "metric_decay": 0.0},
    {"sweeps": 3, "proximal": 0.1, "weight_decay": 0.3, "metric_rank": 5},
    {"metric_rank": 100, "momentum_rank": 4, "sweeps": 1},  # as wide as the smaller side
    {"momentum_mode": "projected", "metric_rank": 2},
    {"momentum_mode": "naive", "metric_decay": 0.5},
]


@every_road
@pytest.mark.parametrize("options", SCALED, ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "default")
def test_the_scaled_variant_follows_its_algorithm_box(options: dict, road: str) -> None:
    model = make_model(road)
    optimizer = make(model, **{**KFAC, **options})
    follow(model, optimizer, naive_twins(model, optimizer))


def test_scaled_sweeps_tend_to_the_truncated_svd_in_the_metric() -> None:
    """With metrics of full rank and many sweeps, one step is the best rank-r approximation of K-FAC's step ``W − ηD_U⁻¹GD_V⁻¹``
    in ``⟨·, D_U · D_V⟩``: the truncated SVD in whitened coordinates."""
    model = make_model("ours")
    options = {**KFAC, "momentum": 0.0, "proximal": 0.0, "sweeps": 300, "metric_rank": 100, "lr": 0.05}
    optimizer = make(model, **options)
    layers = [OPLoRALayer(pair.A.detach(), pair.B.detach(), pair.scale, lr=0.0) for pair in pairs(model)]
    seen = naive_gradients(model, layers, 0)
    before = deltas(model)
    loss_of(model, 0).backward()
    optimizer.step()
    for delta, start, (S, X) in zip(deltas(model), before, seen, strict=True):
        rank = min(S.shape[1], X.shape[1])
        roots = []
        for Z in (S, X):
            sigma, W = torch.linalg.eigh(Z.T @ Z / len(Z))
            sigma[:-rank] = 0  # metrics are at most as wide as the smaller side
            roots.append(W * (sigma + options["metric_damping"]).sqrt() @ W.T)
        root_u, root_v = roots
        whitened = root_u @ start @ root_v - options["lr"] * torch.linalg.solve(root_u, S.T @ X) @ torch.linalg.inv(root_v)
        u, sigma, vh = torch.linalg.svd(whitened)
        best = torch.linalg.solve(root_u, u[:, :3] * sigma[:3] @ vh[:3]) @ torch.linalg.inv(root_v)
        torch.testing.assert_close(delta, best, rtol=1e-6, atol=1e-8 * float(best.norm()))


def test_a_zero_gradient_moves_nothing_under_a_metric() -> None:
    """Which it would if the weight were multiplied as Algorithm 2 is printed."""
    model = make_model("ours")
    optimizer = make(model, **{**KFAC, "momentum": 0.0})
    for _ in range(3):
        loss_of(model, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = deltas(model)
    (0.0 * loss_of(model, 1)).backward()
    optimizer.step()
    for delta, expected in zip(deltas(model), before, strict=True):
        assert expected.norm() > 1e-4
        torch.testing.assert_close(delta, expected, rtol=1e-9, atol=1e-12)


def test_the_metric_keeps_the_largest_part_of_the_statistics() -> None:
    """On the same batch over and over, D_V tends to the best rank-k approximation of XᵀX/n; σ falls, W is orthonormal."""
    model = make_model("ours")
    optimizer = make(model, **{**KFAC, "lr": 0.0, "metric_rank": 4})
    for _ in range(40):
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        optimizer.step()
    pair, (x, _) = pairs(model)[0], batch(0)
    W, sigma = optimizer.state[pair.A]["metric_basis"], optimizer.state[pair.A]["metric_values"]
    torch.testing.assert_close(W.T @ W, torch.eye(4, dtype=W.dtype), rtol=0, atol=1e-12)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    best = vectors[:, -4:] * values[-4:] @ vectors[:, -4:].T
    assert float((W * sigma @ W.T / (1 - 0.9**40) - best).norm() / best.norm()) < 0.05
    assert optimizer.state[pair.B]["metric_values"].shape == (4,)


@every_road
@every_kind
def test_resuming_is_bit_for_bit(kind: dict, road: str) -> None:
    """Metrics, momentum and the counts of layers that missed steps."""
    straight, resumed = Shared(road), Shared(road)

    def train(model: nn.Module, optimizer: OPLoRA, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            x, y = batch(step)
            ((model(x) if step % 2 else model.last(torch.tanh(x))) - y).square().mean().backward()
            optimizer.step()

    train(straight, make(straight, sketch_width=3, **kind), range(9))
    first = make(resumed, sketch_width=3, **kind)
    train(resumed, first, range(4))
    saved = copy.deepcopy(first.state_dict())
    first.close()
    again = make(resumed, sketch_width=3, **kind)
    again.load_state_dict(saved)
    train(resumed, again, range(4, 9))
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))
    if kind is KFAC:
        with pytest.raises(ValueError, match="saved with metric='kfac', here it is None"):
            make(resumed).load_state_dict(saved)
        other = make(resumed, **{**KFAC, "metric_rank": 2})
        other.load_state_dict(saved)  # with the hyperparameters, as torch's optimizers do
        assert other.param_groups[0]["metric_rank"] == saved["param_groups"][0]["metric_rank"]


@every_road
def test_the_step_does_not_depend_on_how_the_scale_is_split(road: str) -> None:
    """s drops out of the step length: without λ, ΔW is the same for (s, B) and (s/10, 10 B), and from B = 0 for every s."""
    models = [make_model(road, scale=scale) for scale in (0.7, 7.0)]
    for model in models:
        optimizer = make(model, proximal=0.0)
        for step in range(10):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
    assert_alike(*models, 1e-8)


class Shared(nn.Module):
    """One adapted layer used twice in a forward pass, one not used, one whose output is not, rank-3 inputs, dropout if wanted."""

    def __init__(self, road: str = "ours", dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared, self.unused, self.dangling = (nn.Linear(12, 12).double() for _ in range(4))
        self.last = nn.Linear(12, 9).double()
        names = ["first", "shared", "unused", "dangling", "last"]
        if road == "ours":
            lk.adapt(self, rank=3, target_modules=names, dropout=dropout)
        else:
            config = peft.LoraConfig(r=3, target_modules=names, lora_dropout=dropout)
            peft.inject_adapter_in_model(config, self)
        for pair in pairs(self):
            pair.A.data = torch.randn(pair.A.shape, dtype=torch.float64) / 4
            pair.B.data = torch.randn(pair.B.shape, dtype=torch.float64) / 4

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.reshape(2, -1, 12)))
        x = torch.tanh(self.shared(torch.tanh(self.shared(x))))
        self.dangling(x)
        return self.last(x).reshape(-1, 9)


@every_road
@every_kind
def test_micro_batches_add_up_exactly(kind: dict, road: str) -> None:
    whole, parts = Shared(road), Shared(road)
    optimizers = [make(model, sketch_width=3, **kind) for model in (whole, parts)]
    for step in range(6):
        x, y = batch(step, rows=32)
        (whole(x) - y).square().mean().backward()
        for part in range(4):
            rows = slice(8 * part, 8 * part + 8)
            ((parts(x[rows]) - y[rows]).square().mean() / 4).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_layers_without_gradient_miss_the_step_and_shared_ones_count_twice() -> None:
    model = Shared()
    optimizer = make(model, proximal=0.0)
    before = copy.deepcopy(model.state_dict())
    x, y = batch(0)
    (model(x) - y).square().mean().backward()
    recorders = dict(zip((p.name for p in optimizer._pairs), optimizer._recorders, strict=True))
    assert sorted(len(r.gradient.pieces) for r in recorders.values()) == [0, 0, 1, 1, 2]
    (found,) = optimizer._captured_gradients()
    torch.testing.assert_close(found.coefficients, torch.ones(3, dtype=torch.float64))
    optimizer.step()
    for name, value in model.state_dict().items():
        moved = not torch.equal(value, before[name])
        assert moved == ("lora_" in name and not name.startswith(("unused", "dangling"))), name


@every_road
@every_gradient
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_what_is_captured_is_the_gradient_of_the_adapters(gradient: str, road: str, dropout: float) -> None:
    """``∂A = s BᵀG`` and ``∂B = s G Aᵀ`` behind dropout, at any scale of the loss."""
    model = Shared(road, dropout).train()
    optimizer = make(model, gradient=gradient, sketch_width=100)
    x, y = batch(0)
    ((model(x) - y).square().mean() * 1024).backward()
    for pair in pairs(model):
        if pair.A.grad is not None:
            pair.A.grad /= 1024
            pair.B.grad /= 1024
    (found,) = optimizer._captured_gradients()
    ga, gtb = found.times([p.A.detach().T for p in map(_pair_of(model), found.pairs)]), found.times([b for _, b in found.factors], True)
    for index, (a, b) in enumerate(zip(ga, gtb, strict=True)):
        pair = _pair_of(model)(found.pairs[index])
        c = found.coefficients[index] * pair.scale
        torch.testing.assert_close(c * a, pair.B.grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(c * b.T, pair.A.grad, rtol=1e-9, atol=1e-12)


def _pair_of(model: nn.Module):
    by_name = {pair.name: pair for pair in pairs(model)}
    return lambda pair: by_name[pair.name]


@pytest.mark.parametrize("reentrant", [True, False])
@every_kind
def test_checkpointing_over_hooks_changes_nothing(kind: dict, reentrant: bool) -> None:
    plain, recomputed = make_model("peft"), make_model("peft")
    optimizers = [make(model, sketch_width=4, **kind) for model in (plain, recomputed)]
    for step in range(4):
        loss_of(plain, step).backward()
        x, y = batch(step)
        (checkpoint(recomputed, x.requires_grad_(), use_reentrant=reentrant) - y).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), recomputed.parameters(), strict=True))


@every_road
@every_kind
def test_grad_scaler_changes_nothing_and_skips_overflows(kind: dict, road: str) -> None:
    plain, scaled = make_model(road, dtype=torch.float32), make_model(road, dtype=torch.float32)
    optimizers = [make(model, sketch_width=4, **kind) for model in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    for step in range(12):
        for optimizer in optimizers:
            optimizer.zero_grad()
        if step == 5:  # an overflow: this step must not be taken, nor leave anything behind
            before = deltas(scaled)
            (scaler.scale(loss_of(scaled, step, torch.float32)) * float("inf")).backward()
            scaler.step(optimizers[1])
            scaler.update()
            assert all(torch.equal(p, q) for p, q in zip(before, deltas(scaled), strict=True))
            scaled.zero_grad()  # Trainers call the model's
        loss_of(plain, step, torch.float32).backward()
        scaler.scale(loss_of(scaled, step, torch.float32)).backward()
        optimizers[0].step()
        scaler.step(optimizers[1])
        scaler.update()
    assert_alike(scaled, plain, 2e-4)


@every_gradient
@pytest.mark.parametrize("kind", ["factors", "full"])
def test_clipping_scales_the_full_gradient(gradient: str, kind: str) -> None:
    """A clipped step is the step at a smaller learning rate (without momentum; each step from the same start)."""
    model, twin = make_model("ours"), make_model("ours")
    options = {"momentum": 0.0, "gradient": gradient, "sketch_width": 100}
    clipped = make(model, **options)
    loss_of(model, 0).backward()
    if kind == "factors":
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    else:
        norm = clipped.clip_full_grad_norm_(1e-2, probes=200)
        layers = [OPLoRALayer(pair.A.detach(), pair.B.detach(), pair.scale, lr=1.0) for pair in pairs(model)]
        exact = sum(float((s.T @ x).square().sum()) for s, x in naive_gradients(model, layers, 0)) ** 0.5
        assert abs(float(norm) / exact - 1) < (1e-12 if gradient == "dense" else 0.2)
    assert norm > 2e-2, "the test must clip"
    clipped.step()
    shorter = make(twin, **{**options, "lr": LR * 1e-2 / (float(norm) + 1e-6)})
    loss_of(twin, 0).backward()
    shorter.step()
    for delta, expected in zip(deltas(model), deltas(twin), strict=True):
        torch.testing.assert_close(delta, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("overlap", [False, True])
def test_layers_of_one_width_share_their_random_matrices(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ω and Ψ are made once a step, whatever the number of layers, micro-batches and backward passes that were dropped."""
    made: list[tuple[int, ...]] = []

    def counted(like: Tensor, *numbers: int) -> Tensor:
        made.append(numbers)
        return random_matrix(like, *numbers)

    model = make_model("ours", shapes=[(12, 12)] * 6)
    optimizer = make(model, gradient="sketch", sketch_width=3, overlap=overlap)
    monkeypatch.setattr("lowrank_kernels.optim.full_gradient.random_matrix", counted)
    x = batch(0)[0]
    for step in range(4):
        optimizer.zero_grad()
        made.clear()
        for part in range(1 if overlap else 3):
            model(x).square().mean().backward()
            if part == 0 and step == 2:
                model.zero_grad()
                copy.deepcopy(model), pickle.dumps(optimizer)
                model(x).square().mean().backward()
        optimizer.step()
        assert [numbers[1:4] for numbers in made] == [(12, 3, step), (12, 7, step)]
        assert not optimizer._probes[0]._made, "they are kept for one step"


def test_sketch_is_exact_up_to_its_width_then_within_its_bound() -> None:
    generator = torch.Generator().manual_seed(1)
    x, s = (torch.randn(200, width, generator=generator, dtype=torch.float64) for width in (60, 80))
    u, sigma, v = torch.linalg.svd(s.T @ x, full_matrices=False)
    sigma = 2.0 ** -(torch.arange(60, dtype=torch.float64) / 4)
    s, x = (u * sigma).T, v  # tokens = the singular directions

    def error(width: int) -> float:
        errors = []
        for seed in range(8):
            sketch = Sketch(width, Probes(seed))
            for rows in (slice(0, 30), slice(30, 60)):
                sketch.add(x[rows], s[rows])
            (left,), (right,) = reconstruct([sketch])
            errors.append(float((left @ right.T - s.T @ x).norm() ** 2))
        return sum(errors) / len(errors)

    assert error(60) < 1e-20
    found = []
    for width in (8, 16, 32):
        bounds = [2 * (1 + rho / (width - rho - 1)) * float(sigma[rho:].square().sum()) for rho in range(width - 1)]
        found.append(error(width))
        assert found[-1] <= 1.5 * min(bounds)  # the bound is for the expectation
    assert found[0] > 4 * found[1] > 16 * found[2]


@every_road
def test_nothing_is_kept_and_hooks_go_with_the_optimizer(road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(road)
    optimizer = make(model)
    seen: list[weakref.ref] = []
    add = Factors.add
    monkeypatch.setattr(Factors, "add", lambda self, x, s: (seen.append(weakref.ref(s)), add(self, x, s))[1])
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if step == 0:
            optimizer.step()
            assert all(recorder.gradient.empty for recorder in optimizer._recorders)
    optimizer.zero_grad()
    gc.collect()
    assert len(seen) == 6 and all(reference() is None for reference in seen)
    loss_of(model, 3)  # a forward pass alone leaves nothing
    assert all(recorder.gradient.empty for recorder in optimizer._recorders)

    recorders = optimizer._recorders
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None and not any(recorder.active for recorder in recorders)
    assert all(getattr(layer, "capture", None) is None for layer in model.modules())
    assert not any(module._forward_hooks for module in model.modules())

    optimizer = make(model)
    optimizer.close()
    loss_of(model, 0).backward()
    assert all(recorder.gradient.empty for recorder in optimizer._recorders)
    with pytest.raises(RuntimeError, match="no backward pass was seen"):
        optimizer.step()


@every_road
def test_copies(road: str) -> None:
    """A copied model alone records nothing; model and optimizer copied together go on alike."""
    model = make_model(road)
    optimizer = make(model)
    alone = copy.deepcopy(model)
    loss_of(alone, 0).backward()
    layers = [m.capture for m in alone.modules() if isinstance(m, LowRankLinear)]
    hooks = [hook.recorder for m in alone.modules() for hook in m._forward_hooks.values()]
    assert all(recorder.gradient.empty for recorder in [*layers, *hooks]) and (layers or hooks)
    twin_model, twin = copy.deepcopy((model, optimizer))
    for one, its in ((model, optimizer), (twin_model, twin)):
        for step in range(4):
            its.zero_grad()
            loss_of(one, step).backward()
            its.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin_model.parameters(), strict=True))


def test_groups_with_the_model_beside_them() -> None:
    model, twin = make_model("peft"), make_model("peft")
    with pytest.raises(ValueError, match="pass the model"):
        make(model.named_parameters(), scale=0.7)
    grouped, plain = make([{"params": trainable(model)}], model=model), make(twin)
    for one, optimizer in ((model, grouped), (twin, plain)):
        loss_of(one, 0).backward()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


class Launches(TorchDispatchMode):
    """Counts the operators that compute something: no views, no allocations. One of ours is one here, and what it launches in all."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        view = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
        self.count += not view and not func.__name__.startswith(("empty", "new_empty", "detach"))
        return func(*args, **(kwargs or {}))


@every_kind
@pytest.mark.parametrize("mode", ["lowrank", "projected", "naive"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_operators_of_a_step_do_not_depend_on_the_number_of_layers(kind: dict, mode: str, dtype: torch.dtype) -> None:
    """The measurement of c and the clipping as well, torch's operators beside ours."""
    counts = []
    for layers in (6, 60):
        model = lk.adapt(nn.Sequential(*(nn.Linear(12, 12, dtype=dtype) for _ in range(layers))), rank=3)
        optimizer = make(model, **kind, sketch_width=4, momentum_mode=mode)
        for _ in range(2):
            optimizer.zero_grad()
            sum(layer(torch.randn(5, 12, dtype=dtype)).square().sum() for layer in model).backward()
            with Launches() as launches:
                # As many scalings of .grad as parameters are the model's affair, not the optimizer's.
                norms = [found.squared_norms(4, 1) for found in optimizer._captured_gradients()]
                optimizer.step()
        assert len(norms) == 1 and len(norms[0]) == layers
        counts.append(launches.count)
    assert counts[0] == counts[1], counts


@every_kind
@pytest.mark.parametrize("mode", ["lowrank", "projected", "naive"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_factors_follow_float32_ones(kind: dict, mode: str, dtype: torch.dtype) -> None:
    """Momentum enters from the second step on, in fp32 beside factors that are not."""
    found = []
    for of_factors in (torch.float32, dtype):
        torch.manual_seed(0)
        model = lk.adapt(nn.Sequential(nn.Linear(12, 10)), rank=3, dtype=of_factors)
        optimizer = make(model, **{"lr": 0.02, **kind}, sketch_width=12, momentum_mode=mode)
        for step in range(3):
            x, y = batch(step, d_out=10, dtype=torch.float32)
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        found += deltas(model)
    exact, rounded = (delta.float() for delta in found)
    assert float((exact - rounded).norm() / exact.norm()) <= 0.05


def storages(tensors) -> int:
    """Bytes of the memory that stands behind tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("mode", ["lowrank", "projected", "naive"])
@every_kind
def test_memory_is_at_most_adams_and_what_the_gradient_is_said_to_hold(kind: dict, mode: str) -> None:
    """State: Adam's twice the factors; the metric adds the factors' size (and σ) once. Between backward and ``step()``: X and S of all
    tokens, the matrices, or p(d_out + d_in) + (p+1) d_in numbers; of them X is what autograd held anyway. After ``step()``: nothing.
    """
    rank, width, micro_batches = 4, 5, 3
    shapes = [(40, 24), (24, 24), (16, 24)]
    model = lk.adapt(nn.Sequential(*(nn.Linear(d_in, d_out, dtype=torch.float32) for d_out, d_in in shapes)), rank=rank)
    head = nn.Linear(6, 2)
    model.append(head)
    twins = [p.detach().clone().requires_grad_() for p in trainable(model)]
    optimizer, adam = make(model, sketch_width=width, momentum_mode=mode, **kind), torch.optim.AdamW(twins)
    inputs = [torch.randn(7, 24) for _ in range(micro_batches)]
    for x in inputs:
        sum(layer(x).square().mean() for layer in model[:3]).backward()
    head(torch.randn(3, 6)).sum().backward()
    held = [value for recorder in optimizer._recorders for value in vars(recorder.gradient).values()]
    captured = [t for h in held for piece in (h if isinstance(h, list) else [h]) for t in (piece if isinstance(piece, tuple) else [piece])]
    captured = [t for t in captured if isinstance(t, Tensor)]
    tokens, (heights, widths) = 7 * micro_batches, map(sum, zip(*shapes, strict=True))
    # X is one tensor for all three layers here, as it is for query, key and value.
    stated = {
        "factors": tokens * (heights + 24),
        "dense": sum(d_out * d_in for d_out, d_in in shapes),
        "sketch": width * (heights + widths) + (width + 1) * widths,
    }[kind.get("gradient", "factors")]
    assert storages(captured) == 4 * stated
    optimizer.step()
    assert all(recorder.gradient.empty for recorder in optimizer._recorders)
    for p in twins:
        p.grad = torch.zeros_like(p)
    adam.step()

    def kept(of: torch.optim.Optimizer) -> int:
        return storages(t for state in of.state.values() for t in state.values() if t.ndim)

    factors = 4 * rank * (heights + widths)
    metric = factors + 4 * 2 * rank * len(shapes) if "metric" in kind else 0
    assert kept(optimizer) - metric <= kept(adam)
    assert kept(optimizer) - metric - 2 * storages(head.parameters()) == {"naive": 4 * rank * heights}.get(mode, factors)


def test_refusals() -> None:
    model = make_model("ours")
    for bad, message in (
        ({"sweeps": 0}, "sweeps must be an integer ≥ 1, got 0"),
        ({"proximal": -1.0}, "proximal must be ≥ 0"),
        ({"momentum": 1.0}, "Invalid momentum value"),
        ({"momentum_mode": "adam"}, "momentum_mode must be one of"),
        ({"gradient": "whole"}, "gradient must be one of"),
        ({"momentum_rank": 0}, "momentum_rank must be an integer ≥ 1"),
        ({"momentum_rank": 4, "momentum_mode": "naive"}, "momentum_rank is for"),
        ({"sketch_width": 0}, "sketch_width must be"),
        ({"lr_ratio": 2.0}, "lr_ratio is not supported"),
        ({"metric": "shampoo"}, "metric must be one of None, 'kfac', got 'shampoo'"),
        ({"metric_rank": 4}, "metric_rank is for metric='kfac'"),
        ({**KFAC, "metric_rank": 0}, "metric_rank must be an integer ≥ 1"),
        ({**KFAC, "metric_decay": 1.0}, "metric_decay must be in"),
        ({**KFAC, "metric_damping": 0.0}, "metric_damping must be positive"),
        ({**KFAC, "gradient": "dense"}, "made of X and S, which gradient='dense' does not keep"),
    ):
        with pytest.raises(ValueError, match=message):
            make(model, **bad)
    with pytest.raises(ValueError, match="no pair of low-rank factors"):
        make(nn.Linear(3, 3))
    optimizer = make(model)
    for bad in (0.0, float("nan")):
        with pytest.raises(ValueError, match="max_norm must be positive"):
            optimizer.clip_full_grad_norm_(bad)
    a, b = (next(p for n, p in model.named_parameters() if n == f"0.lora_{x}") for x in "AB")
    with pytest.raises(ValueError, match="different lr"):
        make([{"params": [a]}, {"params": [b], "lr": 1.0}])


@every_gradient
def test_a_step_that_makes_no_sense_changes_nothing(gradient: str) -> None:
    model = make_model("ours")
    optimizer = make(model, gradient=gradient, sketch_width=4)
    loss_of(model, 0).backward()
    optimizer.step()
    before = copy.deepcopy(model.state_dict())

    def refused(message: str) -> None:
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        optimizer.zero_grad()

    refused("no backward pass was seen")  # a second step on the same gradient
    (loss_of(model, 1) * float("nan")).backward()
    refused("2|0|4.*not finite")
    loss_of(model, 1).backward()
    trainable(model)[1].grad.normal_()
    refused("is not the gradient that was captured")
    loss_of(model, 1).backward()
    trainable(model)[1].grad = None
    refused("only one factor")
    optimizer.step()  # no gradient anywhere: nothing to do
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loss_of(model, 1).backward()
    optimizer.step()
    assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@every_road
@every_kind
@pytest.mark.parametrize("mode", ["lowrank", "projected", "naive"])
def test_overlap_with_the_backward_pass_changes_nothing(mode: str, kind: dict, road: str) -> None:
    plain, overlapped = Shared(road), Shared(road)
    options = {"lr": 0.01, **kind, "sketch_width": 3, "momentum_mode": mode}
    optimizers = make(plain, **options), make(overlapped, overlap=True, **options)
    for step in range(6):
        for model, optimizer in zip((plain, overlapped), optimizers, strict=True):
            optimizer.zero_grad()
            x, y = batch(step)
            (model(x) - y).square().mean().backward()
            if step == 3:  # an lr that comes after the backward pass is the one that counts
                optimizer.param_groups[0]["lr"] /= 2
        assert len(optimizers[1]._early) == (3 if step else 0)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(plain.parameters(), overlapped.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("key", ["lr", "momentum", "weight_decay", "maximize", "proximal", "factor"])
def test_what_changes_between_the_backward_pass_and_the_step_counts(key: str) -> None:
    plain, overlapped = Shared("ours"), Shared("ours")
    optimizers = make(plain), make(overlapped, overlap=True)
    for step in range(4):
        for model, optimizer in zip((plain, overlapped), optimizers, strict=True):
            optimizer.zero_grad()
            x, y = batch(step)
            (model(x) - y).square().mean().backward()
            if step == 2 and key == "factor":
                with torch.no_grad():
                    pairs(model)[0].A.mul_(1 + 1e-9)  # within what a gradient that was captured may differ from .grad
            elif step == 2:
                optimizer.param_groups[0][key] = {"maximize": True, "weight_decay": 0.5}.get(key, 0.02)
            optimizer.step()
    for p, q in zip(plain.parameters(), overlapped.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


def test_overlap_refuses_what_it_cannot_do() -> None:
    model = make_model("ours")
    optimizer = make(model, overlap=True)
    loss_of(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = deltas(model)
    loss_of(model, 1).backward()
    with pytest.raises(RuntimeError, match="second backward pass.*overlap=False"):
        loss_of(model, 2).backward()
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(RuntimeError, match="Use overlap=False"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, deltas(model), strict=True))
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(before, deltas(model), strict=True))


def two_ranks_and_a_head() -> nn.Module:
    """Layers in two buckets, and parameters beside them."""
    torch.manual_seed(0)
    model = nn.Sequential(LowRankLinear(nn.Linear(12, 12), 3, 1.0), LowRankLinear(nn.Linear(12, 12), 2, 1.0), nn.Linear(12, 9)).double()
    for pair in pairs(model):
        nn.init.normal_(pair.B)
    return model


@pytest.mark.parametrize("options", [{}, {"momentum_mode": "projected"}, KFAC], ids=["lowrank", "projected", "kfac"])
def test_overlap_that_fails_in_one_layer_changes_nothing(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = two_ranks_and_a_head(), two_ranks_and_a_head()
    optimizer, other = make(model, overlap=True, **options), make(plain, **options)
    for step in range(4):
        with monkeypatch.context() as patch:
            if step == 2:

                def fails(self, gradients, *arguments, step_pairs=OPLoRA._step_pairs) -> None:
                    step_pairs(self, gradients, *arguments)
                    if gradients.pairs[0] is self._pairs[1]:
                        raise RuntimeError("simulated")

                patch.setattr(OPLoRA, "_step_pairs", fails)
            for net, its in ((model, optimizer), (plain, other)):
                its.zero_grad()
                loss_of(net, step).backward()
            if step == 2:
                before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
                with pytest.raises(RuntimeError, match="simulated"):
                    optimizer.step()
                assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
                torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
        optimizer.step()  # after the failure: without what was begun early
        other.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


def test_overlap_that_fails_while_it_is_taken_over_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("ours")
    optimizer = make(model, overlap=True)

    def fails(self, *arguments) -> None:
        raise RuntimeError("simulated")

    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        with monkeypatch.context() as patch:
            if step:
                patch.setattr(OPLoRA, "_write_back", fails)
                with pytest.raises(RuntimeError, match="simulated"):
                    optimizer.step()
            else:
                optimizer.step()
    with pytest.raises(RuntimeError, match="failed half-way .*simulated.*Load a checkpoint"):
        optimizer.step()


def _step_in_child(results: multiprocessing.Queue, model: nn.Module, optimizer: OPLoRA) -> None:
    torch.set_num_threads(1)  # torch's own products may wait for ever in a forked child
    optimizer.step()  # begun early in the parent
    for step in (2, 3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    results.put([p.detach().numpy() for p in model.parameters()])


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch's autograd has threads for GPUs, and refuses to work in a forked child")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_overlap_in_a_forked_child() -> None:
    """The worker does not survive a fork: the child has its own, and does not wait for what the parent's had begun."""
    model = make_model("ours")
    optimizer = make(model, overlap=True)
    loss_of(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_step_in_child, args=(results, model, optimizer))
    child.start()
    try:
        found = results.get(timeout=60)
    finally:
        child.kill()
        child.join()
    optimizer.step()
    for step in (2, 3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    for p, other in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(p.detach(), torch.from_numpy(other), rtol=1e-12, atol=1e-14)


def test_overlap_on_a_gpu_keeps_one_stream_and_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: streams that do nothing, and tensors that note by which stream they are recorded."""

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def wait_stream(self, other: object) -> None:
            pass

    class Recorded:
        device = torch.device("cuda", 0)

        def __init__(self) -> None:
            self.streams: list[object] = []

        def clone(self) -> Recorded:
            return Recorded()

        def record_stream(self, stream: object) -> None:
            self.streams.append(stream)

    current = Stream(Recorded.device)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(early, "_streams", {})
    sides = set()
    for _ in range(3):
        changed, read = Recorded(), Recorded()
        work = early.start(lambda copies: None, ([changed],), [0.1], [read])
        sides.add(work.work)
        assert changed.streams == read.streams == [work.work]
        assert work.copies[0][0].streams == [current]
    assert len(sides) == 1 and current not in sides


#: Of a base layer; PEFT's A has its kernel, stride and padding.
CONVOLUTIONS = {
    "2d": lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1),
    "2d, oblong": lambda: nn.Conv2d(3, 8, (3, 2), stride=(1, 2), padding=(0, 1)),
    "2d, same": lambda: nn.Conv2d(3, 8, (2, 3), padding="same"),
    "2d, pointwise": lambda: nn.Conv2d(3, 8, 1),
    "1d": lambda: nn.Conv1d(3, 8, 5, stride=2, padding=2),
}


class Convolved(nn.Module):
    """A convolution and a linear layer behind it, adapted by PEFT, with random factors."""

    def __init__(self, kind: str, channels_last: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.head = CONVOLUTIONS[kind]().double(), nn.Linear(8, 5).double()
        peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=6, target_modules=["convolution", "head"]), self)
        self.positions = (7, 6) if kind.startswith("2d") else (11,)
        self.pairs = pairs(self, convolutions=True)
        for pair in self.pairs:
            for factor in (pair.A, pair.B):
                factor.data = torch.randn(factor.shape, dtype=torch.float64) / 4
                if channels_last and factor.ndim == 4:
                    factor.data = factor.data.to(memory_format=torch.channels_last)

    def batch(self, step: int) -> Tensor:
        return torch.randn(4, 3, *self.positions, generator=torch.Generator().manual_seed(step), dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.convolution(x).flatten(2).mT)).square().mean()

    def deltas(self) -> list[Tensor]:
        return [pair.scale * pair.B.detach().flatten(1) @ pair.A.detach().flatten(1) for pair in self.pairs]

    def dense_gradients(self, layers: list[OPLoRALayer], step: int) -> list[tuple[Tensor, Tensor]]:
        """(S, X) of both layers, G = SᵀX by autograd through whole weights; of the convolution S = I and X = G."""
        base, a = self.convolution.base_layer, self.convolution.lora_A.default
        convolve = nn.functional.conv2d if len(self.positions) == 2 else nn.functional.conv1d
        whole, head = (layer.delta_weight().requires_grad_() for layer in layers)
        x = self.batch(step)
        y = base(x) + convolve(x, whole.view(8, 3, *a.kernel_size), stride=a.stride, padding=a.padding)
        hidden = torch.tanh(y.flatten(2).mT)
        output = hidden @ (self.head.base_layer.weight + head).T + self.head.base_layer.bias
        output.square().mean().backward()
        return [(torch.eye(8, dtype=torch.float64), whole.grad), (torch.eye(5, dtype=torch.float64), head.grad)]


@pytest.mark.parametrize("channels_last", [False, True])
@every_gradient
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_convolutions_follow_the_algorithm_box_on_dense_gradients(convolution: str, gradient: str, channels_last: bool) -> None:
    if channels_last and not convolution.startswith("2d"):
        pytest.skip("a layout of 2-d convolutions")
    model = Convolved(convolution, channels_last)
    optimizer = make(model, gradient=gradient, sketch_width=100)
    assert optimizer._handles and len(optimizer._pairs) == 2
    optimizer._create_state()
    layers = []
    for pair in model.pairs:
        start, settings = optimizer.state[pair.A]["momentum_v"].clone(), {"lr": LR, "momentum": 0.8}
        factors = pair.A.detach().flatten(1).clone(), pair.B.detach().flatten(1).clone()
        layers.append(OPLoRALayer(*factors, pair.scale, proximal=1e-3, momentum_start=start, **settings))
    first = model.deltas()
    for step in range(20):
        for layer, (s, x) in zip(layers, model.dense_gradients(layers, step), strict=True):
            layer.step(s, x)
        optimizer.zero_grad()
        model(model.batch(step)).backward()
        optimizer.step()
    for delta, layer, start in zip(model.deltas(), layers, first, strict=True):
        expected = layer.delta_weight()
        assert float((expected - start).norm()) > 1e-3
        assert float((delta - expected).norm() / expected.norm()) <= 1e-9


@every_kind
def test_convolutions_in_micro_batches_overlapped_and_resumed(kind: dict) -> None:
    """As one batch on a contiguous layout; the metric's X are the patches."""
    whole, parts = Convolved("2d"), Convolved("2d", channels_last=True)
    optimizers = make(whole, sketch_width=100, **kind), make(parts, sketch_width=100, **kind)
    overlapped = Convolved("2d", channels_last=True)
    early = make(overlapped, sketch_width=100, overlap=True, **kind)
    for step in range(6):
        if step == 3:
            saved, optimizer = copy.deepcopy(optimizers[1].state_dict()), optimizers[1]
            optimizer.close()
            optimizers = optimizers[0], make(parts, sketch_width=100, **kind)
            optimizers[1].load_state_dict(saved)
        x = whole.batch(step)
        for model, optimizer in ((whole, optimizers[0]), (overlapped, early)):
            optimizer.zero_grad()
            model(x).backward()
            optimizer.step()
        optimizers[1].zero_grad()
        for half in x.split(2):
            (parts(half) / 2).backward()
        optimizers[1].step()
    for model in (parts, overlapped):
        for mine, theirs in zip(model.deltas(), whole.deltas(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_other_convolutions_are_left_to_adamw_with_a_notice() -> None:
    """Groups and three dimensions (PEFT), and a transposed A."""
    model = nn.Module()
    model.grouped, model.deep, model.plain = nn.Conv2d(4, 8, 3, groups=2), nn.Conv3d(3, 4, 2), nn.Conv2d(3, 4, 2)
    with pytest.warns(UserWarning, match="groups"):
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["grouped", "deep", "plain"]), model)
    model.transposed = nn.Module()
    model.transposed.lora_A = nn.ModuleDict({"default": nn.ConvTranspose2d(2, 5, 3, bias=False)})
    model.transposed.lora_B = nn.ModuleDict({"default": nn.ConvTranspose2d(5, 2, 1, bias=False)})
    with pytest.warns(UserWarning, match=r"6 adapter parameter\(s\).*convolutions in groups, transposed or 3-d.*get AdamW: grouped"):
        optimizer = make(model)
    assert [pair.name for pair in optimizer._pairs] == ["plain.default"]
    del model.plain
    with pytest.raises(ValueError, match="no pair of low-rank factors"):
        make(model)


@pytest.fixture(scope="module")
def two_ranks(ranks: Ranks) -> list[dict]:
    return ranks(oplora_ranks.results)


@pytest.mark.parametrize("case", oplora_ranks.CASES)
def test_two_ranks_with_half_the_batch_are_one(case: str, two_ranks: list[dict]) -> None:
    (zero, sent), (one, _) = (results[case] for results in two_ranks)
    for mine, other, expected in zip(zero, one, oplora_ranks.train(case, 0, 1), strict=True):
        assert np.array_equal(mine, other), "the ranks drifted apart"
        np.testing.assert_allclose(mine, expected.numpy(), rtol=1e-9, atol=1e-12)
    # At most four columns of G or of Gᵀ (the norm's probe) for all layers; the sketches, 4 and 9 columns; three of each metric.
    heights, widths = (sum(shape[dim] for shape in oplora_ranks.SHAPES) for dim in (0, 1))
    thin = {"sketch": 4 * heights + 9 * widths, "kfac": 3 * (heights + widths)}
    assert sent <= thin.get(case, 4 * max(heights, widths))
