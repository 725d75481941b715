"""PEFT models, unmodified: patterns, rsLoRA, several adapters, saved modules, DoRA, quantized bases, files, and our kernels in them."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from _matrix import (
    RANK,
    TARGETS,
    Cell,
    assert_moved,
    assert_same,
    data,
    feature,
    loss_of,
    net,
    of_peft,
    ours,
    state_copy,
    train,
    values,
    with_peft,
)
from torch import Tensor, nn

import lowrank_kernels as lk
from lowrank_kernels.adapters.peft import DecoupledLoraConfig, KernelLinear, with_kernels
from lowrank_kernels.backends import call_counts

STEPS = 8


def outputs(model: nn.Module) -> Tensor:
    """In eval mode."""
    with torch.no_grad():
        return model.eval()(data(99)[0])


def assert_saves_and_loads(cell: Cell, model: peft.PeftModel, tolerance: float = 0.0, base: nn.Module | None = None) -> None:
    """What ``save_pretrained`` wrote, loaded by plain peft onto a fresh base, computes the same."""
    model.save_pretrained(cell.folder / "adapter")
    loaded = peft.PeftModel.from_pretrained(net() if base is None else base, cell.folder / "adapter")
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=tolerance, atol=tolerance)


@feature("PEFT: trains, saved by save_pretrained, loaded by from_pretrained: same outputs", of_peft)
def peft_round_trip(cell: Cell) -> None:
    model = with_peft(cell)
    before, optimizer = values(model), cell.optimizer(model)
    train(model, optimizer, 0, STEPS)
    assert_moved(before, model)
    assert_saves_and_loads(cell, model)


@feature("PEFT: resume from save_pretrained + optimizer.state_dict() = uninterrupted", of_peft)
def peft_resume(cell: Cell) -> None:
    whole, first = with_peft(cell), with_peft(cell)
    train(whole, cell.optimizer(whole), 0, 2 * STEPS)
    optimizer = cell.optimizer(first)
    train(first, optimizer, 0, STEPS)
    first.save_pretrained(cell.folder / "adapter")
    torch.save(optimizer.state_dict(), cell.folder / "optimizer.pt")
    second = peft.PeftModel.from_pretrained(net(), cell.folder / "adapter", is_trainable=True)
    resumed = cell.optimizer(second)
    resumed.load_state_dict(torch.load(cell.folder / "optimizer.pt", weights_only=True))
    train(second, resumed, STEPS, 2 * STEPS)
    assert_same(second, whole)


@feature("PEFT: rank_pattern, alpha_pattern, rsLoRA", of_peft)
def peft_patterns(cell: Cell) -> None:
    k = cell.method.peft_rank
    for options in (
        {"rank_pattern": {"down": 2 * k, "middle": k}, "alpha_pattern": {"down": 5}},
        {"use_rslora": True, "rank_pattern": {"up": 4 * k}},
    ):
        model = with_peft(cell, **options)
        found = {pair.name.split(".")[-2]: pair for pair in lk.pairs(model)}
        for name, layer in model.base_model.model.named_modules():
            if name in TARGETS:
                assert found[name].scale == layer.scaling["default"] and found[name].A.shape[0] == layer.r["default"]
        assert len({pair.scale for pair in found.values()}) > 1
        before = values(model)
        train(model, cell.optimizer(model), 0, STEPS)
        assert_moved(before, model)
        assert_saves_and_loads(cell, model)


@feature("PEFT: several adapters, switching, one optimizer per adapter", of_peft)
def peft_several_adapters(cell: Cell) -> None:
    model = with_peft(cell, modules_to_save=None)
    model.add_adapter("second", model.peft_config["default"])
    alone = with_peft(cell, modules_to_save=None)
    train(alone, cell.optimizer(alone), 0, STEPS)
    first = cell.optimizer(model)
    train(model, first, 0, STEPS // 2)
    model.set_adapter("second")
    second, frozen = cell.optimizer(model), {n: v for n, v in values(model).items() if ".default." in n}
    train(model, second, 0, STEPS)
    after = values(model)
    assert all(torch.equal(after[n], v) for n, v in frozen.items()), "the other adapter's optimizer left it alone"
    assert any(not torch.equal(after[n], after[n.replace(".second.", ".default.")]) for n in after if ".second." in n)
    model.set_adapter("default")
    train(model, first, STEPS // 2, STEPS)
    for name, value in alone.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@feature("PEFT: modules_to_save get AdamW in the same step()", of_peft)
def peft_saved_modules(cell: Cell) -> None:
    model = with_peft(cell)
    optimizer = cell.optimizer(model)
    head = model.base_model.model.head.modules_to_save["default"]
    twins = [nn.Parameter(p.detach().clone()) for p in head.parameters()]
    settings = {"lr": optimizer.param_groups[0]["lr"], "weight_decay": optimizer.param_groups[0]["weight_decay"]}
    yardstick = torch.optim.AdamW(twins, **settings)
    for step in range(STEPS):
        train(model, optimizer, step, step + 1)
        for twin, p in zip(twins, head.parameters(), strict=True):
            twin.grad = p.grad.clone()
        yardstick.step()
        for twin, p in zip(twins, head.parameters(), strict=True):
            torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-7)
    assert_saves_and_loads(cell, model)


@feature("PEFT: DoRA's magnitudes get AdamW, with one notice", of_peft)
def peft_dora(cell: Cell) -> None:
    model = with_peft(cell, use_dora=True)
    notices = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = cell.optimizer(model)
    notices = [str(w.message) for w in caught if "no pair of matrices" in str(w.message)]
    assert len(notices) == (1 if optimizer.requires_pairs else 0)
    assert all("3 adapter parameter(s)" in n and "lora_magnitude_vector" in n and "get AdamW" in n for n in notices)
    before = values(model)
    train(model, optimizer, 0, STEPS)
    after = values(model)
    assert all(not torch.equal(before[n], after[n]) for n in after if "magnitude" in n)
    assert_saves_and_loads(cell, model)


class PackedTensor(Tensor):
    """A weight that is no plain tensor: what a quantizing library may put there."""


class StandInQuantized(nn.Linear):
    """A Linear whose weight is int8 and whose forward dequantizes it."""

    @classmethod
    def of(cls, linear: nn.Linear) -> StandInQuantized:
        """The quantized version of ``linear``."""
        self = cls(linear.in_features, linear.out_features)
        self.step = linear.weight.detach().abs().max() / 127
        packed = (linear.weight.detach() / self.step).round().to(torch.int8).as_subclass(PackedTensor)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias
        return self

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.as_subclass(Tensor).to(x.dtype) * self.step, self.bias)


def quantized_net(kind: str) -> nn.Module:
    """The base model with quantized layers: bitsandbytes' NF4, or the stand-in."""
    model = net()
    for name in TARGETS:
        linear = getattr(model, name)
        if kind == "bitsandbytes":
            import bitsandbytes as bnb

            layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.float32, quant_type="nf4")
            layer.load_state_dict(linear.state_dict())
            layer = layer.to("cpu")  # quantizes
        else:
            layer = StandInQuantized.of(linear)
        setattr(model, name, layer)
    return model


