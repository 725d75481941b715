"""What every optimizer of the package promises: AdamW's arithmetic and arguments, state rules, resume, constant launches."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import math
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from _models import batch, loss_of, make_model, pair_delta, trainable
from _ranks import Ranks
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lk
from lowrank_kernels import backends, ops, pairs
from lowrank_kernels.backends import registry
from lowrank_kernels.optim._shared.arguments import AdamWOptions
from lowrank_kernels.optim._shared.shards import local_parts

OPTIMIZERS = {
    "AdamW": lambda params, **k: lk.AdamW(params, **{"lr": 1e-2, **k}),
    "SDSLoRA": lambda params, **k: lk.SDSLoRA(params, **{"lr": 1e-2, "total_steps": 40, **k}),
    "AltLoRA": lambda params, **k: lk.AltLoRA(params, **{"lr": 1e-2, "damping": 1e-3, **k}),
    "AltLoRA-joint": lambda params, **k: lk.AltLoRA(params, **{"lr": 1e-2, "damping": 1e-3, "order": "joint", **k}),
    "AltLoRAPlus": lambda params, **k: lk.AltLoRAPlus(params, **{"lr": 1e-2, "damping": 1e-3, **k}),
    "AltLoRAPlus-A-freeze": lambda params, **k: lk.AltLoRAPlus(params, **{"lr": 1e-2, "order": "A", "freeze_idle": True, **k}),
    "ScaledGD": lambda params, **k: lk.ScaledGD(params, **{"lr": 1e-2, "damping": 1e-3, **k}),
    "ScaledGD-momentum": lambda params, **k: lk.ScaledGD(params, **{"lr": 1e-2, "damping": 1e-3, "momentum": 0.5, **k}),
    "ScaledAdamW": lambda params, **k: lk.ScaledAdamW(params, **{"lr": 1e-2, **k}),
    "LoRAPro": lambda params, **k: lk.LoRAPro(params, **{"lr": 1e-2, **k}),
    "LoRARITE": lambda params, **k: lk.LoRARITE(params, **{"lr": 1e-2, **k}),
    "OPLoRA": lambda params, **k: lk.OPLoRA(params, **{"lr": 1e-2, **k}),
    "OPLoRA-dense-projected": lambda params, **k: lk.OPLoRA(params, **{"lr": 1e-2, "gradient": "dense", "momentum_mode": "projected", **k}),
    "OPLoRA-sketch": lambda params, **k: lk.OPLoRA(params, **{"lr": 1e-2, "gradient": "sketch", "sketch_width": 4, **k}),
}
every_optimizer = pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def run(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, dtype: torch.dtype = torch.float64) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, step, dtype).backward()
        optimizer.step()


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


def test_default_weight_decay_spares_factors_only() -> None:
    model = make_model("ours")
    head = nn.Linear(9, 2)
    optimizer = lk.AdamW([*model.named_parameters(), *((f"head.{n}", p) for n, p in head.named_parameters())])
    assert optimizer.param_groups[0]["weight_decay"] == 1e-2 and optimizer.param_groups[0]["factor_weight_decay"] == 0.0
    before = {n: p.detach().clone() for n, p in [*model.named_parameters(), *head.named_parameters()]}
    for p in [*trainable(model), *head.parameters()]:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in head.named_parameters():
        torch.testing.assert_close(p, before[name] * (1 - 1e-3 * 1e-2))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize("named", [False, True])
def test_lone_factors_are_decayed_as_factors(named: bool) -> None:
    """LoRA-FA under AdamW; a core among pairs."""
    model = make_model("ours")
    model[0].lora_A.requires_grad_(False)
    cores = lk.adapt(nn.Sequential(nn.Linear(6, 6)), rank=2, method="xs").double()
    params = nn.ModuleDict({"pairs": model, "cores": cores, "head": nn.Linear(9, 2)}).double()
    given = params if named else trainable(params)
    for decay, of_adapters, of_rest in ((None, 0.0, 0.01), (0.5, 0.5, 0.5)):
        with torch.no_grad():
            pairs(cores)[0].A.fill_(1.0), pairs(cores)[0].B.fill_(1.0)
            for p in trainable(params):
                p.fill_(1.0).grad = torch.zeros_like(p)
        lk.AdamW(given, lr=0.1, weight_decay=decay).step()
        for name, p in params.named_parameters():
            if p.requires_grad:
                expected = 1 - 0.1 * (of_adapters if "lora_" in name else of_rest)
                torch.testing.assert_close(p, torch.full_like(p, expected), rtol=1e-12, atol=0)
        if named:
            with pytest.warns(UserWarning, match="lone factors"):
                optimizer = lk.ScaledAdamW(params, lr=0.1, weight_decay=decay)
            assert len(optimizer._lone_factors[0]) == 1, "the core: of the first layer lora_B has a partner, if a frozen one"


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


@every_optimizer
def test_edited_groups_are_checked_before_anything_changes(build) -> None:
    model = make_model("ours")
    optimizer = build(model, weight_decay=0.1)
    run(model, optimizer, 0, 2)
    group = optimizer.param_groups[0]
    wrong = {
        "lr": ["a", None, math.nan, -1.0, torch.ones(2)],
        "weight_decay": [None, "x", -1.0, math.inf],
        "factor_weight_decay": ["x", -1.0],
        "betas": [(0.9,), (2.0, 3.0)],
        "eps": ["1e-8", -1.0],
        "maximize": ["no"],
        "lr_ratio": [0.0, math.inf],
        "damping": [-1.0, math.inf, "x"],
        "momentum": [1.0],
        "order": ["Q"],
        "sweeps": [0],
        "proximal": [-1.0, math.inf],
    }
    saved = optimizer.state_dict()
    before = copy.deepcopy((model.state_dict(), saved["state"]))
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    for key, values in wrong.items():
        for value in values if key in group else ():
            kept, group[key] = group[key], value
            with pytest.raises((TypeError, ValueError), match=f"(?i){'learning rate|lr' if key == 'lr' else key.rstrip('s')}") as raised:
                optimizer.step()
            assert len(str(raised.value)) < 200
            group[key] = kept
            damaged = {**saved, "param_groups": [{**saved["param_groups"][0], key: value}, *saved["param_groups"][1:]]}
            with pytest.raises((TypeError, ValueError)):
                optimizer.load_state_dict(damaged)
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    assert group["step"] == 2
    group["lr"] = -1e-19  # as a schedule may end
    optimizer.step()


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


def test_a_checkpoint_with_another_order_of_parameters_is_refused() -> None:
    named = [*make_model("ours").named_parameters()]
    optimizer = lk.AdamW(named)
    other = lk.AdamW([*named[2:], *named[:2]])
    with pytest.raises(ValueError, match=r"the same parameters in another order \(.* where .* stands here\)"):
        other.load_state_dict(optimizer.state_dict())


@every_optimizer
def test_weight_decay_can_be_edited_and_resumed(build) -> None:
    """As torch's: the group's number is read in every step. Factors have it where they were given it, or a number of their own."""

    def left_over(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
        """What a step without gradient leaves of a ΔW and of a head, over a step without decay."""
        with torch.no_grad():
            head.weight.fill_(1.0)
            for pair in pairs(model):
                pair.A.fill_(1.0), pair.B.fill_(1.0)
        for _ in range(2):  # either factor's turn
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        return float(pair_delta(pairs(model)[0])[0, 0] / 2.1), float(head.weight.detach()[0, 0])

    model, head = make_model("ours"), nn.Linear(9, 2).double()
    params = [*trainable(model), head.weight]
    for given, edit, factors, rest in (
        (None, {"weight_decay": 5.0}, False, True),
        (0.1, {"weight_decay": 5.0}, True, True),
        (0.0, {"weight_decay": 5.0, "factor_weight_decay": 0.0}, False, True),
        (None, {"weight_decay": 0.0, "factor_weight_decay": 5.0}, True, False),
    ):
        optimizer, resumed = (build(params, lr=1e-2, weight_decay=given) for _ in range(2))
        optimizer.param_groups[0].update(edit)
        resumed.load_state_dict(optimizer.state_dict())
        for either in (optimizer, resumed):
            delta, weight = left_over(either)
            assert (weight < 0.95) == rest and (delta < 0.95) == factors, (given, edit, delta, weight)


@every_optimizer
def test_state_is_created_by_the_first_step(build) -> None:
    model = make_model("ours")
    optimizer, parameters = build(model), set(trainable(model))
    assert not optimizer.state
    run(model, optimizer, 0, 1)
    for p in trainable(model):
        state = optimizer.state[p]
        assert all(isinstance(v, torch.Tensor) and v.dtype == torch.float64 for v in state.values())
        assert all(v.shape == p.shape for k, v in state.items() if k.startswith("exp_avg"))
    assert set(optimizer.state) == parameters, "frozen parameters must have no state"


@every_optimizer
def test_checkpoint_probe_moves_nothing(build) -> None:
    """torch.distributed.checkpoint asks an empty optimizer for its state by a step with lr 0 and zero gradients."""
    model = make_model("ours")
    optimizer = build(model)
    before = [p.detach().clone() for p in trainable(model)]
    lrs = [g["lr"] for g in optimizer.param_groups]
    for p in trainable(model):
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
    assert len(optimizer.state) == len(before) and all(g["step"] == 0 for g in optimizer.param_groups)
    assert all(torch.equal(p, b) for p, b in zip(trainable(model), before, strict=True))
    fresh = make_model("ours")
    run(fresh, build(fresh), 0, 15)
    run(model, optimizer, 0, 15)
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True))


def run_with_an_idle_layer(
    model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, rank: int = 0, world: int = 1
) -> None:
    """In two steps of three the last layer has no gradient, as an expert that was not chosen: it is counted who missed how many."""
    for step in range(first, last):
        optimizer.zero_grad()
        x, y = batch(step)
        if step % 3 != 1 and world == 1:
            model[-1].forward = lambda x: x[..., :9]
        (model(x[rank::world]) - y[rank::world]).square().mean().backward()
        vars(model[-1]).pop("forward", None)
        if step % 3 != 1 and world > 1:  # FSDP2 gathers what is not used, and waits for it only where it is
            for p in model[-1].parameters():
                p.grad = None
        optimizer.step()


def in_two_groups(model: nn.Module, named: bool) -> list[dict]:
    """The layer that is idle in :func:`run_with_an_idle_layer` in a second group, behind one that is not."""
    found = [(n, p) if named else p for n, p in model.named_parameters() if p.requires_grad]
    return [{"params": found[:2]}, {"params": found[2:], "lr": 5e-3}]


def assert_same(model: nn.Module, optimizer: torch.optim.Optimizer, twin: nn.Module, resumed: torch.optim.Optimizer) -> None:
    """To the bit, with all that the optimizers know."""
    for group, other in zip(optimizer.param_groups, resumed.param_groups, strict=True):
        assert all(group[key] == other[key] for key in ("step", "cleared_at", "missed", "late", "turn") if key in group)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(*local_parts([p.detach(), q.detach()]))
        state, other = optimizer.state.get(p, {}), resumed.state.get(q, {})
        assert state.keys() == other.keys() and all(torch.equal(*local_parts([state[key], other[key]])) for key in state)


@every_optimizer
@pytest.mark.parametrize("way", ["memory", "disk", "disk, flattened", "full"])
def test_resume_by_distributed_checkpoints_is_bit_for_bit(build, way: str, tmp_path: Path) -> None:
    """What was counted arrives at a new optimizer, which has counted nothing."""
    options = dcp.StateDictOptions(flatten_optimizer_state_dict="flattened" in way, full_state_dict=way == "full")
    for index, given in enumerate((lambda m: m, lambda m: in_two_groups(m, way != "memory"))):
        model, twin = make_model("ours"), make_model("ours")
        optimizer, resumed = build(given(model)), build(given(twin))
        run_with_an_idle_layer(model, optimizer, 0, 7)
        assert optimizer.param_groups[-1]["missed"]
        if way == "full" and not any(optimizer.state.values()):
            pytest.skip("torch wants a state with a tensor in it, of its SGD too")
        saved = dcp.get_state_dict(model, optimizer, options=options)
        if "disk" in way:
            folder, target = tmp_path / str(index), dcp.get_state_dict(twin, resumed, options=options)
            torch.distributed.checkpoint.save(dict(zip("mo", saved, strict=True)), checkpoint_id=folder, no_dist=True)
            torch.distributed.checkpoint.load(read := dict(zip("mo", target, strict=True)), checkpoint_id=folder, no_dist=True)
            saved = read["m"], read["o"]
        saved = copy.deepcopy(saved)
        dcp.set_state_dict(twin, resumed, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)
        assert_same(model, optimizer, twin, resumed)
        for either, its in ((model, optimizer), (twin, resumed)):
            run_with_an_idle_layer(either, its, 7, 11)
        assert_same(model, optimizer, twin, resumed)


def resume_from_full(rank: int, world: int, name: str) -> None:
    """On every rank, of parameters that FSDP2 shards where the method takes shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sharded = name != "LoRARITE"
    share = (rank, world) if sharded else (0, 1)

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_model("ours", shapes=[(20, 12), (16, 20), (9, 16)])
        if sharded:
            options = {"mesh": init_device_mesh("cpu", (world,)), "shard_placement_fn": lk.shard_placement(model)}
            for layer in (*model[::2], model):
                fully_shard(layer, **options)
        return model, OPTIMIZERS[name](in_two_groups(model, True))

    for broadcast in (False, True):
        options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        (model, optimizer), (twin, resumed) = made(), made()
        run_with_an_idle_layer(model, optimizer, 0, 7, *share)
        assert optimizer.param_groups[-1]["missed"]
        saved = copy.deepcopy(dcp.get_state_dict(model, optimizer, options=dcp.StateDictOptions(full_state_dict=True)))
        of_model, of_optimizer = ({}, {}) if broadcast and rank else saved
        dcp.set_model_state_dict(twin, of_model, options=options)
        dcp.set_optimizer_state_dict(twin, resumed, of_optimizer, options=options)
        assert_same(model, optimizer, twin, resumed)
        for either, its in ((model, optimizer), (twin, resumed)):
            run_with_an_idle_layer(either, its, 7, 11, *share)
        assert_same(model, optimizer, twin, resumed)


