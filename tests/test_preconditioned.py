"""AltLoRA, AltLoRA+, ScaledGD, ScaledAdamW, LoRA-Pro and LoRA-RITE against their algorithm boxes, and their invariances.

Most tests train towards a target per layer, ``L = Σ ½‖ΔW − T‖²``, whose full gradient is ``G = ΔW − T``: no network between.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import peft
import pytest
import torch
from _models import loss_of, make_model, trainable
from _numerics import same_bits_or
from _preconditioned import Targets, every_method
from torch import Tensor, nn

from benchmarks.naive.preconditioned import AltLoRALayer, LoRAProLayer, LoRARITELayer, ScaledLayer
from lowrank_kernels import (
    AdamW,
    AltLoRA,
    AltLoRAPlus,
    LoRAPro,
    LoRARITE,
    LowRankLinear,
    ScaledAdamW,
    ScaledGD,
    SDSLoRA,
    pairs,
)
from lowrank_kernels.optim._shared.base import LowRankOptimizer

NAIVE: dict[type, Callable] = {
    AltLoRA: lambda *factors, momentum=0.9, **k: AltLoRALayer(*factors, betas=(momentum, 0.0), **k),
    AltLoRAPlus: lambda *factors, **k: AltLoRALayer(*factors, plus=True, **k),
    ScaledGD: lambda *factors, **k: ScaledLayer(*factors, adam=False, **k),
    ScaledAdamW: lambda *factors, **k: ScaledLayer(*factors, adam=True, **k),
    LoRAPro: lambda *factors, sylvester=True, **k: LoRAProLayer(*factors, sylvester=sylvester, **k),
    LoRARITE: LoRARITELayer,
}


def assert_follows(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    difference = float((actual - expected).norm() / expected.norm())
    assert difference <= tolerance, f"{what}: {difference:.2g}"


# ------------------------------------------------------------------------------------------------------------------ algorithm boxes

COMMON = {"lr": 0.02, "damping": 1e-3}
CASES: list[tuple[type, dict]] = [
    *((AltLoRA, {"order": order}) for order in ("B", "A", "joint")),
    (AltLoRA, {"momentum": 0.0, "damping": 0.3}),
    (AltLoRA, {"weight_decay": 0.3, "lr_ratio": 4.0}),
    (AltLoRA, {"maximize": True, "lr": 1e-3}),
    *((AltLoRAPlus, {"order": order, "weight_decay": 0.3}) for order in ("B", "A", "joint")),
    (AltLoRAPlus, {"betas": (0.5, 0.9), "eps": 1e-3, "damping": 0.3}),
    (AltLoRAPlus, {"lr_ratio": 4.0, "maximize": True}),
    (ScaledGD, {}),
    (ScaledGD, {"momentum": 0.8, "weight_decay": 0.3, "lr": 0.005}),
    (ScaledGD, {"lr_ratio": 4.0, "lr": 0.005, "damping": 0.3}),
    (ScaledGD, {"maximize": True, "lr": 1e-3, "momentum": 0.5}),
    (ScaledAdamW, {"weight_decay": 0.3}),
    (ScaledAdamW, {"betas": (0.5, 0.9), "eps": 1e-3, "damping": 0.3, "lr": 0.005}),
    (ScaledAdamW, {"lr_ratio": 4.0, "maximize": True}),
    (LoRAPro, {"sylvester": True}),
    (LoRAPro, {"sylvester": False, "weight_decay": 0.3}),
    (LoRAPro, {"betas": (0.5, 0.9), "eps": 0.1, "damping": 0.3}),
    (LoRAPro, {"lr_ratio": 4.0, "maximize": True}),
    (LoRARITE, {"damping": 1e-9}),
    (LoRARITE, {"weight_decay": 0.3}),
    (LoRARITE, {"betas": (0.5, 0.9), "eps": 1e-3, "damping": 0.3}),
    (LoRARITE, {"lr_ratio": 4.0, "maximize": True}),
]


@pytest.mark.parametrize(("method", "options"), CASES, ids=[f"{m.__name__}-{'-'.join(f'{k}={v}' for k, v in o.items())}" for m, o in CASES])
def test_trajectory_is_the_algorithm_box(method: type[LowRankOptimizer], options: dict) -> None:
    """200 steps; each side computes its gradients at its own factors. Of every factor some gradients are None."""
    options = {**COMMON, **options}
    problem = Targets()
    optimizer = method(problem.model, **options)
    sign = -1.0 if options.pop("maximize", False) else 1.0  # ascending on L is descending on -L
    naive = [NAIVE[method](x.lora_A.detach().clone(), x.lora_B.detach().clone(), x.scale, **options) for x in problem.model]
    for step in range(200):
        problem.set_gradients()
        for index, (layer, twin) in enumerate(zip(problem.model, naive, strict=True)):
            grad_A, grad_B = (sign * grad for grad in problem.gradients(index, twin.A, twin.B))
            if (step + index) % 7 == 3:
                layer.lora_A.grad = grad_A = None
            if (step + 2 * index) % 5 == 1:
                layer.lora_B.grad = grad_B = None
            twin.step(grad_A, grad_B)
        optimizer.step()
        for layer, twin in zip(problem.model, naive, strict=True):
            assert_follows(layer.delta_weight(), twin.delta_weight(), 1e-9, f"step {step + 1}")
            if not math.isfinite(float(twin.delta_weight().norm())) or float(twin.delta_weight().norm()) > 1e6:
                pytest.fail("the case diverges: it proves nothing")


def test_a_scheduled_momentum_of_scaled_gd_is_that_of_sgd() -> None:
    """What was added up before counts as much as it did then: nothing is rescaled where μ changes."""
    options = {"lr": 1e-3, "damping": 1e-3, "weight_decay": 0.3}
    problem = Targets()
    optimizer = ScaledGD(problem.model, momentum=0.3, **options)
    naive = [NAIVE[ScaledGD](x.lora_A.detach().clone(), x.lora_B.detach().clone(), x.scale, **options) for x in problem.model]
    for momentum in (0.3, 0.3, 0.9, 0.9, 0.5, 0.0, 0.7):
        optimizer.param_groups[0]["momentum"] = momentum
        problem.set_gradients()
        for index, twin in enumerate(naive):
            twin.momentum = momentum
            twin.step(*problem.gradients(index, twin.A, twin.B))
        optimizer.step()
        for layer, twin in zip(problem.model, naive, strict=True):
            assert_follows(layer.delta_weight(), twin.delta_weight(), 1e-12, f"momentum {momentum}")


@pytest.mark.parametrize("order", ["B", "joint"])
@pytest.mark.parametrize("method", [AltLoRA, AltLoRAPlus], ids=lambda method: method.__name__)
@pytest.mark.parametrize(("before", "after"), [(1.0, 1e-6), (1e-6, 1.0)])
def test_momentum_is_aligned_with_the_damping_of_its_turn(method: type[LowRankOptimizer], order: str, before: float, after: float) -> None:
    """``(BᵀB + δI)⁻¹ BᵀB_old`` (Algorithm 1, line 6) has one δ, also if that was another when B was written: what is left of the other
    would be divided by a B that is small, as it is in the first steps."""
    problem = Targets()
    for layer in problem.model:
        layer.lora_B.data *= 1e-2
    optimizer = method(problem.model, lr=0.01, damping=before, order=order)
    problem.run(optimizer, 2)
    old = [layer.lora_B.detach().clone() for layer in problem.model]
    problem.run(optimizer, 1)
    wanted = []
    for layer, old_B in zip(problem.model, old, strict=True):
        B = layer.lora_B.detach()
        cross = B.mT @ old_B @ optimizer.state[layer.lora_A]["exp_avg"]
        wanted.append(0.9 * torch.linalg.solve(B.mT @ B + after * torch.eye(layer.rank, dtype=B.dtype), cross))
    optimizer.param_groups[0]["damping"] = after
    problem.set_gradients()
    for layer in problem.model:
        layer.lora_A.grad.zero_()
    optimizer.step()
    for layer, momentum in zip(problem.model, wanted, strict=True):
        assert_follows(optimizer.state[layer.lora_A]["exp_avg"], momentum, 1e-8, f"rank {layer.rank}")


@every_method
def test_the_damping_of_a_gram_matrix_is_that_of_its_factors_group(method: type[LowRankOptimizer]) -> None:
    """B is frozen, so that A's step is all there is: it knows the δ of B's group, and not that of its own."""
    moved = []
    for damping_a, damping_b in ((1e-3, 0.5), (0.2, 0.5), (1e-3, 0.1)):
        problem = Targets()
        factors = {side: [(n, p) for n, p in problem.model.named_parameters() if f"lora_{side}" in n] for side in "AB"}
        groups = [{"params": factors["A"], "damping": damping_a}, {"params": factors["B"], "damping": damping_b}]
        optimizer = method(groups, lr=0.01, **({"order": "joint"} if method in (AltLoRA, AltLoRAPlus) else {}))
        for _ in range(3):
            problem.set_gradients()
            for _, p in factors["B"]:
                p.grad = None
            optimizer.step()
        moved.append([layer.lora_A.detach() for layer in problem.model])
    assert all(map(torch.equal, moved[0], moved[1]))
    assert not any(map(torch.equal, moved[0], moved[2]))


def narrow_model() -> nn.Module:
    """A head with one output at a rank of 4, as PEFT allows it; a layer with as little input; an ordinary one."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 1))
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "2", "4"], init_lora_weights=False)).double()


