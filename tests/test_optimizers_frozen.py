"""Parameters that are frozen or thawed under an optimizer: whole layers, one factor of a pair, what has a gradient left over."""

from __future__ import annotations

import pytest
import torch
from _models import loss_of, make_model, pair_delta
from _optimizers import every_optimizer, run
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels import pairs


@every_optimizer
def test_a_parameter_that_is_unfrozen_late_starts_anew(build) -> None:
    """Its bias corrections count its own updates; the others go on as if nothing had happened."""
    model = make_model("ours")
    head = nn.Linear(9, 9).double()
    optimizer = build([*model.named_parameters(), ("head.weight", head.weight)])
    head.requires_grad_(False)
    for step in range(9):
        run(model, optimizer, step, step + 1)
    head.requires_grad_(True)
    optimizer.zero_grad()
    before, lr = head.weight.detach().clone(), optimizer.param_groups[0]["lr"]
    head.weight.grad = torch.randn_like(head.weight).sign()
    optimizer.step()
    expected = before * (1 - lr * optimizer.param_groups[0]["weight_decay"]) - lr * head.weight.grad.sign()
    torch.testing.assert_close(head.weight.detach(), expected, rtol=0, atol=1e-6 * lr)


@every_optimizer
@pytest.mark.parametrize("side", ["A", "B"])
def test_the_partner_of_a_frozen_factor_goes_on(build, side: str) -> None:
    """Frozen before the first step and thawed later, as if its gradient had been None; LoRA-FA freezes every A."""
    model, twin = make_model("ours"), make_model("ours")
    optimizer, other = build(model.named_parameters(), scale=0.7), build(twin.named_parameters(), scale=0.7)
    if isinstance(optimizer, lk.OPLoRA) or optimizer.defaults.get("freeze_idle"):
        pytest.skip("moves both factors or none, or freezes and thaws them itself")
    halves = [getattr(pair, side).requires_grad_(False) for pair in pairs(model)]
    if isinstance(optimizer, lk.SDSLoRA):  # which would overwrite both when it makes bases
        run(model, optimizer, 0, 9)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match=f"only {'BA'['AB'.index(side)]} is trained and {side} is frozen.*Nothing was changed"):
            run(model, optimizer, 9, 10)
        assert all(map(torch.equal, model.parameters(), before)) and optimizer.param_groups[0]["step"] == 9
        return
    before = [p.detach().clone() for p in halves]
    for step in range(12):
        run(model, optimizer, step, step + 1)
        other.zero_grad()
        loss_of(twin, step).backward()
        for pair in pairs(twin):
            getattr(pair, side).grad = None
        other.step()
    assert all(torch.equal(p, q) for p, q in zip(halves, before, strict=True))
    for p in halves:
        p.requires_grad_(True)
    run(model, optimizer, 12, 15)
    run(twin, other, 12, 15)
    for p, q in zip(pairs(model), pairs(twin), strict=True):
        assert pair_delta(p).any() == (side != "B" or bool(pair_delta(q).any()))
        torch.testing.assert_close(pair_delta(p), pair_delta(q), rtol=1e-10, atol=1e-13)


@every_optimizer
def test_a_layer_that_was_frozen_before_the_first_step_is_trained_once_it_is_thawed(build) -> None:
    model = make_model("ours")
    optimizer = build(model)
    frozen = [pairs(model)[1].A.requires_grad_(False), pairs(model)[1].B.requires_grad_(False)]
    run(model, optimizer, 0, 14)
    assert not any(optimizer.state[p] for p in frozen) or optimizer.defaults.get("freeze_idle")  # reading leaves empty states behind
    start = [p.requires_grad_(True).detach().clone() for p in frozen]
    run(model, optimizer, 14, 18)
    assert not any(torch.equal(p, before) for p, before in zip(frozen, start, strict=True))


@every_optimizer
@pytest.mark.parametrize("which", ["a layer", "A", "the rest"])
def test_what_is_frozen_with_a_gradient_left_over_takes_its_step_as_in_torch(build, which: str) -> None:
    """PEFT's ``set_adapter`` freezes an adapter without a look at ``.grad``, and torch's AdamW steps whatever has one."""
    chosen = {"a layer": "2.lora", "A": "2.lora_A", "the rest": "bias"}[which]
    trained, frozen = make_model("ours"), make_model("ours")
    for model in (trained, frozen):
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad or name.endswith("bias"))
    optimizers = build(trained), build(frozen)
    for model in (trained, frozen):
        loss_of(model, 0).backward()
    for name, p in frozen.named_parameters():
        p.requires_grad_(p.requires_grad and not name.startswith(chosen) and not name.endswith(chosen))
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(trained.parameters(), frozen.parameters(), strict=True))
    states = [{key: sorted(state) for key, state in optimizer.state_dict()["state"].items()} for optimizer in optimizers]
    assert states[0] == states[1]