@pytest.mark.parametrize("name", ["AdamW", "LoRARITE"])
def test_ranks_resume_from_full_state_dicts_bit_for_bit(name: str, ranks: Ranks) -> None:
    ranks(resume_from_full, name, world=1)
    ranks(resume_from_full, name)


@every_optimizer
def test_checkpoints_with_positions_load(build) -> None:
    """Older versions saved ``missed`` as it is in memory, a dictionary by position, and ``late`` as the positions."""
    model, twin = make_model("ours"), make_model("ours")
    optimizer, resumed = build(in_two_groups(model, False)), build(in_two_groups(twin, False))
    run_with_an_idle_layer(model, optimizer, 0, 7)
    saved = copy.deepcopy(optimizer.state_dict())
    for group, here in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        assert isinstance(group["missed"], list) and isinstance(here["missed"], dict)
        group.update({key: copy.deepcopy(here[key]) for key in ("missed", "late") if key in here})
    twin.load_state_dict(model.state_dict())
    for state_dict in (optimizer.state_dict(), saved):
        resumed.load_state_dict(state_dict)
        assert_same(model, optimizer, twin, resumed)
    for either, its in ((model, optimizer), (twin, resumed)):
        run_with_an_idle_layer(either, its, 7, 11)
    assert_same(model, optimizer, twin, resumed)