@every_method
def test_layers_narrower_than_the_rank(method: type[LowRankOptimizer]) -> None:
    """XᵀX has less than full rank, and the damping does the rest; a QR of X there is none."""
    model = narrow_model()
    if method is LoRARITE:
        with pytest.raises(ValueError, match=r"LoRARITE: .*\.0\.default is of rank 4, more than its 16 × 3 weight has"):
            method(model)
        return
    options = {"lr": 1e-3, "damping": 0.1}
    optimizer, found = method(model, **options), pairs(model)
    twins = [NAIVE[method](pair.A.detach().clone(), pair.B.detach().clone(), pair.scale, **options) for pair in found]
    for _ in range(20):
        for pair, twin in zip(found, twins, strict=True):
            pair.A.grad, pair.B.grad = torch.randn_like(pair.A), torch.randn_like(pair.B)
            twin.step(pair.A.grad.clone(), pair.B.grad.clone())
        optimizer.step()
    for pair, twin in zip(found, twins, strict=True):
        assert_follows(pair.scale * pair.B.detach() @ pair.A.detach(), twin.delta_weight(), 1e-9, pair.name)


@every_method
def test_low_precision_factors_are_rounded_once(method: type[LowRankOptimizer]) -> None:
    """bf16 factors, fp32 state: after a step from the same bf16 factors and gradients, the fp64 result to one rounding."""
    problem = Targets(dtype=torch.bfloat16)
    optimizer = method(problem.model, lr=0.05, damping=1e-2)
    for _ in range(3):
        problem.set_gradients()
        exact = []
        for layer in problem.model:
            twin = LowRankLinear(nn.Linear(layer.in_features, layer.out_features).double().requires_grad_(False), layer.rank, layer.scale)
            for name in ("lora_A", "lora_B"):
                getattr(twin, name).data = getattr(layer, name).detach().double()
                getattr(twin, name).grad = getattr(layer, name).grad.double()
            exact.append(twin)
        reference = method(nn.ModuleList(exact), lr=0.05, damping=1e-2)
        for twin, layer in zip(exact, problem.model, strict=True):
            for name in ("lora_A", "lora_B"):
                if state := optimizer.state.get(getattr(layer, name)):
                    reference.state[getattr(twin, name)] = {key: value.double() for key, value in state.items()}
        for theirs, mine in zip(reference.param_groups, optimizer.param_groups, strict=True):
            theirs["step"] = mine["step"]
        reference.step()
        optimizer.step()
        for twin, layer in zip(exact, problem.model, strict=True):
            for name in ("lora_A", "lora_B"):
                new, wanted = getattr(layer, name).detach().double(), getattr(twin, name).detach()
                assert ((new - wanted).abs() <= 2**-8 * wanted.abs() + 1e-4 * wanted.abs().max()).all()
                assert all(value.dtype == torch.float32 for value in optimizer.state[getattr(layer, name)].values())


