"""Adapters on disk: our files (exact, atomic, checked) and PEFT folders (loaded by the real ``peft``)."""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from _ranks import Ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize  # noqa: F401 (peft imports it lazily and warns)

import lowrank_kernels as lrk


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.dense(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 8)])
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def randomize(model: nn.Module, decoupled: str = "all") -> nn.Module:
    """Train the model, so to speak: every trainable value moves. ``decoupled``: "all", "none", or every "second" layer."""
    with torch.no_grad():
        for i, layer in enumerate(m for m in model.modules() if isinstance(m, lrk.LowRankLinear)):
            layer.lora_A.normal_(std=layer.in_features**-0.5)
            layer.lora_B.normal_(std=layer.rank**-0.5)
            if layer.method == "sds" and (decoupled == "all" or (decoupled == "second" and i % 2)):
                like = {"dtype": torch.float64}
                layer.q_a.copy_(torch.linalg.qr(torch.randn(layer.in_features, layer.rank, **like))[0].mT)
                layer.q_b.copy_(torch.linalg.qr(torch.randn(layer.out_features, layer.rank, **like))[0])
                layer.decoupled = True
        for name, p in model.named_parameters():
            if p.requires_grad and "lora" not in name:
                p.add_(torch.randn_like(p), alpha=0.1)
    return model


SETTINGS: dict[str, object] = {"rank": 2, "target_modules": r"layers\.\d", "modules_to_save": ["head"]}


def trained(base: nn.Module, method: str = "sds", decoupled: str = "all", **kwargs: object) -> nn.Module:
    model = lrk.adapt(copy.deepcopy(base), method, **SETTINGS | kwargs)
    randomize(model, decoupled)
    model(torch.randn(16, 8))  # moves BatchNorm's statistics
    return model.eval()


X = torch.linspace(-1, 1, 40).reshape(5, 8)


# --- our files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [True, False], ids=["base model", "adapted model"])
@pytest.mark.parametrize(("method", "decoupled"), [("lora", "none"), ("sds", "none"), ("sds", "second"), ("sds", "all")])
def test_round_trip_is_exact(tmp_path: Path, method: str, decoupled: str, fresh: bool) -> None:
    base = Net()
    model = trained(base, method, decoupled, dropout=0.25)
    lrk.save_adapter(model, tmp_path / "adapter.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.safetensors"]
    other = copy.deepcopy(base).eval()
    if not fresh:
        other = lrk.adapt(other, method, **SETTINGS | {"dropout": 0.25}).eval()
    assert lrk.load_adapter(other, tmp_path / "adapter.safetensors") is other
    assert torch.equal(other(X), model(X)) and not torch.allclose(other(X), base.eval()(X))
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in other.named_parameters()} == flags
    assert other.layers[0].dropout == 0.25 and other.layers[0].scale == model.layers[0].scale


def test_settings_that_are_numbers_of_numpy_can_be_saved(tmp_path: Path) -> None:
    base, file = Net(), tmp_path / "adapter.safetensors"
    model = trained(base, "lora", rank=np.int64(2), alpha=np.float32(4), dropout=np.float32(0.25))
    lrk.save_adapter(model, file)
    assert torch.equal(lrk.load_adapter(copy.deepcopy(base).eval(), file)(X), model(X))
    lrk.load_adapter(lrk.adapt(copy.deepcopy(base), **SETTINGS | {"alpha": 4}), file)  # the same scale


@pytest.mark.parametrize("keep", ["", "eval", "save"])
def test_statistics_of_a_frozen_batch_norm_are_the_base_models(tmp_path: Path, keep: str) -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    model = randomize(lrk.adapt(copy.deepcopy(base), rank=2, modules_to_save=["1"] if keep == "save" else None))
    model[1].train(keep != "eval")
    model(torch.randn(16, 8))
    lrk.save_adapter(model, tmp_path / "a")
    other = lrk.load_adapter(copy.deepcopy(base), tmp_path / "a")
    assert torch.equal(other.eval()(X), model.eval()(X)) == bool(keep)


