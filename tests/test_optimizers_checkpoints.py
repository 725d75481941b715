"""The state of every optimizer and its way through checkpoints, copies and torch.distributed.checkpoint: bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from _models import batch, make_model, trainable
from _numerics import same_bits_or
from _optimizers import OPTIMIZERS, every_optimizer, run
from _ranks import Ranks
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.parallel.shards import local_parts


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
    warming = build(other := make_model("ours"), lr=0.0)  # a schedule that begins at 0 is none
    run(other, warming, 0, 1)
    assert all(g["step"] == 1 for g in warming.param_groups)
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
    """To the bit, with all that the optimizers know. Nearly so without the extension."""
    same = same_bits_or(rtol=1e-12, atol=1e-15)
    for group, other in zip(optimizer.param_groups, resumed.param_groups, strict=True):
        assert all(group[key] == other[key] for key in ("step", "cleared_at", "missed", "late") if key in group)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert same(*local_parts([p.detach(), q.detach()]))
        state, other = optimizer.state.get(p, {}), resumed.state.get(q, {})
        assert state.keys() == other.keys() and all(same(*local_parts([state[key], other[key]])) for key in state)


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
    resumed, loaded = build(twin), trainable(twin)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for p, q in zip(parameters, loaded, strict=True):
        for key, value in optimizer.state[p].items():
            assert value.dtype == torch.float32 and torch.equal(value, resumed.state[q][key])
    run(model, optimizer, 7, 20, torch.bfloat16)
    run(twin, resumed, 7, 20, torch.bfloat16)
    assert all(p.isfinite().all() for p in parameters)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


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
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_of_an_optimizer_with_several_groups_go_on_alike(build, copier) -> None:
    """Torch adds a key to a copy's defaults, and so to what each group is asked for; from the second group on nothing may be taken for
    something else. An edit of what is fixed is still refused, by its own name."""
    model = make_model("ours")
    optimizer = build(
        [{"params": list(model[0].parameters()) + list(model[2].parameters())}, {"params": model[4].parameters(), "lr": 3e-3}]
    )
    run(model, optimizer, 0, 12)
    twin_model, twin = copier((model, optimizer))
    run(model, optimizer, 12, 16)
    run(twin_model, twin, 12, 16)
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), twin_model.state_dict().values(), strict=True))
    for optimizer_now, model_now in ((optimizer, model), (twin, twin_model)):
        for key in optimizer_now.fixed:
            before = optimizer_now.param_groups[1][key]
            optimizer_now.param_groups[1][key] = "another"
            with pytest.raises(ValueError, match=rf"{key} of param_groups\[1\] cannot change"):
                run(model_now, optimizer_now, 16, 17)
            optimizer_now.param_groups[1][key] = before


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