# ------------------------------------------------------------------------------------------------------------------ invariance


def reparametrized(problem: Targets, condition: float) -> Targets:
    """The same ΔW from ``(BT, T⁻¹A)`` with ``cond(T)`` as told."""
    other, generator = copy.deepcopy(problem), torch.Generator().manual_seed(1)
    for layer in other.model:
        rank = layer.rank
        u, v = (torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64, generator=generator))[0] for _ in range(2))
        T = u * torch.logspace(0.5, 0.5 - math.log10(condition), rank, dtype=torch.float64) @ v
        layer.lora_A.data, layer.lora_B.data = torch.linalg.solve(T, layer.lora_A.data), layer.lora_B.data @ T
    return other


def largest_difference(build: Callable[[nn.Module], torch.optim.Optimizer], steps: int = 60, condition: float = 1e3) -> float:
    """Between the trajectories of ΔW from (B, A) and from (BT, T⁻¹A), relative to ΔW."""
    problem = Targets()
    other = reparametrized(problem, condition)
    optimizers = build(problem.model), build(other.model)
    start, worst = problem.deltas(), 0.0
    for _ in range(steps):
        for p, optimizer in zip((problem, other), optimizers, strict=True):
            p.set_gradients()
            optimizer.step()
        for mine, theirs in zip(problem.deltas(), other.deltas(), strict=True):
            worst = max(worst, float((mine - theirs).norm() / mine.norm()))
    assert problem.loss() < 0.9 * sum(float((d - t).square().sum()) / 2 for d, t in zip(start, problem.targets, strict=True))
    return worst


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("order", ["B", "A", "joint"])
def test_altlora_does_not_depend_on_the_split(order: str, weight_decay: float) -> None:
    """Theorem 4, with momentum."""
    assert largest_difference(lambda m: AltLoRA(m, lr=0.05, damping=0.0, order=order, weight_decay=weight_decay)) < 2e-9


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_lora_rite_does_not_depend_on_the_split(weight_decay: float) -> None:
    """With its second moment."""
    assert largest_difference(lambda m: LoRARITE(m, lr=0.02, damping=0.0, weight_decay=weight_decay)) < 1e-8


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_scaled_gd_does_not_depend_on_the_split(momentum: float) -> None:
    assert largest_difference(lambda m: ScaledGD(m, lr=0.01, momentum=momentum, damping=0.0)) < 1e-8


