"""Unusual and broken input: as ``torch.optim.AdamW`` takes it, or an error that names what came, before anything is changed."""

from __future__ import annotations

import copy

import pytest
import torch
from _matrix import Cell, assert_same, assert_same_state, feature, loss_of, ours, state_copy, train, values
from torch import Tensor, nn

NAN = float("nan")
STEPS = 6


def trained_of(model: nn.Module) -> list[nn.Parameter]:
    """What is handed to an optimizer as a plain list."""
    return [p for p in model.parameters() if p.requires_grad]


def with_rest(cell: Cell, *rest: nn.Parameter) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The adapted model, and an optimizer that has further parameters, each with a gradient of ones if it is trained."""
    model = ours(cell)
    optimizer = cell.optimizer([*trained_of(model), *rest])
    loss_of(model, 0).backward()
    for p in rest:
        p.grad = torch.ones_like(p) if p.requires_grad else None
    return model, optimizer


@feature("input: parameters that are empty, 0-dimensional, not contiguous, of one storage, frozen, integers; gradients that are views")
def odd_parameters(cell: Cell) -> None:
    torch.manual_seed(0)
    storage = torch.randn(10)
    rest = [
        torch.randn(0, 3),
        torch.tensor(2.0),
        torch.randn(4, 6).mT,
        torch.randn(8, 6)[::2, ::3],
        torch.randn(2, 3, 4).permute(2, 0, 1),
        storage[:4],
        storage[4:].view(2, 3),
    ]
    mine, theirs = ([nn.Parameter(x.clone() if clone else x) for x in rest] for clone in (False, True))
    still = [nn.Parameter(torch.arange(3), requires_grad=False), nn.Parameter(torch.ones(2), requires_grad=False)]
    model, optimizer = with_rest(cell, *mine, *still)
    yardstick = torch.optim.AdamW(theirs, lr=optimizer.param_groups[0]["lr"])
    for _ in range(3):
        for a, b in zip(mine, theirs, strict=True):
            a.grad, b.grad = torch.ones(()).expand(a.shape), torch.ones(b.shape)
        model.zero_grad()
        loss_of(model, 0).backward()
        optimizer.step()
        yardstick.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert still[0].tolist() == [0, 1, 2] and still[1].tolist() == [1, 1]
    generator, twin = ours(cell), ours(cell)
    train(generator, cell.optimizer(p for p in generator.parameters()), 0, STEPS)
    named = [{"params": []}, {"params": ((n, p) for n, p in twin.named_parameters() if p.requires_grad), "lr": 1e-2, "betas": [0.9, 0.999]}]
    named[0]["params"] = [("lone", nn.Parameter(torch.ones(2)))]
    train(twin, cell.optimizer(named), 0, STEPS)
    assert_same(generator, twin)


@feature("input: complex, expanded, doubled, meta and sparse parameters, A and B of two dtypes: refused, nothing changed")
def bad_parameters(cell: Cell) -> None:
    extra = nn.Parameter(torch.ones(3))
    for rest, message in (
        ([nn.Parameter(torch.ones(3, dtype=torch.complex64))], "complex parameters are not supported"),
        ([nn.Parameter(torch.ones(1, 6).expand(4, 6))], r"params\[\d+\] is expanded"),
        ([nn.Module()], "can only optimize Tensors"),
        ([extra * 2], "non-leaf"),
    ):
        model = ours(cell)
        with pytest.raises((TypeError, ValueError), match=message):
            cell.optimizer([*trained_of(model), *rest])
    model = ours(cell)
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="is in the group twice"):
        cell.optimizer([*trained_of(model), trained_of(model)[0]])
    for params, message in (
        (None, "params must be an iterable"),
        (dict(model.named_parameters()), "params must be an iterable"),
        ([{"params": model}], "params of a group must be tensors"),
        ([], "empty parameter list"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            cell.optimizer(params)
    embedding = nn.Embedding(6, 4, sparse=True)
    halves = [[*trained_of(model)], [*embedding.parameters()]]
    optimizer = cell.optimizer([{"params": half} for half in halves])
    train(model, optimizer, 0, 2)
    optimizer.zero_grad()
    (loss_of(model, 2) + embedding(torch.tensor([1, 2])).sum()).backward()
    before, state = values(model), state_copy(optimizer)
    with pytest.raises(RuntimeError, match="does not support sparse gradients, as param_groups.1..0. has one.*nothing was changed"):
        optimizer.step()
    assert_same(before, model)
    assert_same_state(state, state_copy(optimizer))
    _, optimizer = with_rest(cell, nn.Parameter(torch.ones(3, device="meta")))
    with pytest.raises(RuntimeError, match="is on the meta device and holds no values"):
        optimizer.step()
    assert not optimizer.state
    if type(optimizer).requires_pairs and cell.name != "LoRASB":
        model = ours(cell)
        factor = model.get_parameter("middle.lora_B")
        factor.data = factor.data.to(torch.bfloat16)
        optimizer = cell.optimizer(trained_of(model))
        for p in trained_of(model):
            p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match="cast both to one dtype"):
            optimizer.step()


@feature("input: hyperparameters that are no numbers, negative, NaN or of a wrong kind, given, edited or loaded: refused by name")
def bad_hyperparameters(cell: Cell) -> None:
    model = ours(cell)
    bad = {
        "lr": [-1.0, NAN, None, "1e-3", [1e-3], torch.ones(2), torch.tensor(-1.0)],
        "weight_decay": [-1.0, NAN, "0.1"],
        "lr_ratio": [0.0, -1.0, NAN, None, "2"],
        "maximize": ["yes"],
        "amsgrad": [True],
    }
    own = cell.optimizer(model).defaults
    for key, values_of in (
        ("betas", [0.9, (0.9,), (0.9, 0.99, 0.999), ("0.9", "0.99"), (1.0, 0.9), (NAN, 0.9), None]),
        ("eps", [-1.0, NAN, None, "x"]),
    ):
        if cell.name not in ("AltLoRA", "ScaledGD", "OPLoRA"):  # these have no betas and eps for the factors
            bad[key] = values_of
    for key in ("sylvester", "freeze_idle"):
        if key in own:
            bad[key] = ["False", None]
    for key in ("momentum", "damping", "proximal", "metric_decay", "metric_damping"):
        if key in own:
            bad[key] = [-1.0, NAN, None, "x"]
    for key in ("total_steps", "phases", "refresh_every", "basis", "order", "update", "sweeps", "gradient", "momentum_mode"):
        if key in own:
            bad[key] = ["x", ["x"], -1, 0]
    words = {"lr": "lr|learning rate", "betas": "beta", "eps": "eps"}
    for key, wrong in bad.items():
        for value in wrong:
            with pytest.raises((TypeError, ValueError), match=f"(?i){words.get(key, key)}"):
                cell.optimizer(model, **{key: value})
            optimizer = cell.optimizer(model)
            state = copy.deepcopy(optimizer.state_dict())
            with pytest.raises((TypeError, ValueError), match=f"(?i){words.get(key, key)}"):
                optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], key: value})
            assert optimizer.state_dict() == state
    for key, wrong in (("scale", ["2", NAN, 0]), ("model", ["net"]), ("nonfinite_grads", [None]), ("foreach_", [True])):
        for value in wrong:
            with pytest.raises((TypeError, ValueError), match=key):
                cell.optimizer(trained_of(model), **{key: value})


@feature("input: between steps: freezing, unfreezing, .data replaced, casts; edited groups and data of another size are refused")
def changed_between_steps(cell: Cell) -> None:
    model, twin = ours(cell), ours(cell)
    optimizer, other = cell.optimizer(model), cell.optimizer(twin)
    train(model, optimizer, 0, STEPS)
    train(twin, other, 0, STEPS)
    for p in trained_of(model):
        p.data = p.data.clone()
    train(model, optimizer, STEPS, STEPS + 2)
    train(twin, other, STEPS, STEPS + 2)
    assert_same(model, twin)
    layer = model.get_submodule("middle")
    frozen = [p for p in layer.parameters() if p.requires_grad]
    before = values(layer)
    for p in frozen:
        p.requires_grad_(False)
    train(model, optimizer, STEPS + 2, STEPS + 5)
    assert_same(before, layer)
    for p in frozen:
        p.requires_grad_(True)
    train(model, optimizer, STEPS + 5, STEPS + 7)
    assert any(not torch.equal(value, layer.state_dict()[name]) for name, value in before.items())

    def refused(change, message: str) -> None:
        model = ours(cell)
        optimizer = cell.optimizer(model)
        train(model, optimizer, 0, STEPS)
        optimizer.zero_grad()
        loss_of(model, STEPS).backward()
        change(model, optimizer)
        with pytest.raises((RuntimeError, ValueError), match=message):
            optimizer.step()

    def smaller(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        weight = model.get_submodule("head").weight
        weight.data, weight.grad = torch.zeros(5, 4), torch.ones(5, 4)

    def double(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model.double()

    refused(smaller, r"head.weight is torch.float32 of shape \(5, 4\), but its exp_avg")
    refused(double, "torch.float64 of shape .*, but its .* torch.float32|float64|dtype")
    refused(lambda m, o: o.param_groups[0]["params"].pop(), "change them by add_param_group")
    refused(lambda m, o: o.param_groups.clear(), "change them by add_param_group")
    model = ours(cell).to(torch.bfloat16)  # after construction or later: state is fp32 whatever the parameter
    optimizer = cell.optimizer(model)
    train(model, optimizer, 0, 2, torch.bfloat16)
    train(model.float(), optimizer, 2, STEPS)
    assert all(p.isfinite().all() for p in model.parameters())


@feature("input: an add_param_group that raises leaves nothing behind; checkpoints with a key missing are refused by name")
def nothing_left_behind(cell: Cell) -> None:
    model, twin = ours(cell), ours(cell)
    optimizer, other = cell.optimizer(trained_of(model)), cell.optimizer(trained_of(twin))
    train(model, optimizer, 0, 3)
    train(twin, other, 0, 3)
    for group, message in (
        ({"params": [nn.Parameter(torch.ones(3))], "lr": "x"}, "lr must be a number"),
        ({"params": [nn.Parameter(torch.ones(3, dtype=torch.complex64))]}, "complex"),
        ({"params": [trained_of(model)[0]]}, "more than one parameter group"),
        ([nn.Parameter(torch.ones(3))], "must be a dict"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    for what in ("step", "cleared_at", "missed", "lr"):
        saved = state_copy(optimizer)
        del saved["param_groups"][0][what]
        with pytest.raises(ValueError, match=f"lacks {what}; it is damaged"):
            optimizer.load_state_dict(saved)
    saved = state_copy(optimizer)
    key, state = next((k, s) for k, s in saved["state"].items() if s)
    name = next(iter(state))
    saved["state"][key] = {n: v for n, v in state.items() if n != name}
    with pytest.raises(ValueError, match=f"{name} of .* is missing in the checkpoint"):
        optimizer.load_state_dict(saved)
    saved["state"][key] = {**state, name: [1.0, 2.0]}
    with pytest.raises(ValueError, match=f"{name} of .* is a list, not a tensor"):
        optimizer.load_state_dict(saved)
    for broken in (None, [], {"state": {}}):
        with pytest.raises(ValueError, match="must be what state_dict.. returned"):
            optimizer.load_state_dict(broken)
    wide = state_copy(optimizer)
    wide["state"] = {k: {n: v.double() if isinstance(v, Tensor) else v for n, v in s.items()} for k, s in wide["state"].items()}
    optimizer.load_state_dict(wide)  # an fp64 run's state in an fp32 run
    train(model, optimizer, 3, STEPS)
    train(twin, other, 3, STEPS)
    assert_same(model, twin)