@every_optimizer
def test_low_precision_parameters_keep_float32_state_through_a_checkpoint(build) -> None:
    def bf16_model() -> nn.Module:
        return make_model("peft", rank=2, dtype=torch.bfloat16)

    model = bf16_model()
    optimizer, parameters = build(model), trainable(model)
    run(model, optimizer, 0, 7, torch.bfloat16)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = bf16_model()
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = build(twin)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for p, q in zip(parameters, trainable(twin), strict=True):
        for key, value in optimizer.state[p].items():
            assert value.dtype == torch.float32 and torch.equal(value, resumed.state[q][key])
    run(model, optimizer, 7, 20, torch.bfloat16)
    run(twin, resumed, 7, 20, torch.bfloat16)
    assert all(p.isfinite().all() for p in parameters)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


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


@every_optimizer
def test_hooks_may_change_what_is_loaded(build) -> None:
    """As torch says: what a checkpoint's parameters are here is for ``register_load_state_dict_pre_hook`` to say, by their names."""
    model, twin = make_model("ours"), make_model("ours")
    optimizer = build(model)
    run(model, optimizer, 0, 12)
    saved = copy.deepcopy(optimizer.state_dict())
    twin.load_state_dict(model.state_dict())
    resumed = build([(n, p) for n, p in reversed(list(twin.named_parameters())) if p.requires_grad])
    with pytest.raises(ValueError, match="in another order"):
        resumed.load_state_dict(saved)

    def by_name(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
        (group,), (here,) = state_dict["param_groups"], optimizer.param_groups
        places = [group["param_names"].index(name) for name in here["param_names"]]
        moved = {**group, "params": [group["params"][i] for i in places], "param_names": here["param_names"]}
        moved |= {key: [group[key][i] for i in places] for key in ("missed", "late") if key in group}
        return {**state_dict, "param_groups": [moved]}

    seen = []
    with resumed.register_load_state_dict_pre_hook(by_name):
        resumed.register_load_state_dict_post_hook(
            lambda optimizer: seen.append([v.dtype for v in optimizer.state[twin[0].lora_B].values()])
        )
        resumed.load_state_dict(saved)
    assert seen == [[value.dtype for value in optimizer.state[model[0].lora_B].values()]], "the user's hook sees the state as it will be"
    run(model, optimizer, 12, 24)
    run(twin, resumed, 12, 24)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="in another order"):
        resumed.load_state_dict(saved)  # the hook is gone


