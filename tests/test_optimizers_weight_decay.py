"""Weight decay of every optimizer: whom the default spares, and how it is edited."""

from __future__ import annotations

import pytest
import torch
from _models import make_model, pair_delta, trainable
from _optimizers import every_optimizer
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels import pairs


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


def test_a_bias_of_an_adapter_is_decayed_as_what_is_no_factor() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 6)), peft.LoraConfig(r=2, target_modules=["0"], lora_bias=True))
    for decay, of_factors, of_rest in ((None, 0.0, 0.01), (0.5, 0.5, 0.5)):
        for method in (lk.AdamW, lk.AltLoRA, lk.ScaledAdamW):
            with torch.no_grad():
                for p in trainable(model):
                    p.fill_(1.0).grad = torch.zeros_like(p)
            optimizer = method(model, lr=0.1, weight_decay=decay)
            optimizer.step(), optimizer.step()  # either factor's turn
            for name, p in model.named_parameters():
                if p.requires_grad:
                    turns = 1 if method is lk.AltLoRA and not name.endswith("bias") else 2
                    expected = (1 - 0.1 * (of_rest if name.endswith("bias") else of_factors)) ** turns
                    torch.testing.assert_close(p.detach(), torch.full_like(p, expected), rtol=1e-6, atol=0)


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