def test_only_what_was_trained_is_saved() -> None:
    model = trained(Net())
    state = lrk.adapter_state_dict(model)
    factors = {f"layers.{i}.{k}" for i in (0, 1) for k in ("lora_A", "lora_B", "q_a", "q_b", "is_decoupled")}
    head = {n for n in model.state_dict() if n.startswith("head.")}
    assert state.keys() == factors | head and "head.norm.running_mean" in head
    assert all(not t.requires_grad for t in state.values())
    assert "head.out.bias" in lrk.adapter_state_dict(trained(Net(), "lora"))


def test_trained_biases_of_adapted_layers_keep_their_bare_names(tmp_path: Path) -> None:
    base = Net()
    model = trained(base)
    model.layers[0].base_layer.bias.requires_grad_(True)
    randomize(model)
    assert "layers.0.bias" in lrk.adapter_state_dict(model)
    lrk.save_adapter(model, tmp_path / "a")
    other = lrk.load_adapter(copy.deepcopy(base).eval(), tmp_path / "a")
    assert torch.equal(other(X), model(X)) and other.layers[0].base_layer.bias.requires_grad


def test_names_do_not_depend_on_wrappers(tmp_path: Path) -> None:
    model = trained(Net())
    expected = lrk.adapter_state_dict(model).keys()
    assert lrk.adapter_state_dict(nn.DataParallel(model)).keys() == expected
    assert lrk.adapter_state_dict(torch.compile(model, backend="eager")).keys() == expected
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    assert lrk.adapter_state_dict(model).keys() == expected
    lrk.save_adapter(model, tmp_path / "a")
    other = lrk.load_adapter(Net().eval(), tmp_path / "a")
    assert torch.equal(other.layers[0].lora_A, model.layers[0].lora_A)


