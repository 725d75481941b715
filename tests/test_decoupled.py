"""SDSLoRA and ODLoRA against their algorithm boxes, in both kinds of layers: trajectory, continuity, resume, phases, bad input."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from _models import batch, loss_of, make_model, pair_delta, trainable
from torch import nn

from benchmarks.naive.od_lora import ODLoRALayer
from benchmarks.naive.sds_lora import SDSLoRALayer
from lowrank_kernels import AdamW, AltLoRAPlus, LowRankLinear, ODLoRA, SDSLoRA, adapt, pairs
from lowrank_kernels.optim.decoupled import refresh_due
from lowrank_kernels.pairs import owners

LIBRARIES = ["ours", "peft"]


def forward_with(model: nn.Module, deltas: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The model's forward with effective weights W0 + ΔW, so that autograd gives the full gradients G."""
    for index, (pair, delta) in enumerate(zip(pairs(model), deltas, strict=True)):
        base = pair.layer.base_layer
        x = nn.functional.linear(x, base.weight + delta, base.bias)
        x = x.tanh() if index < len(deltas) - 1 else x
    return x


def factor_gradients(layer: SDSLoRALayer, full: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``∂A = sBᵀG, ∂B = sGAᵀ`` while plain, ``∂A = sQ_BᵀG, ∂B = sGQ_A`` when decoupled (Eq. 6)."""
    left, right = (layer.B, layer.A.T) if layer.Q_A is None else (layer.Q_B, layer.Q_A)
    return layer.scale * left.T @ full, layer.scale * full @ right


METHODS = {"SDSLoRA": (SDSLoRA, SDSLoRALayer, 310), "ODLoRA": (ODLoRA, ODLoRALayer, 250)}


@pytest.mark.parametrize(("clip", "rank"), [(None, 3), (0.05, 3), (None, 5)], ids=["free", "clipped", "layers-narrower-than-2r"])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("method", METHODS)
def test_trajectory_is_algorithm_1(method: str, library: str, clip: float | None, rank: int) -> None:
    ours, plain, total = METHODS[method]
    lr = 1e-2
    model = make_model(library, rank=rank)
    optimizer = ours(model, lr=lr, total_steps=total)
    naive = [plain(p.A[:rank].detach().clone(), p.B[:, :rank].detach().clone(), p.scale, total_steps=total, lr=lr) for p in pairs(model)]
    clipped = 0
    for step in range(total):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        deltas = [n.delta_weight().requires_grad_() for n in naive]
        x, y = batch(step)
        full = torch.autograd.grad((forward_with(model, deltas, x) - y).square().mean(), deltas)
        grads = [factor_gradients(n, g) for n, g in zip(naive, full, strict=True)]
        if clip is not None:
            ours = torch.nn.utils.clip_grad_norm_(trainable(model), clip)
            norm = torch.stack([g.norm() for pair in grads for g in pair]).norm()
            torch.testing.assert_close(ours, norm, rtol=1e-9, atol=0)
            factor = min(1.0, clip / (float(norm) + 1e-6))
            clipped += factor < 1
            grads = [(a * factor, b * factor) for a, b in grads]
        for n, (grad_a, grad_b) in zip(naive, grads, strict=True):
            n.step(grad_a, grad_b)
        optimizer.step()
        for pair, n in zip(pairs(model), naive, strict=True):
            expected = n.delta_weight()
            assert (pair_delta(pair) - expected).norm() <= 1e-9 * expected.norm(), f"step {step + 1}, layer {pair.name}"
    assert clip is None or clipped > total // 2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("library", LIBRARIES)
def test_refresh_after_reparametrization_is_continuous(library: str, dtype: torch.dtype, tolerance: float) -> None:
    model, plain = make_model(library, dtype=dtype), make_model(library, dtype=dtype)
    optimizer = SDSLoRA(model, lr=1e-2, total_steps=100)
    # A longer warm-up: the same ten updates, without the re-parametrization after the tenth.
    still_plain = SDSLoRA(plain, lr=1e-2, total_steps=100, warmup_steps=11)
    train(model, optimizer, 0, 10)
    train(plain, still_plain, 0, 10)
    before = [pair_delta(p) for p in pairs(plain)]
    reparametrized = [pair_delta(p) for p in pairs(model)]
    with torch.no_grad():  # as a step has it
        optimizer._refresh(optimizer._pairs)
    refreshed = [pair_delta(p) for p in pairs(model)]
    for x, y, z in zip(before, reparametrized, refreshed, strict=True):
        assert (x - y).norm() <= tolerance * x.norm(), "re-parametrization"
        assert (y - z).norm() <= tolerance * y.norm(), "refresh"
    for state in (optimizer.state[p] for p in trainable(model)):
        assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()
    with torch.no_grad():
        unaligned = [torch.linalg.qr(pair_b(p))[0] for p in pairs(model)]
        jump = max(float((q - pair_q(p)).norm()) for q, p in zip(unaligned, pairs(model), strict=True))
    assert jump > 0.1, "a QR without sign alignment must jump, or this test proves nothing"


def pair_b(pair):
    return pair.B if isinstance(pair.layer, LowRankLinear) else pair.B[:, pair.B.shape[1] // 2 :]


def pair_q(pair):
    return pair.layer.q_b if isinstance(pair.layer, LowRankLinear) else pair.B[:, : pair.B.shape[1] // 2]


def train(model: nn.Module, optimizer: SDSLoRA, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, step, pairs(model)[0].A.dtype).backward()
        optimizer.step()


SHORT = {"SDSLoRA": {"total_steps": 60}, "ODLoRA": {"total_steps": 60, "rounds": 3, "round_steps": 7}}


@pytest.mark.parametrize("shape", [(9, 40), (40, 9)])
def test_bases_of_a_narrow_layer_without_update_are_orthonormal(shape: tuple[int, int]) -> None:
    model = make_model("ours", rank=5, shapes=[shape])
    optimizer = ODLoRA(model, lr=1e-2, total_steps=60, rounds=2, round_steps=2)
    for _ in range(4):
        optimizer.step()
    for basis in (model[0].q_a, model[0].q_b.T):
        torch.testing.assert_close(basis @ basis.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_reparametrization_rounds_16_bit_factors_once() -> None:
    model = make_model("peft", dtype=torch.bfloat16)
    optimizer = SDSLoRA(model, lr=0.0, total_steps=60, warmup_steps=1)
    with torch.no_grad():
        for pair in pairs(model):
            pair.B[:, :3].normal_()
    products = [pair.B[:, :3].detach().double() @ pair.A[:3].detach().double() for pair in pairs(model)]
    loss_of(model, 0, torch.bfloat16).backward()
    optimizer.step()
    for pair, product in zip(pairs(model), products, strict=True):
        u, sigma, vh = (x[..., :3] if i < 2 else x[:3] for i, x in enumerate(torch.linalg.svd(product, full_matrices=False)))
        (position,) = [p for p in optimizer._pairs if optimizer._at(p.a) is pair.A]
        decoupled = optimizer._views(position, owners(), True)
        signs = (decoupled.q_b.detach().double() * u).sum(dim=0).sign()
        for found, exact in (
            (decoupled.q_b, u * signs),
            (decoupled.q_a, signs[:, None] * vh),
            (decoupled.b, u * signs * sigma / 2),
            (decoupled.a, (signs * sigma)[:, None] / 2 * vh),
        ):
            assert found.dtype == torch.bfloat16
            error = (found.detach().double() - exact).abs() - 2.0**-8 * exact.abs()  # half a unit in the last place
            assert float(error.max()) <= 1e-6


@pytest.mark.parametrize("stop", [4, 7, 10, 18, 21, 24, 28, 41])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("method", METHODS)
def test_resume_is_bit_for_bit(method: str, library: str, stop: int) -> None:
    build, options = METHODS[method][0], SHORT[method]
    whole = make_model(library)
    optimizer = build(whole, lr=1e-2, **options)
    train(whole, optimizer, 0, 60)

    first = make_model(library)
    optimizer = build(first, lr=1e-2, **options)
    train(first, optimizer, 0, stop)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    second = make_model(library, seed=99)
    second.load_state_dict(saved["model"])
    resumed = build(second, lr=5e-2, **options)
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, stop, 60)
    for p, q in zip(whole.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("library", LIBRARIES)
def test_od_lora_is_back_at_the_pretrained_model_after_every_round(library: str) -> None:
    model = make_model(library)
    x = batch(0)[0]
    with torch.no_grad():
        pretrained = forward_with(model, [torch.zeros_like(pair_delta(p)) for p in pairs(model)], x)
    optimizer = ODLoRA(model, lr=1e-2, total_steps=60, rounds=3, round_steps=7)
    for end in (7, 14, 21):
        train(model, optimizer, end - 7, end)
        with torch.no_grad():
            assert torch.equal(model(x), pretrained)
        for pair in pairs(model):
            q = pair_q(pair)
            torch.testing.assert_close(q.mT @ q, torch.eye(3, dtype=q.dtype), rtol=0, atol=1e-13)
    bases = [pair_q(p).clone() for p in pairs(model)]
    train(model, optimizer, 21, 27)
    assert all(torch.equal(q, pair_q(p)) for q, p in zip(bases, pairs(model), strict=True)), "fixed for the first steps of the main run"


@pytest.mark.parametrize("method", METHODS)
def test_polar_bases_span_the_same_ranges_and_change_nothing_at_first(method: str) -> None:
    models = [make_model("ours"), make_model("ours")]
    optimizers = [METHODS[method][0](m, lr=1e-2, basis=basis, **SHORT[method]) for m, basis in zip(models, ("qr", "polar"), strict=True)]
    start = 28 if method == "ODLoRA" else 10
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 0, start)
        before = [pair_delta(p) for p in pairs(model)]
        optimizer._refresh(optimizer._pairs)
        for delta, pair in zip(before, pairs(model), strict=True):
            assert (pair_delta(pair) - delta).norm() <= 1e-12 * delta.norm()
        train(model, optimizer, start, 45)
    optimizers[1]._refresh(optimizers[1]._pairs)
    for pair in pairs(models[1]):
        q, b = pair_q(pair).detach(), pair_b(pair).detach()
        torch.testing.assert_close(q.mT @ q, torch.eye(3, dtype=q.dtype), rtol=0, atol=1e-13)
        # The polar factor's own mark: Qᵀ X is symmetric positive definite.
        torch.testing.assert_close(q.mT @ b, (q.mT @ b).mT, rtol=0, atol=1e-13)
        assert torch.linalg.eigvalsh(q.mT @ b).min() > 0


def test_both_libraries_agree_in_float32() -> None:
    models = [make_model(library, dtype=torch.float32) for library in LIBRARIES]
    optimizers = [SDSLoRA(m, lr=3e-3, total_steps=60) for m in models]
    for step in range(60):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, step, torch.float32).backward()
            optimizer.step()
    for ours, theirs in zip(pairs(models[0]), pairs(models[1]), strict=True):
        assert (pair_delta(ours) - pair_delta(theirs)).norm() <= 1e-3 * pair_delta(ours).norm()


def test_peft_gradients_of_untrained_halves_are_zero() -> None:
    model = make_model("peft")
    optimizer = SDSLoRA(model, lr=1e-2, total_steps=60)
    for step in range(14):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        for pair in pairs(model):
            trained = pair.B.grad[:, :3] if step < 10 else pair.B.grad[:, 3:]
            idle = pair.B.grad[:, 3:] if step < 10 else pair.B.grad[:, :3]
            assert trained.any() and not idle.any() and not pair.A.grad[3:].any()
        untouched = [pair.A[3:].detach().clone() for pair in pairs(model)]
        optimizer.step()
        if step < 9:
            assert all(torch.equal(pair.A[3:], old) for pair, old in zip(pairs(model), untouched, strict=True))
    del optimizer
    model.zero_grad()
    loss_of(model, 0).backward()
    assert pairs(model)[0].B.grad[:, :3].any(), "the hooks must go with the optimizer"


@pytest.mark.parametrize("successor", [SDSLoRA, AltLoRAPlus, torch.optim.AdamW])
@pytest.mark.parametrize("steps", [0, 3])
def test_an_optimizer_that_is_kept_alive_holds_nothing_back_from_the_next(successor: type, steps: int) -> None:
    """A cell of a notebook run twice, whose scheduler keeps the first optimizer."""
    model, twin = make_model("peft"), make_model("peft")
    kept = SDSLoRA(model, lr=1e-2, total_steps=60)
    if steps and successor is not SDSLoRA:  # which would refuse a second half that is not zero
        train(model, kept, 0, steps)
    twin.load_state_dict(model.state_dict())
    options = {"total_steps": 60} if successor is SDSLoRA else {}
    optimizers = [successor(trainable(m) if successor is torch.optim.AdamW else m, lr=1e-2, **options) for m in (model, twin)]
    free = 1 if successor is torch.optim.AdamW else 0  # torch's is noticed by what its first step writes
    for step in range(12):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            for micro in range(2):
                (loss_of(m, 2 * step + micro) / 2).backward()
        if step < free:
            continue_as(twin, model)
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(trainable(model), trainable(twin), strict=True)), step
        for optimizer in optimizers:
            optimizer.step()
    assert pairs(model)[0].B.grad[:, 3:].any()
    if steps and successor is not SDSLoRA:  # one that steps again has its parameters back
        kept.step()
        model.zero_grad()
        loss_of(model, 0).backward()
        assert not pairs(model)[0].B.grad[:, 3:].any()


@pytest.mark.parametrize("what", ["loaded between micro-batches", "skipped, average swapped in and out"])
def test_idle_halves_stay_idle_where_the_same_values_are_written(what: str) -> None:
    model = make_model("peft")
    optimizer = SDSLoRA(model, lr=1e-2, total_steps=60)
    train(model, optimizer, 0, 3)
    optimizer.zero_grad()
    loss_of(model, 3).backward()
    values = copy.deepcopy(model.state_dict())
    if what.startswith("skipped"):  # as by a GradScaler
        optimizer.zero_grad()
        model.load_state_dict({name: value * 0.9 if "lora_" in name else value for name, value in values.items()})
    for micro in range(2):
        model.load_state_dict(values)
        loss_of(model, 4 + micro).backward()
    for pair in pairs(model):
        assert pair.B.grad[:, :3].any() and not pair.B.grad[:, 3:].any() and not pair.A.grad[3:].any()


def continue_as(twin: nn.Module, model: nn.Module) -> None:
    """Give the twin the model's gradients."""
    for p, q in zip(trainable(twin), trainable(model), strict=True):
        p.grad.copy_(q.grad)


@pytest.mark.parametrize("copier", [None, copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["same", "deepcopy", "pickle"])
def test_peft_adapters_that_are_frozen_are_hooked_for_when_they_are_thawed(copier) -> None:
    """Two adapters of which one is inactive, which is PEFT's word for frozen; LoRA-FA, whose A always are."""
    model = make_model("peft")
    model.add_adapter("other", model.peft_config["default"])
    optimizer = SDSLoRA(model.named_parameters(), lr=1e-2, total_steps=60, scale=0.7)
    train(model, optimizer, 0, 3)
    if copier is not None:
        model, optimizer = copier((model, optimizer))
    model.base_model.set_adapter("other")
    for name, p in model.named_parameters():
        p.requires_grad_("lora_B.other" in name)
    loss_of(model, 0).backward()
    found = [p.grad for name, p in model.named_parameters() if "lora_B.other" in name]
    assert all(grad[:, :3].any() and not grad[:, 3:].any() for grad in found)
    assert all(p.grad is None for name, p in model.named_parameters() if "lora_A.other" in name)
    optimizer.step()


@pytest.mark.parametrize("resumed", ["", "state dict", "disk"])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("method", METHODS)
def test_frozen_layers_are_left_alone_and_take_their_turn_when_thawed(method: str, library: str, resumed: str, tmp_path: Path) -> None:
    """Frozen after some steps, past every switch; what was trained stays, and goes on from there, once ΔW = s(Q_B A + B Q_Aᵀ)."""
    build, options = METHODS[method][0], SHORT[method]
    model = make_model(library)
    optimizer = build(model.named_parameters(), lr=1e-2, scale=0.7, **options)
    train(model, optimizer, 0, 4)
    frozen = pairs(model)[1]
    before, delta = [p.requires_grad_(False).detach().clone() for p in (frozen.A, frozen.B)], pair_delta(frozen)
    train(model, optimizer, 4, 31)
    assert torch.equal(frozen.A, before[0]) and torch.equal(frozen.B, before[1]) and torch.equal(pair_delta(frozen), delta)
    marked = optimizer.param_groups[0]["still_plain"]
    assert len(marked) == 1
    if resumed == "disk":
        flattened = dcp.StateDictOptions(flatten_optimizer_state_dict=True)
        saved = dcp.get_optimizer_state_dict(model, optimizer, options=flattened)
        torch.distributed.checkpoint.save({"o": saved}, checkpoint_id=tmp_path, no_dist=True)
        optimizer.zero_grad()  # torch makes no state, to be read into, where there are gradients
        optimizer = build(model.named_parameters(), lr=1e-2, scale=0.7, **options)
        read = {"o": dcp.get_optimizer_state_dict(model, optimizer, options=flattened)}
        torch.distributed.checkpoint.load(read, checkpoint_id=tmp_path, no_dist=True)
        dcp.set_optimizer_state_dict(model, optimizer, read["o"], options=flattened)
    elif resumed == "state dict":
        saved = copy.deepcopy(optimizer.state_dict())
        assert saved["param_groups"][0]["still_plain"].count(True) == 1
        optimizer = build(model.named_parameters(), lr=1e-2, scale=0.7, **options)
        damaged = copy.deepcopy(saved)
        damaged["param_groups"][0]["still_plain"] = [1000]
        with pytest.raises(ValueError, match="still_plain .* it is damaged"):
            optimizer.load_state_dict(damaged)
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["still_plain"] == marked
    twin = make_model(library)
    twin.load_state_dict(model.state_dict())
    frozen.A.requires_grad_(True), frozen.B.requires_grad_(True)
    for p in trainable(twin):
        p.requires_grad_(p is pairs(twin)[1].A or p is pairs(twin)[1].B)
    optimizer.zero_grad()
    loss_of(model, 31).backward()
    plain = torch.autograd.grad(loss_of(twin, 31), [pairs(twin)[1].A, pairs(twin)[1].B])
    for p, grad, part in zip((frozen.A, frozen.B), plain, (slice(3), (slice(None), slice(3))), strict=True):
        assert torch.equal(p.grad[part], grad[part])
    optimizer.step()
    q = pair_q(frozen).detach()
    torch.testing.assert_close(q.mT @ q, torch.eye(3, dtype=q.dtype), rtol=0, atol=1e-12)
    moved = pair_delta(frozen) - delta
    assert 0 < moved.norm() < 0.5 * delta.norm() and optimizer.param_groups[0]["still_plain"] == []
    train(model, optimizer, 32, 60)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_refresh_schedule() -> None:
    assert [t for t in range(1, 301) if refresh_due(t, 300, 5)][:61] == [*range(1, 61), 62]
    for t in range(1, 400):
        interval = min((5 * t + 299) // 300, 5)
        assert refresh_due(t, 300, 5) == (t % interval == 0)


def test_uniform_schedule_needs_no_total() -> None:
    model = make_model("ours")
    optimizer = SDSLoRA(model, lr=1e-2, refresh_every=7)
    changed = []
    for step in range(40):
        bases = [p.layer.q_b.clone() for p in pairs(model)]
        train(model, optimizer, step, step + 1)
        if step >= 10 and not torch.equal(bases[0], pairs(model)[0].layer.q_b):
            changed.append(step + 1 - 10)
    assert changed == [7, 14, 21, 28]


def test_continues_from_a_decoupled_adapter() -> None:
    model = make_model("ours")
    train(model, SDSLoRA(model, lr=1e-2, total_steps=40), 0, 40)
    before = [pair_delta(p) for p in pairs(model)]
    with pytest.raises(RuntimeError, match="come from different steps; load both from one checkpoint"):
        train(model, SDSLoRA(model, lr=1e-2, total_steps=40), 0, 1)
    assert all(torch.equal(b, pair_delta(p)) for b, p in zip(before, pairs(model), strict=True))
    train(model, SDSLoRA(model, lr=1e-2, total_steps=40, warmup_steps=0), 0, 40)
    assert loss_of(model, 0).isfinite()


@pytest.mark.parametrize("change", ["nothing", "buffers", "parameters", "layer", "cast"])
def test_bases_are_written_where_they_are_now(change: str) -> None:
    """Which layers hold the bases is kept from refresh to refresh: a model that was changed between them trains as with nothing kept."""
    models, found = [make_model("ours"), make_model("ours")], []
    for model, kept in zip(models, (True, False), strict=True):
        optimizer = SDSLoRA(model, lr=1e-2, refresh_every=1, warmup_steps=2)
        for step in range(9):
            if step == 5:
                change_layers(model, optimizer, change)
            if not kept:
                optimizer._buckets = (None, [])
            train(model, optimizer, step, step + 1)
        found.append([x.detach() for p in pairs(model) for x in (p.A, p.B, p.layer.q_a, p.layer.q_b)])
        for pair in pairs(model):
            torch.testing.assert_close(pair.layer.q_b @ (pair.layer.q_b.mT @ pair.B), pair.B.detach(), rtol=0, atol=1e-5)
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def change_layers(model: nn.Module, optimizer: SDSLoRA, change: str) -> None:
    if change == "cast":
        model.float()
        optimizer.load_state_dict(optimizer.state_dict())
    for name, layer in [(n, m) for n, m in model.named_children() if isinstance(m, LowRankLinear)]:
        if change == "buffers":
            for key, buffer in list(layer.named_buffers(recurse=False)):
                setattr(layer, key, buffer.clone())
        elif change == "parameters":
            group = optimizer.param_groups[0]
            for key in ("lora_A", "lora_B"):
                old = getattr(layer, key)
                setattr(layer, key, nn.Parameter(old.detach().clone()))
                (index,) = [i for i, p in enumerate(group["params"]) if p is old]
                group["params"][index] = getattr(layer, key)
                optimizer.state[getattr(layer, key)] = optimizer.state.pop(old)
        elif change == "layer":  # another module over the same parameters takes the place of one that is gone
            setattr(model, name, twin := copy.deepcopy(layer))
            twin.lora_A, twin.lora_B = layer.lora_A, layer.lora_B


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_continues_from_a_decoupled_peft_adapter_that_was_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    """As with a layer of ours: from where it was, along the same trajectory; also of bases that were rounded to bf16 and loaded as fp32."""
    import peft

    from lowrank_kernels.adapters.peft import DecoupledLoraConfig

    def base(dtype: torch.dtype = dtype) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9)).to(dtype)

    config = DecoupledLoraConfig(rank=3, alpha=2.0, target_modules=["0", "2"])
    model = peft.get_peft_model(base(), config, autocast_adapter_dtype=False)
    train(model, SDSLoRA(model, lr=1e-2, total_steps=40), 0, 40)
    model.save_pretrained(tmp_path)
    wide = torch.promote_types(dtype, torch.float32)
    loaded = peft.PeftModel.from_pretrained(base(wide), tmp_path, is_trainable=True)
    twin = adapt(base(wide), "sds", rank=3, alpha=2.0)
    with torch.no_grad():
        for ours, theirs in zip(pairs(twin), pairs(loaded), strict=True):
            for target, half in ((ours.A, theirs.A[:3]), (ours.layer.q_a, theirs.A[3:]), (ours.B, theirs.B[:, 3:])):
                target.copy_(half)
            ours.layer.q_b.copy_(theirs.B[:, :3])
            ours.layer.decoupled = True
    start = [pair_delta(p) for p in pairs(loaded)]
    models = (loaded, twin)
    optimizers = [SDSLoRA(m, lr=1e-6, total_steps=40, warmup_steps=0) for m in models]
    for first, last, lr in ((0, 1, 1e-6), (1, 30, 1e-2)):
        for m, optimizer in zip(models, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = lr
            train(m, optimizer, first, last)
        if first == 0:
            jump = 1e-4 if dtype == wide else 2e-2  # the first refresh makes whole what rounding has taken from the bases
            assert all((pair_delta(p) - d).abs().max() < jump for p, d in zip(pairs(loaded), start, strict=True))
    tolerance = {"rtol": 0, "atol": 1e-9 if dtype == torch.float64 else 2e-2}
    for ours, theirs, before in zip(pairs(twin), pairs(loaded), start, strict=True):
        torch.testing.assert_close(pair_delta(theirs).double(), pair_delta(ours).double(), **tolerance)
        assert (pair_delta(theirs) - before).norm() < 2 * before.norm()


@pytest.mark.parametrize("library", LIBRARIES)
def test_no_warmup_over_plain_layers_names_the_warmup(library: str) -> None:
    model = make_model(library)
    before = copy.deepcopy(model.state_dict())
    optimizer = SDSLoRA(model, lr=1e-2, refresh_every=100, warmup_steps=0)
    which = re.escape(pairs(model)[0].name)
    message = f"SDSLoRA: warmup_steps=0 continues with layers that are decoupled already, and {which} is plain LoRA; give it warm-up steps"
    for trained in (0, 3):  # and LoRA that was trained
        if trained:
            model.load_state_dict(before)
            train(model, AdamW(model, lr=1e-2), 0, trained)
        now = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match=message):
            train(model, optimizer, 0, 1)
        assert not optimizer.state and all(torch.equal(now[key], value) for key, value in model.state_dict().items())


def test_a_model_of_another_step_is_refused_at_the_next_one() -> None:
    model = make_model("ours")
    optimizer = SDSLoRA(model, lr=1e-2, refresh_every=100, warmup_steps=3)
    train(model, optimizer, 0, 2)
    plain = copy.deepcopy(model.state_dict())
    train(model, optimizer, 2, 6)
    model.load_state_dict(plain)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(RuntimeError, match="come from different steps; load both from one checkpoint"):
        train(model, optimizer, 6, 7)
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), plain.values(), strict=True))
    assert all(torch.equal(before[i][k], v) for i, s in optimizer.state_dict()["state"].items() for k, v in s.items())