def test_scaled_gd_has_state_as_long_as_it_has_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Targets()
    optimizer = ScaledGD(problem.model, lr=0.01)
    problem.run(optimizer, 1)
    with monkeypatch.context() as patch:
        patch.setattr(ScaledGD, "_factor_state", lambda *_: pytest.fail("no step looks for state again that is not kept"))
        problem.run(optimizer, 1)
    assert not any(optimizer.state.values())
    optimizer.param_groups[0]["momentum"] = 0.5
    problem.run(optimizer, 1)
    assert all(state.keys() == {"exp_avg"} for state in optimizer.state.values())


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_lora_pro_under_sgd_does_not_depend_on_the_split(weight_decay: float) -> None:
    """X = 0. AdamW with a huge eps is SGD: the direction is m / eps."""
    eps = 1e30
    sgd = {"lr": 0.05 * eps, "betas": (0.0, 0.999), "eps": eps, "weight_decay": weight_decay / eps}
    assert largest_difference(lambda m: LoRAPro(m, damping=0.0, sylvester=False, **sgd)) < 2e-9


@pytest.mark.parametrize(
    "build",
    [
        lambda m: AdamW(m, lr=0.02),
        lambda m: AltLoRAPlus(m, lr=0.02, damping=0.0),  # elementwise second moments
        lambda m: AltLoRA(m, lr=0.05, damping=0.1),
    ],
    ids=["AdamW", "AltLoRAPlus", "AltLoRA with damping"],
)
def test_others_depend_on_the_split(build) -> None:
    """So the tests above can fail."""
    assert largest_difference(build) > 1e-2


