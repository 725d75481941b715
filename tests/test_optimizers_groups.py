"""Parameter groups of every optimizer: names, pairs and lone factors, groups that are added, parameters that are replaced."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from _models import loss_of, make_model, pair_delta, trainable
from _optimizers import every_optimizer, run
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels import pairs


def test_lone_factors_are_told_of_without_names_too() -> None:
    model = lk.adapt(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), rank=2)
    given = [p for name, p in model.named_parameters() if p.requires_grad and name != "1.lora_B"]
    for options, which in (({}, r"param_groups\[0\]\[2\] is the A of a layer"), ({"model": model}, "of 1 only A is given")):
        with pytest.warns(UserWarning, match=rf"1 adapter .* get AdamW: param_groups\[0\]\[2\].*{which}.*left out; pass both") as caught:
            optimizer = lk.AltLoRAPlus(given, lr=1e-3, **options)
        assert len(caught) == len(optimizer._pairs) == 1
        with pytest.warns(UserWarning, match="train at half|left out") as caught:  # a later group's notice is of that group
            optimizer = lk.AltLoRAPlus(trainable(model[0]), lr=1e-3)
            optimizer.add_param_group({"params": [model[1].lora_B]})
        assert len(caught) == 1 and "param_groups[1][0]" in str(caught[0].message)


def test_an_adapter_that_is_added_later_is_found_in_the_model() -> None:
    """By bare parameters, too: with its names and its s, as if it had been there."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(nn.Sequential(nn.Linear(6, 6)), LoraConfig(r=2, target_modules=["0"]))
    optimizer = lk.AltLoRA(model, lr=1e-2)
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=32, target_modules=["0"]))
    model.set_adapter("second")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group({"params": [p for name, p in model.named_parameters() if ".second." in name]})
    assert [(pair.name.rpartition(".")[2], pair.scale) for pair in optimizer._pairs] == [("default", 4.0), ("second", 16.0)]


@every_optimizer
def test_closure_scheduler_and_named_groups(build) -> None:
    model = make_model("ours")
    optimizer = build([{"params": [(n, p)], "lr": 1e-2} for n, p in model.named_parameters() if p.requires_grad])
    assert len(optimizer.param_groups) == 6, "the user's groups stay the user's groups"
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
    twin = make_model("ours")
    plain = build(twin)
    twin_scheduler = torch.optim.lr_scheduler.LinearLR(plain, total_iters=10)
    for step in range(20):

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0
        scheduler.step()
        run(twin, plain, step, step + 1)
        twin_scheduler.step()
    for p, q in zip(pairs(model), pairs(twin), strict=True):
        torch.testing.assert_close(pair_delta(p), pair_delta(q), rtol=1e-12, atol=0)