def test_a_merged_model_saves_its_factors_and_a_merged_model_follows_a_load(tmp_path: Path) -> None:
    base = Net()
    model, other = trained(base), trained(base)
    y = model(X)
    lrk.merge(model)
    lrk.save_adapter(model, tmp_path / "a")
    lrk.merge(other)
    with torch.no_grad():
        other(X)
        lrk.load_adapter(other, tmp_path / "a")
        torch.testing.assert_close(other(X), y, rtol=1e-5, atol=1e-5)
    assert torch.equal(lrk.unmerge(other)(X), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    base = nn.Sequential(nn.Linear(8, 6)).to(dtype)
    model = randomize(lrk.adapt(copy.deepcopy(base), "sds", rank=2, dtype=dtype))
    lrk.save_adapter(model, tmp_path / "a")
    other = lrk.load_adapter(base, tmp_path / "a")
    assert other[0].lora_A.dtype == dtype and torch.equal(other(X.to(dtype)), model(X.to(dtype)))


@pytest.mark.parametrize("method", ["lora", "sds", "xs"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_was_cast_comes_back(tmp_path: Path, dtype: torch.dtype, method: str) -> None:
    base = nn.Sequential(nn.Linear(8, 6))
    model = lrk.adapt(copy.deepcopy(base), method, rank=2)
    if method == "xs":
        lrk.initialize(model, "svd", oversample=4)
        nn.init.normal_(model[0].lora_R)
    model.to(dtype)
    lrk.save_adapter(model, tmp_path / "a")
    other = lrk.load_adapter(copy.deepcopy(base).to(dtype), tmp_path / "a")
    mine, theirs = model.state_dict(), other.state_dict()
    assert {k: v.dtype for k, v in mine.items()} == {k: v.dtype for k, v in theirs.items()}
    assert torch.equal(other(X.to(dtype)), model(X.to(dtype)))
    assert lrk.load_adapter(base, tmp_path / "a")(X).isfinite().all()
    lrk.load_adapter(lrk.load_adapter(nn.Sequential(nn.Linear(8, 6)), tmp_path / "a"), tmp_path / "a")


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    model = trained(Net())
    lrk.save_adapter(model, path)
    first = path.read_bytes()
    calls: list[str] = []
    real_replace, real_fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("replace"), real_replace(*a)))
    lrk.save_adapter(randomize(model), path)
    assert calls == (["fsync", "replace", "fsync"] if os.name != "nt" else ["fsync", "replace"])
    second = path.read_bytes()
    assert second != first

    def fail(*args: object) -> None:
        raise OSError("disk full")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            with pytest.raises(OSError, match="disk full"):
                lrk.save_adapter(randomize(model), path)
        assert path.read_bytes() == second and [p.name for p in tmp_path.iterdir()] == [path.name]
    link = tmp_path / "link"
    link.symlink_to(path)
    lrk.save_adapter(randomize(model), link)
    assert link.is_symlink() and path.read_bytes() != second


@pytest.mark.skipif(os.name == "nt", reason="POSIX file modes")
def test_files_get_the_modes_that_the_umask_gives(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        lrk.save_adapter(trained(Net()), tmp_path / "a")
    finally:
        os.umask(previous)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def rewrite(path: Path, change=None, header=None, drop: str | None = None) -> None:
    """Write the file anew with changed tensors or settings."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if change is not None:
        tensors |= {name: t.contiguous() for name, t in change(tensors).items()}
    if drop is not None:
        del tensors[drop]
    if header is not None:
        settings = json.loads(metadata["lowrank_kernels"])
        header(settings)
        metadata["lowrank_kernels"] = json.dumps(settings)
    save_file(tensors, path, metadata)


A = "layers.1.lora_A"
FILES = {
    "damaged": (lambda p: p.write_bytes(p.read_bytes()[:-9]), ValueError, "damaged or not a safetensors file"),
    "damaged header": (lambda p: p.write_bytes(b"\xff" * 4 + p.read_bytes()[4:]), ValueError, "damaged or not a safetensors file"),
    "empty": (lambda p: p.write_bytes(b""), ValueError, "damaged or not a safetensors file"),
    "foreign": (lambda p: save_file({"w": torch.zeros(2)}, p), ValueError, "was not written by save_adapter"),
    "absent": (lambda p: p.unlink(), FileNotFoundError, "no file"),
    "newer": (lambda p: rewrite(p, header=lambda h: h.update(format_version=2)), ValueError, "format version 2, this release reads 1"),
    "no JSON": (lambda p: save_file(load_file(p), p, {"lowrank_kernels": "{"}), ValueError, "settings that cannot be used"),
    "no layers": (lambda p: rewrite(p, header=lambda h: h.pop("layers")), ValueError, "settings that cannot be used"),
    "method": (lambda p: rewrite(p, header=lambda h: h["layers"]["layers.1"].update(method="x")), ValueError, "method must be one of"),
    "no method": (lambda p: rewrite(p, header=lambda h: h["layers"]["layers.1"].pop("method")), ValueError, "settings that cannot be used"),
    "rank": (lambda p: rewrite(p, header=lambda h: h["layers"]["layers.1"].update(rank=3)), ValueError, "but its rank is 3"),
    "scale": (lambda p: rewrite(p, header=lambda h: h["layers"]["layers.1"].update(scale="1")), ValueError, "has the scale '1'"),
    "missing tensor": (lambda p: rewrite(p, drop="layers.1.q_b"), ValueError, "layers.1.q_b is missing"),
    "shape": (lambda p: rewrite(p, lambda t: {A: t[A][:, :-1]}), ValueError, r"lora_A.*\(2, 11\)"),
    "dtype": (lambda p: rewrite(p, lambda t: {"layers.1.lora_B": t["layers.1.lora_B"].half()}), (TypeError, ValueError), "float16"),
    "head dtype": (
        lambda p: rewrite(p, lambda t: {"head.out.bias": t["head.out.bias"].half()}),
        TypeError,
        "head.out.bias is torch.float16",
    ),
    "head shape": (lambda p: rewrite(p, lambda t: {"head.out.bias": torch.zeros(4)}), ValueError, r"head.out.bias has shape \(4,\)"),
    "flag": (
        lambda p: rewrite(p, lambda t: {"layers.1.is_decoupled": torch.full_like(t["layers.1.is_decoupled"], 7)}),
        ValueError,
        r"is_decoupled must be 0 or 1 \(.*\), got 7",
    ),
    "extra": (lambda p: rewrite(p, lambda t: {"head.more": torch.zeros(1)}), ValueError, "head.more"),
}


@pytest.mark.parametrize("fresh", [True, False], ids=["base model", "adapted model"])
@pytest.mark.parametrize("case", FILES)
def test_files_that_cannot_be_loaded_change_nothing(tmp_path: Path, case: str, fresh: bool) -> None:
    spoil, error, message = FILES[case]
    path = tmp_path / "a"
    lrk.save_adapter(trained(Net()), path)
    spoil(path)
    model = Net().eval() if fresh else trained(Net())
    before, structure = copy.deepcopy(model.state_dict()), str(model)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        lrk.load_adapter(model, path)
    after = model.state_dict()
    assert str(model) == structure and before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_files_for_another_model_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    lrk.save_adapter(trained(Net()), path)

    def refused(model: nn.Module, message: str) -> None:
        before, structure = copy.deepcopy(model.state_dict()), str(model)
        with pytest.raises(ValueError, match=message):
            lrk.load_adapter(model, path)
        assert str(model) == structure and all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    refused(nn.Sequential(nn.Linear(8, 8)), "the file adapts the Linear 'layers.0', the model has no such module")
    wrong = Net()
    wrong.layers[1] = nn.Linear(12, 9)
    refused(wrong, r"'layers.1' is 9 × 12 in the model")
    wrong.layers[1] = nn.Identity()
    refused(wrong, "the model has a Identity there")
    refused(trained(Net(), "lora"), "has method 'lora', the file 'sds'")
    refused(trained(Net(), rank=3), "has rank 3, the file 2")
    refused(trained(Net(), alpha=1), "has scale")
    refused(trained(Net(), target_modules=["0"]), "the file has an adapter for 'layers.1'")
    refused(
        trained(Net(), target_modules="all-linear", modules_to_save=["out"]), "the model has adapters that the file has not: head.dense"
    )
    refused(trained(Net(), modules_to_save=None), "unexpected: head.*modules_to_save")
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(ValueError, match="meta device"):
        lrk.load_adapter(empty, path)
    assert not any(isinstance(m, lrk.LowRankLinear) for m in empty.modules())


def test_state_dict_rules() -> None:
    base = Net()
    model, other = trained(base), trained(base)
    state = lrk.adapter_state_dict(model)
    with pytest.raises(ValueError, match=r"missing: layers.0.lora_A"):
        lrk.load_adapter_state_dict(other, {k: v for k, v in state.items() if k != "layers.0.lora_A"})
    with pytest.raises(ValueError, match=r"unexpected: more"):
        lrk.load_adapter_state_dict(other, state | {"more": torch.zeros(1)})
    with pytest.raises(TypeError, match="must map names to tensors"):
        lrk.load_adapter_state_dict(other, {"a": 1})
    with pytest.raises(ValueError, match="no adapter"):
        lrk.load_adapter_state_dict(Net(), state)
    with pytest.raises(ValueError, match="no adapter"):
        lrk.adapter_state_dict(Net())
    with pytest.raises(ValueError, match="no adapter"):
        lrk.save_adapter(Net(), "never-written")
    assert not torch.equal(other(X), model(X))
    kept = other.layers[0].lora_A.clone()
    partial = {k: v for k, v in state.items() if k != "layers.0.lora_A"} | {"more": torch.zeros(1)}
    assert lrk.load_adapter_state_dict(other, partial, strict=False) == (["layers.0.lora_A"], ["more"])
    assert torch.equal(other.layers[0].lora_A, kept) and torch.equal(other.layers[1].lora_A, model.layers[1].lora_A)
    assert lrk.load_adapter_state_dict(other, state) == ([], [])
    assert torch.equal(other(X), model(X))


def test_views_of_one_buffer_can_be_saved(tmp_path: Path) -> None:
    """Frameworks flatten parameters into one buffer; safetensors refuses tensors that share memory."""
    model = trained(Net())
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([p.detach().flatten() for p in parameters])
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.data = part.view_as(p)
    lrk.save_adapter(model, tmp_path / "a")
    lrk.export_peft(model, tmp_path / "peft")
    state = lrk.adapter_state_dict(model)
    saved = load_file(tmp_path / "a")
    assert saved.keys() == state.keys() and all(torch.equal(saved[k], state[k]) for k in state)


def test_layers_that_the_model_has_not_are_skipped_when_not_strict(tmp_path: Path) -> None:
    deep = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)).double()
    lrk.save_adapter(randomize(lrk.adapt(deep, "sds", rank=2, modules_to_save=["2"], target_modules=["0", "1"]), "all"), tmp_path / "a")
    shallow = nn.Sequential(nn.Linear(6, 6)).double()
    with pytest.raises(ValueError, match=r"the file adapts the Linear '1', the model has no such module; pass strict=False to skip it"):
        lrk.load_adapter(shallow, tmp_path / "a")
    assert type(shallow[0]) is nn.Linear
    with pytest.warns(UserWarning, match=r"load_adapter: skipped the adapters of 1: the model has no such modules"):
        lrk.load_adapter(shallow, tmp_path / "a", strict=False)
    assert torch.equal(shallow[0].lora_A, deep[0].lora_A) and torch.equal(shallow[0].lora_B, deep[0].lora_B)
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"the Linear '1', the model has a ReLU there"):
            lrk.load_adapter(nn.Sequential(nn.Linear(6, 6), nn.ReLU()).double(), tmp_path / "a", strict=strict)
    with pytest.raises(ValueError, match=r"none of the 2 Linear layers that the file adapts: 0, 1"):
        lrk.load_adapter(nn.ModuleDict({"other": nn.Linear(6, 6)}), tmp_path / "a", strict=False)


def test_a_folder_is_no_file_of_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=r"is a folder, not a file of save_adapter$"):
        lrk.load_adapter(Net(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(IsADirectoryError, match=r"holds a PEFT adapter: load it with peft\.PeftModel\.from_pretrained"):
        lrk.load_adapter(Net(), tmp_path)


# --- PEFT ------------------------------------------------------------------------------------------------------------


def tiny_bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=16
    )
    return transformers.BertForSequenceClassification(config).eval()


def tiny_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24
    )
    return transformers.LlamaForCausalLM(config).eval()


IDS = torch.arange(14).reshape(2, 7)


def load_with_peft(base: nn.Module, folder: Path) -> nn.Module:
    """As a user of PEFT does it, with every warning an error."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)  # between peft and transformers, not about the adapter
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("decoupled", ["none", "second", "all"])
@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
def test_peft_loads_the_export_and_computes_the_same(tmp_path: Path, make, decoupled: str, dtype: torch.dtype) -> None:
    base = make().to(dtype)
    head = ["classifier"] if make is tiny_bert else None
    model = lrk.adapt(copy.deepcopy(base), "sds", rank=3, alpha=5, dropout=0.1, modules_to_save=head)
    randomize(model, decoupled).eval()
    errors = lrk.export_peft(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert errors == dict.fromkeys((pair.name for pair in lrk.pairs(model)), 0.0)
    loaded = load_with_peft(base, tmp_path)
    y, theirs = model(IDS).logits, loaded(IDS).logits
    assert (y - base(IDS).logits).abs().max() > 0.01 * y.abs().max()
    torch.testing.assert_close(theirs, y, rtol=0, atol=64 * torch.finfo(dtype).eps * float(y.detach().abs().max()))
    deltas, their_deltas = lrk.delta_weights(model), lrk.delta_weights(loaded)
    assert deltas.keys() == their_deltas.keys()
    for name, delta in deltas.items():
        torch.testing.assert_close(their_deltas[name], delta, rtol=0, atol=16 * torch.finfo(dtype).eps * float(delta.abs().max()))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == (3 if decoupled == "none" else config["r"]) and config["lora_dropout"] == 0.1
    if decoupled == "all":
        assert config["r"] == 6 and config["lora_alpha"] == pytest.approx(2 * 5 * 3**0.5) and not config["rank_pattern"]
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        pair = lrk.pairs(model)[0]
        a = tensors[f"base_model.model.{pair.name}.lora_A.weight"]
        assert torch.equal(a[:3], pair.A) and torch.equal(a[3:], pair.layer.q_a)
    if decoupled == "second":
        assert set(config["rank_pattern"].values()) | {config["r"]} == {3, 6}


def test_export_of_layers_with_different_ranks_and_scales(tmp_path: Path) -> None:
    """Names that are one another's endings, ranks and scales that differ: PEFT must find each its own."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(8, 8)
            self.inner = nn.ModuleDict({"proj": nn.Linear(8, 8), "xproj": nn.Linear(8, 8)})
            self.rest = nn.ModuleDict({"proj": nn.Linear(8, 8)})

        def forward(self, x: Tensor) -> Tensor:
            return self.rest["proj"](self.inner["xproj"](self.inner["proj"](self.proj(x))))

    base = Nested()
    model = copy.deepcopy(base)
    model.proj = lrk.LowRankLinear(model.proj, 2, 0.5, method="sds")
    model.inner["proj"] = lrk.LowRankLinear(model.inner["proj"], 3, 0.25)
    model.inner["xproj"] = lrk.LowRankLinear(model.inner["xproj"], 3, 2.0)
    model.requires_grad_(False)
    randomize(model)
    lrk.export_peft(model, tmp_path)
    loaded = load_with_peft(base, tmp_path)
    assert {pair.name: (len(pair.A), pair.scale) for pair in lrk.pairs(loaded)} == {
        "base_model.model.proj.default": (4, 0.5),
        "base_model.model.inner.proj.default": (3, 0.25),
        "base_model.model.inner.xproj.default": (3, 2.0),
    }
    torch.testing.assert_close(loaded(X), model(X))


def test_saved_modules_travel_to_peft(tmp_path: Path) -> None:
    base = Net().eval()
    model = trained(base, modules_to_save=["head"])
    lrk.export_peft(model, tmp_path, "some/base-model")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base-model"
    assert config["modules_to_save"] == ["head.dense", "head.norm", "head.out"]
    torch.testing.assert_close(load_with_peft(base, tmp_path)(X), model(X))
    model.layers[0].base_layer.bias.requires_grad_(True)
    with pytest.raises(ValueError, match="modules_to_save cannot express"):
        lrk.export_peft(model, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_export_of_tied_layers_is_refused(tmp_path: Path) -> None:
    model = Net()
    model.again = model.layers[0]
    lrk.adapt(model, rank=2, target_modules=["0"])
    with pytest.raises(ValueError, match="under several names"):
        lrk.export_peft(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_layers_that_peft_would_pass_over_are_not_exported_in_silence(tmp_path: Path) -> None:
    """nn.MultiheadAttention reads its out_proj's weight, and the encoder's fast path those of its Linears: in PEFT's layers that is W0."""
    base = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)).eval()
    model = randomize(lrk.adapt(copy.deepcopy(base), rank=2, target_modules=["out_proj"]))
    with pytest.raises(ValueError, match=r"'0\.self_attn\.out_proj' is the out_proj of an nn\.MultiheadAttention.*[Ll]eave it out"):
        lrk.export_peft(model, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    model = randomize(lrk.adapt(copy.deepcopy(base), rank=2, target_modules=["linear1", "linear2"]))
    with pytest.warns(UserWarning, match=r"'0\.linear1' is in an nn\.TransformerEncoderLayer.*set_fastpath_enabled\(False\)"):
        lrk.export_peft(model, tmp_path)
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        x = torch.randn(2, 3, 8)
        torch.testing.assert_close(load_with_peft(base, tmp_path)(x), model(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def written(folder: Path, name: str, scale: float) -> Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    return scale * b @ a


@pytest.mark.parametrize("rank", [1, 3, 4, 5, 8, 99])
def test_export_of_a_lower_rank_is_the_best_one_and_says_its_error(tmp_path: Path, rank: int) -> None:
    base = nn.Sequential(nn.Linear(20, 24), nn.Linear(24, 9), nn.Linear(9, 7)).double()
    model = randomize(lrk.adapt(copy.deepcopy(base), "sds", rank=4), "all")
    model[1].decoupled = False
    errors = lrk.export_peft(model, tmp_path, rank=rank)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for name, delta in lrk.delta_weights(model).items():
        layer = model.get_submodule(name)
        full = 8 if layer.decoupled else 4
        assert full <= 8 and (f"^{name}" in config["rank_pattern"] or config["r"] == min(rank, full))
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        best = u[:, :rank] * s[:rank] @ vh[:rank]
        ours = written(tmp_path, name, layer.scale)
        torch.testing.assert_close(ours, best, rtol=0, atol=1e-12)
        exact = float((ours - delta).norm() / delta.norm())
        assert errors[name] == pytest.approx(exact, rel=1e-9, abs=1e-14)
        assert errors[name] == 0.0 if rank >= full else errors[name] >= 0
    for name, delta in lrk.delta_weights(load_with_peft(base, tmp_path)).items():
        torch.testing.assert_close(delta, written(tmp_path, name, model.get_submodule(name).scale), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rank_r_export_is_exact_straight_after_a_refresh(tmp_path: Path, dtype: torch.dtype) -> None:
    """With Aᵀ = Q_A R_A and B = Q_B R_B, ΔW = s Q_B (R_Aᵀ + R_B) Q_Aᵀ has rank r."""
    model = lrk.adapt(nn.Sequential(nn.Linear(40, 56), nn.Linear(56, 32)), "sds", rank=4, dtype=dtype)
    randomize(model)
    with torch.no_grad():
        for layer in model:
            (q_a, q_b), _ = [lrk.ops.grouped_qr([factor])[0][0] for factor in (layer.lora_A.mT, layer.lora_B)], None
            layer.q_a.copy_(q_a.mT)
            layer.q_b.copy_(q_b)
    eps = torch.finfo(dtype).eps
    errors = lrk.export_peft(model, tmp_path, rank=4)
    assert all(0 <= error < 8 * eps for error in errors.values()), errors
    for name, delta in lrk.delta_weights(model).items():
        layer = model.get_submodule(name)
        assert layer.decoupled
        ours = written(tmp_path, name, layer.scale)
        assert (ours - delta.double()).norm() < 8 * eps * delta.norm()
        r_a, r_b = layer.q_a.double() @ layer.lora_A.double().mT, layer.q_b.double().mT @ layer.lora_B.double()
        formula = layer.scale * layer.q_b.double() @ (r_a.mT + r_b) @ layer.q_a.double()
        assert (ours - formula).norm() < 16 * eps * formula.norm()


def test_export_errors(tmp_path: Path) -> None:
    model = trained(Net())
    for rank, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="rank must be"):
            lrk.export_peft(model, tmp_path / "x", rank=rank)
    with pytest.raises(ValueError, match="no adapter"):
        lrk.export_peft(Net(), tmp_path / "x")
    zero = lrk.adapt(nn.Sequential(nn.Linear(8, 8)), "lora", rank=3)
    assert lrk.export_peft(zero, tmp_path / "x", rank=2) == {"0": 0.0}  # ΔW = 0, and no 0/0
    assert not any(t.isnan().any() for t in load_file(tmp_path / "x" / "adapter_model.safetensors").values())


def test_saving_into_a_missing_folder_names_the_folder(tmp_path: Path) -> None:
    model = lrk.adapt(nn.Sequential(nn.Linear(4, 4)), rank=2)
    with pytest.raises(FileNotFoundError, match="save_adapter: no folder '.*/missing'; create it first"):
        lrk.save_adapter(model, tmp_path / "missing" / "adapter.safetensors")


@pytest.mark.parametrize("function", [lrk.save_adapter, lrk.export_peft])
def test_an_empty_path_is_refused(function, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"{function.__name__}: (path|folder) is empty; name"):
        function(lrk.adapt(nn.Sequential(nn.Linear(4, 4)), rank=2), "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [None, 5, [], b"x", "a\0b"])
@pytest.mark.parametrize("function", [lrk.save_adapter, lrk.load_adapter, lrk.export_peft])
def test_what_is_no_path_is_refused(function, path) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{function.__name__}: (path|folder) (must be a path|holds a NUL)"):
        function(lrk.adapt(nn.Sequential(nn.Linear(4, 4)), rank=2), path)


@pytest.mark.parametrize("name", [object(), 1j, b"x", float("nan"), True, {}, [1], "\ud800"])
def test_an_export_that_cannot_be_written_leaves_the_old_one(name: object, tmp_path: Path) -> None:
    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    lrk.export_peft(trained(Net()), tmp_path)
    before, other = files(), randomize(lrk.adapt(Net(), rank=2))
    with pytest.raises((TypeError, ValueError), match="base_model_name_or_path must be a str|surrogates"):
        lrk.export_peft(other, tmp_path, name)
    assert files() == before


def test_an_export_without_values_or_place_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="export_peft: .* is on the meta device and has no values to save"):
        lrk.export_peft(lrk.adapt(Net(), rank=2).to("meta"), tmp_path / "x")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="export_peft: folder '.*' cannot be made"):
        lrk.export_peft(trained(Net()), tmp_path / "file" / "x")


def test_states_and_flags_of_a_wrong_kind_are_refused() -> None:
    model = lrk.adapt(nn.Sequential(nn.Linear(4, 4)), rank=2)
    with pytest.raises(TypeError, match="load_adapter_state_dict: state must map names to tensors"):
        lrk.load_adapter_state_dict(model, {0: torch.ones(1)})
    for call, flag in ((lrk.load_adapter_state_dict, "strict"), (lrk.load_adapter, "strict"), (lrk.merge, "unload")):
        with pytest.raises(TypeError, match=f"{call.__name__}: {flag} must be True or False, got 'False'"):
            call(model, **({} if call is lrk.merge else {"path" if call is lrk.load_adapter else "state": {}}), **{flag: "False"})


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    model = lrk.adapt(nn.Sequential(nn.Linear(4, 4)), rank=2)
    with pytest.raises(IsADirectoryError, match="save_adapter: .* is a folder; name a file in it"):
        lrk.save_adapter(model, tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="export_peft: folder .* is no folder"):
        lrk.export_peft(model, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="FIFOs")
@pytest.mark.parametrize("linked", [False, True])
def test_a_fifo_stays_one(linked: bool, tmp_path: Path) -> None:
    model = lrk.adapt(nn.Sequential(nn.Linear(4, 4)), rank=2)
    for name in ("saved", "adapter_config.json"):
        fifo = tmp_path / f"{name}.fifo" if linked else tmp_path / name
        os.mkfifo(fifo)
        if linked:
            (tmp_path / name).symlink_to(fifo)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(OSError, match=": '.*' is no regular file, and writing would replace it; name another one"):
            lrk.save_adapter(model, tmp_path / name) if name == "saved" else lrk.export_peft(model, tmp_path)
        assert fifo.is_fifo() and sorted(tmp_path.iterdir()) == before


def files_of_shards(rank: int, world: int, base: nn.Module, file: Path) -> list[list[float]]:
    """Under FSDP2: what is refused, and the way out that the error names; the outputs of the sharded model."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model, whole, other = trained(base), lrk.adapt(copy.deepcopy(base), "sds", **SETTINGS), file.with_suffix(f".{rank}")
    lrk.save_adapter(whole, other)
    expected = model(X)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)), shard_placement_fn=lrk.shard_placement(model))
    for attempt in (
        lambda: lrk.save_adapter(model, file),
        lambda: lrk.export_peft(model, file.parent),
        lambda: lrk.export_peft(model, file.parent, rank=1),
    ):
        with pytest.raises(ValueError, match=r"is sharded \(a DTensor\), and no rank holds all of it. On every rank get the whole state"):
            attempt()
    with pytest.raises(ValueError, match=r"is sharded \(a DTensor\) in the model only; load it before fully_shard"):
        lrk.load_adapter(model, other)
    torch.testing.assert_close(model(X), expected)
    whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    if rank == 0:
        lrk.save_adapter(whole, file)
    return expected.tolist()


@pytest.mark.skipif(sys.platform == "win32" or not torch.distributed.is_available(), reason="needs gloo")
def test_shards_are_refused_and_the_error_says_what_to_do(ranks: Ranks, tmp_path: Path) -> None:
    base, file = Net(), tmp_path / "adapter.safetensors"
    outputs, _ = ranks(files_of_shards, base, file)
    torch.testing.assert_close(lrk.load_adapter(copy.deepcopy(base).eval(), file)(X), torch.tensor(outputs))
