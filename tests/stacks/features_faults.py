"""What goes wrong in long runs: killed processes, damaged files, gradients that are not finite, memory that runs out."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import signal
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from _matrix import Cell, assert_same, assert_same_state, data, feature, loss_of, ours, state_copy, train, values
from _ranks import CONTEXT

import lowrank_kernels as lk
from lowrank_kernels.backends import registry

STEPS = 8


def trained(cell: Cell, steps: int = 5, **options):
    """A model and its optimizer in the middle of a run, gradients at hand."""
    model = ours(cell)
    optimizer = cell.optimizer(model, **options)
    train(model, optimizer, 0, steps)
    optimizer.zero_grad()
    loss_of(model, steps).backward()
    return model, optimizer


def spoil(model: torch.nn.Module, value: float) -> str:
    """Put a value that is not finite into one gradient; returns the parameter's name."""
    name, parameter = next((n, p) for n, p in model.named_parameters() if "middle" in n and p.grad is not None)
    parameter.grad.view(-1)[3] = value
    return name


@feature("faults: infinite or NaN gradients: kept (as torch; OPLoRA raises), skipped or raised by nonfinite_grads=, state untouched")
def nonfinite_gradients(cell: Cell) -> None:
    with pytest.raises(ValueError, match="nonfinite_grads must be one of 'keep', 'skip', 'raise'"):
        cell.optimizer(ours(cell), nonfinite_grads="ignore")
    for value in (float("nan"), float("inf"), -float("inf")):
        model, optimizer = trained(cell, nonfinite_grads="raise")
        name, before, state = spoil(model, value), values(model), state_copy(optimizer)
        with pytest.raises(FloatingPointError, match=f"gradient of .*{name}.* is infinite or NaN; nothing was changed"):
            optimizer.step()
        assert_same(before, model)
        assert_same_state(state, state_copy(optimizer))
    whole, plain = trained(cell)
    train(whole, plain, 5, STEPS)
    model, optimizer = trained(cell, nonfinite_grads="skip")
    spoil(model, float("nan"))
    before = values(model)
    with pytest.warns(UserWarning, match="such steps are skipped"):
        optimizer.step()
    optimizer.step()
    assert optimizer.skipped_steps == 2
    assert_same(before, model)
    train(model, optimizer, 5, STEPS)
    assert_same(model, whole)
    model, optimizer = trained(cell)
    if cell.name == "OPLoRA":  # by the gradient of B it measures what was done to the captured one
        model.get_parameter("middle.lora_B").grad[0, 0] = float("nan")
        before, state = values(model), state_copy(optimizer)
        with pytest.raises(RuntimeError, match="the gradient of middle is not finite; nothing was changed"):
            optimizer.step()
        assert_same(before, model)
        assert_same_state(state, state_copy(optimizer))
        return
    spoil(model, float("nan"))
    optimizer.step()
    assert any(not p.isfinite().all() for p in model.parameters()), "by default a step computes with what it is given"


class OutOfMemory(Exception):
    """Stands for torch.OutOfMemoryError."""