@every_optimizer
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_of_model_and_optimizer_go_on_alike(build, copier) -> None:
    model = make_model("ours")
    optimizer = build(model)
    run(model, optimizer, 0, 12)
    twin_model, twin = copier((model, optimizer))
    run(model, optimizer, 12, 30)
    run(twin_model, twin, 12, 30)
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), twin_model.state_dict().values(), strict=True))


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
def test_resume_in_the_middle_bit_for_bit(build) -> None:
    """Through a file, after every number of steps up to 14: in the warm-up, at either factor's turn, before the first step."""
    for middle in (0, 1, 2, 5, 10, 14):
        model = make_model("ours")
        optimizer = build(model)
        run(model, optimizer, 0, middle)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        twin = make_model("ours", seed=5)
        resumed = build(twin)
        twin.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["optimizer"])
        run(model, optimizer, middle, middle + 12)
        run(twin, resumed, middle, middle + 12)
        assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), twin.state_dict().values(), strict=True)), middle


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
def test_warnings_name_the_line_that_led_to_them(build) -> None:
    model = make_model("peft", dtype=torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(ValueError):  # OPLoRA, which must see the layers
            build(model.named_parameters())
        optimizer = build(model, nonfinite_grads="skip")
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)  # wraps step()
        for p in trainable(model):
            p.grad = torch.full_like(p, torch.inf)
        optimizer.step()
        scheduler.step()
    ours = [w for w in caught if type(optimizer).__name__ in str(w.message) and "half their rank" not in str(w.message)]
    assert ["infinite" in str(w.message) for w in ours] == [False] * (len(ours) - 1) + [True]
    assert len(ours) == (1 if isinstance(optimizer, (lk.AdamW, lk.OPLoRA)) else 2)
    assert {w.filename for w in ours} == {__file__}


