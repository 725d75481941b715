"""The preconditioned methods on PEFT's layers: scales, ranks, several adapters, and what is no pair of factors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import peft
import pytest
import torch
from _preconditioned import every_method
from torch import Tensor, nn

import lowrank_kernels as lk
from benchmarks.naive.preconditioned import AltLoRALayer
from lowrank_kernels import (
    AltLoRAPlus,
    Pair,
    adapt,
    pairs,
)
from lowrank_kernels.optim._shared.base import LowRankOptimizer


class Mixed(nn.Module):
    """An embedding, a convolution, linear layers of different widths and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.convolution = nn.Embedding(30, 16), nn.Conv1d(16, 12, 3, padding=1)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 14), nn.Linear(14, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.convolution(self.embedding(tokens).mT).mT.tanh()
        return self.head(self.down(self.up(x).tanh()).tanh().mean(dim=1))


def peft_model(targets: list[str], adapters: int = 1, **options) -> nn.Module:
    torch.manual_seed(0)
    # PEFT trains one copy of a head at a time.
    head = ["head"] if adapters == 1 else None
    config = peft.LoraConfig(target_modules=targets, modules_to_save=head, **{"r": 4, "lora_alpha": 6, **options})
    model = peft.get_peft_model(Mixed(), config)
    for index in range(1, adapters):
        model.add_adapter(f"extra{index}", config)
    return model


def train_peft(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 30, (32, 6), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), tokens[:, 0] % 3)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses


def follow(model: nn.Module, optimizer: torch.optim.Optimizer, scales: dict[str, float], steps: int = 12) -> None:
    """Train, and hold every pair of ``scales`` to the naive method, which sees the same gradients."""
    found: dict[str, Pair] = {pair.name.removeprefix("base_model.model."): pair for pair in pairs(model)}
    options = {"lr": 1e-2, "damping": 1e-3}
    naive = {n: AltLoRALayer(found[n].A.detach().clone(), found[n].B.detach().clone(), s, plus=True, **options) for n, s in scales.items()}
    for step in range(steps):
        train_peft(model, optimizer, step, step + 1)
        for name, layer in naive.items():
            layer.step(found[name].A.grad, found[name].B.grad)
            torch.testing.assert_close(found[name].A.detach(), layer.A, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found[name].B.detach(), layer.B, rtol=1e-4, atol=1e-6)