def test_heads_get_adamw_and_their_state_is_not_cleared() -> None:
    torch.manual_seed(0)
    model = make_model("ours")
    head = nn.Linear(9, 2, dtype=torch.float64)
    reference = copy.deepcopy(head)
    optimizer = SDSLoRA([{"params": trainable(model)}, {"params": head.parameters(), "lr": 5e-3}], lr=1e-2, total_steps=30)
    plain = torch.optim.AdamW(reference.parameters(), lr=5e-3)
    for _ in range(20):
        optimizer.zero_grad()
        hidden = model(torch.randn(8, 12, dtype=torch.float64))
        head(hidden).square().mean().backward()
        for p, q in zip(reference.parameters(), head.parameters(), strict=True):
            p.grad = q.grad.clone()
        optimizer.step()
        plain.step()
    for p, q in zip(reference.parameters(), head.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


class TestBadInput:
    def test_total_steps(self) -> None:
        model = make_model("ours")
        with pytest.raises(ValueError, match="total_steps is missing"):
            SDSLoRA(model, lr=1e-2)
        with pytest.raises(ValueError, match="total_steps must be larger than the 10 steps"):
            SDSLoRA(model, lr=1e-2, total_steps=10)
        with pytest.raises(TypeError, match="total_steps must be an integer, got 1.5"):
            SDSLoRA(model, lr=1e-2, total_steps=1.5)
        with pytest.raises(ValueError, match="warmup_steps"):
            SDSLoRA(model, lr=1e-2, total_steps=10, warmup_steps=-1)

    def test_nothing_to_pair(self) -> None:
        with pytest.raises(ValueError, match="no pair of low-rank factors"):
            SDSLoRA(nn.Linear(3, 3), lr=1e-2, total_steps=100)
        with pytest.raises(ValueError, match="no pair of low-rank factors"):
            SDSLoRA(make_model("peft").parameters(), lr=1e-2, total_steps=100)

    @pytest.mark.parametrize("method", [SDSLoRA, ODLoRA])
    @pytest.mark.parametrize("library", LIBRARIES)
    @pytest.mark.parametrize("how", ["plain", "named", "model"])
    def test_half_a_layer(self, method: type, library: str, how: str) -> None:
        """Left out, frozen before, or another layer's half as well: new bases would change what is not trained, or nobody's partner."""
        if (library, how) == ("peft", "plain"):
            return  # nothing tells that there are layers

        def refused(model: nn.Module, given: list[tuple[str, nn.Parameter]], message: str) -> None:
            params = given if how == "named" else [p for _, p in given]
            with pytest.raises(ValueError, match=f"{method.__name__}: .*{message}.*pass and train both or neither"):
                method(params, total_steps=100, **({"model": model} if how == "model" else {}))

        model = make_model(library)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        refused(model, [x for x in named if x[1] is not pairs(model)[1].B], "2.*(only A is given|is the A of a layer)")
        pairs(model)[1].A.requires_grad_(False)
        refused(model, [x for x in named if x[1].requires_grad], "2.*(only B is given|is the B of a layer)")
        model = make_model(library, shapes=[(20, 12), (9, 12)])
        first, second = (pair.layer for pair in pairs(model))
        if library == "ours":
            second.lora_A = first.lora_A
        else:
            second.lora_A["default"].weight = first.lora_A["default"].weight
        refused(model, [(n, p) for n, p in model.named_parameters() if p.requires_grad], "A of .* is also that of|only B is given")

    @pytest.mark.parametrize("library", LIBRARIES)
    @pytest.mark.parametrize("method", METHODS)
    def test_one_factor_frozen(self, method: str, library: str) -> None:
        build, model = METHODS[method][0], make_model(library)
        pairs(model)[1].A.requires_grad_(False)
        with pytest.raises(ValueError, match=r"of .*2.* only B is trained and A is frozen.*train both or freeze both"):
            build(model.named_parameters(), scale=0.7, total_steps=100)
        pairs(model)[1].A.requires_grad_(True)
        optimizer = build(model, lr=1e-2, **SHORT[method])
        train(model, optimizer, 0, 6)
        pairs(model)[1].B.requires_grad_(False)
        last = {"SDSLoRA": 9, "ODLoRA": 6}[method]
        train(model, optimizer, 6, last)
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        with pytest.raises(RuntimeError, match="only A is trained and B is frozen.*Nothing was changed"):
            train(model, optimizer, last, last + 1)
        assert all(torch.equal(before[0][n], value) for n, value in model.state_dict().items())
        assert all(torch.equal(before[1][i][k], v) for i, state in optimizer.state_dict()["state"].items() for k, v in state.items())
        pairs(model)[1].B.requires_grad_(True)
        train(model, optimizer, last, 30)

    def test_odd_rank(self) -> None:
        import peft

        model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(r=3, target_modules=["0"]))
        with pytest.raises(ValueError, match="rank must be even"):
            SDSLoRA(model, lr=1e-2, total_steps=100)

    def test_second_half_not_zero(self) -> None:
        model = make_model("peft")
        with torch.no_grad():
            pairs(model)[1].B[:, 3:] = 1.0
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = SDSLoRA(model, lr=1e-2, total_steps=100)
        loss_of(model, 0).backward()
        with pytest.raises(RuntimeError, match=r"second half of lora_B must be zero.* if it is decoupled, .*warmup_steps=0\)"):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)) and not optimizer.state

    def test_scale_unknown_warns_once(self) -> None:
        model = make_model("peft")
        with pytest.warns(UserWarning, match="scale is not known") as caught:
            SDSLoRA(model.named_parameters(), lr=1e-2, total_steps=100)
        assert sum("scale is not known" in str(warning.message) for warning in caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=".*train at half their rank")
            SDSLoRA(make_model("peft").named_parameters(), lr=1e-2, total_steps=100, scale=0.7)
            ours = make_model("ours")
            SDSLoRA(ours.parameters(), lr=1e-2, total_steps=100)

    @pytest.mark.parametrize("method", [SDSLoRA, ODLoRA])
    def test_half_of_the_rank_is_trained_and_that_is_said_once(self, method: type) -> None:
        plain = adapt(nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 12)), rank=6)
        for model in (plain, make_model("peft")):
            with pytest.warns(UserWarning, match=r"train at half their rank \(.*: 3 of 6\).*rank 12, or .*method='sds', rank=6") as caught:
                optimizer = method(model, lr=1e-2, total_steps=100)
                optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
            assert len(caught) == 1 and caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            method(make_model("ours"), lr=1e-2, total_steps=100)

    def test_decoupled_configuration_is_not_told_of_halves(self) -> None:
        peft = pytest.importorskip("peft")
        from lowrank_kernels.adapters.peft import DecoupledLoraConfig

        model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 20)), DecoupledLoraConfig(rank=3, target_modules=["0"]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            SDSLoRA(model, lr=1e-2, total_steps=100)

    @pytest.mark.parametrize(
        ("rule", "patterns"),
        [
            ("lora", {"rank_pattern": {"^first.q": 2, "k": 3}, "alpha_pattern": {"second.[qo]": 1.5, "k": 2.5}}),
            ("rslora", {"rank_pattern": {"^first.q": 2, "k": 3}}),
            ("rslora", {"alpha_pattern": {"second.[qo]": 1.5, "k": 2.5}}),
            ("rslora", {"rank_pattern": {"^first.q": 2, "k": 3}, "alpha_pattern": {"^first.q": 1.5, "k": 2.5}}),
        ],
        ids=str,
    )
    def test_decoupled_configuration_translates_patterns(self, rule: str, patterns: dict, tmp_path: Path) -> None:
        """Each layer's r and α are those that PEFT takes from the patterns; its s is the rule's of them, and that of the saved adapter."""
        peft = pytest.importorskip("peft")
        from lowrank_kernels.adapters.peft import DecoupledLoraConfig

        def net() -> nn.Module:
            return nn.ModuleDict({part: nn.ModuleDict({name: nn.Linear(12, 12) for name in "qkvo"}) for part in ("first", "second")})

        targets = ["q", "k", "v", "o"]
        plain = peft.get_peft_model(net(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **patterns))
        model = peft.get_peft_model(net(), DecoupledLoraConfig(4, 6.0, rule, target_modules=targets, **patterns))
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(net(), tmp_path)
        layers = {name: layer for name, layer in plain.named_modules() if isinstance(layer, peft.tuners.lora.Linear)}
        assert len(layers) == 8 and len({(x.r["default"], x.lora_alpha["default"]) for x in layers.values()}) > 2
        for name, layer in layers.items():
            r, alpha = layer.r["default"], layer.lora_alpha["default"]
            for other in (model.get_submodule(name), loaded.get_submodule(name)):
                assert other.r["default"] == 2 * r == other.lora_A["default"].weight.shape[0], name
                assert other.scaling["default"] == pytest.approx(alpha / (r if rule == "lora" else r**0.5)), name

    @pytest.mark.parametrize("kind", ["cat", "linear", "svd"])
    def test_decoupled_adapters_are_combined_as_peft_combines_plain_ones(self, kind: str) -> None:
        """PEFT makes the new adapter's configuration by dataclasses.replace, with fields that rank and alpha decide."""
        peft = pytest.importorskip("peft")
        from lowrank_kernels.adapters.peft import DecoupledLoraConfig, KernelLinear

        config = DecoupledLoraConfig(rank=3, alpha=2.0, target_modules=["0", "2"])
        plain = peft.LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=["0", "2"])
        torch.manual_seed(0)
        base, x = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16)), torch.randn(5, 12)
        models = [peft.get_peft_model(copy.deepcopy(base), one) for one in (config, plain)]
        for model, one in zip(models, (config, plain), strict=True):
            model.add_adapter("other", one)
            torch.manual_seed(1)
            for name, p in model.named_parameters():
                if "lora_" in name:
                    nn.init.normal_(p)
            model.add_weighted_adapter(["default", "other"], [0.5, 0.25], "both", combination_type=kind)
            model.set_adapter("both")
        torch.testing.assert_close(models[0](x), models[1](x))
        assert isinstance(models[0].base_model.model[0], KernelLinear)
        made = models[0].peft_config["both"]
        assert type(made) is peft.LoraConfig and made.to_dict() == models[1].peft_config["both"].to_dict()
        twins = copy.deepcopy(config), pickle.loads(pickle.dumps(config))
        assert all(type(twin) is DecoupledLoraConfig and twin.to_dict() == config.to_dict() for twin in twins)

    def test_decoupled_configuration_refuses_patterns(self) -> None:
        pytest.importorskip("peft")
        from lowrank_kernels.adapters.peft import DecoupledLoraConfig

        for patterns, error, message in (
            ({"rank_pattern": {"q": 0}}, ValueError, r"rank_pattern\['q'\] must be ≥ 1, got 0"),
            ({"alpha_pattern": ["q"]}, TypeError, r"alpha_pattern must be a dictionary by regular expressions, got \['q'\]"),
            ({"rank_pattern": {"q": 1}, "alpha_pattern": {"k": 1}}, ValueError, r"must have the same keys .* got \['q'\] and \['k'\]"),
        ):
            with pytest.raises(error, match=f"DecoupledLoraConfig: .*{message}"):
                DecoupledLoraConfig(target_modules=["q"], **patterns)

    def test_od_lora(self) -> None:
        with pytest.raises(ValueError, match="would train rank 3, more than its 2 × 20 allow"):
            ODLoRA(make_model("peft", shapes=[(20, 12), (2, 20)]), total_steps=100)
        with pytest.raises(ValueError, match="larger than the 50 steps"):
            ODLoRA(make_model("ours"), total_steps=50)
        with pytest.raises(ValueError, match="rounds must be ≥ 1, got 0"):
            ODLoRA(make_model("ours"), total_steps=50, rounds=0)
        with pytest.raises(ValueError, match="basis must be"):
            ODLoRA(make_model("ours"), total_steps=100, basis="svd")

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("round_steps", 0, "ODLoRA: round_steps must be ≥ 1, got 0"),
            ("round_steps", 2.5, "ODLoRA: round_steps must be an integer, got 2.5"),
            ("start_steps", -1, "ODLoRA: start_steps must be ≥ 0, got -1"),
        ],
    )
    def test_edited_rounds(self, key: str, value: object, message: str) -> None:
        model = make_model("ours")
        optimizer = ODLoRA(model, total_steps=60, rounds=2, round_steps=3)
        optimizer.param_groups[0][key] = value
        with pytest.raises((TypeError, ValueError), match=message):
            train(model, optimizer, 0, 1)

    def test_edited_warmup(self) -> None:
        model = make_model("ours")
        optimizer = SDSLoRA(model, lr=1e-2, total_steps=60)
        optimizer.param_groups[0]["start_steps"] = 1.5
        with pytest.raises(TypeError, match="SDSLoRA: warmup_steps must be an integer, got 1.5"):
            train(model, optimizer, 0, 1)

    def test_capturable(self) -> None:
        with pytest.raises(ValueError, match="capturable"):
            SDSLoRA(make_model("ours"), lr=1e-2, total_steps=100, capturable=True)