@every_optimizer
def test_a_scale_that_is_not_the_layers_goes_unused_with_a_warning(build) -> None:
    model = make_model("ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(model, scale=0.7)
        if build is OPTIMIZERS["AdamW"]:
            build(model, scale=2.0)  # which needs none
            return
    for params in (model, model.parameters()):
        with pytest.warns(UserWarning, match=r"scale=2.0 .* has s = 0.7") as caught:
            optimizer = build(params, scale=2.0)
        assert len(caught) == 1 and {pair.scale for pair in optimizer._pairs} == {0.7}


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
    for call in range(1, 60):
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
        assert build not in (OPTIMIZERS["AdamW"], OPTIMIZERS["SDSLoRA"]), "was the native extension built?"


def test_numbers_of_numpy_are_taken_and_become_pythons() -> None:
    model = make_model("ours")
    number = np.int64(3)
    for optimizer in (
        lk.SDSLoRA(model, lr=np.float64(1e-3), total_steps=np.int64(1000), warmup_steps=number, phases=number),
        lk.ODLoRA(model, lr=np.float32(1e-3), total_steps=np.int64(1000), rounds=number, round_steps=number),
        lk.OPLoRA(model, lr=np.float64(1e-3), sweeps=number, momentum_rank=number, seed=number),
        lk.AdamW([{"params": trainable(model), "lr": np.float64(1e-3)}]),
        lk.AdamW(model, betas=(np.float64(0.9), np.float32(0.99)), eps=np.float32(1e-8)),
        lk.AdamW([{"params": trainable(model), "betas": [np.float64(0.9), 0.99]}]),
    ):
        group = optimizer.param_groups[0]
        assert not any(isinstance(value, np.generic) for value in (*group.values(), *group["betas"]))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        torch.load(file, weights_only=True)
    with pytest.raises(ValueError, match="total_steps must be a positive integer, got 5.0"):
        lk.SDSLoRA(model, total_steps=np.float64(5))


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


def takes(build, *names: str) -> bool:
    """Whether a method has these arguments: not every one is an AdamW."""
    initialize = type(build(make_model("ours"))).__init__
    return set(names) <= set(inspect.signature(initialize).parameters) | set(AdamWOptions.__annotations__)


@every_optimizer
def test_adamws_checks(build) -> None:
    model = make_model("ours")
    for bad, message in (
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
        ({"eps": -1.0}, "Invalid epsilon value: -1.0"),
        ({"momentum": 1.0}, "Invalid momentum value: 1.0"),
        ({"damping": -1.0}, "damping must be ≥ 0, got -1.0"),
        ({"order": "C"}, "order must be 'B'"),
        ({"lr_ratio": 0.0}, "lr_ratio must be positive"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        ({"amsgrad": True}, "amsgrad"),
        ({"differentiable": True}, "differentiable"),
        ({"scale": 0.0}, "scale must be positive"),
    ):
        if takes(build, *bad):
            with pytest.raises(ValueError, match=message):
                build(model, **bad)
    with pytest.raises(RuntimeError, match="fused"):
        build(model, fused=True, foreach=True)
    name = type(build(model)).__name__
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'maximise'; did you mean maximize\?"):
        build(model, maximise=True)
    with pytest.raises(TypeError, match="iterable of tensors"):
        build(trainable(model)[0])
    build(model, fused=True), build(model, foreach=True)


@every_optimizer
def test_explain_names_a_backend_and_a_reason_for_every_operation(build, capsys) -> None:
    model = make_model("ours", dtype=torch.float32)
    explanation = lk.explain(model, build(model))
    assert {c.operation for c in explanation.choices} >= {"lora_linear", "lora_linear_backward"}
    assert all(c.backend in c.reasons and all(c.reasons.values()) for c in explanation.choices)
    assert (
        torch.version.cuda is None
        or "native" in explanation.unavailable
        or any(line.startswith("cusolver") for line in explanation.libraries)
    )
    assert all(line in str(explanation) for line in explanation.libraries)
    assert str(explanation) in capsys.readouterr().out
    with pytest.raises(TypeError, match="one of lowrank_kernels"):
        lk.explain(model, torch.optim.AdamW(trainable(model)))


#: What steps call now and then only: refreshes, the inverses of constant factors.
OCCASIONAL = {"SDSLoRA": {"grouped_qr", "grouped_svd_product"}, "ODLoRA": {"grouped_qr", "grouped_svd_product"}, "LoRASB": {"grouped_gram"}}
EXPLAINED = {
    **OPTIMIZERS,
    "ODLoRA": lambda params, **k: lk.ODLoRA(params, lr=1e-2, total_steps=400, **k),
    "LoRAPro-no-sylvester": lambda params, **k: lk.LoRAPro(params, lr=1e-2, sylvester=False, **k),
    "LoRASB": lambda params, **k: lk.LoRASB(params, lr=1e-2, **k),
    "ScaledAdamW-lora-plus": lambda params, **k: lk.ScaledAdamW(params, lr=1e-2, lr_ratio=4.0, **k),
    **{
        f"OPLoRA-{'-'.join(map(str, options.values()))}": lambda params, options=options, **k: lk.OPLoRA(params, lr=1e-2, **options, **k)
        for options in (
            {"momentum_mode": "naive"},
            {"momentum": 0.0},
            {"gradient": "sketch", "sketch_width": 140, "momentum_mode": "projected"},
            {"metric": "kfac"},
            {"metric": "kfac", "metric_rank": 4, "momentum_rank": 4},
            {"metric": "kfac", "momentum": 0.0, "momentum_rank": 140},
        )
    },
}


@pytest.mark.parametrize("trained", ["both", "B"])
@pytest.mark.parametrize("rank", [8, 130])
@pytest.mark.parametrize("name", EXPLAINED)
def test_explain_says_what_a_step_then_calls(name: str, rank: int, trained: str) -> None:
    # There is no B; freeze_idle says itself what is trained; the others move both or none.
    if trained == "B" and (name in ("LoRASB", "AltLoRAPlus-A-freeze", "SDSLoRA", "ODLoRA") or name.startswith("OPLoRA")):
        return
    torch.manual_seed(0)
    method = "xs" if name == "LoRASB" else "sds" if name in ("SDSLoRA", "ODLoRA") else "lora"
    layers = [lk.adapt(nn.Sequential(nn.Linear(width, 140), nn.Linear(140, 150)), method, rank=rank) for width in (131, 160)]
    model = nn.ModuleList([*layers, nn.LayerNorm(150)])
    if method == "xs":
        lk.initialize(model, "svd")
    if trained == "B":
        for pair in pairs(model):
            pair.A.requires_grad_(False)
    optimizer = EXPLAINED[name]([*model.named_parameters()] if trained == "B" else model)

    def step() -> dict[tuple[str, str], int]:
        optimizer.zero_grad()
        sum(model[2](layer(torch.randn(3, layer[0].in_features))).square().sum() for layer in layers).backward()
        before = backends.call_counts()
        optimizer.step()
        return {call: count for call, count in backends.call_counts().items() if count > before.get(call, 0)}

    step()
    said = {(choice.operation, choice.backend) for choice in lk.explain(optimizer).choices}
    # Where A is frozen, AltLoRA has nothing to do every other time.
    called = {call for _ in range(2 if trained == "B" else 1) for call in step()}
    assert called <= said
    assert {operation for operation, _ in said - called} <= OCCASIONAL.get(name, set())


def test_explain_is_short_and_takes_either_order(capsys) -> None:
    model = lk.adapt(torch.nn.Sequential(*(torch.nn.Linear(4 + i, 5 + i) for i in range(6))), rank=2)
    optimizer = lk.AdamW(model)
    explanation = lk.explain(model, optimizer)
    text = capsys.readouterr().out
    assert text.count("lora_linear, lora_linear_backward on cpu (5 × 4, r = 2; 6 × 5, r = 2; ") == 1 and "; and 2 more): " in text
    assert len(explanation.choices) > 12 and text.count("reference PyTorch takes every call") <= 2
    assert "\n" not in repr(explanation)
    assert torch.version.cuda is not None or "CUDA libraries" not in text
    assert lk.explain(optimizer, model).choices == explanation.choices
    for wrong in ((optimizer, optimizer), (model, model), ("model",)):
        with pytest.raises(TypeError, match="explain: "):
            lk.explain(*wrong)


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
    used = backends.call_counts().get(("grouped_adamw_", "native"), 0)
    optimizer.step()
    assert backends.call_counts()["grouped_adamw_", "native"] == used + 1


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
    if isinstance(optimizer, lk.AdamW):
        optimizer.step()
        return
    with pytest.raises(RuntimeError, match=r"0\.lora_B was replaced"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    params[1] = old
    optimizer.step()


DAMAGED = {
    "step nan": (lambda s: s["param_groups"][0].update(step=math.nan), r"param_groups\[0\] of the checkpoint has step nan"),
    "step negative": (lambda s: s["param_groups"][0].update(step=-5), r"step -5"),
    "step two numbers": (lambda s: s["param_groups"][0].update(step=torch.tensor([1.0, 2.0])), r"has step tensor"),
    "step too small": (lambda s: s["param_groups"][0].update(step=0, missed={}), r"never updated, but its exp_avg|cleared_at"),
    "missed number": (lambda s: s["param_groups"][0].update(missed=1), r"missed 1, no list"),
    "missed short": (lambda s: s["param_groups"][0].update(missed=[1]), r"missed of 1 parameters, and 6 parameters"),
    "missed negative": (lambda s: s["param_groups"][0]["missed"].__setitem__(1, -1), r"missed\[1\] -1"),
    "missed a tensor": (lambda s: s["param_groups"][0]["missed"].__setitem__(1, torch.tensor([0, 1])), r"missed\[1\] tensor"),
    "missed huge": (lambda s: s["param_groups"][0].update(missed={0: 10**6}), r"missed\[0\] 1000000"),
    "missed text": (lambda s: s["param_groups"][0].update(missed={0: "a"}), r"missed\[0\] 'a'"),
    "missed of none": (lambda s: s["param_groups"][0].update(missed={999: 1}), r"missed\[999\]"),
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
        ([6], "late with 6, no position"),
        ([0, True], "late with True, no position"),
        ([True] * 5, "late of 5 parameters, and 6 parameters"),
    ],
)
def test_a_damaged_note_of_who_is_late_is_refused(late: object, message: str) -> None:
    optimizer = lk.AltLoRA(make_model("ours"))
    state = optimizer.state_dict()
    state["param_groups"][0]["late"] = late
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)


def test_oplora_wants_the_state_of_both_factors() -> None:
    model = make_model("ours")
    optimizer = lk.OPLoRA(model)
    run(model, optimizer, 0, 2)
    state = optimizer.state_dict()
    del state["state"][1]
    with pytest.raises(ValueError, match=r"the state of A of 0 only"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    "given",
    [
        {"lr_ratio": torch.tensor(2.0)},
        {"betas": (torch.tensor(0.9), 0.99)},
        {"lr": True},
        {"lr": math.inf},
        {"eps": math.inf},
        {"weight_decay": torch.tensor(0.1)},
        {"capturable": "x"},
        {"foreach": "x"},
        {"atomic": "x"},
        {"amsgrad": "x"},
        {"differentiable": "x"},
        {"split_work": "False"},
        {"scale": True},
        {"scale": 10**400},
        {"lr": 10**400},
        {"eps": 1e300},
        {"lr": torch.tensor(math.inf)},
        {"lr": torch.tensor(True)},
        {"lr": torch.tensor(1j)},
        {"lr": torch.tensor(1.0, device="meta")},
    ],
)
def test_what_no_step_takes_the_constructor_refuses(given) -> None:
    with pytest.raises((TypeError, ValueError), match=f"SDSLoRA: {next(iter(given))} must be"):
        OPTIMIZERS["SDSLoRA"](make_model("ours"), **given)


def test_integers_that_no_tensor_takes_do_not_tear_a_step() -> None:
    optimizer = lk.LoRARITE(model := make_model("ours"), eps=10**30)
    run(model, optimizer, 0, 1)
    assert isinstance(optimizer.param_groups[0]["eps"], float) and optimizer.state_dict()["state"]
    optimizer.param_groups[0]["eps"] = 10**30
    loss_of(model, 1).backward()
    with pytest.raises(ValueError, match="LoRARITE: eps must be finite, and within the range of fp32"):
        optimizer.step()
    assert optimizer.state_dict()["state"]


@pytest.mark.parametrize("groups", [[{}], [{"lr": 1.0}]])
def test_a_group_without_parameters_says_so(groups) -> None:
    with pytest.raises(ValueError, match="AdamW: a parameter group must have 'params'"):
        lk.AdamW(groups)
    with pytest.raises(ValueError, match="AdamW: a parameter group must have 'params'"):
        lk.AdamW(make_model("ours")).add_param_group(groups[0])


@pytest.mark.parametrize("given", [None, "x", 5, torch.ones(1), [1]])
def test_what_holds_no_parameters_is_refused(given) -> None:
    with pytest.raises(TypeError, match="average_gradients: params must be"):
        lk.average_gradients(given)
    for function in (lk.pairs, lk.shard_placement):
        with pytest.raises(TypeError, match=rf"{function.__name__}: model must be a torch\.nn\.Module"):
            function(given)


def test_betas_cannot_be_edited_in_place_unseen() -> None:
    optimizer = lk.AdamW(model := make_model("ours"), betas=[0.9, 0.99])
    run(model, optimizer, 0, 1)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99) and isinstance(optimizer.param_groups[0]["betas"], tuple)
