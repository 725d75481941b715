"""What torch itself does with an optimizer and a model: AMP, clipping, checkpointing, schedulers, compilers, copies, files."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from _matrix import (
    Cell,
    assert_moved,
    assert_refuses_peft,
    assert_same,
    assert_same_state,
    data,
    feature,
    loss_of,
    models,
    ours,
    state_copy,
    train,
    values,
    with_peft,
)
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from torch.utils.checkpoint import checkpoint

STEPS = 9


@feature("loop: save with torch.save, load with weights_only=True, resume = uninterrupted")
def resume(cell: Cell) -> None:
    whole = ours(cell)
    train(whole, cell.optimizer(whole), 0, 2 * STEPS)
    for stop in (1, 4, STEPS):
        first = ours(cell)
        optimizer = cell.optimizer(first)
        before = values(first)
        train(first, optimizer, 0, stop)
        if stop == STEPS:
            assert_moved(before, first)
        torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, cell.folder / "checkpoint.pt")
        saved = torch.load(cell.folder / "checkpoint.pt", weights_only=True)
        second = ours(cell, seed=7)
        second.load_state_dict(saved["model"])
        resumed = cell.optimizer(second)
        resumed.load_state_dict(saved["optimizer"])
        train(second, resumed, stop, 2 * STEPS)
        assert_same(second, whole)


@feature("loop: deepcopy and pickle of model and optimizer")
def copies(cell: Cell) -> None:
    model = ours(cell)
    optimizer = cell.optimizer(model)
    train(model, optimizer, 0, 5)
    twins = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    train(model, optimizer, 5, STEPS)
    for twin, its_optimizer in twins:
        train(twin, its_optimizer, 5, STEPS)
        assert_same(twin, model)


@feature("loop: autocast bf16")
def autocast_bf16(cell: Cell) -> None:
    for make in models(cell):
        model = make(cell)
        optimizer, before, losses = cell.optimizer(model), values(model), []
        for step in range(3 * STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, step % 3)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert_moved(before, model)
        assert losses[-1] < losses[0]
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@feature("loop: autocast fp16 with GradScaler: an overflow is skipped, the scale comes down, training goes on")
def grad_scaler(cell: Cell) -> None:
    model = ours(cell)
    optimizer = cell.optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(index: int, spoil: bool = False) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, index)
        scaler.scale(loss).backward()
        if spoil:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        scaler.step(optimizer)
        scaler.update()

    before = values(model)
    step(0)
    assert scaler.get_scale() == 2.0**10
    saved, state = values(model), state_copy(optimizer)
    step(1, spoil=True)
    assert_same(saved, model)
    assert_same_state(state, state_copy(optimizer))
    assert scaler.get_scale() == 2.0**9
    for index in range(2, STEPS):
        step(index)
    assert_moved(before, model)
    assert all(p.isfinite().all() for p in model.parameters())


@feature("loop: bf16 and fp16 factors, fp32 state")
def low_precision_factors(cell: Cell) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = ours(cell, dtype=dtype)
        dtypes = {p.dtype for n, p in model.named_parameters() if "lora_" in n}
        assert dtypes == {torch.float32}, "factors beside a 16-bit weight are fp32"
        model = ours(cell).to(dtype)
        optimizer, before = cell.optimizer(model), values(model)
        train(model, optimizer, 0, STEPS, dtype)
        assert_moved(before, model)
        assert all(v.dtype in (torch.float32, torch.float64) for s in optimizer.state.values() for v in s.values())
        assert all(p.isfinite().all() for p in model.parameters())


@feature("loop: gradient clipping and accumulation")
def clipping_and_accumulation(cell: Cell) -> None:
    model, twin = ours(cell, dtype=torch.float64), ours(cell, dtype=torch.float64)
    optimizer, other = cell.optimizer(model), cell.optimizer(twin)
    for step in range(STEPS):
        x, y = data(step, dtype=torch.float64)
        for half in (slice(0, 8), slice(8, 16)):
            (nn.functional.cross_entropy(model(x[half]), y[half]) / 2).backward()
        nn.functional.cross_entropy(twin(x), y).backward()
        norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1) for m in (model, twin)]
        assert norms[0] > 0.1, "clipping must do something here"
        for each in (optimizer, other):
            each.step()
            each.zero_grad()
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=0)
    assert_same(model, twin, 1e-6)


@feature("loop: activation checkpointing, reentrant and not")
def activation_checkpointing(cell: Cell) -> None:
    trained = []
    for reentrant in (None, True, False):
        model = ours(cell)
        optimizer = cell.optimizer(model)
        for step in range(STEPS):
            optimizer.zero_grad()
            x, y = data(step)
            x.requires_grad_()  # reentrant checkpointing needs it; a gradient for x may change how the others are multiplied out
            out = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
            nn.functional.cross_entropy(out, y).backward()
            optimizer.step()
        trained.append(model)
    assert_same(trained[1], trained[0])
    assert_same(trained[2], trained[0])


@feature("loop: zero_grad(set_to_none=True) and False")
def zero_grad(cell: Cell) -> None:
    models = []
    for set_to_none in (True, False):
        model = ours(cell)
        optimizer = cell.optimizer(model)
        for step in range(STEPS):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss_of(model, step).backward()
            optimizer.step()
        models.append(model)
    assert_same(*models)


@feature("loop: learning-rate schedulers (with their state), tensor lr")
def schedulers(cell: Cell) -> None:
    makers = (
        lambda o: CosineAnnealingLR(o, 2 * STEPS),
        lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: OneCycleLR(o, 1e-2, total_steps=3 * STEPS, cycle_momentum=False),
    )
    for make in makers:
        whole, model = ours(cell), ours(cell)
        rates = []

        def run(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler, first: int, last: int, rates: list[float] = rates) -> None:
            for step in range(first, last):
                train(model, optimizer, step, step + 1)
                scheduler.step()
                rates.append(optimizer.param_groups[0]["lr"])

        optimizer = cell.optimizer(whole)
        run(whole, optimizer, make(optimizer), 0, STEPS)
        assert len(set(rates)) > STEPS // 2
        optimizer = cell.optimizer(model)
        scheduler = make(optimizer)
        run(model, optimizer, scheduler, 0, 4)
        again, twin = cell.optimizer(twin_model := ours(cell)), None
        twin_model.load_state_dict(model.state_dict())
        twin = make(again)
        again.load_state_dict(state_copy(optimizer))
        twin.load_state_dict(scheduler.state_dict())
        run(twin_model, again, twin, 4, STEPS)
        assert_same(twin_model, whole)
    model, twin_model = ours(cell), ours(cell)
    train(model, cell.optimizer(model, lr=torch.tensor(1e-2, dtype=torch.float64)), 0, STEPS)
    train(twin_model, cell.optimizer(twin_model), 0, STEPS)
    assert_same(model, twin_model, 1e-5)


@feature("loop: step(closure)")
def closures(cell: Cell) -> None:
    model, twin = ours(cell), ours(cell)
    optimizer = cell.optimizer(model)
    for step in range(STEPS):

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0
    train(twin, cell.optimizer(twin), 0, STEPS)
    assert_same(model, twin)


@feature("loop: foreach= and fused= as torch.optim.AdamW takes them; amsgrad and differentiable refused")
def foreach_and_fused(cell: Cell) -> None:
    reference = ours(cell)
    train(reference, cell.optimizer(reference), 0, 4)
    for options in ({"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}, {"foreach": None, "fused": None}):
        model = ours(cell)
        train(model, cell.optimizer(model, **options), 0, 4)
        assert_same(model, reference)
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        cell.optimizer(ours(cell), foreach=True, fused=True)
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        cell.optimizer(ours(cell), differentiable=True)


@feature("loop: parameter groups, add_param_group, hooks around step()")
def groups_and_hooks(cell: Cell) -> None:
    model, twin = ours(cell), ours(cell)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    adapter, head = ([(n, p) for n, p in named if ("head" in n) == is_head] for is_head in (False, True))
    optimizer = cell.optimizer([{"params": adapter}, {"params": head, "lr": 1e-2}])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    train(model, optimizer, 0, STEPS)
    assert seen == ["pre", "post"] * STEPS
    train(twin, cell.optimizer(twin), 0, STEPS)
    assert_same(model, twin)
    extra = nn.Linear(5, 5)
    optimizer.add_param_group({"params": [(f"extra.{n}", p) for n, p in extra.named_parameters()], "lr": 1e-3})
    before = values(extra)
    train(nn.Sequential(model, extra), optimizer, STEPS, STEPS + 1)
    assert not torch.equal(before["weight"], extra.weight)


@feature("loop: maximize")
def maximize(cell: Cell) -> None:
    model, twin = ours(cell), ours(cell)
    up, down = cell.optimizer(model, maximize=True), cell.optimizer(twin)
    for step in range(STEPS):
        up.zero_grad()
        (-loss_of(model, step)).backward()
        up.step()
    train(twin, down, 0, STEPS)
    assert_same(model, twin, 1e-5)


@feature("torch.compile: the model, in one graph (OPLoRA's capture breaks it at every adapted layer)")
def compiled_model(cell: Cell) -> None:
    model, twin = ours(cell), ours(cell)
    compiled = torch.compile(model, fullgraph=cell.name != "OPLoRA", backend="aot_eager")
    optimizer = cell.optimizer(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(compiled, step).backward()
        optimizer.step()
    train(twin, cell.optimizer(twin), 0, STEPS)
    assert_same(model, twin, 1e-4)


@feature("torch.compile: PEFT's layers, in training (OPLoRA: made before the first compiled call of such layers)", lambda m: m.peft)
def compiled_peft(cell: Cell) -> None:
    if not cell.method.peft:
        assert_refuses_peft(cell)
        return
    torch.compiler.reset()  # what other cells compiled
    model, twin = with_peft(cell), with_peft(cell)
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = cell.optimizer(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(compiled, step).backward()
        optimizer.step()
    train(twin, cell.optimizer(twin), 0, STEPS)
    assert_same(model, twin, 1e-4)
    if cell.name == "OPLoRA":  # what is compiled does not call hooks that come later
        torch.compiler.reset()
        model = with_peft(cell)
        compiled = torch.compile(model, backend="aot_eager")
        loss_of(compiled, 0).backward()
        model.zero_grad()
        optimizer, before = cell.optimizer(model), values(model)
        loss_of(compiled, 0).backward()
        with pytest.raises(RuntimeError, match="no backward pass was seen"):
            optimizer.step()
        assert_same(before, model)


@feature("torch.compile: step() inside a compiled function (it runs outside the graph)")
def compiled_step(cell: Cell) -> None:
    model, twin = ours(cell), ours(cell)
    optimizer = cell.optimizer(model)

    @torch.compile(backend="eager")
    def step_of() -> None:
        optimizer.step()

    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        step_of()
    train(twin, cell.optimizer(twin), 0, STEPS)
    assert_same(model, twin, 1e-5)


@feature("CUDA graphs: capturable=True (its arithmetic on the CPU; replays are tested on a GPU)", lambda m: m.capturable is not None)
def capturable(cell: Cell) -> None:
    options = cell.method.capturable
    if options is None:
        with pytest.raises(ValueError, match="capturable=True is not supported"):
            cell.optimizer(ours(cell), capturable=True)
        return
    model, twin = ours(cell), ours(cell)
    optimizer, plain = cell.optimizer(model, capturable=True, **options), cell.optimizer(twin, **options)
    train(model, optimizer, 0, STEPS)
    train(twin, plain, 0, STEPS)
    assert_same(model, twin, 1e-4)
    assert isinstance(optimizer.param_groups[0]["step"], torch.Tensor), "the step is counted on the device"
    for bad in ({"nonfinite_grads": "skip"}, {"atomic": True}):
        with pytest.raises(ValueError, match="wait for the device"):
            cell.optimizer(model, capturable=True, **options, **bad)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    train(model, optimizer, STEPS, STEPS + 2)


@feature("loop: TRL-style, the same batch several times with clipping and a reference model")
def trl_style(cell: Cell) -> None:
    model = ours(cell)
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer, before, losses = cell.optimizer(model), values(model), []
    for step in range(4):
        x, y = data(step % 2)
        with torch.no_grad():
            old = model(x).log_softmax(-1).gather(1, y[:, None])
            anchor = reference(x).log_softmax(-1)
        for _ in range(4):  # PPO epochs
            logits = model(x).log_softmax(-1)
            ratio = (logits.gather(1, y[:, None]) - old).exp()
            loss = -torch.min(ratio, ratio.clamp(0.8, 1.2)).mean() + 0.05 * (logits.exp() * (logits - anchor)).sum(-1).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert_moved(before, model)
    assert losses[3] < losses[0] and all(loss == loss for loss in losses)