@every_optimizer
def test_add_param_group(build) -> None:
    model, later = make_model("ours"), make_model("ours", seed=3)
    optimizer = build(model)
    run(model, optimizer, 0, 5)
    optimizer.zero_grad()
    optimizer.add_param_group({"params": [(n, p) for n, p in later.named_parameters() if p.requires_grad], "lr": 1e-2})
    run(later, optimizer, 0, 15)
    alone = make_model("ours", seed=3)
    run(alone, build(alone), 0, 15)
    for p, q in zip(pairs(later), pairs(alone), strict=True):
        torch.testing.assert_close(pair_delta(p), pair_delta(q), rtol=1e-12, atol=0)


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("steps", [0, 3])
@every_optimizer
def test_a_partner_that_is_added_later(build, steps: int, side: str) -> None:
    """A lone factor becomes one of a pair, with a checkpoint that goes on alike; or, if AdamW has stepped it, the partner is refused."""
    model = make_model("ours")
    if method_of(build) != "SDSLoRA":
        model = lk.adapt(nn.Sequential(*(m.base_layer if isinstance(m, lk.LowRankLinear) else m for m in model)), rank=2)
    later = pairs(model)[1].A if side == "A" else pairs(model)[1].B
    first = [p for p in trainable(model) if p is not later]
    if method_of(build) == "SDSLoRA":
        with pytest.raises(ValueError, match=f"is the {'B' if side == 'A' else 'A'} of a layer, its partner was left out"):
            build(first)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = build(first)
    run(model, optimizer, 0, steps)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    if steps and method_of(build) != "AdamW":
        with pytest.raises(ValueError, match="were added at different steps; add both in one add_param_group, or make a new optimizer"):
            optimizer.add_param_group({"params": [later]})
        now = model.state_dict(), optimizer.state_dict()
        assert all(torch.equal(now[0][key], value) for key, value in before[0].items())
        assert now[1]["param_groups"] == before[1]["param_groups"] and now[1]["state"].keys() == before[1]["state"].keys()
        run(model, optimizer, steps, steps + 3)
        return
    optimizer.add_param_group({"params": [later]})
    assert len(optimizer._pairs) == 3
    run(model, optimizer, steps, steps + 3)
    twin, state = copy.deepcopy(model), optimizer.state_dict()
    of_twin = {id(p): q for p, q in zip(model.parameters(), twin.parameters(), strict=True)}
    resumed = build([{"params": [of_twin[id(p)] for p in group["params"]]} for group in optimizer.param_groups])
    resumed.load_state_dict(state)
    for m, o in ((model, optimizer), (twin, resumed)):
        run(m, o, steps + 3, steps + 8)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(p.isfinite().all() for p in trainable(model))


def method_of(build) -> str:
    return type(build(lk.adapt(nn.Sequential(nn.Linear(4, 4)), "sds", rank=1))).__name__


def test_parameters_without_names_are_taken_beside_a_model() -> None:
    model, head = make_model("ours"), nn.Linear(9, 2).double()
    optimizer = lk.AdamW(model, lr=1e-2)
    optimizer.add_param_group({"params": head.weight, "lr": 0.1})
    optimizer.add_param_group({"params": (p for p in [head.bias])})
    assert [group["param_names"] for group in optimizer.param_groups[1:]] == [["param_groups[1][0]"], ["param_groups[2][0]"]]
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [head.bias]})
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        optimizer.add_param_group({"params": [1.0]})
    before = head.weight.detach().clone()
    nn.Sequential(model, head)(torch.ones(1, 12).double()).sum().backward()
    optimizer.step()
    assert not torch.equal(head.weight, before)
    resumed = lk.AdamW([{"params": trainable(model)}, {"params": [head.weight]}, {"params": [head.bias]}])
    resumed.load_state_dict(optimizer.state_dict())


@every_optimizer
def test_why_there_is_no_pair(build) -> None:
    ratio = {"lr_ratio": 16.0} if "AdamW" in type(build(make_model("ours"))).__name__ else {}
    cores = lk.adapt(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), rank=2, method="xs")
    for p in pairs(cores):
        nn.init.normal_(p.A), nn.init.normal_(p.B)
    with pytest.raises(ValueError, match="no pair .* the model has 2 cores .*method='xs'.* LoRASB"):
        build(cores, **ratio)
    for library in ("ours", "peft"):
        model = make_model(library)
        for pair in pairs(model):
            pair.A.requires_grad_(False)
        if type(build(make_model("ours"))).reads_frozen_partners:
            build(model, **ratio)
        else:
            hint = "Train both, or freeze both, or" if type(build(make_model("ours"))).moves_both_factors else "Pass both, .*, or"
            with pytest.raises(ValueError, match=rf"no pair .* of .*0.* and 2 more only B is among them, its partner is frozen.* {hint}"):
                build(model, **ratio)
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        with pytest.raises(ValueError, match="no pair .* only B is among|no pair .*lora_B.* have no partner"):
            build(trained, **ratio)
        for pair in pairs(model):
            pair.B.requires_grad_(False)
        with pytest.raises(ValueError, match="no pair .* the model's 3 pairs are frozen"):
            build(nn.ModuleList([model, nn.Linear(2, 2)]), **ratio)
    with pytest.raises(ValueError, match=r"no pair .*Pass the adapted model itself.* model=model beside it"):
        build(make_model("peft").parameters(), **ratio)
    import peft

    for config in (peft.LoHaConfig, peft.VeraConfig, peft.IA3Config):
        options = {"feedforward_modules": ["0"]} if config is peft.IA3Config else {}
        model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config(target_modules=["0"], **options))
        with pytest.raises(ValueError, match="no pair .*(hada|vera|ia3)_.* of a method other than LoRA .* this package's AdamW"):
            build(model, **ratio)
    if not ratio:  # as PEFT's create_loraplus_optimizer calls it
        model = make_model("peft")
        groups = [{"params": [getattr(pair, side) for pair in pairs(model)]} for side in "AB"]
        with pytest.raises(ValueError, match="no pair .*in place of PEFT's create_loraplus_optimizer .* lr_ratio="):
            build([groups[0], {"params": []}, groups[1], {"params": []}])


