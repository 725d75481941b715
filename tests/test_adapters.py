"""``adapt``: what it changes and what not, which layers it takes, and what it refuses."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from _adapters import IDS, Block, Net, adapted_net, names_of, randomize
from torch import Tensor, nn

import lowrank_kernels as lrk

BAD_RANK = "rank 9 is too large for"


@pytest.mark.parametrize("method", ["lora", "sds"])
def test_adapt_changes_no_output_and_no_weight(method: str) -> None:
    model = Net()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    expected = model(IDS)
    assert lrk.adapt(model, method, rank=2, target_modules=["query", "down", "unembed"]) is model
    assert torch.equal(model(IDS), expected)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, (tensor, value) in before.items():
        assert after[name] is tensor and torch.equal(tensor, value), name
    assert model.unembed.base_layer.weight is model.embedding.weight
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = ("blocks.0.query", "blocks.0.down", "blocks.1.query", "blocks.1.down", "unembed")
    assert trainable == {f"{layer}.{factor}" for layer in layers for factor in ("lora_A", "lora_B")}


def test_training_moves_the_factors_only() -> None:
    model = adapted_net(modules_to_save=["classifier"])
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    learning = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(IDS).square().sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, frozen[name]) if name in frozen else not torch.equal(p, learning[name]), name


@pytest.mark.parametrize(
    ("method", "alpha", "rank_scaling", "scale"),
    [
        ("lora", None, None, 8 / 4),  # PEFT's alpha
        ("sds", None, None, 4 / 2),  # the paper's: α = 4, s = α/√r
        ("lora", 16, "lora", 4.0),
        ("lora", 16, "rslora", 8.0),
        ("sds", 1.0, "lora", 0.25),
    ],
)
def test_scale(method: str, alpha: float | None, rank_scaling: str | None, scale: float) -> None:
    model = lrk.adapt(Block(), method, rank=4, alpha=alpha, rank_scaling=rank_scaling)
    assert {pair.scale for pair in lrk.pairs(model)} == {scale}


def test_target_rules() -> None:
    def adapted(**kwargs: object) -> list[str]:
        return names_of(lrk.adapt(Net(), rank=2, **kwargs))

    assert adapted(target_modules=["query"]) == ["blocks.0.query", "blocks.1.query"]
    assert adapted(target_modules=("1.query", "unembed")) == ["blocks.1.query", "unembed"]
    assert adapted(target_modules=r"blocks\.\d\.(up|down)") == [f"blocks.{i}.{n}" for i in (0, 1) for n in ("up", "down")]
    assert adapted(target_modules=r".*\.0\.value") == ["blocks.0.value"]
    every = [f"blocks.{i}.{n}" for i in (0, 1) for n in ("query", "value", "up", "down")]
    # No get_output_embeddings here: "all-linear" leaves out the classifier, and says that nobody trains it.
    with pytest.warns(UserWarning, match=r"'classifier' is neither adapted nor trained.*modules_to_save=\['classifier'\]"):
        assert adapted(target_modules="all-linear") == [*every, "unembed"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert adapted(target_modules="all-linear", modules_to_save=["classifier"]) == [*every, "unembed"]
        assert adapted(target_modules="all-linear", modules_to_save=["1", "classifier"]) == [*every[:4], "unembed"]
        assert adapted(target_modules=["query", "up"], modules_to_save=["up"]) == ["blocks.0.query", "blocks.1.query"]


def test_all_linear_leaves_out_the_output_embedding() -> None:
    class Language(Net):
        def get_output_embeddings(self) -> nn.Module:
            return self.unembed

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = names_of(lrk.adapt(Language(), rank=2))
    assert "unembed" not in found and "classifier" in found and len(found) == 9


def test_modules_to_save_train_in_full() -> None:
    model = lrk.adapt(Net(), rank=2, target_modules=["query"], modules_to_save=["classifier", "norm"])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert trainable == {f"{m}.{p}" for m in ("classifier", "blocks.0.norm", "blocks.1.norm") for p in ("weight", "bias")}


def test_a_module_with_two_names_is_adapted_once_and_stays_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.group = nn.ModuleList([self.first, nn.Linear(6, 6)])

        def forward(self, x: Tensor) -> Tensor:
            return self.group[1](self.group[0](self.first(x)))

    for targets in ("all-linear", ["first"], ["group.0"]):
        model = lrk.adapt(Tied().double(), rank=2, target_modules=targets)
        assert isinstance(model.first, lrk.LowRankLinear) and model.first is model.group[0]
        assert type(model.first.base_layer) is nn.Linear
        assert len(lrk.pairs(model)) == (2 if targets == "all-linear" else 1)
        x = torch.randn(3, 6, dtype=torch.float64)
        y = randomize(model)(x)
        lrk.merge(model, unload=True)
        assert model.first is model.group[0] and type(model.first) is nn.Linear
        torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"method": "dora"}, ValueError, "method must be one of 'lora', 'sds'"),
        ({"rank": 0}, ValueError, "rank must be ≥ 1, got 0"),
        ({"rank": 2.0}, TypeError, "rank must be an integer"),
        ({"rank": True}, TypeError, "rank must be an integer"),
        ({"rank": 9}, ValueError, BAD_RANK + r" 'blocks.0.query' \(8 × 8\)"),
        ({"rank": 9, "target_modules": ["up", "down", "1.value"]}, ValueError, BAD_RANK),
        ({"alpha": 0.0}, ValueError, "alpha must be positive"),
        ({"alpha": float("nan")}, ValueError, "alpha must be positive"),
        ({"alpha": "8"}, TypeError, "alpha must be a number"),
        ({"alpha": 10**400}, ValueError, "alpha must be finite, got a number beyond"),
        ({"alpha": 5e-324}, ValueError, "alpha must be larger"),
        ({"target_modules": torch.tensor(1)}, TypeError, "target_modules must be a list"),
        ({"rank_scaling": "sqrt"}, ValueError, "rank_scaling must be"),
        ({"rank_scaling": ""}, ValueError, "rank_scaling must be"),
        ({"dropout": 1.0}, ValueError, "dropout must be in"),
        ({"dropout": "0"}, TypeError, "dropout must be a number"),
        ({"dtype": torch.int8}, TypeError, "dtype must be one of"),
        ({"target_modules": ["qurey"]}, ValueError, "no module matches 'qurey'.*did you mean 'query'"),
        ({"target_modules": ["query", "zzz"]}, ValueError, "no module matches 'zzz'.*the model has 'query'"),
        ({"target_modules": []}, ValueError, "target_modules is empty"),
        ({"target_modules": [3]}, TypeError, "target_modules must contain module names"),
        ({"target_modules": None}, TypeError, "target_modules must be a list"),
        ({"target_modules": "query"}, ValueError, r"for a name write a list, \['query'\]"),
        ({"target_modules": "("}, ValueError, "not a regular expression"),
        ({"target_modules": ["norm"]}, TypeError, "'blocks.0.norm' is a LayerNorm; only nn.Linear"),
        ({"target_modules": ["embedding"]}, TypeError, "'embedding' is a Embedding"),
        ({"modules_to_save": "classifier"}, TypeError, "modules_to_save must be a list"),
        ({"modules_to_save": ["clasifier"]}, ValueError, "no module matches 'clasifier' of modules_to_save; did you mean 'classifier'"),
        ({"target_modules": ["query"], "modules_to_save": ["query"]}, ValueError, "matches nothing to adapt"),
    ],
)
def test_bad_arguments_change_nothing(kwargs: dict[str, object], error: type[Exception], message: str) -> None:
    model = Net()
    model.embedding.weight.requires_grad_(False)
    structure, flags = str(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lrk.adapt(model, **{"rank": 2} | kwargs)
    assert str(model) == structure and [p.requires_grad for p in model.parameters()] == flags


def test_models_that_cannot_be_adapted() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got dict"):
        lrk.adapt({})
    with pytest.raises(ValueError, match=r"itself a Linear.*nn.Sequential"):
        lrk.adapt(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"no nn.Linear to adapt"):
        lrk.adapt(nn.Sequential(nn.Conv1d(3, 3, 1)))
    model = adapted_net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"already has 8 low-rank adapters \(the first at 'blocks.0.query'\).*unload=True"):
        lrk.adapt(model, rank=2)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    lrk.merge(model, unload=True)
    lrk.adapt(model, rank=2, target_modules=["query"])  # and now it may
    with pytest.raises(ValueError, match="wrapped by DataParallel"):
        lrk.adapt(nn.DataParallel(Net()), rank=2)
    lazy = nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"'1.weight' has no shape yet.*run the model once"):
        lrk.adapt(lazy, rank=2)
    lazy(torch.randn(3, 4))
    lrk.adapt(lazy, rank=2)


def test_conv1d_of_transformers_is_refused_by_name() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    with pytest.raises(TypeError, match=r"'0' is a Conv1D; only nn\.Linear"):
        lrk.adapt(nn.Sequential(conv1d(4, 4), nn.Linear(4, 4)), rank=2, target_modules=["0"])
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), conv1d(4, 4), conv1d(4, 4), nn.Linear(4, 5))
    model.get_output_embeddings = lambda: model[4]
    with pytest.raises(
        ValueError,
        match=r"no nn\.Linear to adapt: 'all-linear' leaves out '4' as the output head.*; 2 Conv1D \(the first is '2'\) are no nn\.Linear",
    ):
        lrk.adapt(model, rank=2)
    lrk.adapt(model, rank=2, target_modules=["4"])


def test_an_adapted_peft_model_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ValueError, match="already has 2 low-rank adapters"):
        lrk.adapt(model, rank=2, target_modules=["value"])


def test_a_compiled_model_is_adapted_and_compiled_anew() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    expected = compiled(IDS)
    assert lrk.adapt(compiled, "sds", rank=2, target_modules=r"blocks\.\d\.query") is compiled
    assert torch.equal(compiled(IDS), expected)
    randomize(model)
    torch.testing.assert_close(compiled(IDS), model(IDS))
    assert not torch.allclose(compiled(IDS), expected)
    assert list(lrk.delta_weights(compiled)) == ["blocks.0.query", "blocks.1.query"]


def test_a_layer_that_was_compiled_by_itself_is_refused(tmp_path: Path) -> None:
    """Its wrapper goes on calling the Linear that it was made of."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    lrk.save_adapter(lrk.adapt(copy.deepcopy(model), rank=2), tmp_path / "adapter.safetensors")
    model[2] = torch.compile(model[2], backend="eager")
    for attempt in (lambda: lrk.adapt(model, rank=2), lambda: lrk.load_adapter(model, tmp_path / "adapter.safetensors")):
        with pytest.raises(ValueError, match=r"'2' was compiled by itself, .* would go on without the adapter"):
            attempt()
        assert all(p.requires_grad for p in model.parameters()) and not lrk.pairs(model)
    lrk.adapt(model, rank=2, target_modules=["0"])
    inner = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(8, 8)), backend="eager"))
    lrk.adapt(inner, rank=2)(torch.randn(3, 8)).sum().backward()
    assert all(p.grad is not None for p in inner.parameters() if p.requires_grad)


def test_public_names() -> None:
    wanted = {
        "adapt", "merge", "unmerge", "delta_weights", "pairs", "Pair", "save_adapter", "load_adapter", "adapter_state_dict",
        "load_adapter_state_dict", "export_peft", "ops", "LowRankLinear", "__version__",
    }  # fmt: skip
    assert wanted <= set(lrk.__all__) and all(hasattr(lrk, name) for name in lrk.__all__)
    assert callable(lrk.pairs) and callable(lrk.merge) and callable(lrk.adapt)
