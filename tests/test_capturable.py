"""``capturable=True``: a step reads nothing on the host, and a captured step replays as an eager one."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _models import make_model
from _numerics import same_bits_or
from _optimizers import run
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lowrank_kernels as lk
import lowrank_kernels.optim.adamw as adamw
from lowrank_kernels.backends import reference
from lowrank_kernels.optim import altlora, lora_pro, lora_rite, scaled
from lowrank_kernels.optim._shared import base

METHODS: dict[str, Callable[..., base.LowRankOptimizer]] = {
    "AdamW": adamw.AdamW,
    "AltLoRA": lambda named, **options: altlora.AltLoRA(named, order="joint", **options),
    "AltLoRAPlus": lambda named, **options: altlora.AltLoRAPlus(named, order="joint", freeze_idle=True, **options),
    "ScaledAdamW": scaled.ScaledAdamW,
    "ScaledGD": lambda named, **options: scaled.ScaledGD(named, momentum=0.9, **options),
    "LoRAPro": lora_pro.LoRAPro,
    "LoRARITE": lora_rite.LoRARITE,
}
#: What reads a tensor on the host.
READS = ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "cpu")
#: What makes a tensor from data of the host: a copy to the device that cannot be captured.
MAKERS = ("tensor", "as_tensor", "from_numpy")


def named_parameters(device: torch.device | str, seed: int = 0) -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"head.weight": (7, 5)}
    for layer, (d_in, d_out) in enumerate(((20, 12), (9, 30), (20, 12))):
        shapes |= {f"l{layer}.lora_A.weight": (4, d_in), f"l{layer}.lora_B.weight": (d_out, 4)}
    return [(name, nn.Parameter(torch.randn(shape, generator=generator).to(device))) for name, shape in shapes.items()]


def set_grads(named: list[tuple[str, Tensor]], step: int) -> None:
    """The gradients of a step, in place where there are any."""
    generator = torch.Generator().manual_seed(1000 + step)
    for _, p in named:
        grad = torch.randn(p.shape, generator=generator).to(p.device)
        if p.grad is None:
            p.grad = grad
        else:
            p.grad.copy_(grad)


def make(method: str, named: list[tuple[str, Tensor]], lr: float | Tensor) -> base.LowRankOptimizer:
    return METHODS[method](named, lr=lr, capturable=True, scale=2.0, lr_ratio=3.0)


@contextlib.contextmanager
def host_reads() -> Iterator[Counter[str]]:
    """Counts what reads tensors on the host, or makes them from host data, outside of backends (on the CPU those may)."""
    found: Counter[str] = Counter()

    def watched(name: str, original: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            frame = sys._getframe(1)
            while frame is not None and "/lowrank_kernels/backends/" not in frame.f_code.co_filename:
                frame = frame.f_back
            found[name] += frame is None and options.get("device") != "cpu"  # that is made for `sent`, which does not wait
            return original(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in ((Tensor, READS), (torch, MAKERS)):
            for name in names:
                patch.setattr(owner, name, watched(name, getattr(owner, name)))
        yield found


@pytest.mark.parametrize("method", METHODS)
def test_a_step_reads_nothing_on_the_host(method: str) -> None:
    named = named_parameters("cpu")
    optimizer = make(method, named, torch.tensor(1e-2))
    # Pairs of different scale: their s⁻² must be made once and kept.
    if optimizer._pairs:
        optimizer._pairs[0] = dataclasses.replace(optimizer._pairs[0], scale=0.5)
    set_grads(named, 0)
    optimizer.step()
    set_grads(named, 1)
    before = [p.clone() for _, p in named]
    with host_reads() as found:
        optimizer.step()
    assert not +found
    assert all(not torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))
    assert isinstance(optimizer.param_groups[0]["step"], Tensor) and optimizer.param_groups[0]["step"].item() == 2


@pytest.mark.parametrize("how", ["edited", "loaded"])
def test_the_counter_is_where_a_capturable_step_counts(how: str) -> None:
    models = [make_model("ours") for _ in range(2)]
    plain, other = (lk.AdamW(model, lr=1e-2) for model in models)
    for first, capturable in enumerate((False, True, False)):
        if how == "edited":
            other.param_groups[0]["capturable"] = capturable
        else:
            saved = other.state_dict()
            saved["param_groups"][0]["capturable"] = capturable
            other.load_state_dict(saved)
        for model, optimizer in zip(models, (plain, other), strict=True):
            run(model, optimizer, 2 * first, 2 * first + 2)
        assert isinstance(other.param_groups[0]["step"], Tensor) == capturable
    for p, q in zip(*(model.parameters() for model in models), strict=True):  # one step's difference would be 1e-2
        assert same_bits_or(rtol=1e-10, atol=1e-12)(p, q)


def test_the_watch_can_fail() -> None:
    """Reading the step counter of a capturable group is what must not happen."""
    named = named_parameters("cpu")
    optimizer = make("AltLoRAPlus", named, torch.tensor(1e-2))
    set_grads(named, 0)
    optimizer.step()
    with host_reads() as found:
        int(optimizer.param_groups[0]["step"])
    assert found["__int__"] > 0


@pytest.mark.parametrize("method", [altlora.AltLoRA, altlora.AltLoRAPlus])
@pytest.mark.parametrize("order", ["A", "B"])
def test_alternating_orders_are_refused(method: Any, order: str) -> None:
    with pytest.raises(ValueError, match="order='joint'"):
        method(named_parameters("cpu"), order=order, capturable=True, scale=1.0)


def test_eigenvectors_that_cannot_be_captured_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the rank that Triton's kernel takes; outside of a capture they are torch's."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():
        x, values = torch.empty(2, 65, 65, device="cuda"), torch.empty(2, 65, device="cuda")
        with pytest.raises(RuntimeError, match="grouped_eigh: .* 65 rows, waits for the device and cannot be captured"):
            reference.eigh.grouped_eigh(x, values, x)


@pytest.mark.parametrize("method", METHODS)
def test_missed_steps_are_counted_on_the_device(method: str) -> None:
    """Factors that started late, side by side with others: bias correction by each one's own count."""
    steps = 4
    ours, theirs = named_parameters("cpu"), named_parameters("cpu")
    capturable, ordinary = make(method, ours, torch.tensor(1e-2)), METHODS[method](theirs, lr=1e-2, scale=2.0, lr_ratio=3.0)
    for step in range(steps):
        for named, optimizer in ((ours, capturable), (theirs, ordinary)):
            set_grads(named, step)
            for name, p in named:
                if step == 1 and name.startswith("l1"):
                    p.grad = None
            if step == steps - 1 and optimizer is capturable:
                with host_reads() as found:
                    optimizer.step()
                assert not +found
            else:
                optimizer.step()
    for (name, p), (_, q) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_capturable_steps_are_the_ordinary_ones(method: str) -> None:
    ours, theirs = named_parameters("cpu"), named_parameters("cpu")
    capturable, ordinary = make(method, ours, torch.tensor(1e-2)), METHODS[method](theirs, lr=1e-2, scale=2.0, lr_ratio=3.0)
    for step in range(4):
        for named, optimizer in ((ours, capturable), (theirs, ordinary)):
            set_grads(named, step)
            optimizer.step()
    for (name, p), (_, q) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("options", [{}, {"metric": "kfac"}, {"momentum_mode": "projected"}, {"gradient": "dense"}], ids=str)