@pytest.mark.parametrize("damping", [0.0, 1e-2, 3.0])
def test_scaled_gd_is_one_simultaneous_least_squares_step(damping: float) -> None:
    """OPLoRA's sweep (its Equation 6) with λ = δ, both factors from the old ones, at lr η: ScaledGD at lr η/s²."""
    lr = 0.3

    def least_squares(fixed: Tensor, target: Tensor, old: Tensor) -> Tensor:
        """The U of ``min ‖U·fixedᵀ − target‖² + λ‖U − old‖²``, as one stacked least-squares problem."""
        rank = fixed.shape[1]
        system = torch.cat([fixed, damping**0.5 * torch.eye(rank, dtype=fixed.dtype)])
        return torch.linalg.lstsq(system, torch.cat([target.mT, damping**0.5 * old.mT])).solution.mT

    problem = Targets()
    expected = []
    for layer, target in zip(problem.model, problem.targets, strict=True):
        U, V, s = layer.lora_B.detach(), layer.lora_A.detach().mT, layer.scale
        G = s * U @ V.mT - target
        wanted = U @ V.mT - lr / s * G
        expected.append((least_squares(U, wanted.mT, V).mT, least_squares(V, wanted, U)))
    problem.set_gradients()
    for layer, (A, B) in zip(problem.model, expected, strict=True):
        ScaledGD(layer, lr=lr / layer.scale**2, damping=damping).step()
        torch.testing.assert_close(layer.lora_A.detach(), A, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(layer.lora_B.detach(), B, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------------------------------------ robustness

STARTS: dict[str, Callable[[LowRankLinear], None]] = {
    "B = 0": lambda layer: layer.lora_B.data.zero_(),
    "A = B = 0": lambda layer: (layer.lora_A.data.zero_(), layer.lora_B.data.zero_()),
    "equal columns": lambda layer: layer.lora_B.data[:, 1:].copy_(layer.lora_B.data[:, :1].expand(-1, layer.rank - 1)),
    "zero rows": lambda layer: layer.lora_A.data[1:].zero_(),
    "kappa 1e6": lambda layer: (_spread(layer.lora_A, 0), _spread(layer.lora_B, 1)),
    "large": lambda layer: layer.lora_A.data.mul_(10),
}


def _spread(factor: Tensor, rank_dim: int) -> None:
    """Condition number 1e6, largest singular value 10."""
    q, _ = torch.linalg.qr(factor.data.double() if rank_dim else factor.data.double().mT)
    mix, _ = torch.linalg.qr(torch.randn(q.shape[1], q.shape[1], dtype=torch.float64))
    x = q * torch.logspace(1, -5, q.shape[1]) @ mix
    factor.data.copy_(x if rank_dim else x.mT)


@every_method
@pytest.mark.parametrize("start", STARTS)
def test_no_start_blows_up_in_fp32(method: type[LowRankOptimizer], start: str) -> None:
    """Every argument at its default; a hundred steps, some of them without any gradient but zeros."""
    torch.manual_seed(3)
    problem = Targets([(60, 40, 4, 0.7), (40, 60, 4, 0.7), (40, 40, 4, 2.0)], torch.float32)
    for layer in problem.model:
        STARTS[start](layer)
    optimizer = method(problem.model)
    first = problem.loss()
    for step in range(100):
        problem.set_gradients()
        if step in (0, 7, 8, 50):
            for p in problem.model.parameters():
                p.grad = None if p.grad is None else torch.zeros_like(p)
        optimizer.step()
        assert all(v.isfinite().all() for p in trainable(problem.model) for v in (p, *optimizer.state[p].values())), step
        assert problem.loss() <= 1.1 * first, step


@every_method
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_spoils_its_own_pair_only(method: type[LowRankOptimizer], bad: float) -> None:
    clean, spoilt = Targets(), Targets()
    optimizers = [method(p.model, lr=0.02, damping=1e-3) for p in (clean, spoilt)]
    for step in range(4):
        for problem, optimizer in zip((clean, spoilt), optimizers, strict=True):
            problem.set_gradients()
            if problem is spoilt and step == 1:
                problem.model[1].lora_A.grad[0, 3] = problem.model[1].lora_B.grad[2, 1] = bad
            optimizer.step()
    assert not spoilt.model[1].delta_weight().isfinite().all()
    for index in (0, 2, 3):
        assert_follows(spoilt.model[index].delta_weight(), clean.model[index].delta_weight(), 1e-13, f"layer {index}")


def state_elements(optimizer: torch.optim.Optimizer) -> int:
    return sum(value.numel() for state in optimizer.state.values() for value in state.values() if value.ndim)


def test_state_memory() -> None:
    problem = Targets([(384, 384, 8, 1.0), (1536, 384, 8, 1.0)])

    def elements(build) -> int:
        copy_of = copy.deepcopy(problem)
        optimizer = build(copy_of.model)
        copy_of.run(optimizer, 2)
        return state_elements(optimizer)

    adamw = elements(lambda m: torch.optim.AdamW(trainable(m)))
    r_squared = 4 * 8**2  # four factors
    assert elements(lambda m: AltLoRA(m)) < 0.6 * adamw
    assert elements(lambda m: AltLoRAPlus(m)) <= adamw + r_squared
    assert elements(lambda m: ScaledGD(m)) == 0
    for method in (ScaledAdamW, LoRAPro):
        assert elements(lambda m, method=method: method(m)) == adamw
    assert elements(lambda m: LoRARITE(m)) <= adamw + r_squared


# ------------------------------------------------------------------------------------------------------------------ freezing, errors


@pytest.mark.parametrize("order", ["B", "A"])
@pytest.mark.parametrize("method", [AltLoRA, AltLoRAPlus])
def test_freezing_the_idle_factor_changes_nothing_but_its_backward(method: type[LowRankOptimizer], order: str) -> None:
    free, frozen = make_model("ours"), make_model("ours")
    options = {"lr": 1e-2, "damping": 1e-3, "order": order}
    optimizers = method(free, **options), method(frozen, freeze_idle=True, **options)
    for step in range(12):
        for model, optimizer in zip((free, frozen), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
        turn = "BA" if order == "B" else "AB"
        for pair in pairs(frozen):
            factors = {"A": pair.A, "B": pair.B}
            assert factors[turn[(step + 1) % 2]].requires_grad and not factors[turn[step % 2]].requires_grad
            if step:
                assert factors[turn[(step + 1) % 2]].grad is None, "the idle factor's gradient was computed"
        assert all(torch.equal(p, q) for p, q in zip(free.parameters(), frozen.parameters(), strict=True))
    assert "turn" not in optimizers[0].state_dict()["param_groups"][0], "whose turn it is follows from the step, and from nothing beside it"


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("method", [AltLoRA, AltLoRAPlus])
def test_freezing_the_idle_factor_can_be_switched_off(method: type[LowRankOptimizer], copied: bool) -> None:
    free, frozen = make_model("ours"), make_model("ours")
    options = {"lr": 1e-2, "damping": 1e-3}
    optimizers = [method(free, **options), method(frozen, freeze_idle=True, **options)]
    for step in range(8):
        if step == 3:
            if copied:
                frozen, optimizers[1] = copy.deepcopy((frozen, optimizers[1]))
            optimizers[1].param_groups[0]["freeze_idle"] = False
        if step == 5:
            for model in (free, frozen):  # what the user freezes from then on stays so
                model[0].lora_A.requires_grad_(False)
        for model, optimizer in zip((free, frozen), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(free.parameters(), frozen.parameters(), strict=True))
    assert [p.requires_grad for p in frozen.parameters()] == [p.requires_grad for p in free.parameters()]


@pytest.mark.parametrize("order", ["A", "B"])
@pytest.mark.parametrize("method", [AltLoRA, AltLoRAPlus])
def test_freezing_the_idle_factor_follows_a_checkpoint_that_is_loaded(method: type[LowRankOptimizer], order: str) -> None:
    """Back to an earlier step in place, by an odd and an even number of steps, and in a new run."""

    def make() -> tuple[nn.Module, LowRankOptimizer]:
        model = make_model("ours")
        return model, method(model, lr=1e-2, damping=1e-3, order=order, freeze_idle=True)

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)  # by a norm of which an idle factor's gradient would be a part
            optimizer.step()

    def load(model: nn.Module, optimizer: LowRankOptimizer) -> None:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])

    whole, model = make(), make()
    for step in range(6):
        saved = copy.deepcopy((whole[0].state_dict(), whole[1].state_dict()))
        trained = [p.requires_grad for p in whole[0].parameters()]
        for further in (1, 2):
            load(*model)
            assert [p.requires_grad for p in model[0].parameters()] == trained
            run(*model, step, step + further)
        resumed = make()
        for each in (model, resumed):
            load(*each)
        for each in (whole, model, resumed):
            run(*each, step, step + 1)
        for each in (model, resumed):
            assert all(map(torch.equal, each[0].parameters(), whole[0].parameters()))
    saved[1]["param_groups"][0]["freeze_idle"] = False
    load(*model)
    assert all(p.requires_grad for pair in pairs(model[0]) for p in (pair.A, pair.B))
    model = make()
    saved = copy.deepcopy((model[0].state_dict(), model[1].state_dict()))
    model[0][0].lora_A.requires_grad_(False)
    load(*model)
    assert not model[0][0].lora_A.requires_grad, "before the first step what is frozen was frozen by the user"


