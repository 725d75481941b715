"""``explain``: which backend runs every operation of a model and an optimizer, and why."""

from __future__ import annotations

import pytest
import torch
from _models import make_model, trainable
from _optimizers import OPTIMIZERS, every_optimizer
from _ranks import Ranks
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels import backends, pairs


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


@pytest.mark.parametrize("build", [lk.AltLoRAPlus, lk.LoRARITE, lk.OPLoRA])
def test_explain_counts_matrices(build) -> None:
    model = lk.adapt(torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(7))), rank=2)
    steps = [c for c in lk.explain(build(model)).choices if c.operation.startswith("grouped_")]
    assert steps and {c.what for c in steps} == {"7 tensors"}


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


def trains_b_alone(name: str) -> bool:
    """Of the others, one has no B; freeze_idle says itself what is trained; the others move both or none."""
    return name not in ("LoRASB", "AltLoRAPlus-A-freeze", "SDSLoRA", "ODLoRA") and not name.startswith("OPLoRA")


@pytest.mark.parametrize(
    ("name", "trained"), [(name, trained) for name in EXPLAINED for trained in ("both", "B") if trained == "both" or trains_b_alone(name)]
)
@pytest.mark.parametrize("rank", [8, 130])
def test_explain_says_what_a_step_then_calls(name: str, rank: int, trained: str) -> None:
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


class Heads(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.o_proj = (nn.Linear(12, width, dtype=dtype) for width in (12, 12, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.q_proj(x) * self.v_proj(x))


def with_peft(kernels: bool, **options: object) -> nn.Module:
    peft = pytest.importorskip("peft")
    from lowrank_kernels.adapters.peft import with_kernels

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], **options)
    return peft.get_peft_model(Heads(), with_kernels(config) if kernels else config)


def shared(method: str, **options: object) -> nn.Module:
    model = lk.adapt(Heads(), method, rank=4, **options)
    if method == "sds":
        for pair in pairs(model):
            pair.layer.decoupled = True
    lk.share_inputs(model)
    return model


def merged() -> nn.Module:
    return lk.merge(lk.adapt(Heads(), rank=4).eval()).requires_grad_(False)


SAID = {
    "shared": (lambda: shared("lora"), {"lora_down", "lora_up", "lora_linear"}),
    "shared, decoupled": (lambda: shared("sds"), {"lora_down", "lora_up", "lora_linear"}),
    "shared, with dropout": (lambda: shared("lora", dropout=0.1), {"lora_linear"}),
    "bf16": (lambda: lk.adapt(Heads(torch.bfloat16), rank=4), {"lora_linear"}),
    "core": (lambda: shared("xs"), {"lora_linear"}),
    "merged": (merged, set()),
    "peft": (lambda: with_peft(True), {"lora_linear"}),
    "peft's own": (lambda: with_peft(False), set()),
    "peft, variant": (lambda: with_peft(True, use_dora=True), set()),
}


@pytest.mark.parametrize("name", SAID)
def test_explain_says_what_a_model_then_calls(name: str) -> None:
    build, operations = SAID[name]
    model = build()
    explanation = lk.explain(model)
    before = backends.call_counts()
    y = model(torch.randn(3, 12, dtype=torch.bfloat16 if name == "bf16" else torch.float32, requires_grad=True))
    y.square().sum().backward()
    called = {call for call, count in backends.call_counts().items() if count > before.get(call, 0) and call[0] != "dropout_mask"}
    assert {(choice.operation, choice.backend) for choice in explanation.choices} == called
    assert {operation.removesuffix("_backward") for operation, _ in called} == operations
    assert ("calls no operation of this package" in str(explanation)) == (not called) and "pass a model" not in str(explanation)
    assert "pass a model or an optimizer" in str(lk.explain())


def explained(rank: int, world: int, method: str, options: dict) -> set[tuple[str, str]]:
    """What ``explain`` says on one rank of two, of a model that FSDP2 has sharded; on the other one it is not called."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = lk.adapt(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)), "sds", rank=2)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)), shard_placement_fn=lk.shard_placement(model))
    optimizer = getattr(lk, method)(model, lr=1e-2, **options)

    def gather(*_: object, **__: object) -> None:
        raise AssertionError("explain() asks the other ranks")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_gather_into_tensor", gather)
        return {(choice.operation, choice.backend) for choice in lk.explain(optimizer).choices} if rank == 0 else set()


@pytest.mark.parametrize(("method", "options"), [("SDSLoRA", {"total_steps": 40}), ("ODLoRA", {"total_steps": 400}), ("ScaledAdamW", {})])
def test_one_rank_alone_is_explained_what_all_do(method: str, options: dict, ranks: Ranks) -> None:
    model = lk.adapt(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)), "sds", rank=2)
    optimizer = getattr(lk, method)(model, lr=1e-2, **options)
    whole = {(choice.operation, choice.backend) for choice in lk.explain(optimizer).choices}
    assert ranks(explained, method, options)[0] == whole


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