def test_a_parameter_in_the_place_of_another_starts_anew() -> None:
    """As torch's AdamW has it; and one that comes back finds its moments."""
    here, there = ([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))] for _ in range(2))
    optimizers = lk.AdamW(here, lr=0.1, weight_decay=0.01), torch.optim.AdamW(there, lr=0.1)
    others = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    firsts = here[1], there[1]
    for step in range(6):
        for optimizer, other, first in zip(optimizers, others, firsts, strict=True):
            params = optimizer.param_groups[0]["params"]
            params[1] = other if 2 <= step < 4 else first
            for p in params:
                p.grad = torch.full_like(p, 1.0 + step)
            optimizer.step()
        if step == 3:
            assert len(optimizers[0].state_dict()["state"]) == 2 and len(optimizers[0].state) == 3
    # What the other one was not there for, it missed; torch counts each parameter's own steps.
    torch.testing.assert_close(here[0], there[0])
    torch.testing.assert_close(others[0], others[1])


@every_optimizer
def test_a_factor_in_the_place_of_another_is_refused_by_its_name(build) -> None:
    model = make_model("ours")
    optimizer = build(model)
    run(model, optimizer, 0, 3)
    optimizer.zero_grad()
    loss_of(model, 3).backward()
    params = optimizer.param_groups[0]["params"]
    before = [p.detach().clone() for p in params]
    old, params[1] = params[1], nn.Parameter(params[1].detach().clone())
    params[1].grad = old.grad
    if isinstance(optimizer, lk.AdamW):  # which knows no factors, and starts anew with what is new
        optimizer.step()
        assert optimizer.state[params[1]]["exp_avg"].any()
        return
    with pytest.raises(RuntimeError, match=r"0\.lora_B was replaced"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    params[1] = old
    optimizer.step()


@every_optimizer
@pytest.mark.parametrize("steps", [0, 2])
def test_layers_that_a_state_dict_decouples_are_refused_at_the_next_step(build, steps: int) -> None:
    decoupled, model = make_model("ours"), make_model("ours")
    run(decoupled, lk.SDSLoRA(decoupled, lr=1e-2, refresh_every=1, warmup_steps=1), 0, 2)
    optimizer = build(model)
    run(model, optimizer, 0, steps)
    model.load_state_dict(decoupled.state_dict())
    for p in model.parameters():
        p.grad = None
    loss_of(model, steps).backward()
    if isinstance(optimizer, lk.AdamW):  # which trains whatever A and B mean
        optimizer.step()
        return
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises((RuntimeError, ValueError), match=r"0 is decoupled, .* this method trains plain LoRA|should be plain LoRA"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), decoupled.state_dict().values(), strict=True))
    torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0)


@pytest.mark.parametrize("groups", [[{}], [{"lr": 1.0}]])
def test_a_group_without_parameters_says_so(groups) -> None:
    with pytest.raises(ValueError, match="AdamW: a parameter group must have 'params'"):
        lk.AdamW(groups)
    with pytest.raises(ValueError, match="AdamW: a parameter group must have 'params'"):
        lk.AdamW(make_model("ours")).add_param_group(groups[0])