@every_method
def test_misuse_is_named(method: type[LowRankOptimizer]) -> None:
    name = method.__name__
    model = Targets().model
    with pytest.raises(ValueError, match=f"{name}: damping must be ≥ 0, got -1"):
        method(model, damping=-1.0)
    with pytest.raises(ValueError, match=f"{name}: damping must be ≥ 0, got nan"):
        method(model, damping=math.nan)
    with pytest.raises(ValueError, match=f"{name}: found no pair of low-rank factors"):
        method(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=f"{name}: lr_ratio must be positive"):
        method(model, lr_ratio=-2.0)
    decoupled = make_model("ours")
    optimizer = SDSLoRA(decoupled, lr=1e-2, total_steps=5, warmup_steps=1)
    loss_of(decoupled, 0).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=f"{name}: 0 is decoupled.*SDSLoRA"):
        method(decoupled)


@every_method
def test_without_damping_a_zero_factor_is_refused_where_it_is_inverted_first(method: type[LowRankOptimizer]) -> None:
    model = make_model("ours")  # B = 0
    before = [p.detach().clone() for p in model.parameters()]
    options: list[dict] = [{"order": "A"}, {"order": "joint"}] if method in (AltLoRA, AltLoRAPlus) else [{}]
    for more in options:
        optimizer = method(model, damping=0.0, **more)
        loss_of(model, 0).backward()
        with pytest.raises(ValueError, match=f"{method.__name__}: damping is 0, and B of 0 is zero.*Give damping"):
            optimizer.step()
        assert not optimizer.state and all(map(torch.equal, before, model.parameters()))
    if method in (AltLoRA, AltLoRAPlus):
        optimizer = method(model, damping=0.0)  # B's turn, then A's
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())


