"""What every optimizer takes as its arguments, of the constructor and in edited groups, and how it refuses or warns of the rest."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import math
import pickle
import re
import warnings
from collections.abc import Callable

import _optimizers
import numpy as np
import pytest
import torch
from _models import loss_of, make_model, trainable
from _optimizers import OPTIMIZERS, every_optimizer, run

import lowrank_kernels as lk
from lowrank_kernels.optim._shared.arguments import AdamWOptions
from lowrank_kernels.optim._shared.base import LowRankOptimizer


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
        "capturable": ["no", 2, None],
        "lr_ratio": [0.0, math.inf],
        "damping": [-1.0, math.inf, "x"],
        "momentum": [1.0],
        "order": ["Q"],
        "sweeps": [0],
        "proximal": [-1.0, math.inf],
        "momentum_rank": ["x", -1, 1.5, True],
        "metric_rank": ["x", -1, 1.5],
        "sketch_width": [None, 0],
    }
    saved = optimizer.state_dict()
    before = copy.deepcopy((model.state_dict(), saved["state"]))
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    for key, values in wrong.items():
        for value in values if key in group else ():
            kept, group[key] = group[key], value
            its_name = f"(?i){'learning rate|lr' if key == 'lr' else key.rstrip('s')}"
            with pytest.raises((TypeError, ValueError), match=its_name) as raised:
                optimizer.step()
            assert len(str(raised.value)) < 200
            group[key] = kept
            damaged = {**saved, "param_groups": [{**saved["param_groups"][0], key: value}, *saved["param_groups"][1:]]}
            with pytest.raises((TypeError, ValueError), match=its_name):
                optimizer.load_state_dict(damaged)
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    assert group["step"] == 2
    group["lr"] = -1e-19  # as a schedule may end
    optimizer.step()


@pytest.mark.parametrize(
    ("build", "edit"),
    [
        *((OPTIMIZERS["OPLoRA"], {key: value}) for key, value in (("momentum_mode", "naive"), ("momentum_rank", 2), ("metric", "kfac"))),
        *((OPTIMIZERS["OPLoRA-sketch"], {key: value}) for key, value in (("gradient", "dense"), ("sketch_width", 3))),
        (lambda m, **k: lk.OPLoRA(m, metric="kfac", **k), {"metric": None}),
        (lambda m, **k: lk.OPLoRA(m, metric="kfac", **k), {"metric_rank": 2}),
        (OPTIMIZERS["AltLoRAPlus"], {"order": "joint"}),
        (OPTIMIZERS["SDSLoRA"], {"start_steps": 20}),
        (lambda m, **k: lk.ODLoRA(m, total_steps=60, rounds=2, round_steps=3, **k), {"round_steps": 2}),
    ],
)
def test_what_says_which_state_there_is_cannot_be_edited_mid_run(build, edit: dict) -> None:
    model = make_model("ours")
    optimizer = build(model)
    ((key, value),) = edit.items()
    for optimizer_now, model_now in ((optimizer, model), copy.deepcopy((optimizer, model))):
        run(model_now, optimizer_now, 0, 2)
        saved = optimizer_now.state_dict()
        before = copy.deepcopy((model_now.state_dict(), saved["state"]))
        for loaded in (False, True):
            if loaded:
                optimizer_now.load_state_dict(saved)
            (group,) = optimizer_now.param_groups
            kept, group[key] = group[key], value
            with pytest.raises(
                ValueError, match=rf"{key} of param_groups\[0\] cannot change once the optimizer has stepped, from {kept!r} to"
            ):
                run(model_now, optimizer_now, 2, 3)
            group[key] = kept
        torch.testing.assert_close((model_now.state_dict(), optimizer_now.state_dict()["state"]), before, rtol=0, atol=0)
        run(model_now, optimizer_now, 2, 3)
        # A copy remembers what it was made with, too.
        copied_model, copied = copy.deepcopy((model_now, optimizer_now))
        copied.param_groups[0][key] = value
        with pytest.raises(ValueError, match=f"{key} of"):
            run(copied_model, copied, 3, 4)


def test_an_edit_of_what_is_fixed_names_the_argument_that_it_comes_from() -> None:
    model = make_model("ours")
    optimizer = lk.SDSLoRA(model, total_steps=40, warmup_steps=10)
    run(model, optimizer, 0, 1)
    optimizer.param_groups[0]["start_steps"] = 20
    with pytest.raises(ValueError, match=r"start_steps of param_groups\[0\] .* build a new optimizer with warmup_steps=…"):
        run(model, optimizer, 1, 2)


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
    assert [w.filename for w in ours] == [_optimizers.__file__] * (len(ours) - 1) + [__file__]


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


def test_numbers_of_numpy_are_taken_and_become_pythons() -> None:
    model = make_model("ours")
    number = np.int64(3)
    for optimizer in (
        lk.SDSLoRA(model, lr=np.float64(1e-3), total_steps=np.int64(1000), warmup_steps=number, phases=number),
        lk.ODLoRA(model, lr=np.float32(1e-3), total_steps=np.int64(1000), rounds=number, round_steps=number),
        lk.OPLoRA(model, lr=np.float64(1e-3), sweeps=number, momentum_rank=number, seed=number),
        lk.AdamW([{"params": trainable(model), "lr": np.float64(1e-3)}]),
        lk.AdamW(model, betas=(np.float64(0.9), np.float32(0.99)), eps=np.float32(1e-8)),
        lk.AdamW(model, lr=np.array(1e-3), betas=np.array([0.9, 0.99])),
        lk.AdamW([{"params": trainable(model), "betas": [np.float64(0.9), 0.99]}]),
    ):
        group = optimizer.param_groups[0]
        assert not any(isinstance(value, np.generic) for value in (*group.values(), *group["betas"]))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        torch.load(file, weights_only=True)
    with pytest.raises(TypeError, match="total_steps must be an integer, got 5.0"):
        lk.SDSLoRA(model, total_steps=np.float64(5))


def takes(build, *names: str) -> bool:
    """Whether a method has these arguments: not every one is an AdamW."""
    initialize = type(build(make_model("ours"))).__init__
    return set(names) <= set(inspect.signature(initialize).parameters) | set(AdamWOptions.__annotations__)


def test_what_all_take_is_typed_and_described() -> None:
    """``AdamWOptions`` is what type checkers, and the names that are proposed for misspelt ones, know of it."""
    parameters = inspect.signature(lk.AdamW).parameters.values()
    shared = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY} - {"method_defaults"}
    assert set(AdamWOptions.__annotations__) == shared
    assert all(re.search(rf"^ {{8}}(\w+, )*{name}(, \w+)*:", LowRankOptimizer.__doc__, re.MULTILINE) for name in shared)
    with pytest.raises(TypeError, match="did you mean model"):
        lk.AltLoRAPlus(make_model("ours"), modle=None)


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


@pytest.mark.parametrize("method", [lk.AltLoRA, lk.ScaledGD, lk.OPLoRA])
@pytest.mark.parametrize("given", [{"betas": (0.95, 0.999)}, {"eps": 1e-6}])
def test_adamws_numbers_are_refused_where_the_factors_have_none(method, given) -> None:
    with pytest.raises(TypeError, match=f"{method.__name__}: {next(iter(given))} is AdamW's.*the factors take momentum=.*in a group"):
        method(make_model("ours"), **given)


def test_integers_that_no_tensor_takes_do_not_tear_a_step() -> None:
    optimizer = lk.LoRARITE(model := make_model("ours"), eps=10**30)
    run(model, optimizer, 0, 1)
    assert isinstance(optimizer.param_groups[0]["eps"], float) and optimizer.state_dict()["state"]
    optimizer.param_groups[0]["eps"] = 10**30
    loss_of(model, 1).backward()
    with pytest.raises(ValueError, match="LoRARITE: eps must be finite, and within the range of fp32"):
        optimizer.step()
    assert optimizer.state_dict()["state"]


@pytest.mark.parametrize("given", ["gloo", 0, True, torch.distributed.GroupMember.NON_GROUP_MEMBER])
def test_what_is_no_group_of_this_process_is_refused(given) -> None:
    model = make_model("ours")
    for call in (lk.OPLoRA, lambda m, **k: lk.SDSLoRA(m, total_steps=9, **k), lk.average_gradients):
        with pytest.raises((TypeError, ValueError), match="(OPLoRA|SDSLoRA|average_gradients): process_group (must be|does not contain)"):
            call(model, process_group=given)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("method", ["OPLoRA", "SDSLoRA", "ODLoRA"])
def test_copies_communicate_with_nobody_where_the_original_does_not(method: str, copier: Callable) -> None:
    model = make_model("ours")
    optimizer = getattr(lk, method)(model, **({} if method == "OPLoRA" else {"total_steps": 400}), process_group=False)
    assert copier((model, optimizer))[1]._process_group is False
    optimizer._process_group = lambda: "a group, which no file can hold"
    assert copier((model, optimizer))[1]._process_group is None


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