@feature("quantized base (bitsandbytes NF4; a stand-in with a packed weight): PEFT's layers and ours")
def quantized_base(cell: Cell) -> None:
    kinds = ["stand-in"]
    try:
        import bitsandbytes  # noqa: F401

        kinds.append("bitsandbytes")
    except ImportError:
        pass
    for kind in kinds:
        models = [lk.adapt(quantized_net(kind), cell.method.adapter, rank=RANK, target_modules=TARGETS, modules_to_save=["head"])]
        if cell.method.adapter == "xs":
            lk.initialize(models[0], "svd")
        if kind == "bitsandbytes" and cell.method.peft:  # PEFT refuses weights that it does not know
            models.append(with_peft(cell, base=quantized_net(kind)))
        for model in models:
            codes = [m.weight.clone() for m in model.modules() if type(m).__name__ in ("Linear4bit", "StandInQuantized")]
            assert not codes or all(not c.is_floating_point() for c in codes)
            trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            optimizer = cell.optimizer(model)
            losses = train(model, optimizer, 0, STEPS)
            after = dict(model.named_parameters())
            for part in TARGETS:
                assert any(not torch.equal(v, after[n]) for n, v in trained.items() if part in n.split(".")), part
            assert torch.tensor(losses).isfinite().all()
            now = [m.weight for m in model.modules() if type(m).__name__ in ("Linear4bit", "StandInQuantized")]
            assert all(torch.equal(a, b) for a, b in zip(codes, now, strict=True)), "the base was touched"