def test_misuse_of_single_methods_is_named() -> None:
    model = Targets().model
    for method in (AltLoRA, AltLoRAPlus):
        with pytest.raises(ValueError, match=f"{method.__name__}: order must be"):
            method(model, order="AB")
    for method in (AltLoRA, ScaledGD):
        with pytest.raises(ValueError, match="Invalid momentum value: 1.0"):
            method(model, momentum=1.0)
    for method, flag in ((AltLoRA, "freeze_idle"), (AltLoRAPlus, "freeze_idle"), (LoRAPro, "sylvester")):
        with pytest.raises(TypeError, match=f"{method.__name__}: {flag} must be True or False, got 'False'"):
            method(model, **{flag: "False"})
    first, second = Targets().model[0], Targets().model[1]
    optimizer = AltLoRA([("0.lora_A", first.lora_A), ("0.lora_B", first.lora_B), ("1.lora_A", second.lora_A)], scale=0.7)
    first.lora_B.grad = torch.ones_like(first.lora_B)
    optimizer.step()
    with pytest.raises(ValueError, match="added at different steps"):
        optimizer.add_param_group({"params": [("1.lora_B", second.lora_B)]})


@pytest.mark.parametrize(
    ("method", "options", "last"),
    [
        (AltLoRA, {}, "_step_side"),
        (AltLoRA, {"order": "joint"}, "_write_stacked_state"),
        (AltLoRAPlus, {}, "_step_side"),
        (AltLoRAPlus, {"order": "joint"}, "_write_stacked_state"),
        (LoRARITE, {}, "_write_stacked_state"),
    ],
)
@pytest.mark.parametrize("steps", [0, 1])
def test_atomic_undoes_a_step_that_moves_stacked_state(
    method: type, options: dict[str, str], last: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that puts views of one stack into the state fails after it has written them: the state is what it was."""
    problem, whole = Targets(), Targets()
    optimizer, plain = method(problem.model, lr=0.02, atomic=True, **options), method(whole.model, lr=0.02, **options)
    problem.run(optimizer, steps)
    whole.run(plain, steps)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # the stacks are gone
    before = copy.deepcopy(list(optimizer.state.values()))
    write = getattr(method, last)

    def fails(self, *args, **kwargs) -> None:
        write(self, *args, **kwargs)
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):  # a stack
                value.fill_(7.0)
        raise RuntimeError("simulated")

    problem.set_gradients()
    with monkeypatch.context() as patch:
        patch.setattr(method, last, fails)
        with pytest.raises(RuntimeError, match="simulated"):
            optimizer.step()
    for old, new in zip(before, optimizer.state.values(), strict=False):
        assert all(torch.equal(old[key], new[key]) for key in old)
    problem.run(optimizer, 3)
    whole.run(plain, 3)
    assert all(map(torch.equal, problem.deltas(), whole.deltas()))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("order", ["A", "B", "joint"])
def test_a_step_that_is_undone_leaves_the_turn_as_it_was(order: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it fails after it has frozen the factor whose turn it was."""
    models = [make_model("ours"), make_model("ours")]
    optimizers = [AltLoRAPlus(model, lr=1e-2, order=order, freeze_idle=True, atomic=True) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        for step in range(steps):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
    freeze, frozen = AltLoRAPlus._freeze_idle, [p.requires_grad for p in models[0].parameters()]

    def fails(self, *args: object) -> None:
        freeze(self, *args)
        monkeypatch.setattr(AltLoRAPlus, "_freeze_idle", freeze)
        raise RuntimeError("simulated")

    monkeypatch.setattr(AltLoRAPlus, "_freeze_idle", fails)
    loss_of(models[0], steps).backward()
    with pytest.raises(RuntimeError, match="simulated"):
        optimizers[0].step()
    assert [p.requires_grad for p in models[0].parameters()] == frozen
    for step in range(steps, steps + 3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


@every_method
@pytest.mark.parametrize("side", ["A", "B"])
def test_frozen_partners_are_read_where_the_model_is_given(side: str, method: type) -> None:
    """LoRA-FA in some layers: a factor's step is the method's own, not AdamW's, when its partner was frozen before."""
    given, listed = Targets(), Targets()
    for problem in (given, listed):
        for layer in problem.model[:2]:
            getattr(layer, f"lora_{side}").requires_grad_(False)
    optimizers = method(given.model, lr=1e-2), method(listed.model.named_parameters(), lr=1e-2)
    factors = [[p for pair in pairs(problem.model) for p in (pair.A, pair.B)] for problem in (given, listed)]
    before = [p.detach().clone() for p in factors[0]]
    for _ in range(6):
        for problem, optimizer in zip((given, listed), optimizers, strict=True):
            problem.set_gradients()
            for layer in problem.model[:2]:
                getattr(layer, f"lora_{side}").grad = None
            optimizer.step()
    for p, q, old in zip(*factors, before, strict=True):
        assert same_bits_or(rtol=1e-12, atol=1e-14)(p, q)
        assert torch.equal(p, old) != p.requires_grad
