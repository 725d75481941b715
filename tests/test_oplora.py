"""OPLoRA against its algorithm box, its state, what it holds and what it refuses."""

from __future__ import annotations

import copy

import numpy as np
import oplora_ranks
import pytest
import torch
from _models import batch, loss_of, trainable
from _numerics import same_bits_or
from _oplora import KFAC, Shared, assert_alike, deltas, every_gradient, every_kind, every_library, make, make_model, naive_gradients
from _ranks import Ranks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank_kernels as lk
from benchmarks.naive.oplora import Kronecker, OPLoRALayer
from lowrank_kernels import LowRankLinear, OPLoRA, pairs

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


@every_library
@every_gradient
@pytest.mark.parametrize("options", CASES, ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "default")
def test_follows_the_algorithm_box(options: dict, gradient: str, library: str) -> None:
    model = make_model(library)
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


@every_library
@pytest.mark.parametrize("options", SCALED, ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "default")
def test_the_scaled_variant_follows_its_algorithm_box(options: dict, library: str) -> None:
    model = make_model(library)
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


def test_the_metric_of_few_tokens_is_exact() -> None:
    """Of fewer tokens than the metric's rank the statistics are known whole, and D_V is (1 - decay) XᵀX/n."""
    model = make_model("ours")
    optimizer = make(model, **{**KFAC, "lr": 0.0, "metric_rank": 8})
    x, y = (t[:3] for t in batch(0))
    (model(x) - y).square().sum().backward()
    optimizer.step()
    state = optimizer.state[pairs(model)[0].A]
    W, sigma = state["metric_basis"], state["metric_values"]
    torch.testing.assert_close(W * sigma @ W.T, 0.1 * x.T @ x / 3, rtol=0, atol=1e-12)


@every_library
@every_kind
def test_resuming_is_bit_for_bit(kind: dict, library: str) -> None:
    """Metrics, momentum and the counts of layers that missed steps."""
    straight, resumed = Shared(library), Shared(library)

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
    same = same_bits_or(rtol=1e-10, atol=1e-12)  # a checkpoint drops the strides of the metric's basis
    assert all(same(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))
    if kind is KFAC:
        with pytest.raises(ValueError, match="saved with metric='kfac', here it is None"):
            make(resumed).load_state_dict(saved)
        other = make(resumed, **{**KFAC, "metric_rank": 2})
        other.load_state_dict(saved)  # with the hyperparameters, as torch's optimizers do
        assert other.param_groups[0]["metric_rank"] == saved["param_groups"][0]["metric_rank"]


@every_library
def test_the_step_does_not_depend_on_how_the_scale_is_split(library: str) -> None:
    """s drops out of the step length: without λ, ΔW is the same for (s, B) and (s/10, 10 B), and from B = 0 for every s."""
    models = [make_model(library, scale=scale) for scale in (0.7, 7.0)]
    for model in models:
        optimizer = make(model, proximal=0.0)
        for step in range(10):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
    assert_alike(*models, 1e-8)


@every_library
def test_copies(library: str) -> None:
    """A copied model alone records nothing; model and optimizer copied together go on alike."""
    model = make_model(library)
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
    found, start = [], torch.randn(3, 12) / 12**0.5
    for of_factors in (torch.float32, dtype):
        torch.manual_seed(0)
        model = lk.adapt(nn.Sequential(nn.Linear(12, 10)), rank=3, dtype=of_factors)
        model[0].lora_A.data.copy_(start)
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


@pytest.mark.parametrize("mode", ["projected", "naive"])
def test_momentum_that_goes_through_zero_forgets(mode: str) -> None:
    model = make_model("ours")
    optimizer = make(model, momentum_mode=mode)
    for step in range(5):
        if step == 2:
            optimizer.param_groups[0]["momentum"] = 0.0
            twin = copy.deepcopy(model)
            other = make(twin, momentum_mode=mode)
        if step == 3:
            optimizer.param_groups[0]["momentum"] = 0.8
        for module, method in [(model, optimizer)] + ([(twin, other)] if step >= 2 else []):
            method.zero_grad()
            loss_of(module, step).backward()
            method.step()
    assert_alike(model, twin, 1e-9)


