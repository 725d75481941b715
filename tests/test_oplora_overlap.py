"""OPLoRA's sweeps that begin in the backward pass."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing

import pytest
import torch
from _models import batch, loss_of
from _oplora import KFAC, Shared, deltas, every_kind, every_library, make, make_model
from torch import nn

from lowrank_kernels import LowRankLinear, OPLoRA, pairs
from lowrank_kernels.backends import call_counts, force
from lowrank_kernels.optim._shared import background


@every_library
@every_kind
@pytest.mark.parametrize("mode", ["lowrank", "projected", "naive"])
def test_overlap_with_the_backward_pass_changes_nothing(mode: str, kind: dict, library: str) -> None:
    plain, overlapped = Shared(library), Shared(library)
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


@pytest.mark.parametrize("key", ["lr", "momentum", "weight_decay", "maximize", "proximal", "metric_decay", "metric_damping", "factor"])
def test_what_changes_between_the_backward_pass_and_the_step_counts(key: str) -> None:
    plain, overlapped = Shared("ours"), Shared("ours")
    options = {"metric": "kfac"} if key.startswith("metric") else {}
    optimizers = make(plain, **options), make(overlapped, overlap=True, **options)
    for step in range(4):
        for model, optimizer in zip((plain, overlapped), optimizers, strict=True):
            optimizer.zero_grad()
            x, y = batch(step)
            (model(x) - y).square().mean().backward()
            for work in optimizer._early.values():
                work.wait()
            if step == 2 and key == "factor":
                with torch.no_grad():
                    pairs(model)[0].A.mul_(1 + 1e-9)  # within what a gradient that was captured may differ from .grad
            elif step == 2:
                optimizer.param_groups[0][key] = {"maximize": True, "weight_decay": 0.5, "metric_damping": 0.5}.get(key, 0.02)
            optimizer.step()
    for p, q in zip(plain.parameters(), overlapped.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


def test_a_forced_backend_holds_for_the_worker() -> None:
    model = make_model("ours")
    optimizer = make(model, overlap=True)
    before = call_counts()
    with force("reference"):
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
    ran = {call for call, count in call_counts().items() if count > before.get(call, 0)}
    assert ("grouped_lorsum", "reference") in ran
    assert {backend for _, backend in ran} == {"reference"}


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
    monkeypatch.setattr(background, "_streams", {})
    sides = set()
    for _ in range(3):
        changed, read = Recorded(), Recorded()
        work = background.start(lambda copies: None, ([changed],), [0.1], [read])
        sides.add(work.work)
        assert changed.streams == read.streams == [work.work]
        assert work.copies[0][0].streams == [current]
    assert len(sides) == 1 and current not in sides
