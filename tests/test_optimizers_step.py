"""A step of every optimizer: AdamW's arithmetic, hooks and closures, capturable steps, constant launches, the forced backend."""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest
import torch
from _models import loss_of, make_model, trainable
from _optimizers import OPTIMIZERS, every_optimizer, run
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lk
from lowrank_kernels import backends, ops
from lowrank_kernels.backends.extension import csrc


def mixed_parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((7, 5), (11,), (2, 3, 4), (), (1, 1))]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_adamw_is_torchs_adamw(weight_decay: float, maximize: bool, tensor_lr: bool) -> None:
    ours, theirs = mixed_parameters(torch.float64), mixed_parameters(torch.float64)
    lr = torch.tensor(3e-2, dtype=torch.float64) if tensor_lr else 3e-2
    options = dict(lr=lr, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay, maximize=maximize)
    mine, reference = lk.AdamW(ours, **options), torch.optim.AdamW(theirs, foreach=False, **options)
    for step in range(30):
        for index, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            # Some gradients are missing in some steps: their bias corrections must lag behind, as torch's do.
            p.grad = None if (step + index) % 4 == 0 else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        mine.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_whoever_looks_at_a_step_sees_what_torch_shows() -> None:
    """Hooks of the optimizer and of all optimizers, what they make of the arguments, the profiler's record; all once, in torch's order."""

    class Users(lk.AdamW):
        def step(self, closure=None):
            seen.append("own step")
            return super().step(closure)

    def small(cls: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
        parameter = nn.Parameter(torch.ones(3))
        parameter.grad = torch.ones(3)
        return cls([parameter], lr=0.1)

    seen: list[object] = []
    orders = []
    for cls in (torch.optim.AdamW, lk.AdamW, Users):
        seen.clear()
        optimizer = small(cls)
        handles = [
            register_optimizer_step_pre_hook(lambda *_: seen.append("all pre")),
            register_optimizer_step_post_hook(lambda *_: seen.append("all post")),
            optimizer.register_step_pre_hook(lambda opt, args, kwargs: (args, {"closure": lambda: seen.append("closure") or 7.0})),
            optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(("post", len(args), sorted(kwargs)))),
        ]
        assert optimizer.step() == 7.0
        for handle in handles:
            handle.remove()
        orders.append([event for event in seen if event != "own step"])
        assert optimizer.step() is None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            optimizer.step()
        records = [event.name for event in profiler.events() if event.name.startswith("Optimizer.step#")]
        assert records == [f"Optimizer.step#{cls.__name__}.step"]
    assert orders[0] == orders[1] == orders[2] and len(orders[0]) == 4


@pytest.mark.parametrize("enabled", [True, False])
def test_a_step_leaves_gradients_as_they_were(enabled: bool) -> None:
    optimizer = lk.AdamW([nn.Parameter(torch.ones(3))], lr=0.1)
    seen = []
    with torch.set_grad_enabled(enabled):
        optimizer.step(lambda: seen.append(torch.is_grad_enabled()))
        assert torch.is_grad_enabled() == enabled
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        assert torch.is_grad_enabled() == enabled and seen == [True]