def test_refusals() -> None:
    model = make_model("ours")
    for bad, message in (
        ({"sweeps": 0}, "sweeps must be ≥ 1, got 0"),
        ({"proximal": -1.0}, "proximal must be ≥ 0"),
        ({"momentum": 1.0}, "Invalid momentum value"),
        ({"momentum_mode": "adam"}, "momentum_mode must be one of"),
        ({"gradient": "whole"}, "gradient must be one of"),
        ({"momentum_rank": 0}, "momentum_rank must be ≥ 1, got 0"),
        ({"momentum_rank": 4, "momentum_mode": "naive"}, "momentum_rank is for"),
        ({"sketch_width": 0}, "sketch_width must be"),
        ({"lr_ratio": 2.0}, "lr_ratio is not supported"),
        ({"metric": "shampoo"}, "metric must be one of None, 'kfac', got 'shampoo'"),
        ({"metric_rank": 4}, "metric_rank is for metric='kfac'"),
        ({**KFAC, "metric_rank": 0}, "metric_rank must be ≥ 1, got 0"),
        ({**KFAC, "metric_decay": 1.0}, "metric_decay must be in"),
        ({**KFAC, "metric_damping": 0.0}, "metric_damping must be positive"),
        ({**KFAC, "metric_damping": 1e-300}, "metric_damping must be positive"),
        ({**KFAC, "metric_damping": 1e300}, "metric_damping must be finite"),
        ({"sweeps": 10**30}, "sweeps must be ≤ 1000000, got"),
        ({**KFAC, "gradient": "dense"}, "made of X and S, which gradient='dense' does not keep"),
    ):
        with pytest.raises(ValueError, match=message):
            make(model, **bad)
    for bad in ({"metric_damping": True}, {"metric_decay": None}, {"metric_decay": []}, {"overlap": "False"}):
        with pytest.raises(TypeError, match=f"OPLoRA: {next(iter(bad))} must be"):
            make(model, **bad)
    with pytest.raises(ValueError, match="no pair of low-rank factors"):
        make(nn.Linear(3, 3))
    optimizer = make(model)
    for bad in (0.0, float("nan")):
        with pytest.raises(ValueError, match="max_norm must be positive"):
            optimizer.clip_full_grad_norm_(bad)
    for bad in ("a", None, True):
        with pytest.raises(TypeError, match="OPLoRA: max_norm must be a number, got"):
            optimizer.clip_full_grad_norm_(bad)
    loss_of(model, 0).backward()
    grads = [p.grad.clone() for p in trainable(model)]
    assert optimizer.clip_full_grad_norm_(float("inf")) > 0
    assert all(torch.equal(p.grad, grad) for p, grad in zip(trainable(model), grads, strict=True))
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


@pytest.fixture(scope="module")
def two_ranks(ranks: Ranks) -> list[dict]:
    return ranks(oplora_ranks.results)


def test_the_mean_over_ranks_is_finite_where_the_sum_is_not(ranks: Ranks) -> None:
    assert ranks(oplora_ranks.mean_of_large_gradients) == [[40000.0, 65504.0, -30000.0]] * 2


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


@pytest.mark.parametrize("mode", ["lowrank", "projected", "naive"])
def test_layers_narrower_than_the_rank(mode: str) -> None:
    """PEFT allows them: a head of one output under r = 4. ΔW has rank 1 at most, the factors and a momentum on them have four columns."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    layers = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1)).double()
    model = peft.get_peft_model(layers, peft.LoraConfig(r=4, target_modules=["0", "1"]))
    optimizer = make(model, lr=0.02, momentum_mode=mode)
    x, losses = torch.randn(32, 6, dtype=torch.float64), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - x[:, :1]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_layers_that_are_thawed_later() -> None:
    model = make_model("peft")
    later = [p for name, p in model.named_parameters() if p.requires_grad and ".0." in name]
    for p in later:
        p.requires_grad_(False)
    optimizer = make(model, lr=0.02)
    known = len(optimizer._pairs)
    for p in later:
        p.requires_grad_(True)
    optimizer.add_param_group({"params": [(name, p) for name, p in model.named_parameters() if any(p is q for q in later)]})
    assert len(optimizer._pairs) > known
    before = [p.detach().clone() for p in later]
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    assert not any(map(torch.equal, before, later))