def test_steps_beside_the_backward_pass_do_not_wait_for_the_device(options: dict[str, Any]) -> None:
    """A copy from the host waits for what was launched before it: for the backward pass that the step was to run beside."""
    torch.manual_seed(0)
    model = lk.adapt(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9)), rank=3)
    optimizer = lk.OPLoRA(model, lr=1e-2, overlap=True, **options)
    for step in range(2):
        loss = model(torch.randn(6, 12)).square().mean()
        with host_reads() as found:
            loss.backward()
            for work in optimizer._early.values():
                work.work.result()  # type: ignore[union-attr]
        assert bool(optimizer._early) == (step > 0) and not +found
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS)
def test_graph_replays_equal_eager_steps(method: str) -> None:
    captured, eager = named_parameters("cuda"), named_parameters("cuda")
    lrs = [torch.tensor(1e-2, device="cuda") for _ in range(2)]
    optimizers = [make(method, named, lr) for named, lr in zip((captured, eager), lrs, strict=True)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(2):
            set_grads(captured, step)
            optimizers[0].step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for step in range(2, 7):
        set_grads(captured, step)
        lrs[0].fill_(1e-2 / step)
        graph.replay()
    for step in range(7):
        set_grads(eager, step)
        lrs[1].fill_(1e-2 if step < 2 else 1e-2 / step)
        optimizers[1].step()
    for (name, p), (_, q) in zip(captured, eager, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)
    assert optimizers[0].param_groups[0]["step"].item() == 7
