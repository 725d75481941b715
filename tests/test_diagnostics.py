"""Measures against their dense definitions, the probe against full gradients by autograd, and the papers' theory."""

from __future__ import annotations

import copy
import gc
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from _models import batch, loss_of, make_model, pair_delta, trainable
from torch import Tensor, nn

import lowrank_kernels as lrk
from benchmarks.ablations.variants import AnisotropicODLoRA, OrthonormalLoRA
from lowrank_kernels import diagnostics
from lowrank_kernels.diagnostics import FullGradientProbe, Projections, frames
from lowrank_kernels.diagnostics.__main__ import main
from lowrank_kernels.pairs import register_layer

S = 0.7
FIGURES = {"figure1.png", "figure3.png", "figure4.png", "figure5.png", "spectrum.png"}
DELTA = 0.03


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum() / (x.norm() * y.norm())


def effective_rank_of(x: Tensor) -> float:
    sigma = torch.linalg.svdvals(x)
    p = sigma[sigma > 1e-12 * sigma[0]] / sigma.sum()
    return float(torch.exp(-(p * p.log()).sum()))


def dense(method: str, G: Tensor, A: Tensor, B: Tensor, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """G̃, ∇A and ∇B as the papers print them."""
    grad_a, grad_b = S * B.T @ G, S * G @ A.T
    if method in ("lora", "sds"):  # for sds, A and B stand for Q_Aᵀ and Q_B
        return S**2 * (G @ A.T @ A + B @ B.T @ G), grad_a, grad_b
    eye = torch.eye(len(A), dtype=A.dtype)
    inverse_b, inverse_a = torch.linalg.inv(B.T @ B + delta * eye), torch.linalg.inv(A @ A.T + delta * eye)
    if method == "preconditioned":
        g_a, g_b = inverse_b @ grad_a, grad_b @ inverse_a
        return S * (B @ g_a + g_b @ A), g_a, g_b
    if method == "lora-rite":
        r_a, r_b = torch.linalg.qr(A.T)[1], torch.linalg.qr(B)[1]
        x_a, x_b = torch.linalg.inv(r_b).T @ grad_a, grad_b @ torch.linalg.inv(r_a)
        return S * (B @ torch.linalg.inv(r_b) @ x_a + x_b @ torch.linalg.inv(r_a).T @ A), x_a, x_b
    if method in ("lora-pro", "oplora"):
        g_a = inverse_b @ grad_a / S**2
        g_b = (grad_b - B @ inverse_b @ B.T @ grad_b) @ inverse_a / S**2
        return S * (B @ g_a + g_b @ A), g_a, g_b
    g_r = S * B.T @ G @ A.T
    if method == "lora-sb":
        g_r = inverse_b @ g_r @ inverse_a / S**2
    return S * B @ g_r @ A, g_r, g_r


@pytest.mark.parametrize("delta", [0.0, DELTA])
@pytest.mark.parametrize("method", diagnostics.RULES)
def test_measures_are_those_of_the_dense_definitions(method: str, delta: float) -> None:
    if method == "lora-rite" and delta:
        pytest.skip("LoRA-RITE has no damping")
    G, A, B = [], [], []
    for seed, (d_out, d_in) in enumerate([(30, 18), (11, 25), (16, 16)]):
        spread = torch.logspace(0, -2, 4, dtype=torch.float64)
        G.append(random(d_out, d_in, seed=seed) @ torch.diag(torch.linspace(0.1, 2, d_in, dtype=torch.float64)))
        A.append(spread[:, None] * random(4, d_in, seed=10 + seed))
        B.append(random(d_out, 4, seed=20 + seed) * spread)
        if method == "sds":
            A[-1], B[-1] = torch.linalg.qr(A[-1].T)[0].T, torch.linalg.qr(B[-1])[0]
    found = frames([*B, *(a.T for a in A)])
    p = Projections.concatenate([Projections.of(g, u, v) for g, u, v in zip(G, found.bases[:3], found.bases[3:], strict=True)])
    sigma_b, sigma_a = found.sigma[:3], found.sigma[3:]
    measured = diagnostics.alignment(p, sigma_b, sigma_a, method, delta)
    rank_a, rank_b = diagnostics.gradient_ranks(p, sigma_b, sigma_a, method, delta)
    for i in range(3):
        equivalent, grad_a, grad_b = dense(method, G[i], A[i], B[i], delta)
        assert float(measured[i]) == pytest.approx(float(cosine(G[i], equivalent)), rel=1e-9)
        # LoRA-Pro's damped projection leaves a remainder of B's range in its second gradient: no cancellation to 1e-9 there.
        assert float(rank_a[i]) == pytest.approx(effective_rank_of(grad_a), rel=1e-6)
        assert float(rank_b[i]) == pytest.approx(effective_rank_of(grad_b), rel=1e-6)
    plain_a, plain_b = diagnostics.gradient_ranks(p, sigma_b, sigma_a, "lora", scaled=False)
    for i in range(3):
        u, v = torch.linalg.qr(B[i])[0], torch.linalg.qr(A[i].T)[0]
        assert float(plain_a[i]) == pytest.approx(effective_rank_of(u.T @ G[i]), rel=1e-9)
        assert float(plain_b[i]) == pytest.approx(effective_rank_of(G[i] @ v), rel=1e-9)


def test_lora_plus_weighs_the_gradient_of_b() -> None:
    G, A, B = random(20, 14, seed=1), random(3, 14, seed=2), random(20, 3, seed=3)
    found = frames([B, A.T])
    p = Projections.of(G, *found.bases)
    expected = cosine(G, 4 * G @ A.T @ A + B @ B.T @ G)
    assert float(diagnostics.alignment(p, found.sigma[:1], found.sigma[1:], ratio=4.0)) == pytest.approx(float(expected), rel=1e-12)


def test_directions_that_do_not_exist_carry_nothing() -> None:
    G, A, B = random(20, 14, seed=1), random(3, 14, seed=2), torch.zeros(20, 3, dtype=torch.float64)
    projection = torch.linalg.pinv(A) @ A
    for method, expected in [("lora", G @ A.T @ A), ("preconditioned", G @ projection), ("oplora", G @ projection)]:
        found = frames([B, A.T])
        p = Projections.of(G, *found.bases)
        assert float(diagnostics.alignment(p, found.sigma[:1], found.sigma[1:], method)) == pytest.approx(
            float(cosine(G, expected)), rel=1e-9
        )
        rank_a, rank_b = diagnostics.gradient_ranks(p, found.sigma[:1], found.sigma[1:], method)
        assert rank_a.isnan().all() and 1 <= float(rank_b) <= 3


def test_ranks_and_spectra() -> None:
    x = torch.diag(torch.tensor([3.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    values = torch.linalg.svdvals(x)
    p = torch.tensor([0.6, 0.2, 0.2])
    assert float(diagnostics.effective_rank(values)) == pytest.approx(float(torch.exp(-(p * p.log()).sum())))
    assert float(diagnostics.stable_rank(values)) == pytest.approx(11 / 9)
    tall = [random(9, 3, seed=1), random(40, 3, seed=2)]
    for measured, factor in zip(diagnostics.stable_ranks(tall), tall, strict=True):
        assert float(measured) == pytest.approx(float(factor.norm() ** 2 / torch.linalg.matrix_norm(factor, 2) ** 2), rel=1e-12)
    # Wider than tall: [Q_B B] of a layer narrower than 2r.
    for height in (9, 4):
        left, right = random(height, 6, seed=3), random(12, 6, seed=4)
        spectrum = diagnostics.delta_spectrum([left], [right])[0]
        expected = torch.linalg.svdvals(left @ right.T)[:6]
        torch.testing.assert_close(spectrum[: len(expected)], expected, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- the probe


def full_gradients(model: nn.Module, step: int) -> list[Tensor]:
    """G of every layer, by autograd through weights W0 + ΔW."""
    layers = lrk.pairs(model)
    deltas = [pair_delta(pair).requires_grad_() for pair in layers]
    x, y = batch(step)
    for index, (pair, delta) in enumerate(zip(layers, deltas, strict=True)):
        base = pair.layer.base_layer
        x = nn.functional.linear(x, base.weight.detach() + delta, base.bias)
        x = x.tanh() if index < len(deltas) - 1 else x
    return list(torch.autograd.grad((x - y).square().mean(), deltas))


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    loss_of(model, step).backward()
    optimizer.step()


def halves(pair: lrk.Pair) -> tuple[Tensor, Tensor]:
    """Q_Aᵀ and Q_B in both kinds of layers."""
    if isinstance(pair.layer, lrk.LowRankLinear):
        return pair.layer.q_a.clone(), pair.layer.q_b.clone()
    return pair.A[3:].detach().clone(), pair.B[:, :3].detach().clone()


@pytest.mark.parametrize("library", ["ours", "peft"])
def test_probe_sees_the_full_gradient_of_decoupled_layers(library: str) -> None:
    model = make_model(library)
    optimizer = lrk.SDSLoRA(model, lr=1e-2, total_steps=40)
    probe = FullGradientProbe(model, method="sds")
    untouched = make_model(library)
    other = lrk.SDSLoRA(untouched, lr=1e-2, total_steps=40)
    for step in range(16):
        gradients = full_gradients(model, step)
        plain = [(p.A[:3].detach().clone(), p.B[:, :3].detach().clone()) for p in lrk.pairs(model)]
        bases = [halves(p) for p in lrk.pairs(model)]
        deltas = [pair_delta(p) for p in lrk.pairs(model)]
        with probe:
            one_step(model, optimizer, step)
        one_step(untouched, other, step)
        rows = probe.rows[-3:]
        for row, G, (A, B), (Q_A, Q_B), delta, pair in zip(rows, gradients, plain, bases, deltas, lrk.pairs(model), strict=True):
            decoupled = step >= 10
            assert row["method"] == ("sds" if decoupled else "lora") and row["step"] == step + 1
            if decoupled:
                A, B = Q_A, Q_B
            equivalent, grad_a, grad_b = dense("lora", G, A, B, 0.0)
            assert row["gradient_norm"] == pytest.approx(float(G.norm()), rel=1e-9)
            assert row["alignment"] == pytest.approx(float(cosine(G, equivalent)), rel=1e-6)
            assert row["rank_grad_b"] == pytest.approx(effective_rank_of(grad_b), rel=1e-6)
            if step > 0:
                assert row["rank_grad_a"] == pytest.approx(effective_rank_of(grad_a), rel=1e-6)
            if decoupled:
                assert row["alignment"] == pytest.approx(row["alignment_unscaled"])
                assert row["rank_grad_a"] == pytest.approx(row["rank_grad_a_unscaled"])
                assert row["drift_b"] == pytest.approx(float((halves(pair)[1] * Q_B).sum() / 3), rel=1e-9)
                assert 0.5 < row["drift_a"] < 1, "refreshed in every step of the first phase"
            expected = torch.linalg.svdvals(delta)
            measured = torch.tensor(row["spectrum"], dtype=torch.float64)
            torch.testing.assert_close(measured, expected[: len(measured)], rtol=1e-6, atol=1e-9)
    for p, q in zip(model.state_dict().values(), untouched.state_dict().values(), strict=True):
        assert torch.equal(p, q), "looking must not change anything"


def test_probe_leaves_no_trace_and_measures_one_layer_at_a_time() -> None:
    model = make_model("ours")
    bases = [pair.layer.base_layer.weight for pair in lrk.pairs(model)]
    probe = FullGradientProbe(model, every=3)
    alive = []

    def count(_: Tensor) -> None:
        alive.append(sum(weight.grad is not None for weight in bases))

    for step in range(7):
        with probe:
            armed = step % 3 == 0
            loss = loss_of(model, step)
            assert all(weight.requires_grad == armed for weight in bases)
            handles = [weight.register_post_accumulate_grad_hook(count) for weight in bases if armed]
            loss.backward()
        assert all(weight.grad is None and not weight.requires_grad for weight in bases)
        for handle in handles:
            handle.remove()
    assert alive == [0] * 9, "each gradient is gone before the next layer's comes"
    assert sorted({row["step"] for row in probe.rows}) == [1, 4, 7]
    with pytest.raises(ZeroDivisionError), FullGradientProbe(model):
        raise ZeroDivisionError
    assert not any(weight.requires_grad for weight in bases)


def test_attached_probe_takes_the_method_and_averages_micro_batches() -> None:
    model = make_model("ours")
    for pair in lrk.pairs(model):
        with torch.no_grad():
            pair.B.copy_(random(*pair.B.shape, seed=pair.B.shape[0]))
    optimizer = lrk.ScaledAdamW(model, lr=1e-3, damping=DELTA)
    probe = FullGradientProbe(model, every=2).attach(optimizer)
    expected, expected_norms = [], []
    for step in range(4):
        factors = [(p.A.detach().clone(), p.B.detach().clone()) for p in lrk.pairs(model)]
        optimizer.zero_grad()
        values, norms = [], []
        for micro in (2 * step, 2 * step + 1):
            gradients = full_gradients(model, micro)
            values.append(
                [float(cosine(G, dense("preconditioned", G, A, B, DELTA)[0])) for G, (A, B) in zip(gradients, factors, strict=True)]
            )
            norms.append([float(G.norm()) for G in gradients])
            loss_of(model, micro).backward()
        optimizer.step()
        if step % 2 == 0:
            expected += [sum(pair) / 2 for pair in zip(*values, strict=True)]
            expected_norms += [sum(pair) / 2 for pair in zip(*norms, strict=True)]
    probe.detach()
    assert {row["method"] for row in probe.rows} == {"preconditioned"} and {row["step"] for row in probe.rows} == {1, 3}
    assert [row["alignment"] for row in probe.rows] == pytest.approx(expected, rel=1e-9)
    assert [row["gradient_norm"] for row in probe.rows] == pytest.approx(expected_norms, rel=1e-9)
    assert not any(pair.layer.base_layer.weight.requires_grad for pair in lrk.pairs(model))


def test_a_probe_that_measures_is_not_begun_again() -> None:
    model = make_model("ours")
    optimizer = lrk.ScaledAdamW(model, lr=1e-3, damping=DELTA)
    probe = FullGradientProbe(model, damping=0.0, ratio=1.0)
    probe.detach()  # it is not attached
    probe.attach(optimizer)
    assert (probe.damping, probe.ratio) == (0.0, 1.0)  # as they were given
    with pytest.raises(RuntimeError, match=r"attached to an optimizer already; detach\(\) it first"):
        probe.attach(optimizer)
    with pytest.raises(RuntimeError, match="it measures a step already"), probe:
        pass
    probe.detach()
    assert not any(pair.layer.base_layer.weight.requires_grad for pair in lrk.pairs(model))
    with FullGradientProbe(model) as another:
        loss_of(model, 0).backward()
    assert another.rows


@pytest.mark.parametrize("compiled", [False, True])
def test_between_steps_an_attached_probe_lends_no_weight(compiled: bool) -> None:
    model = make_model("ours")
    run = torch.compile(model, backend="eager") if compiled else model
    optimizer = lrk.SDSLoRA(model, lr=1e-3, total_steps=40)
    files, adapters = list(lrk.adapter_state_dict(model)), trainable(model)
    probe = FullGradientProbe(model).attach(optimizer)
    metric = nn.MSELoss()  # another module, called between steps
    for step in range(2):
        metric(random(3, seed=0), random(3, seed=1))
        with torch.no_grad():
            loss_of(run, step)
        assert list(lrk.adapter_state_dict(model)) == files and len(trainable(copy.deepcopy(model))) == len(adapters)
        assert {*lrk.AdamW(model, lr=1e-3).param_groups[0]["params"]} == {*adapters}
        one_step(run, optimizer, step)
    probe.detach()
    assert {row["step"] for row in probe.rows} == {1, 2} and trainable(model) == adapters
    hooks = torch.nn.modules.module._global_forward_pre_hooks
    assert not hooks
    with pytest.warns(UserWarning, match="no gradient of an adapted layer came"), FullGradientProbe(model):
        assert len(hooks) == 1
    assert not hooks
    weight = weakref.ref(model[0].base_layer.weight)
    probe.attach(optimizer)
    del probe, optimizer, model, run, adapters
    gc.collect()
    assert not hooks and weight() is None, "one that is forgotten keeps nothing"


def test_checkpointing_and_layers_that_are_used_twice() -> None:
    model = make_model("ours", shapes=[(12, 12)])
    layer = model[0]
    with torch.no_grad():
        layer.lora_B.copy_(random(12, 3, seed=1))
    x = random(8, 12, seed=2)
    weight = (layer.base_layer.weight + layer.delta_weight()).requires_grad_()
    bias = layer.base_layer.bias
    hidden = nn.functional.linear(x, weight, bias).tanh()
    (G,) = torch.autograd.grad(nn.functional.linear(hidden, weight, bias).square().sum(), weight)
    expected = float(cosine(G, dense("lora", G, layer.lora_A.detach(), layer.lora_B.detach(), 0.0)[0]))
    for wrap in (lambda y: layer(y).tanh(), lambda y: torch.utils.checkpoint.checkpoint(lambda z: layer(z).tanh(), y, use_reentrant=False)):
        with FullGradientProbe(model) as probe:
            layer(wrap(x)).square().sum().backward()
        (row,) = probe.rows
        assert row["alignment"] == pytest.approx(expected, rel=1e-9), "the whole gradient of the weight, once"
        assert row["gradient_norm"] == pytest.approx(float(G.norm()), rel=1e-9)


@pytest.mark.parametrize("decoupled", [False, True])
def test_bases_in_bf16_are_found_by_what_the_optimizers_ask(decoupled: bool) -> None:
    """Rounding leaves QᵀQ of many columns far from I as a whole; and an A of which half is orthonormal is no decoupled layer."""
    model = make_model("peft", rank=48, shapes=[(100, 90)], dtype=torch.bfloat16)
    (pair,) = lrk.pairs(model)
    with torch.no_grad():
        pair.A[48:] = torch.linalg.qr(random(90, 48, seed=1))[0].mT
        pair.B.copy_(random(100, 96, seed=2) / 10)
        if decoupled:
            pair.B[:, :48] = torch.linalg.qr(random(100, 48, seed=3))[0]
    with FullGradientProbe(model, method="sds") as probe:
        model(random(4, 90, seed=4).bfloat16()).square().sum().backward()
    (row,) = probe.rows
    assert row["method"] == ("sds" if decoupled else "lora") and len(row["spectrum"]) == (96 if decoupled else 48)


class CoreLinear(nn.Module):
    """``ΔW = sBRA`` with constant B and A, as LoRA-XS and LoRA-SB have it."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(12, 9, dtype=torch.float64).requires_grad_(False)
        self.scale = S
        self.register_buffer("lora_A", random(3, 12, seed=1))
        self.register_buffer("lora_B", random(9, 3, seed=2))
        self.lora_R = nn.Parameter(random(3, 3, seed=3))
        register_layer(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + S * x @ self.lora_A.T @ self.lora_R.T @ self.lora_B.T

    def delta_factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_B @ self.lora_R.detach(), self.lora_A.T


@pytest.mark.parametrize("method", [None, "lora-sb"])
def test_layers_with_a_core(method: str | None) -> None:
    model = nn.Sequential(CoreLinear())
    layer = model[0]
    x = random(8, 12, seed=4)
    with FullGradientProbe(model, method=method) as probe:
        y = model(x)
        y.square().sum().backward()
    G = 2 * y.detach().T @ x
    (row,) = probe.rows
    equivalent, core, _ = dense(method or "lora-xs", G, layer.lora_A, layer.lora_B, 0.0)
    if method is None:
        torch.testing.assert_close(core, layer.lora_R.grad)
    assert row["alignment"] == pytest.approx(float(cosine(G, equivalent)), rel=1e-9)
    assert row["rank_grad_a"] == row["rank_grad_b"] == pytest.approx(effective_rank_of(core), rel=1e-9)
    delta = S * layer.lora_B @ layer.lora_R.detach() @ layer.lora_A
    assert row["spectrum"] == pytest.approx(torch.linalg.svdvals(delta)[:3].tolist(), rel=1e-9)


@pytest.mark.parametrize("method", [None, "sds"])
def test_spectra_after_a_start_are_of_the_change_since_then(method: str | None) -> None:
    model = nn.Sequential(*(nn.Linear(d_in, d_out, dtype=torch.float64) for d_out, d_in in ((20, 12), (9, 20))))
    lrk.adapt(model, rank=4)
    lrk.initialize(model, "pissa", progress=False)
    model.append(lrk.LowRankLinear(nn.Linear(9, 9, dtype=torch.float64), 4, S))  # in the same run, without a start
    with torch.no_grad():
        model[2].lora_B[:, :2] = random(9, 2, seed=1)  # as SDS-LoRA, which would train half of the rank, starts with
    x = random(8, 12, seed=2)
    for changed in (False, True):
        with FullGradientProbe(model, method=method) as probe:
            model(x).square().sum().backward()
        rows = {row["layer"]: row for row in probe.rows}
        for name, delta in lrk.delta_weights(model).items():
            row = rows[name]
            if name != "2" and not changed:
                assert not any(row["spectrum"]) and not delta.any(), "exactly: nothing is left of s·B₀A₀"
                continue
            expected = torch.linalg.svdvals(delta)[: len(row["spectrum"])]
            torch.testing.assert_close(torch.tensor(row["spectrum"], dtype=torch.float64), expected, rtol=1e-9, atol=1e-14)
            assert row["delta_effective_rank"] == pytest.approx(effective_rank_of(delta), rel=1e-6)
        with torch.no_grad():
            for layer in model[:2]:
                layer.lora_A += 1e-6 * random(*layer.lora_A.shape, seed=3)
                layer.lora_B[:, 0] += 1e-6 * random(len(layer.lora_B), seed=4)


@pytest.mark.parametrize("tensorboard", [False, True])
def test_records_and_figures(tmp_path: Path, tensorboard: bool) -> None:
    if tensorboard:
        pytest.importorskip("torch.utils.tensorboard", exc_type=ImportError)
    events = tmp_path / "tensorboard" if tensorboard else None
    file = tmp_path / "runs.csv"
    for run, build in [("lora", lambda m: lrk.AdamW(m, lr=1e-2)), ("sds", lambda m: lrk.SDSLoRA(m, lr=1e-2, total_steps=30))]:
        model = make_model("ours")
        optimizer = build(model)
        probe = FullGradientProbe(model, every=4, csv=file, run=run, tensorboard=events)
        for step in range(14):
            with probe:
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                optimizer.step()
                probe.log(loss=loss.item())
    rows = diagnostics.read(file)
    assert [row["alignment"] for row in rows if row["run"] == "sds" and row["layer"]] == pytest.approx(
        [row["alignment"] for row in probe.rows if row["layer"]], rel=1e-5
    )
    assert sum(row["loss"] is not None for row in rows) == 28
    assert bool(list(tmp_path.glob("tensorboard/sds/events*"))) == tensorboard
    command = [sys.executable, "-m", "lowrank_kernels.diagnostics", "plot", str(file), "--output", str(tmp_path / "figures")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{n}.png" for n in ("figure1", "figure3", "figure4", "figure5", "spectrum")
    }
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="holds other columns"):
        FullGradientProbe(model, csv=tmp_path / "other.csv")


P = Projections.of(random(6, 5, seed=0), random(6, 2, seed=1), random(5, 2, seed=2))
SIGMA = torch.ones(1, 2, dtype=torch.float64)
TALL = [random(6, 2, seed=3), random(6, 2, seed=4)]


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        *(("frames", (factors,)) for factors in (None, [], ["x"], [torch.ones(3, dtype=torch.float64)], [TALL[0], torch.ones(6, 1)])),
        *(("stable_ranks", (factors,)) for factors in ([], None, [TALL[0].to(torch.complex64)])),
        *(("delta_spectrum", factors) for factors in (([], []), (TALL, TALL[:1]), (TALL, [x[:, :1] for x in TALL]))),
        *(
            ("subspace_drift", factors)
            for factors in (([], []), (TALL[:1], [TALL[0][:, :1]]), (TALL, TALL[:1]), (TALL, [x[:3] for x in TALL]))
        ),
        *((rank, (x,)) for rank in ("effective_rank", "stable_rank") for x in (None, torch.ones(0), torch.ones(()), torch.ones(2) * 1j)),
        *(
            (measure, given)
            for measure in ("alignment", "gradient_ranks")
            for given in (
                (None, SIGMA, SIGMA),
                (P, None, SIGMA),
                (P, SIGMA, torch.ones(1, 1)),
                (P, SIGMA.expand(4, 2), SIGMA),
                (P, SIGMA, SIGMA * 1j),
                (P, SIGMA > 0, SIGMA),
                (P, SIGMA, SIGMA.long()),
                *((P, SIGMA, SIGMA, "lora", damping) for damping in (-1, float("nan"), "x", True)),
            )
        ),
        *(("alignment", (P, SIGMA, SIGMA, "lora", 0.0, ratio)) for ratio in (0, -1, float("nan"), True, [])),
        *(("plot", given) for given in (("run.csv", "o"), (None, "o"), ([], None), ([], "o", 1, ["a"]))),
        *(("plot", ([], "o", window)) for window in (float("nan"), float("inf"), 1.5, "x", True)),
        ("read", (None,)),
    ],
)
def test_misuse_is_named(call: str, arguments: tuple) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{call}: \w+(\[\d\])? (must|is|has)|lists must"):
        getattr(diagnostics, call)(*arguments)


def test_imaginary_parts_are_not_dropped() -> None:
    with pytest.raises(TypeError, match=r"Projections: gradient\[0\] has dtype torch.complex128"):
        Projections.of(random(6, 5, seed=0) * 1j, TALL[0], random(5, 2, seed=2))
    with pytest.raises(ValueError, match="Projections: gradient must be"):
        Projections.of(random(6, 5, seed=0), TALL[0], TALL[1])


def test_a_probe_that_cannot_be_made_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("ours")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="needs the package tensorboard"):
        FullGradientProbe(model, csv=tmp_path / "new" / "x.csv", tensorboard=tmp_path / "t")
    for bad in (
        *({"damping": damping} for damping in (-1, float("nan"), "x")),
        *({"ratio": ratio} for ratio in (0, -1, float("nan"), True)),
        *({"csv": path} for path in (5, b"x", "")),
        {"method": ["lora"]},
        {"method": "lora-xs"},
    ):
        with pytest.raises((TypeError, ValueError), match=f"(FullGradientProbe|diagnostics): {next(iter(bad))}(=| must| is)"):
            FullGradientProbe(model, **{"csv": tmp_path / "new" / "x.csv", **bad})
    for nothing in (None, type(model)):
        with pytest.raises(TypeError, match=r"FullGradientProbe: model must be a torch\.nn\.Module"):
            FullGradientProbe(nothing)
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got NoneType"):
        FullGradientProbe(model).attach(None)
    assert not list(tmp_path.iterdir())


def test_files_of_others_are_named_with_the_line(tmp_path: Path) -> None:
    file = tmp_path / "run.csv"
    for content, message in (
        (b"\xff\xfe\x00", "can't decode"),
        (b"run,step,layer,loss\nr,1,,0.5\nr,x,,0.5\n", "line 3: invalid literal"),
        (b"run,step,layer,loss\nr,1,,zero\n", "line 2: could not convert"),
        (b"run,step,layer,loss\nr,1\n", "line 2 has too many or too few cells"),
        (b"run,step,layer,loss\nr,1,,1,2\n", "line 2 has too many or too few cells"),
        (b"run,step,layer,loss\nr,,,1\n", "line 2 .*no step"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"run.csv was not written by FullGradientProbe: .*{message}"):
            diagnostics.read(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="FullGradientProbe: csv=.* is no CSV file"):
        FullGradientProbe(make_model("ours"), csv=file)
    with pytest.raises(NotADirectoryError, match="plot: output is no folder"):
        diagnostics.plot([file], file)


def test_probe_refuses() -> None:
    with pytest.raises(ValueError, match="no pair of low-rank factors"):
        FullGradientProbe(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="method must be one of"):
        FullGradientProbe(make_model("ours"), method="adam")
    with pytest.raises(ValueError, match="every must be ≥ 1, got 0"):
        FullGradientProbe(make_model("ours"), every=0)
    model = make_model("ours")
    lrk.pairs(model)[0].layer.base_layer.weight = nn.Parameter(torch.zeros(20, 12, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="quantized"):
        FullGradientProbe(model)
    with pytest.warns(UserWarning, match="no gradient of an adapted layer"), FullGradientProbe(make_model("ours")):
        pass


# ---------------------------------------------------------------------------------------------------- the theory


def test_equivalent_gradient_from_actual_updates() -> None:
    """``ΔW_{t+1} - ΔW_t = -lr·s²(GQ_AQ_Aᵀ + Q_BQ_BᵀG)`` under plain SGD while Q is fixed (Theorem 3 of OD-LoRA)."""
    model = make_model("ours")
    optimizer = lrk.ODLoRA(model, lr=1e-2, total_steps=60, rounds=2, round_steps=5)
    for step in range(12):
        one_step(model, optimizer, step)
    lr = 1e-2
    sgd = torch.optim.SGD(trainable(model), lr=lr)
    for step in range(12, 17):
        gradients = full_gradients(model, step)
        before = [pair_delta(pair) for pair in lrk.pairs(model)]
        one_step(model, sgd, step)
        for G, old, pair in zip(gradients, before, lrk.pairs(model), strict=True):
            q_a, q_b, s = pair.layer.q_a, pair.layer.q_b, pair.scale
            expected = s**2 * (G @ q_a.T @ q_a + q_b @ q_b.T @ G)
            actual = (old - pair_delta(pair)) / lr
            assert (actual - expected).norm() <= 1e-6 * expected.norm()


def test_decoupled_layers_represent_any_matrix_of_rank_r() -> None:
    """Theorem 3.2 of OD-LoRA: with ``A = ΣVᵀ/2s``, ``B = UΣ/2s`` on ``Q_A = V``, ``Q_B = U``; plain LoRA with uniform σ cannot."""
    for seed in range(20):
        u, _ = torch.linalg.qr(random(12, 3, seed=seed))
        v, _ = torch.linalg.qr(random(20, 3, seed=seed + 100))
        sigma = random(3, seed=seed + 200).abs() * torch.tensor([100.0, 1.0, 1e-3], dtype=torch.float64)
        target = u @ torch.diag(sigma) @ v.T
        layer = lrk.LowRankLinear(nn.Linear(20, 12, dtype=torch.float64), 3, S, method="sds")
        layer.decoupled = True
        with torch.no_grad():
            layer.q_a.copy_(v.T)
            layer.q_b.copy_(u)
            layer.lora_A.copy_(sigma[:, None] * v.T / (2 * S))
            layer.lora_B.copy_(u * sigma / (2 * S))
        assert (layer.delta_weight() - target).norm() <= 1e-14 * target.norm()
        uniform = u @ v.T * sigma.mean()  # the best of its kind on these subspaces (Theorem 2)
        assert (uniform - target).norm() ** 2 == pytest.approx(float(((sigma - sigma.mean()) ** 2).sum()), rel=1e-9)


def test_theorem_1_is_false_as_printed() -> None:
    """⟨G, G̃⟩ at fixed energy is not largest for uniform singular values: concentrating σ on the direction with the largest ‖Gv‖ wins."""
    beaten = 0
    for seed in range(200):
        G = random(12, 9, seed=seed)
        v, _ = torch.linalg.qr(random(9, 3, seed=seed + 1000))
        u, _ = torch.linalg.qr(random(12, 3, seed=seed + 2000))
        uniform = (G * (G @ v @ v.T + u @ u.T @ G)).sum()
        energy_a, energy_b = ((G @ v) ** 2).sum(0), ((u.T @ G) ** 2).sum(1)
        concentrated = 3 * (energy_a.max() + energy_b.max())  # Σσ² = r on one direction
        beaten += bool(concentrated > uniform * (1 + 1e-9))
    assert beaten == 200


def test_one_sided_cosine_is_largest_for_uniform_singular_values() -> None:
    """What does hold: for given subspaces no σ beats σ = 1 in cos(G, GAᵀA) or cos(G, BBᵀG); and of their sum that is not true."""
    sum_is_beaten, generator = False, torch.Generator().manual_seed(0)
    for seed in range(40):
        G = random(12, 9, seed=seed) @ torch.diag(torch.logspace(0, -1, 9, dtype=torch.float64))
        v, _ = torch.linalg.qr(random(9, 3, seed=seed + 1000))
        u, _ = torch.linalg.qr(random(12, 3, seed=seed + 2000))
        p = Projections.of(G, u, v)
        one, zero = torch.ones(1, 3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
        best_a, best_b = (float(diagnostics.alignment(p, *sides)) for sides in ((zero, one), (one, zero)))
        best_sum = float(diagnostics.alignment(p, one, one))
        for trial in range(20):
            # Far from uniform and close to it.
            width = 0.02 if trial % 2 else 0.9
            sigma = 1 + width * (2 * torch.rand(2, 1, 3, generator=generator, dtype=torch.float64) - 1)
            sigma = sigma.sort(dim=-1, descending=True)[0]
            assert float(diagnostics.alignment(p, zero, sigma[1])) <= best_a + 1e-12
            assert float(diagnostics.alignment(p, sigma[0], zero)) <= best_b + 1e-12
            sum_is_beaten |= float(diagnostics.alignment(p, sigma[0], sigma[1])) > best_sum + 1e-6
    assert sum_is_beaten


# ---------------------------------------------------------------------------------------------------- the ablations


@pytest.mark.parametrize("initialized", [False, True])
def test_orthonormal_variant_starts_at_the_pretrained_model_and_has_a_flat_spectrum(initialized: bool) -> None:
    model = make_model("ours")
    x = batch(0)[0]
    with torch.no_grad():
        pretrained = model(x)
    optimizer = OrthonormalLoRA(model, lr=1e-2, total_steps=60, rounds=2, round_steps=5, initialized=initialized, refresh_every=1)
    start = 10 if initialized else 0
    for step in range(start):
        one_step(model, optimizer, step)
    with torch.no_grad():
        torch.testing.assert_close(model(x), pretrained, rtol=1e-12, atol=1e-12)
    gradients = full_gradients(model, start)
    factors = [(p.A.detach().clone(), p.B.detach().clone()) for p in lrk.pairs(model)]
    optimizer.zero_grad()
    loss_of(model, start).backward()
    for G, (q_a, q_b), pair in zip(gradients, factors, lrk.pairs(model), strict=True):
        torch.testing.assert_close(pair.A.grad, S * q_b.T @ G, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(pair.B.grad, S * G @ q_a.T, rtol=1e-9, atol=1e-12)
    for step in range(start, start + 8):
        one_step(model, optimizer, step)
    for (q_a, _), pair in zip(factors, lrk.pairs(model), strict=True):
        sigma = torch.linalg.svdvals(pair_delta(pair))
        torch.testing.assert_close(sigma[:3], torch.full_like(sigma[:3], S), rtol=1e-9, atol=0)
        assert (pair.A - q_a).norm() > 1e-2, "trained"


def test_anisotropic_variant_keeps_its_weight_and_scales_the_gradient() -> None:
    model, reference = make_model("ours"), make_model("ours")
    options = {"lr": 1e-2, "total_steps": 60, "rounds": 2, "round_steps": 5}
    variant, method = AnisotropicODLoRA(model, **options), lrk.ODLoRA(reference, **options)
    for step in range(15):  # the re-parametrization follows the last of them; up to there they are the same method
        one_step(model, variant, step)
        one_step(reference, method, step)
    for ours, theirs in zip(lrk.pairs(model), lrk.pairs(reference), strict=True):
        torch.testing.assert_close(pair_delta(ours), pair_delta(theirs), rtol=1e-9, atol=1e-12)
    before = [pair_delta(pair) for pair in lrk.pairs(model)]
    variant._refresh(variant._pairs)
    gradients = full_gradients(model, 15)
    variant.zero_grad()
    loss_of(model, 15).backward()
    for G, delta, pair in zip(gradients, before, lrk.pairs(model), strict=True):
        torch.testing.assert_close(pair_delta(pair), delta, rtol=1e-9, atol=1e-12)
        q, r = torch.linalg.qr(pair.B.detach())
        scaled = q * r.diagonal()
        assert r.diagonal().abs().max() > 1.2 * r.diagonal().abs().min(), "anisotropic"
        torch.testing.assert_close(pair.layer.q_b, scaled, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(pair.A.grad, S * scaled.T @ G, rtol=1e-9, atol=1e-12)


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("a,b\n")
    model = lrk.adapt(nn.Sequential(nn.Linear(4, 4)), rank=2)
    with pytest.raises(OSError, match="FullGradientProbe: csv=.* cannot be written"):
        FullGradientProbe(model, csv=tmp_path / "file" / "run.csv")
    for name, message in (("file", "argument csv: .* was not written by"), ("none", "argument csv or --output: .*No such file")):
        with pytest.raises(SystemExit) as caught:
            main(["plot", str(tmp_path / name)])
        assert caught.value.code == 2 and re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_that_holds_no_step_is_refused(window: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plot", str(tmp_path / "run.csv"), "--window", str(window)])
    assert f"argument --window: must be a positive number of steps, got {window}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="window must be ≥ 1"):
        diagnostics.plot([tmp_path / "run.csv"], tmp_path, window)