def fail_at(call: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the ``call``-th operation of the package raise after it has been chosen; returns the list of those that ran."""
    ran: list[str] = []
    select = registry.select

    def failing(operation, device_type, args):
        selection = select(operation, device_type, args)
        ran.append(operation)
        if len(ran) != call:
            return selection

        def out_of_memory(*args):
            raise OutOfMemory("simulated")

        broken = registry.Implementation(operation, selection.implementation.backend, out_of_memory, selection.implementation.verify)
        return registry.Selection(broken, selection.reasons)

    monkeypatch.setattr(registry, "select", failing)
    return ran


def counters_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return copy.deepcopy([{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups])


@feature("faults: out of memory in step(): undone with atomic=True; else untouched, or refused until a checkpoint is loaded")
def out_of_memory(cell: Cell) -> None:
    with pytest.MonkeyPatch.context() as patch:
        model, optimizer = trained(cell, steps=2)
        count = len(ran) if (ran := fail_at(-1, patch)) is not None and optimizer.step() is None else 0
    assert count >= 1
    for call in range(1, count + 1):
        for atomic in (False, True):
            # Step 3 of SDSLoRA and steps 2 and 4 of ODLoRA change the parametrization: the failure falls into it, too.
            model, optimizer = trained(cell, steps=2, atomic=atomic)
            before, state, counters = values(model), state_copy(optimizer), counters_of(optimizer)
            checkpoint = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            with pytest.MonkeyPatch.context() as patch:
                fail_at(call, patch)
                with pytest.raises(OutOfMemory):
                    optimizer.step()
            assert counters_of(optimizer) == counters
            torn = optimizer._torn is not None
            if torn:
                assert not atomic
                for what in (optimizer.step, optimizer.state_dict):
                    with pytest.raises(RuntimeError, match="failed half-way .*simulated.*Load a checkpoint"):
                        what()
                model.load_state_dict(checkpoint[0])
                optimizer.load_state_dict(checkpoint[1])
                optimizer.zero_grad()
                loss_of(model, 2).backward()
            assert_same(before, model)
            assert_same_state(state, state_copy(optimizer))
            whole, plain = trained(cell, steps=2)
            optimizer.step()
            plain.step()
            train(model, optimizer, 3, STEPS)
            train(whole, plain, 3, STEPS)
            assert_same(model, whole)


@feature("faults: corrupt, truncated and foreign checkpoints, another method's or rank's: refused, nothing changed")
def bad_checkpoints(cell: Cell) -> None:
    model, optimizer = trained(cell)
    path = cell.folder / "adapter.safetensors"
    lk.save_adapter(model, path)
    content, before, state = path.read_bytes(), values(model), state_copy(optimizer)
    header = int.from_bytes(content[:8], "little")
    bad = {
        "truncated": content[:-100],
        "header only": content[: 8 + header],
        "empty": b"",
        "garbage": b"\x80\x04" + content[2:],
        "pickle": pickle.dumps({"a": torch.ones(2)}),
        "header overwritten": content[:8] + b"\xff" * header + content[8 + header :],
    }
    for what, damaged in bad.items():
        path.write_bytes(damaged)
        with pytest.raises((ValueError, OSError), match="damaged|not a safetensors|not written by|cannot be used"):
            lk.load_adapter(model, path)
        assert_same(before, model), what
    path.write_bytes(content)
    other = ours(cell, rank=2)
    with pytest.raises(ValueError, match="rank"):
        lk.load_adapter(other, path)
    if any("exp_avg" in s for s in optimizer.state.values()):
        its = cell.optimizer(other)
        train(other, its, 0, 2)
        with pytest.raises(ValueError, match="rank|shape"):
            optimizer.load_state_dict(its.state_dict())
    foreign = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="saved by another optimizer"):
        optimizer.load_state_dict(foreign.state_dict())
    saved = state_copy(optimizer)
    for group in saved["param_groups"]:
        group["method"] = "Another"
    with pytest.raises(ValueError, match="was saved by Another"):
        optimizer.load_state_dict(saved)
    for broken in ({}, {"state": {}, "param_groups": []}):
        with pytest.raises((ValueError, KeyError)):
            optimizer.load_state_dict(broken)
    assert_same(before, model)
    assert_same_state(state, state_copy(optimizer))
    torch.save(optimizer.state_dict(), cell.folder / "optimizer.pt")
    whole = (cell.folder / "optimizer.pt").read_bytes()
    (cell.folder / "optimizer.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises((RuntimeError, EOFError, pickle.UnpicklingError, OSError)):
        torch.load(cell.folder / "optimizer.pt", weights_only=True)


class Payload:
    """A pickle that would run code."""

    def __reduce__(self):
        return (os.mkdir, (os.environ["LRK_PAYLOAD"],))


@feature("faults: loading never executes pickled code")
def no_code(cell: Cell) -> None:
    target = cell.folder / "executed"
    os.environ["LRK_PAYLOAD"] = str(target)
    try:
        torch.save({"x": Payload()}, cell.folder / "evil.pt")
        (cell.folder / "evil.pkl").write_bytes(pickle.dumps(Payload()))
        model, optimizer = trained(cell)
        for file in ("evil.pt", "evil.pkl"):
            with pytest.raises(ValueError, match="damaged or not a safetensors"):
                lk.load_adapter(model, cell.folder / file)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(cell.folder / "evil.pt", weights_only=True)
        torch.save(optimizer.state_dict(), cell.folder / "state.pt")
        torch.load(cell.folder / "state.pt", weights_only=True)
        assert not target.exists()
    finally:
        del os.environ["LRK_PAYLOAD"]


#: What a process announces before it begins it: a step, saving the adapter, saving the whole state.
PHASES = (b"t", b"a", b"s")


def run_and_save(cell: Cell, folder: Path, announce: int) -> None:
    """Resume and go on, saving after every step, until killed."""
    model = ours(cell)
    optimizer, step = cell.optimizer(model), 0
    if (folder / "state.pt").exists():
        step = load_state(model, optimizer, folder)
    while True:
        os.write(announce, b"t")
        train(model, optimizer, step, step + 1)
        step += 1
        os.write(announce, b"a")
        lk.save_adapter(model, folder / "adapter.safetensors")
        os.write(announce, b"s")
        state = {"optimizer": optimizer.state_dict(), "step": step, "adapter": lk.adapter_state_dict(model)}
        torch.save(state, folder / "new.pt")
        os.replace(folder / "new.pt", folder / "state.pt")


def load_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Put what was saved last into both; returns its step."""
    saved = torch.load(folder / "state.pt", weights_only=True)
    lk.load_adapter_state_dict(model, saved["adapter"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


def kill_often(name: str, folder: Path, seed: int) -> dict[bytes, int]:
    """Start, kill -9 at a random moment of a phase, resume, kill …, until each phase was hit twice; how often each was hit.

    Runs in a process of its own that computes nothing, so that it may fork: its children are up at once.
    """
    torch.set_num_threads(1)
    cell, random, hits = Cell(name, folder, None), Random(seed), dict.fromkeys(PHASES, 0)
    lasts = dict.fromkeys(PHASES, 1e-3)
    for _ in range(100):
        wanted = min(PHASES, key=lambda phase: hits[phase])
        if hits[wanted] >= 2:
            return hits
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                run_and_save(cell, folder, write)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        os.close(write)
        began, left, seen = time.perf_counter(), random.randint(3, 6), b""
        while left:
            now, phase = os.read(read, 1), seen
            if not now:
                raise AssertionError("the run ended by itself")
            if phase:
                lasts[phase] = time.perf_counter() - began
            began, seen = time.perf_counter(), now
            left -= now == wanted
        time.sleep(random.random() * lasts[wanted])
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while now := os.read(read, 1):
            seen = now
        os.close(read)
        hits[seen] += 1
    raise AssertionError(f"some phase was never hit: {hits}")


@functools.cache
def killers() -> ProcessPoolExecutor:
    """One process for all cells, which starts and kills."""
    return ProcessPoolExecutor(1, mp_context=CONTEXT)


@feature("faults: kill -9 at any moment of saving and stepping, then resume = uninterrupted; no half-written adapter")
def killed(cell: Cell) -> None:
    hits = killers().submit(kill_often, cell.name, cell.folder, len(cell.name)).result(timeout=600)
    assert min(hits.values()) >= 2
    model, whole = ours(cell), ours(cell)
    optimizer, plain = cell.optimizer(model), cell.optimizer(whole)
    step = load_state(model, optimizer, cell.folder)
    assert step >= 4
    # The adapter's own file is complete, and of the step that was saved or of the next.
    lk.load_adapter(alone := ours(cell), cell.folder / "adapter.safetensors")
    found = lk.adapter_state_dict(alone)
    train(whole, plain, 0, step)
    candidates = [copy.deepcopy(lk.adapter_state_dict(whole))]
    assert_same(model, whole)
    train(model, optimizer, step, step + 3)
    train(whole, plain, step, step + 1)
    candidates.append(copy.deepcopy(lk.adapter_state_dict(whole)))
    assert any(all(torch.equal(found[name], value) for name, value in other.items()) for other in candidates)
    train(whole, plain, step + 1, step + 3)
    assert_same(model, whole)


@feature("faults: no gradient at all, one of another dtype or sparse (not a factor's): AdamW's behaviour or an error, nothing changed")
def odd_gradients(cell: Cell) -> None:
    model, optimizer = trained(cell, 7)  # not at the end of ODLoRA's fixed bases: what the schedule does then needs no gradient
    optimizer.zero_grad()
    before = values(model)
    optimizer.step()
    assert_same(before, model)
    x, y = data(0)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    weight = model.get_parameter("head.weight") if "head.weight" in dict(model.named_parameters()) else None
    assert weight is not None and weight.grad is not None
    weight.grad = weight.grad.to_sparse()
    before, state = values(model), state_copy(optimizer)
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert state["param_groups"][0]["step"] == optimizer.param_groups[0]["step"]
    assert_same(before, model)
    assert optimizer._torn is None
