"""The capture of full gradients under everything that training loops do to a backward pass."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import peft
import pytest
import torch
from _models import batch, loss_of
from _oplora import LR, Shared, assert_alike, deltas, every_gradient, every_kind, every_library, make, make_model, naive_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lk
from benchmarks.naive.oplora import OPLoRALayer
from lowrank_kernels import pairs
from lowrank_kernels.optim._shared.held_gradient import Probes, Sketch, TokenFactors, random_matrix, reconstruct


@every_library
@every_kind
def test_micro_batches_add_up_exactly(kind: dict, library: str) -> None:
    whole, parts = Shared(library), Shared(library)
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


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
@every_kind
@every_library
def test_one_buffer_for_all_batches_changes_nothing(kind: dict, library: str, dims: int, asks: bool) -> None:
    fresh, refilled = make_model(library), make_model(library)
    optimizers = make(fresh, **kind), make(refilled, **kind)
    buffer = torch.zeros((16, 12) if dims == 2 else (2, 8, 12), dtype=torch.float64, requires_grad=asks)
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for micro in range(2):
            x, y = batch(2 * step + micro)
            (fresh(x.clone().requires_grad_(asks)) - y).square().mean().backward()
            with torch.no_grad():
                buffer.copy_(x.view_as(buffer))
            (refilled(buffer).view_as(y) - y).square().mean().backward()
        with torch.no_grad():
            buffer.fill_(7.0)  # the next batch is there before the step
        for optimizer in optimizers:
            optimizer.step()
    assert_alike(refilled, fresh, 1e-9)


def test_activations_are_not_copied() -> None:
    model = make_model("ours")
    optimizer = make(model)
    seen = {}
    model[2].register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    loss_of(model, 0).backward()
    first, second = (recorder.gradient.pieces[0][0] for recorder in optimizer._recorders[:2])
    assert second.data_ptr() == seen["x"].data_ptr() and first.shape == (16, 12)


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


@every_library
@every_gradient
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_what_is_captured_is_the_gradient_of_the_adapters(gradient: str, library: str, dropout: float) -> None:
    """``∂A = s BᵀG`` and ``∂B = s G Aᵀ`` behind dropout, at any scale of the loss."""
    model = Shared(library, dropout).train()
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


@every_library
@every_kind
def test_grad_scaler_changes_nothing_and_skips_overflows(kind: dict, library: str) -> None:
    plain, scaled = make_model(library, dtype=torch.float32), make_model(library, dtype=torch.float32)
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


@every_library
@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["plain", "checkpoint"])
def test_autocast_stays_near_full_precision(recomputed: bool, dtype: torch.dtype, kind: dict, library: str) -> None:
    """PEFT's layers get an fp32 input, which their GEMM casts: S is narrower than X."""
    whole, cast = make_model(library, dtype=torch.float32), make_model(library, dtype=torch.float32)
    optimizers = [make(model, sketch_width=4, **kind) for model in (whole, cast)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
    for step in range(4):
        x, y = batch(step, dtype=torch.float32)
        loss_of(whole, step, torch.float32).backward()
        with torch.autocast("cpu", dtype=dtype):
            out = checkpoint(cast, x, use_reentrant=False) if recomputed else cast(x)
        scaler.scale((out.float() - y).square().mean()).backward()
        optimizers[0].step()
        scaler.step(optimizers[1])
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert_alike(cast, whole, 8 * torch.finfo(dtype).eps)


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
    monkeypatch.setattr("lowrank_kernels.optim._shared.held_gradient.random_matrix", counted)
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


@every_library
def test_nothing_is_kept_and_hooks_go_with_the_optimizer(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(library)
    optimizer = make(model)
    seen: list[weakref.ref] = []
    add = TokenFactors.add
    monkeypatch.setattr(TokenFactors, "add", lambda self, x, s: (seen.append(weakref.ref(s)), add(self, x, s))[1])
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


@pytest.mark.filterwarnings("ignore:.*(peft_config|no pair of matrices)")
@pytest.mark.parametrize(("how", "named"), [("velora", r"1\.default, 3\.default, 2 of the 3"), ("tied", r"1\.default, 1 of the 2")])
def test_layers_that_are_never_seen_are_named(how: str, named: str) -> None:
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(6)))
    velora = {"velora_config": peft.VeloraConfig()} if how == "velora" else {}
    for targets, options in ((["1", "3"], velora), (["5"], {})):
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets, **options), model)
    if how == "tied":
        model[3].lora_A.default.weight = model[1].lora_A.default.weight
    optimizer = make(model)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(5, 12)).square().sum().backward()
    with pytest.raises(RuntimeError, match=rf"no backward pass was seen .* of {named} layers with a gradient.*tied.*VeLoRA"):
        optimizer.step()
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))


@pytest.mark.filterwarnings("ignore:.*(peft_config|no pair of matrices)")
@pytest.mark.parametrize("how", ["ours", "peft", "peft's parameters"])
def test_layers_that_are_never_called_are_refused_by_name(how: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.attention(x, x, x)[0])

    model: nn.Module = Block()
    if how == "ours":
        model, named = lk.adapt(model, rank=2), r"attention\.out_proj"
    elif how == "peft":
        config = peft.LoraConfig(r=2, target_modules=["attention", "last"])
        model, named = peft.get_peft_model(model, config), r"\S*attention\.default, \S*attention\.base_layer\.out_proj\.default"
    else:
        config = peft.LoraConfig(r=2, target_modules=["last"], target_parameters=["attention.in_proj_weight"])
        model, named = peft.get_peft_model(model, config), r"\S*attention\.default"
    with pytest.raises(ValueError, match=rf"OPLoRA: {named} belong.*MultiheadAttention"):
        make(model)
    assert not any(module._forward_hooks for module in model.modules())
    for name, p in model.named_parameters():
        p.requires_grad_("last" in name and "lora" in name)
    optimizer = make(model)  # what is frozen is not asked for
    model(torch.randn(2, 3, 8)).sum().backward()
    optimizer.step()


def test_loading_neither_opens_what_was_closed_nor_keeps_more() -> None:
    model = make_model("ours")
    optimizer = make(model)
    closing = optimizer._closing
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer._closing is closing
    optimizer.close()
    optimizer.load_state_dict(optimizer.state_dict())
    loss_of(model, 0).backward()
    assert all(recorder.gradient.empty for recorder in optimizer._recorders)
