"""Checkpoints that an optimizer refuses before anything changes: of other parameters, or damaged."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from _models import make_model, trainable
from _optimizers import OPTIMIZERS, every_optimizer, run

import lowrank_kernels as lk


def test_a_checkpoint_with_another_order_of_parameters_is_refused() -> None:
    named = [*make_model("ours").named_parameters()]
    optimizer = lk.AdamW(named)
    other = lk.AdamW([*named[2:], *named[:2]])
    with pytest.raises(ValueError, match=r"the same parameters in another order \(.* where .* stands here\)"):
        other.load_state_dict(optimizer.state_dict())


@every_optimizer
def test_checkpoints_that_do_not_fit_are_refused_before_anything_changes(build) -> None:
    model, other_rank, other_count = make_model("ours"), make_model("ours", rank=2), make_model("ours", shapes=[(20, 12), (9, 20)])
    optimizer = build(model)
    run(model, optimizer, 0, 3)
    before = copy.deepcopy(optimizer.state_dict())
    has_state = any(optimizer.state[p] for p in trainable(model))
    for bad_model in (other_rank, other_count) if has_state else (other_count,):
        bad = build(bad_model)
        run(bad_model, bad, 0, 2)
        with pytest.raises(ValueError, match="rank|parameters"):
            optimizer.load_state_dict(bad.state_dict())
    foreign = torch.optim.AdamW(trainable(model))
    with pytest.raises(ValueError, match="saved by another optimizer"):
        optimizer.load_state_dict(foreign.state_dict())
    after = optimizer.state_dict()
    for key, state in before["state"].items():
        assert all(torch.equal(value, after["state"][key][name]) for name, value in state.items())


DAMAGED = {
    "step nan": (lambda s: s["param_groups"][0].update(step=math.nan), r"param_groups\[0\] of the checkpoint has step nan"),
    "step negative": (lambda s: s["param_groups"][0].update(step=-5), r"step -5"),
    "step two numbers": (lambda s: s["param_groups"][0].update(step=torch.tensor([1.0, 2.0])), r"has step tensor"),
    "step too small": (lambda s: s["param_groups"][0].update(step=0, missed=[0] * 6), r"never updated, but its exp_avg|cleared_at"),
    "missed number": (lambda s: s["param_groups"][0].update(missed=1), r"missed 1, no list"),
    "missed short": (lambda s: s["param_groups"][0].update(missed=[1]), r"missed of 1 parameters, and 6 parameters"),
    "missed negative": (lambda s: s["param_groups"][0]["missed"].__setitem__(1, -1), r"missed\[1\] -1"),
    "missed a tensor": (lambda s: s["param_groups"][0]["missed"].__setitem__(1, torch.tensor([0, 1])), r"missed\[1\] tensor"),
    "missed huge": (lambda s: s["param_groups"][0].update(missed=[10**6, *[0] * 5]), r"missed\[0\] 1000000"),
    "missed text": (lambda s: s["param_groups"][0].update(missed=["a", *[0] * 5]), r"missed\[0\] 'a'"),
    "missed a dictionary": (lambda s: s["param_groups"][0].update(missed={0: 1}), r"missed \{0: 1\}, no list"),
    "cleared later": (lambda s: s["param_groups"][0].update(cleared_at=10**6), r"cleared_at 1000000 after only 4 steps"),
    "cleared text": (lambda s: s["param_groups"][0].update(cleared_at="z"), r"cleared_at 'z'"),
    "integers": (lambda s: edit_moments(s, torch.Tensor.long), r"exp_avg of .*lora_. is torch.int64"),
    "complex": (lambda s: edit_moments(s, lambda x: x.to(torch.complex128)), r"is torch.complex128"),
    "sparse": (lambda s: edit_moments(s, torch.Tensor.to_sparse), r"torch.sparse_coo"),
    "no state": (lambda s: s.update(state=[]), r"'state' of the checkpoint must be a dictionary, got list"),
    "no group": (lambda s: s.update(param_groups=[None]), r"param_groups\[0\] of the checkpoint must be a dictionary"),
}


def edit_moments(state_dict, edit) -> None:
    for state in state_dict["state"].values():
        state["exp_avg"] = edit(state["exp_avg"])


@pytest.mark.parametrize("name", ["AdamW", "AltLoRAPlus", "LoRARITE", "SDSLoRA"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_checkpoints_are_refused_by_what_is_damaged(name: str, damage: str) -> None:
    model = make_model("ours")
    optimizer = OPTIMIZERS[name](model)
    run(model, optimizer, 0, 4)
    before = copy.deepcopy(optimizer.state_dict())
    damaged = copy.deepcopy(before)
    DAMAGED[damage][0](damaged)
    with pytest.raises(ValueError, match=DAMAGED[damage][1]):
        optimizer.load_state_dict(damaged)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(x, after["state"][key][k]) for key, state in before["state"].items() for k, x in state.items())
    edit_moments(before, lambda x: x.mT.contiguous().mT)  # a good one, if it lies otherwise
    optimizer.load_state_dict(before)
    run(model, optimizer, 4, 6)


@pytest.mark.parametrize(
    ("late", "message"),
    [
        (3, "late 3, no list"),
        ([6], "late with 6, no bool"),
        ([True, 0], "late with 0, no bool"),
        ([True] * 5, "late of 5 parameters, and 6 parameters"),
    ],
)
def test_a_damaged_note_of_who_is_late_is_refused(late: object, message: str) -> None:
    optimizer = lk.AltLoRA(make_model("ours"))
    state = optimizer.state_dict()
    state["param_groups"][0]["late"] = late
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("method", [lk.AltLoRA, lk.ScaledGD])
def test_second_moments_of_a_method_that_has_none_are_refused(method) -> None:
    model = make_model("ours")
    optimizer = method(model)
    run(model, optimizer, 0, 2)
    state = optimizer.state_dict()
    for index, p in enumerate(trainable(model)):
        state["state"][index] = {**state["state"][index], "exp_avg_sq": torch.zeros_like(p)}
    with pytest.raises(ValueError, match="has exp_avg_sq in the checkpoint, and no second moments here"):
        optimizer.load_state_dict(state)


def test_oplora_wants_the_state_of_both_factors() -> None:
    model = make_model("ours")
    optimizer = lk.OPLoRA(model)
    run(model, optimizer, 0, 2)
    state = optimizer.state_dict()
    del state["state"][1]
    with pytest.raises(ValueError, match=r"the state of A of 0 only"):
        optimizer.load_state_dict(state)