@every_optimizer
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_and_accumulation_change_nothing(build, reentrant: bool) -> None:
    plain, recomputed = make_model("ours"), make_model("ours")
    optimizers = build(plain), build(recomputed)

    class Recomputed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(recomputed, x.requires_grad_(), use_reentrant=reentrant)

    class Plain(nn.Module):
        """Whether the input needs a gradient decides which GEMM makes that of A, and the last bit with it."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return plain(x.requires_grad_())

    for step in range(14):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for micro in range(2):
            loss_of(Plain(), 2 * step + micro).backward()
            loss_of(Recomputed(), 2 * step + micro).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(plain.state_dict().values(), recomputed.state_dict().values(), strict=True))


@every_optimizer
def test_capturable_and_tensor_lr_change_nothing(build) -> None:
    plain, other = make_model("ours"), make_model("ours")
    optimizer = build(plain)
    try:
        capturable = build(other, capturable=True, lr=torch.tensor(1e-2, dtype=torch.float64))
    except ValueError as error:
        assert "captur" in str(error)
        pytest.skip(str(error))
    run(plain, optimizer, 0, 20)
    run(other, capturable, 0, 20)
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert all(isinstance(g["step"], torch.Tensor) and float(g["step"]) == 20 for g in capturable.param_groups)


@pytest.mark.parametrize("backend", [None, "reference"])
@every_optimizer
def test_a_tensor_lr_may_have_dimensions(build, backend: str | None) -> None:
    """As torch's AdamW has it; beside parameters that have none, and written in place, as schedulers do."""
    found = []
    for shape in ((), (1,), (1, 1)):
        lr = torch.full(shape, 1e-2, dtype=torch.float64)
        model, lone = make_model("ours"), nn.Parameter(torch.ones((), dtype=torch.float64))
        optimizer = build([{"params": trainable(model)}, {"params": [lone, nn.Parameter(torch.ones(3).double())]}], lr=lr)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=5)
        with backends.force(backend) if backend else contextlib.nullcontext():
            for step in range(15):
                optimizer.zero_grad()
                (loss_of(model, step) + sum((3 * p).square().sum() for p in optimizer.param_groups[1]["params"])).backward()
                optimizer.step()
                if step == 12:
                    lr.mul_(0.5)
                if step < 10:
                    scheduler.step()
        found.append([p.detach() for group in optimizer.param_groups for p in group["params"]])
        assert optimizer.param_groups[0]["lr"] is lr
    for p, *others in zip(*found, strict=True):
        for q in others:
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_the_moment_step_takes_numbers_that_have_dimensions(shape: tuple[int, ...]) -> None:
    found = []
    for dims in ((), shape):
        lr, step = (torch.full(dims, value) for value in (1e-2, 3.0))
        tensors = [[torch.full(size, value) for size in ((), (3,), (0, 2))] for value in (1.0, 0.5, 0.1, 0.2)]
        for backend in (None, "reference"):
            with backends.force(backend) if backend else contextlib.nullcontext():
                ops.grouped_adamw_(*tensors, lr=lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, step=step)
        found.append([x for values in tensors for x in values])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def launches_per_step(build, layers: int) -> list[int]:
    model = make_model("ours", rank=2, dtype=torch.float32, shapes=[(12, 12)] * (layers - 1) + [(9, 12)])
    optimizer = build(model, lr=1e-4)
    counts = []
    for step in range(14):
        optimizer.zero_grad()
        loss_of(model, step, torch.float32).backward()
        before = backends.launch_count()
        optimizer.step()
        counts.append(backends.launch_count() - before)
    return counts


@every_optimizer
def test_launches_do_not_depend_on_the_number_of_layers(build) -> None:
    counts = launches_per_step(build, 6)
    before = backends.call_counts()
    assert counts == launches_per_step(build, 60)
    moment_step = ("grouped_adamw_", "native")
    if backends.call_counts().get(moment_step, 0) > before.get(moment_step, 0):
        assert max(counts) > 0, "the compiled code ran, but counted no launch"
    else:
        assert csrc is None or build not in (OPTIMIZERS["AdamW"], OPTIMIZERS["SDSLoRA"]), "the compiled code did not run"


class TorchCalls(TorchDispatchMode):
    """Counts torch's own operations, but for those that launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aten" and not function.is_view and "empty" not in str(function):
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_optimizer
def test_calls_of_torch_do_not_depend_on_the_number_of_layers(build, dtype: torch.dtype) -> None:
    counts = []
    for layers in (3, 9):
        model = make_model("ours", rank=2, dtype=dtype, shapes=[(12, 12)] * (layers - 1) + [(9, 12)])
        optimizer = build(model, lr=1e-4)
        for step in range(14):  # a refresh of the bases is among the last two
            optimizer.zero_grad()
            loss_of(model, step, dtype).backward()
            with TorchCalls() as calls:
                optimizer.step()
            if step >= 12:
                counts.append(calls.counts)
    assert counts[:2] == counts[2:]


def test_forcing_a_backend_that_cannot_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("ours")
    optimizer = lk.AdamW(model)
    loss_of(model, 0).backward()
    before = [p.detach().clone() for p in model.parameters()]
    monkeypatch.setenv("LOWRANK_KERNELS_BACKEND", "nonsense")
    with pytest.raises(backends.BackendError, match="cannot read 'nonsense'"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    monkeypatch.setenv("LOWRANK_KERNELS_BACKEND", "native,lora_linear=reference,lora_linear_backward=reference")
    if csrc is None:
        with pytest.raises(backends.BackendError, match="grouped_adamw_: backend 'native' was forced, but ImportError"):
            optimizer.step()
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        return
    used = backends.call_counts().get(("grouped_adamw_", "native"), 0)
    optimizer.step()
    assert backends.call_counts()["grouped_adamw_", "native"] == used + 1


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_gradients_whose_corrected_squares_overflow(backend: str) -> None:
    """v = 4e35 is a number, v / (1-β₂) is none in fp32."""
    if backend == "native" and csrc is None:
        pytest.skip("the compiled extension did not load")
    param, moments = torch.ones(8), [torch.zeros(8), torch.zeros(8)]
    with backends.force(backend):
        ops.grouped_adamw_(
            [param], [torch.full((8,), 2e19)], moments[:1], moments[1:], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, step=1
        )
    torch.testing.assert_close(param, torch.full((8,), 0.9))
