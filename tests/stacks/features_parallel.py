"""Several processes: DDP, FSDP2, torch.distributed.checkpoint, and what a step communicates."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _matrix import RANK, TARGETS, Cell, Method, data, feature, net, of_peft, ours, train, values, with_peft
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank_kernels as lk

STEPS = 8
DOUBLE = torch.float64
#: (d_in, d_out) of the adapted layers.
WIDTHS = [(12, 20), (20, 16), (16, 10)]


class Communication(TorchDispatchMode):
    """Counts collectives and the bytes that go into them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            self.calls[function.__name__] += 1
            sent = args[1] if "allgather" in function.__name__ else args[0]  # behind what it fills
            tensors = sent if isinstance(sent, (list, tuple)) else [sent]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
        return function(*args, **(kwargs or {}))


def arrays(model: nn.Module) -> dict[str, Any]:
    """The state of a model as arrays, which travel between processes."""
    return {name: value.double().numpy() for name, value in values(model).items()}


def assert_close(mine: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=tolerance * max(1e-3, np.abs(theirs[name]).max()), err_msg=name)


def share(step: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """This rank's part of the batch of a step."""
    x, y = data(step, dtype=DOUBLE)
    return x[rank::world], y[rank::world]


def ddp_run(rank: int, world: int, name: str, kind: str) -> tuple[dict[str, Any], dict[str, int], int]:
    """Train under DDP; the state at the end, and the collectives of the optimizer's steps."""
    cell = Cell(name, Path(), None)
    model = with_peft(cell).double() if kind == "peft" else ours(cell, dtype=DOUBLE)
    options = {"unused": {"find_unused_parameters": True}, "static": {"static_graph": True}}.get(kind, {})
    ddp = DistributedDataParallel(model, **options)
    optimizer, counted = cell.optimizer(model), Communication()
    for step in range(STEPS):
        optimizer.zero_grad()
        if kind == "no_sync":
            with ddp.no_sync():
                nn.functional.cross_entropy(ddp(share(step, rank, world)[0]), share(step, rank, world)[1]).backward()
        if kind == "unused" and step % 2:
            skip(model, True)
        x, y = share(step + STEPS if kind == "no_sync" else step, rank, world)
        nn.functional.cross_entropy(ddp(x), y).backward()
        skip(model, False)
        with counted:
            optimizer.step()
    return arrays(model), dict(counted.calls), counted.bytes


def skip(model: nn.Module, on: bool) -> None:
    """Leave ``middle`` out of the forward pass, or put it back; its name does not change."""
    layer = model.get_submodule("middle")
    if on:
        layer.forward = lambda x: x[..., :16]
    elif "forward" in layer.__dict__:
        del layer.forward


def alone(cell: Cell, kind: str) -> dict[str, Any]:
    """The same run in one process on whole batches."""
    model = with_peft(cell).double() if kind == "peft" else ours(cell, dtype=DOUBLE)
    optimizer = cell.optimizer(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        if kind == "no_sync":
            x, y = data(step, dtype=DOUBLE)
            nn.functional.cross_entropy(model(x), y).backward()
        if kind == "unused" and step % 2:
            skip(model, True)
        x, y = data(step + STEPS if kind == "no_sync" else step, dtype=DOUBLE)
        nn.functional.cross_entropy(model(x), y).backward()
        skip(model, False)
        optimizer.step()
    return arrays(model)


def assert_ddp(cell: Cell, kind: str) -> None:
    (first, calls, size), (second, *_) = cell.ranks(ddp_run, cell.name, kind)
    if cell.name == "OPLoRA":  # GAᵀ once and a thin product per half sweep, in fp64 here; steps without a layer send less
        sweeps = 2
        products = sum(RANK * (d_out + 2 * sweeps * (d_in + d_out)) for d_in, d_out in WIDTHS)
        assert kind == "unused" or size == STEPS * products * DOUBLE.itemsize, (calls, size / STEPS / 8, products)
    else:
        assert not calls, "under DDP the optimizer communicates nothing"
    assert_close(first, second, 0.0)
    assert_close(first, alone(cell, kind), 1e-6)


@feature("DDP: two ranks = one, identical factors on both, bytes of step() as documented (none but for OPLoRA)")
def ddp(cell: Cell) -> None:
    assert_ddp(cell, "plain")


@feature("DDP: PEFT's layers", of_peft)
def ddp_peft(cell: Cell) -> None:
    assert_ddp(cell, "peft")


def zero_run(rank: int, world: int, name: str) -> dict[str, Any] | None:
    """Train within a ZeroRedundancyOptimizer; None where that is refused, on every rank and before it has changed anything."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    cell = Cell(name, Path(), None)
    model = ours(cell, dtype=DOUBLE)
    ddp = DistributedDataParallel(model)
    params = [p for p in model.parameters() if p.requires_grad]

    def make(**options: Any) -> ZeroRedundancyOptimizer:
        return ZeroRedundancyOptimizer(params, optimizer_class=cell.method.optimizer, lr=1e-2, **{**cell.method.options, **options})

    if not takes_parts(cell.method):
        with pytest.raises(ValueError, match=f"{name}: .*ZeroRedundancyOptimizer gives each rank some of the parameters"):
            make()
        return None
    with pytest.raises(ValueError, match="ZeroRedundancyOptimizer .* AdamW with lr_ratio=1"):
        make(lr_ratio=2.0)
    optimizer = make()
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = share(step, rank, world)
        nn.functional.cross_entropy(ddp(x), y).backward()
        optimizer.step()
    return arrays(model)


def takes_parts(method: Method) -> bool:
    """Whether a step needs neither partners nor, on every rank, any factor at all."""
    return method.optimizer is lk.AdamW


@feature("DDP: torch's ZeroRedundancyOptimizer, whose ranks hold A here and B there", takes_parts)
def ddp_zero(cell: Cell) -> None:
    first, second = cell.ranks(zero_run, cell.name)
    assert (first is None) == (not takes_parts(cell.method))
    if first is not None:
        assert_close(first, second, 0.0)
        assert_close(first, alone(cell, "plain"), 1e-6)


@feature("DDP: no_sync and accumulation")
def ddp_no_sync(cell: Cell) -> None:
    assert_ddp(cell, "no_sync")


@feature("DDP: layers that some steps do not use (find_unused_parameters)")
def ddp_unused(cell: Cell) -> None:
    assert_ddp(cell, "unused")


@feature("DDP: static_graph")
def ddp_static_graph(cell: Cell) -> None:
    assert_ddp(cell, "static")


def join_run(rank: int, world: int, name: str, peft: bool) -> dict[str, Any]:
    """Train in ``join()``, with fewer batches on the last rank; or, where that is refused, only where all ranks have as many."""
    cell = Cell(name, Path(), None)
    model = with_peft(cell).double() if peft else ours(cell, dtype=DOUBLE)
    ddp, optimizer = DistributedDataParallel(model), cell.optimizer(model)

    def steps(count: int) -> None:
        for step in range(count):
            x, y = share(step, rank, world)
            loss = nn.functional.cross_entropy(ddp(x), y)
            with torch.no_grad():
                model(x)  # outside of DDP
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    before, fewer = values(model), STEPS - 3 if rank == world - 1 else STEPS
    if joins(cell.method):
        with ddp.join():
            steps(fewer)
        return arrays(model)
    with ddp.join(), pytest.raises(RuntimeError, match=f"{name}: DistributedDataParallel is in join.*nothing was changed"):
        steps(STEPS)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()) and not optimizer.state
    with ddp.join(enable=False):
        steps(STEPS)
    with pytest.raises(RuntimeError, match="exhausted"), ddp.join(throw_on_early_termination=True):
        steps(fewer)
    return arrays(model)


def joins(method: Method) -> bool:
    """Whether a rank may be missing in a step."""
    return method.optimizer is not lk.OPLoRA


@feature("DDP: join(), in which ranks have fewer batches (not with split_work=True): identical factors on all", joins)
def ddp_join(cell: Cell) -> None:
    for peft in (False, True)[: 1 + cell.method.peft]:
        first, second = cell.ranks(join_run, cell.name, peft)
        assert_close(first, second, 0.0)


def split_run(rank: int, world: int, name: str, fsdp: bool) -> tuple[dict[str, Any], dict[str, int], int]:
    """Train with and without ``split_work`` on the same data, and with other bases after the fact; the state at the end."""
    cell, results = Cell(name, Path(), None), []
    for split in (False, True):
        model = sharded(cell, world) if fsdp else ours(cell, dtype=DOUBLE)
        optimizer = cell.optimizer(model, split_work=split)
        runner = model if fsdp else DistributedDataParallel(model)
        counted = fsdp_steps(runner, optimizer, rank, world, 0, STEPS)
        results.append((whole(model), dict(counted.calls), counted.bytes))
    (plain, calls, size), (state, split_calls, split_size) = results
    assert_close(state, plain, 1e-9)
    return state, {key: n - calls.get(key, 0) for key, n in split_calls.items()}, split_size - size


def share_of_bases(name: str, world: int) -> int:
    """Bytes of ``split_work`` into the all-gathers of all steps, per rank: the largest share of bases (with U, V and Σ for an SVD)."""
    svds, refreshes = {"SDSLoRA": (1, 5), "ODLoRA": (3, 2)}[name]
    of_layers = [(RANK * (d_in + d_out) + RANK, d_in + d_out) for d_in, d_out in WIDTHS]
    of_factors = [(RANK * d, d) for widths in WIDTHS for d in widths]
    return (svds * largest_share(of_layers, world) + refreshes * largest_share(of_factors, world)) * DOUBLE.itemsize


def largest_share(jobs: list[tuple[int, int]], world: int) -> int:
    """The most numbers that a rank sends, of jobs ``(numbers, cost)``: the dearest first, each to the rank with least to do."""
    costs, numbers = [0] * world, [0] * world
    for size, cost in sorted(jobs, key=lambda job: -job[1]):
        rank = costs.index(min(costs))
        costs[rank] += cost
        numbers[rank] += size
    return max(numbers)


@feature(
    "DDP, FSDP2: split_work=True divides the making of bases among the ranks: as without, identical on all, bytes as documented",
    lambda m: m.adapter == "sds",
)
def split_work(cell: Cell) -> None:
    if cell.method.adapter != "sds":
        with pytest.raises(TypeError, match="unexpected keyword argument 'split_work'"):
            cell.optimizer(ours(cell), split_work=True)
        return
    for fsdp, world in ((False, 2), (True, 2), (False, 4)):
        (first, calls, size), *others = cell.ranks(split_run, cell.name, fsdp, world=world)
        assert all(state.keys() == first.keys() and (assert_close(state, first, 0.0) is None) for state, *_ in others)
        assert sum(calls.values()) == {"SDSLoRA": 6, "ODLoRA": 5}[cell.name], calls
        assert size == share_of_bases(cell.name, world), (size, share_of_bases(cell.name, world))


# ------------------------------------------------------------------------------------------------------------------ FSDP2


def sharded(cell: Cell, world: int, wide: bool = True, ignore: bool = False) -> nn.Module:
    """The adapted model under FSDP2, a unit per layer; A sharded along d_in if ``wide``, adapters left whole if ``ignore``."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = ours(cell, dtype=DOUBLE)
    options = {"mesh": init_device_mesh("cpu", (world,))}
    if wide:
        options["shard_placement_fn"] = lk.shard_placement(model)
    if ignore:
        options["ignored_params"] = {p for n, p in model.named_parameters() if "lora_" in n}
    for name in TARGETS:
        fully_shard(model.get_submodule(name), **options)
    fully_shard(model, **options)
    return model


def fsdp_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, world: int, first: int, last: int, average: bool = False
) -> Communication:
    """Train; the collectives of the optimizer's steps."""
    counted = Communication()
    for step in range(first, last):
        optimizer.zero_grad()
        x, y = share(step, rank, world)
        nn.functional.cross_entropy(model(x), y).backward()
        if average:
            lk.average_gradients(model)
        with counted:
            optimizer.step()
    return counted


def whole(model: nn.Module) -> dict[str, Any]:
    """The state of a sharded model, gathered."""
    full = {n: (v.full_tensor() if hasattr(v, "full_tensor") else v) for n, v in model.state_dict().items()}
    return {name: value.double().numpy() for name, value in full.items()}


def fsdp_run(rank: int, world: int, name: str, wide: bool) -> tuple[dict[str, Any], dict[str, int], int]:
    cell = Cell(name, Path(), None)
    model = sharded(cell, world, wide)
    optimizer = cell.optimizer(model)
    counted = fsdp_steps(model, optimizer, rank, world, 0, STEPS)
    for p in model.parameters():
        for key, value in optimizer.state.get(p, {}).items():
            if key.startswith("exp_avg"):
                assert value.placements == p.placements and value.to_local().shape == p.to_local().shape
    if world == 4 and rank == 3:
        assert any(p.to_local().numel() == 0 for p in model.parameters() if p.requires_grad), "an empty shard was to be tested"
    return whole(model), dict(counted.calls), counted.bytes


def expect_refusal(rank: int, world: int, name: str, wide: bool, message: str) -> None:
    cell = Cell(name, Path(), None)
    model = sharded(cell, world, wide)
    before = whole(model)
    with pytest.raises(RuntimeError, match=message):
        fsdp_run(rank, world, name, wide)
    assert_close(whole(model), before, 0.0)


def sent_bytes(name: str, world: int) -> int:
    """Bytes that go into the collectives of all steps of a rank (docs/stacks.md): 8 r² per Gram matrix (and drift, of fp64 factors) and
    layer and step; or the rank's part of the factors, whenever bases are made."""
    # Of 8 steps: the end of the warm-up and 5 main steps; the ends of two rounds, of the fixed phase, and 2 main steps.
    bases = {"SDSLoRA": 6, "ODLoRA": 5}
    if name in bases:
        return bases[name] * sum(-(-d // world) for widths in WIDTHS for d in widths) * RANK * DOUBLE.itemsize
    grams = {"AdamW": 0, "ScaledGD": 2, "ScaledAdamW": 2, "LoRAPro": 4, "AltLoRA": 2, "AltLoRAPlus": 2}[name]
    return STEPS * grams * len(TARGETS) * RANK**2 * 8


@feature(
    "FSDP2: factors sharded (A by shard_placement), states like them, uneven and empty shards, bytes as documented",
    lambda m: m.fsdp is not None,
)
def fsdp2(cell: Cell) -> None:
    if cell.method.fsdp is None:
        cell.ranks(expect_refusal, cell.name, True, "is sharded")
        return
    for world in (2, 4):
        results = cell.ranks(fsdp_run, cell.name, True, world=world)
        assert_close(results[0][0], alone(cell, "plain"), 1e-6)
        for state, calls, size in results:
            assert_close(state, results[0][0], 0.0)
            assert size == sent_bytes(cell.name, world), (calls, size, sent_bytes(cell.name, world))


def fsdp_whole_run(rank: int, world: int, name: str) -> dict[str, Any]:
    cell = Cell(name, Path(), None)
    model = sharded(cell, world, ignore=True)
    kept = [p for n, p in model.named_parameters() if "lora_" in n]
    assert kept and all(type(p) is nn.Parameter for p in kept) and any(hasattr(p, "placements") for p in model.parameters())
    fsdp_steps(model, cell.optimizer(model), rank, world, 0, STEPS, average=True)
    return whole(model)


@feature("FSDP2: factors kept whole (ignored_params), their gradients averaged by average_gradients")
def fsdp2_whole_factors(cell: Cell) -> None:
    first, second = cell.ranks(fsdp_whole_run, cell.name)
    assert_close(first, second, 0.0)
    assert_close(first, alone(cell, "plain"), 1e-6)


def fsdp_spoiled(rank: int, world: int, name: str, ignore: bool) -> tuple[dict[str, Any], int, dict[str, int], int]:
    """A NaN in what the last rank holds; every rank must leave the step out."""
    cell = Cell(name, Path(), None)
    model = sharded(cell, world, ignore=ignore)
    optimizer = cell.optimizer(model, nonfinite_grads="skip")
    fsdp_steps(model, optimizer, rank, world, 0, STEPS // 2, average=ignore)
    x, y = share(STEPS, rank, world)
    for how in ("skip", "raise"):
        optimizer._nonfinite_grads = how
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if ignore:
            lk.average_gradients(model)
        if rank == world - 1:
            model.head.weight.grad.to_local().view(-1)[0] = float("nan")
        before, state, counted = whole(model), copy.deepcopy(optimizer.state_dict()["param_groups"]), Communication()
        if how == "skip":
            with pytest.warns(UserWarning, match="such steps are skipped"), counted:
                optimizer.step()
            calls, size = dict(counted.calls), counted.bytes
        else:
            with pytest.raises(FloatingPointError, match="nothing was changed"):
                optimizer.step()
        assert_close(whole(model), before, 0.0)
        assert optimizer.state_dict()["param_groups"] == state
    optimizer.zero_grad()
    fsdp_steps(model, optimizer, rank, world, STEPS // 2, STEPS, average=ignore)
    return whole(model), optimizer.skipped_steps, calls, size


@feature("FSDP2: nonfinite_grads= decides for all ranks by one all-reduce of 4 bytes, wherever the NaN is")
def fsdp2_nonfinite(cell: Cell) -> None:
    for state, skipped, calls, size in cell.ranks(fsdp_spoiled, cell.name, cell.method.fsdp is None):
        assert skipped == 1 and sum(calls.values()) == 1 and size == 4, (skipped, calls, size)
        assert_close(state, alone(cell, "plain"), 1e-6)


@feature("FSDP2: A sharded along r (no shard_placement_fn)", lambda m: m.fsdp == "any")
def fsdp2_default_placement(cell: Cell) -> None:
    if cell.method.fsdp == "any":
        results = cell.ranks(fsdp_run, cell.name, False)
        assert_close(results[0][0], alone(cell, "plain"), 1e-6)
    else:
        cell.ranks(expect_refusal, cell.name, False, "is sharded")


def dcp_save(rank: int, world: int, name: str, folder: str, fsdp: bool) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    cell = Cell(name, Path(), None)
    model = sharded(cell, world) if fsdp else ours(cell, dtype=DOUBLE)
    optimizer = cell.optimizer(model)
    runner = model if fsdp else DistributedDataParallel(model)
    fsdp_steps(runner, optimizer, rank, world, 0, STEPS)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    fsdp_steps(runner, optimizer, rank, world, STEPS, 2 * STEPS)
    return whole(model)


def dcp_load(rank: int, world: int, name: str, folder: str, fsdp: bool) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    cell = Cell(name, Path(), None)
    distributed = world > 1
    model = sharded(cell, world) if fsdp and distributed else ours(cell, dtype=DOUBLE)
    optimizer = cell.optimizer(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder, no_dist=not distributed)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    runner = model if fsdp or not distributed else DistributedDataParallel(model)
    fsdp_steps(runner, optimizer, rank, world, STEPS, 2 * STEPS)
    return whole(model)


@feature("torch.distributed.checkpoint: saved on 2 ranks, loaded on 1 and on 4, goes on alike")
def distributed_checkpoint(cell: Cell) -> None:
    fsdp = cell.method.fsdp is not None
    saved = cell.ranks(dcp_save, cell.name, str(cell.folder / "dcp"), fsdp)[0]
    for world in (1, 4):
        loaded = cell.ranks(dcp_load, cell.name, str(cell.folder / "dcp"), fsdp, world=world)[0]
        assert_close(loaded, saved, 1e-6)


def fsdp1_refusal(rank: int, world: int, name: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    cell = Cell(name, Path(), None)
    for original in (True, False):
        inner = ours(cell)
        if not original:
            inner.requires_grad_(True)
        model = FullyShardedDataParallel(inner, use_orig_params=original, device_id=torch.device("cpu"))
        for params in (model, list(model.named_parameters())):
            with pytest.raises(ValueError, match="FSDP1|found no pair"):
                cell.optimizer(params)


@feature("FSDP1 (flattened parameters) and DeepSpeed ZeRO's flat partitions", lambda m: False)
def flattened(cell: Cell) -> None:
    cell.ranks(fsdp1_refusal, cell.name)
    # DeepSpeed ZeRO-1/2 puts one flat fp32 partition into each group of the optimizer that it wraps.
    model = ours(cell)
    optimizer = cell.optimizer(model)
    for group in optimizer.param_groups:
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))
        flat.grad = torch.ones_like(flat)
        group["params"] = [flat]
    before = flat.detach().clone()
    with pytest.raises(RuntimeError, match="DeepSpeed ZeRO flatten"):
        optimizer.step()
    assert torch.equal(flat, before) and not optimizer.state


@feature("wrapped before adapting, or copied: DDP of a deep copy, net without adapters refused")
def order_of_wrapping(cell: Cell) -> None:
    model = ours(cell)
    twin = copy.deepcopy(model)
    train(model, cell.optimizer(model), 0, STEPS)
    train(twin, cell.optimizer(twin), 0, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    if type(cell.optimizer(model)).requires_pairs:
        with pytest.raises(ValueError, match="found no pair|found no core"):
            cell.optimizer(net())