@feature("PEFT: our kernels in its layers (with_kernels, DecoupledLoraConfig), files that plain peft reads", of_peft)
def kernels_in_peft(cell: Cell) -> None:
    if cell.method.adapter == "sds":
        config = DecoupledLoraConfig(rank=RANK, alpha=2.0 * RANK, rank_scaling="lora", target_modules=TARGETS, modules_to_save=["head"])
    else:
        config = with_kernels(peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, modules_to_save=["head"]))
    torch.manual_seed(0)
    base = net()
    torch.manual_seed(1)
    model, plain = peft.get_peft_model(base, config), with_peft(cell)
    plain.load_state_dict(model.state_dict())
    assert sum(isinstance(m, KernelLinear) for m in model.modules()) == len(TARGETS)
    before = sum(n for (op, _), n in call_counts().items() if op == "lora_linear")
    optimizer = cell.optimizer(model)
    train(model, optimizer, 0, STEPS)
    # OPLoRA watches lora_A and lora_B, and layers whose parts have hooks are computed by PEFT.
    calls = 0 if cell.name == "OPLoRA" else STEPS * len(TARGETS)
    assert sum(n for (op, _), n in call_counts().items() if op == "lora_linear") == before + calls
    train(plain, cell.optimizer(plain), 0, STEPS)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-3, atol=1e-4)
    # What KernelLinear hands on to PEFT's forward.
    alone = outputs(model)
    with model.disable_adapter():
        base_output = outputs(model)
    assert not torch.allclose(alone, base_output)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model), alone, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.save_pretrained(cell.folder / "adapter")
    text = (cell.folder / "adapter" / "adapter_config.json").read_text()
    assert '"peft_type": "LORA"' in text and "custom" not in text and "rank_scaling" not in text
    assert_saves_and_loads(cell, model, tolerance=1e-5)


@feature("PEFT: our adapters exported exactly (export_peft), loaded by peft: same outputs")
def export(cell: Cell) -> None:
    model = ours(cell)
    train(model, cell.optimizer(model), 0, STEPS)
    errors = lk.export_peft(model, cell.folder / "export")
    assert set(errors) == set(TARGETS) and not any(errors.values())
    loaded = peft.PeftModel.from_pretrained(net(), cell.folder / "export")
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-5, atol=1e-5)


@feature("PEFT: named parameters in place of the model, scale= told", of_peft)
def peft_named(cell: Cell) -> None:
    model, twin = with_peft(cell), with_peft(cell)
    scale = next(iter(lk.pairs(model))).scale
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    options = {"model": model} if cell.name == "OPLoRA" else {}
    if options:
        with pytest.raises(ValueError, match="the layer of .* is not known from its parameters.*pass the model"):
            cell.optimizer(named, scale=scale)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*train at half their rank")
        optimizer = cell.optimizer(named, scale=scale, **options)
    train(model, optimizer, 0, STEPS)
    other = cell.optimizer(twin)
    train(twin, other, 0, STEPS)
    assert_same(model, twin)
    with pytest.raises(ValueError, match="parameters"):
        other.load_state_dict(cell.optimizer(with_peft(cell, modules_to_save=None)).state_dict())
    other.load_state_dict(state_copy(optimizer))
    assert loss_of(model, 0).isfinite()
