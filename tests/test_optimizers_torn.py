"""Steps that fail: undone until the first write, and torn after it."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from _models import loss_of, make_model
from _optimizers import every_optimizer
from torch import nn

from lowrank_kernels import ops
from lowrank_kernels.backends import registry


def same(a: object, b: object) -> bool:
    """Equality to the bit of nested containers of tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


@every_optimizer
def test_only_what_the_step_writes_makes_it_torn(build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what runs beside it, nor operations that it calls on other tensors; and a write by torch does, which no backend sees."""
    model = make_model("ours", rank=2)
    optimizer = build(model, lr=1e-4)
    loss_of(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    x = torch.randn(6, 2)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def fails(step_writes: bool) -> None:
        bases = [torch.empty_like(x)]
        ops.grouped_qr([x], out=bases)
        if step_writes:
            optimizer._begin_writing()
        raise RuntimeError("simulated")

    for step_writes in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(optimizer, "_update", lambda step_writes=step_writes: fails(step_writes))
            with pytest.raises(RuntimeError, match="simulated"):
                optimizer.step()
        if step_writes:
            with pytest.raises(RuntimeError, match="failed half-way .*simulated.*Load a checkpoint"):
                optimizer.step()
        else:
            assert same((model.state_dict(), optimizer.state_dict()), before)
    optimizer.load_state_dict(before[1])


@every_optimizer
def test_a_failing_operation_is_undone_until_the_first_write(build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever call fails: an optimizer that goes on has changed nothing, and one whose first operation is refused goes on."""

    def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_model("ours", rank=2)
        optimizer = build(model, lr=1e-4)
        for step in range(2):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if step == 0:
                optimizer.step()
        return model, optimizer

    select = registry.select
    for call in itertools.count(1):
        ran: list[str] = []
        model, optimizer = trained()
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

        def refuses(operation, device_type, args, call=call, ran=ran):
            ran.append(operation)
            if len(ran) == call:
                raise registry.BackendError("simulated")
            return select(operation, device_type, args)

        with monkeypatch.context() as patch:
            patch.setattr(registry, "select", refuses)
            try:
                optimizer.step()
            except registry.BackendError:
                pass
            else:
                break
        if optimizer._torn is None:
            assert same((model.state_dict(), optimizer.state_dict()), before)
        else:
            assert call > 1
            state = torch.optim.Optimizer.state_dict(optimizer)["state"]
            assert not same((model.state_dict(), state), (before[0], before[1]["state"])), "torn, and nothing was written"