def test_peft_model_with_different_ranks_and_scales() -> None:
    model = peft_model(["up", "down"], rank_pattern={"down": 2}, alpha_pattern={"down": 5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = AltLoRAPlus(model, lr=1e-2, damping=1e-3)
    follow(model, optimizer, {"up.default": 6 / 4, "down.default": 5 / 2})


def test_peft_named_parameters_take_the_scale_that_is_told() -> None:
    model, twin = peft_model(["up", "down"]), peft_model(["up", "down"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = AltLoRAPlus(model.named_parameters(), lr=1e-2, damping=1e-3, scale=1.5)
    losses = train_peft(model, optimizer, 0, 15)
    assert losses == train_peft(twin, AltLoRAPlus(twin, lr=1e-2, damping=1e-3), 0, 15)
    with pytest.warns(UserWarning, match="scale is not known from parameters alone, taking scale=1"):
        AltLoRAPlus(model.named_parameters(), lr=1e-2)


def test_peft_frozen_adapters_are_skipped_and_several_trained() -> None:
    model = peft_model(["up", "down"], adapters=3)
    model.base_model.set_adapter(["default", "extra2"])
    optimizer = AltLoRAPlus(model, lr=1e-2, damping=1e-3)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert any("extra1" in name for name in frozen)
    follow(model, optimizer, {f"{layer}.{adapter}": 1.5 for layer in ("up", "down") for adapter in ("default", "extra2")})
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("named", [False, True])
def test_peft_embeddings_convolutions_and_dora_are_left_to_adamw_with_one_notice(named: bool) -> None:
    model = peft_model(["embedding", "convolution", "up"], use_dora=True)
    with pytest.warns(UserWarning) as caught:
        optimizer = AltLoRAPlus(model.named_parameters() if named else model, lr=1e-2, damping=1e-3, **({"scale": 1.5} if named else {}))
    (notice,) = [w for w in caught if "no pair of matrices" in str(w.message)]
    text = str(notice.message)
    # A, B and magnitude of the embedding and of the convolution, and the magnitude of the linear layer.
    assert text.startswith("AltLoRAPlus: 7 adapter parameter(s)") and "get AdamW" in text and notice.filename == __file__
    assert "embedding" in text and "head" not in text
    names = [n for n, p in model.named_parameters() if p.requires_grad and "up.lora_A" not in n and "up.lora_B" not in n]
    others = [model.get_parameter(n) for n in names]
    twins = [nn.Parameter(p.detach().clone()) for p in others]
    decays = [0.0 if "lora_" in n else 0.01 for n in names]
    yardstick = torch.optim.AdamW(
        [{"params": [twin], "weight_decay": decay} for twin, decay in zip(twins, decays, strict=True)],
        lr=1e-2,
    )
    for step in range(5):
        train_peft(model, optimizer, step, step + 1)
        for p, twin in zip(others, twins, strict=True):
            twin.grad = None if p.grad is None else p.grad.clone()
        yardstick.step()
        for p, twin in zip(others, twins, strict=True):
            torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-7)
    assert not any("transport" in optimizer.state[p] for p in others)


@every_method
def test_peft_and_our_layers_train_alike(method: type[LowRankOptimizer]) -> None:
    theirs = peft_model(["up", "down"])
    ours = peft_model(["up", "down"]).unload()
    adapt(ours, method="lora", target_modules=["up", "down"], rank=4, alpha=6)
    ours.head = copy.deepcopy(theirs.base_model.model.head.modules_to_save["default"])
    with torch.no_grad():
        for mine, other in zip(pairs(ours), pairs(theirs), strict=True):
            mine.A.copy_(other.A)
    losses = train_peft(theirs, method(theirs, lr=1e-2, damping=1e-3), 0, 12)
    torch.testing.assert_close(train_peft(ours, method(ours, lr=1e-2, damping=1e-3), 0, 12), losses, rtol=2e-4, atol=1e-5)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 12, 16))
        self.is_transposed = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->bo", x, self.w)


def _blocks(side: str) -> dict:
    from peft.tuners.lora.config import BdLoraConfig

    return {"use_bdlora": BdLoraConfig(**{f"target_modules_bd_{side}": ["0"]}, nblocks=2, match_strict=False)}


def _kasa() -> dict:
    return {"kasa_config": peft.tuners.lora.config.KasaConfig()}


@every_method
@pytest.mark.parametrize("options", [lambda: _blocks("a"), lambda: _blocks("b"), _kasa], ids=["A in blocks", "B in blocks", "KaSA"])
def test_variants_that_take_no_product_are_refused_or_left_to_adamw(method: type[LowRankOptimizer], options: Callable[[], dict]) -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 16)), peft.LoraConfig(r=4, target_modules=["0"], **options()))
    with pytest.raises(ValueError, match=r"lora_A.default.weight, .* ΔW is not the product sBA"):
        method(model)
    model = lk.adapt(nn.Sequential(model, nn.Linear(16, 8)), rank=2, target_modules=["1"])
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    with pytest.warns(UserWarning, match="variants whose ΔW is not sBA"):
        assert [pair.name for pair in method(model)._pairs] == ["1"]


@every_method
@pytest.mark.parametrize("named", [False, True])
def test_factors_of_other_methods_are_no_pairs(named: bool, method: type[LowRankOptimizer]) -> None:
    """Their ΔW is ``B diag(…) A``, and their names are like LoRA's."""
    for config in (peft.AdaLoraConfig(init_r=2, total_step=100, target_modules=["0"]), peft.DeloraConfig(r=2, target_modules=["0"])):
        model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 16)), config)
        with pytest.raises(ValueError, match="found no pair of low-rank factors"):
            method(list(model.named_parameters()) if named else model)
        assert not lk.AdamW(model)._pairs
    with pytest.raises(ValueError, match=r"lora_A.default, .*train variants whose ΔW is not sBA \(AdaLoRA\) with AdamW"):
        method(peft.get_peft_model(nn.Sequential(nn.Linear(12, 16)), peft.AdaLoraConfig(total_step=100, target_modules=["0"])))


@every_method
def test_experts_of_one_parameter_are_no_pair(method: type[LowRankOptimizer]) -> None:
    config = peft.LoraConfig(r=4, target_modules=["1"], target_parameters=["0.w"])
    model = peft.get_peft_model(nn.Sequential(Experts(), nn.Linear(16, 8)), config)
    with pytest.warns(UserWarning, match="variants whose ΔW is not sBA"):
        optimizer = method(model)
    assert [pair.name for pair in optimizer._pairs] == ["base_model.model.1.default"]
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 12)).square().mean().backward()
        optimizer.step()


@every_method
def test_rank_0_is_no_pair_and_scale_0_is_refused(method: type[LowRankOptimizer]) -> None:
    shapes = {"a.lora_A": (0, 6), "a.lora_B": (5, 0), "b.lora_A": (2, 6), "b.lora_B": (5, 2)}
    named = [(f"{name}.weight", nn.Parameter(torch.randn(shape))) for name, shape in shapes.items()]
    with pytest.warns(UserWarning, match="a.lora_A.weight, a.lora_B.weight"):
        optimizer = method(named, scale=1.0)
    for _, p in named:
        p.grad = torch.randn_like(p)
    optimizer.step()
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5)), peft.LoraConfig(r=2, lora_alpha=0, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"\.0\.default has s = 0"):
        method(model)
