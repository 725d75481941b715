"""``adapt``, ``LowRankLinear``, ``merge``, ``unmerge``, ``delta_weights``."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lrk
from lowrank_kernels.backends import registry

BAD_RANK = "rank 9 is too large for"


class Block(nn.Module):
    def __init__(self, d: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.query = nn.Linear(d, d)
        self.value = nn.Linear(d, d, bias=False)
        self.norm = nn.LayerNorm(d)
        self.up = nn.Linear(d, hidden)
        self.down = nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.value(x) * torch.tanh(self.query(x))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Two blocks, an embedding tied to the output, and a head."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, d)
        self.blocks = nn.ModuleList([Block(d), Block(d)])
        self.unembed = nn.Linear(d, 20, bias=False)
        self.unembed.weight = self.embedding.weight
        self.classifier = nn.Linear(d, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return torch.cat([self.unembed(x), self.classifier(x)], dim=-1)


def randomize(model: nn.Module, decoupled: bool = True) -> nn.Module:
    """Give every adapter a ΔW as large as a weight, decoupled with orthonormal Q where the layer can be."""
    for layer in model.modules():
        if isinstance(layer, lrk.LowRankLinear):
            with torch.no_grad():
                layer.lora_A.normal_(std=layer.in_features**-0.5)
                layer.lora_B.normal_(std=layer.rank**-0.5)
                if layer.method == "sds" and decoupled:
                    layer.q_a.copy_(torch.linalg.qr(torch.randn(layer.in_features, layer.rank))[0].mT)
                    layer.q_b.copy_(torch.linalg.qr(torch.randn(layer.out_features, layer.rank))[0])
                    layer.decoupled = True
    return model


def adapted_net(method: str = "sds", **kwargs: object) -> Net:
    model = Net().double()
    lrk.adapt(model, method, rank=2, **{"target_modules": ["query", "value", "up", "down"]} | kwargs)
    return randomize(model)


IDS = torch.arange(10).reshape(2, 5)


# --- adapt -----------------------------------------------------------------------------------------------------------


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


def names_of(model: nn.Module) -> list[str]:
    return [pair.name for pair in lrk.pairs(model)]


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
        ({"rank": 0}, ValueError, "rank must be at least 1"),
        ({"rank": 2.0}, TypeError, "rank must be an integer"),
        ({"rank": True}, TypeError, "rank must be an integer"),
        ({"rank": 9}, ValueError, BAD_RANK + r" 'blocks.0.query' \(8 × 8\)"),
        ({"rank": 9, "target_modules": ["up", "down", "1.value"]}, ValueError, BAD_RANK),
        ({"alpha": 0.0}, ValueError, "alpha must be positive"),
        ({"alpha": float("nan")}, ValueError, "alpha must be positive"),
        ({"alpha": "8"}, TypeError, "alpha must be a number"),
        ({"alpha": 10**400}, ValueError, "alpha must be positive and finite"),
        ({"alpha": 5e-324}, ValueError, "alpha must be larger"),
        ({"target_modules": torch.tensor(1)}, TypeError, "target_modules must be a list"),
        ({"rank_scaling": "sqrt"}, ValueError, "rank_scaling must be"),
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


def test_conv1d_of_transformers_is_refused_by_name() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    with pytest.raises(TypeError, match=r"'0' is a Conv1D; only nn\.Linear"):
        lrk.adapt(nn.Sequential(conv1d(4, 4), nn.Linear(4, 4)), rank=2, target_modules=["0"])


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


# --- the layer -------------------------------------------------------------------------------------------------------


def dense(layer: lrk.LowRankLinear, x: Tensor) -> Tensor:
    """What the layer computes, by its definition."""
    base = layer.base_layer
    a, b = layer.lora_A, layer.lora_B
    delta = layer.q_b @ a + b @ layer.q_a if layer.decoupled else b @ a
    return F.linear(x, base.weight + layer.scale * delta, base.bias)


@pytest.mark.parametrize("method", ["lora", "sds"])
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 1, 3, 8), (0, 8)], ids=str)
def test_layer_computes_its_definition(method: str, shape: tuple[int, ...]) -> None:
    layer = randomize(lrk.LowRankLinear(nn.Linear(8, 6).double().requires_grad_(False), 3, 0.7, method=method))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    inputs = [x, layer.lora_A, layer.lora_B]
    y, expected = layer(x), dense(layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.weight, layer.base_layer.weight + layer.delta_weight())


def test_hooks_and_replaced_forwards_of_the_base_layer_run() -> None:
    model = adapted_net()
    layer = model.blocks[0].query
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = layer(x)
    base_part = layer.base_layer(x)
    seen = []
    handle = layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output) or 2 * output)
    torch.testing.assert_close(layer(x), expected + base_part)
    assert len(seen) == 1
    with pytest.raises(ValueError, match=r"'blocks.0.query' cannot be merged: its Linear has hooks"):
        lrk.merge(model)
    assert not any(m.merged for m in model.modules() if isinstance(m, lrk.LowRankLinear))
    handle.remove()
    layer.base_layer.forward = lambda x: base_part - 1.0  # as accelerate's offloading does
    torch.testing.assert_close(layer(x), expected - 1.0)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_dropout"])
def test_hooks_and_replacements_in_a_peft_layer_run_with_our_kernels_too(part: str) -> None:
    """All that KernelLinear does not call is called where PEFT calls it: in the layer's own forward."""
    peft = pytest.importorskip("peft")
    from lowrank_kernels.adapters.peft import with_kernels

    def twice(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (2 * args[0],)

    def layer(kernels: bool) -> nn.Module:
        config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        torch.manual_seed(0)
        return peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), with_kernels(config) if kernels else config)

    x = torch.randn(4, 8)
    for change in (
        lambda m: m.register_forward_pre_hook(twice),
        lambda m: m.register_full_backward_hook(lambda module, grads, _: tuple(2 * g for g in grads)),
        lambda m: setattr(m, "forward", lambda x: 2 * type(m).forward(m, x)),
        lambda m: m.register_forward_hook(lambda module, args, y: 2 * y),
    ):
        results = []
        for kernels in (False, True):
            model, given = layer(kernels), x.clone().requires_grad_()
            change(getattr(model.base_model.model[0], part)["default"])
            out = model(given)
            results.append((out, *torch.autograd.grad(out.square().sum(), [given, *(p for p in model.parameters() if p.requires_grad)])))
        torch.testing.assert_close(*results)
    plain, model = layer(False), layer(True)
    for changed in (plain, model):
        changed.base_model.model[0].lora_dropout["default"] = nn.AlphaDropout(1.0)
    torch.testing.assert_close(model(x), plain(x))


def test_a_quantized_base_is_called_as_a_module() -> None:
    class Int8Linear(nn.Linear):
        """A weight-only int8 layer, as quantizing libraries make them."""

        def __init__(self, source: nn.Linear) -> None:
            super().__init__(source.in_features, source.out_features, device="meta")
            self.scales = source.weight.detach().abs().amax(dim=1) / 127
            quantized = (source.weight.detach() / self.scales[:, None]).round().to(torch.int8)
            self.weight, self.bias = nn.Parameter(quantized, requires_grad=False), source.bias

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.to(x.dtype) * self.scales[:, None], self.bias)

    model = nn.Sequential(Int8Linear(nn.Linear(8, 6)))
    x = torch.randn(4, 8, requires_grad=True)
    base = model(x)
    layer = randomize(lrk.adapt(model, "sds", rank=2))[0]
    assert layer.lora_A.dtype == torch.float32
    y = model(x)
    torch.testing.assert_close(y, base + x @ layer.delta_weight().mT)
    y.sum().backward()
    assert layer.lora_A.grad is not None and layer.lora_B.grad is not None and x.grad is not None
    with pytest.raises(ValueError, match="Int8Linear has hooks, a quantized weight"):
        lrk.merge(model)


def test_code_that_reads_the_weight_gets_the_effective_one() -> None:
    """nn.MultiheadAttention never calls its out_proj, and the encoder's fast path calls no Linear at all."""
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    randomize(lrk.adapt(encoder, "sds", rank=2))
    assert isinstance(encoder.self_attn.out_proj, lrk.LowRankLinear)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    slow = encoder(x)
    slow.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters() if p.requires_grad)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), slow)
        lrk.merge(encoder, unload=True)
        torch.testing.assert_close(encoder(x), slow)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_plain_gradients_with_dropout(reentrant: bool) -> None:
    model = adapted_net(dropout=0.3)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)

    def gradients(run) -> list[Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        y = x
        for block in model.blocks:
            y = run(block, y)
        y.square().sum().backward()
        return [y.detach()] + [p.grad for p in model.blocks.parameters() if p.requires_grad]

    plain = gradients(lambda block, y: block(y))
    again = gradients(lambda block, y: checkpoint(block, y, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    torch.manual_seed(4)
    assert not torch.equal(plain[0], model.blocks[1](model.blocks[0](x)))  # dropout was on


def test_gradient_accumulation_gives_the_gradient_of_the_whole_batch() -> None:
    model = adapted_net()
    ids = torch.randint(0, 20, (6, 5))
    model(ids).square().sum().backward()
    whole = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    for part in ids.split(2):
        model(part).square().sum().backward()
    parts = [p.grad for p in model.parameters() if p.requires_grad]
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("decoupled", [False, True], ids=["plain", "decoupled"])
def test_layer_compiles_without_graph_breaks(decoupled: bool, dropout: float) -> None:
    torch._dynamo.reset()  # the graphs of other tests' layers count
    layer = lrk.LowRankLinear(nn.Linear(8, 6).requires_grad_(False), 3, 0.7, method="sds", dropout=dropout)
    randomize(layer, decoupled)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 8, requires_grad=True)
    inputs = [x, layer.lora_A, layer.lora_B]
    results = []
    for function in (layer, compiled):
        torch.manual_seed(2)
        y = function(x)
        results.append([y, *torch.autograd.grad(y, inputs, torch.ones_like(y))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    layer.eval()
    layer.merged = True
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), dense(layer, x))
        layer.merged = False
        layer.decoupled = not decoupled  # what an optimizer does in the middle of training
        torch.testing.assert_close(compiled(x), dense(layer, x))


@pytest.mark.parametrize("change", ["train", "load", "write"])
def test_a_compiled_merged_model_sees_new_factors(change: str) -> None:
    torch._dynamo.reset()
    model = lrk.merge(adapted_net().eval())
    compiled = torch.compile(model, backend="aot_eager")
    layer = model.blocks[1].down
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS), model(IDS))
        if change == "load":
            model.load_state_dict({name: tensor + (0.5 if "lora_B" in name else 0) for name, tensor in model.state_dict().items()})
        else:
            model.train(change == "train")
            layer.lora_B.add_(0.5)
            model.eval()
        y = compiled(IDS)
        torch.testing.assert_close(y, lrk.unmerge(model)(IDS))


def test_autocast_bf16() -> None:
    model = randomize(lrk.adapt(Net(), "sds", rank=2, target_modules=["query", "down"]))
    expected = model(IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(IDS)
    assert y.dtype == torch.bfloat16
    scale = expected.abs().max()
    assert 0 < (y - expected).abs().max() < 0.05 * scale
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_keeps_fp32_factors(dtype: torch.dtype) -> None:
    model = randomize(lrk.adapt(nn.Sequential(nn.Linear(8, 6)).to(dtype), rank=2))
    assert model[0].lora_A.dtype == torch.float32
    x = torch.randn(4, 8, dtype=dtype)
    y = model(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert model[0].lora_A.grad.dtype == torch.float32
    lrk.adapt(half := nn.Sequential(nn.Linear(8, 6)).to(dtype), rank=2, dtype=dtype)
    assert half[0].lora_B.dtype == dtype


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_independent_and_findable(how: str, merged: bool) -> None:
    model = adapted_net().eval()
    if merged:
        lrk.merge(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        assert torch.equal(twin(IDS), model(IDS))
        lrk.unmerge(twin)
        twin.blocks[0].query.lora_B.zero_()
        assert not torch.equal(twin(IDS), model(IDS))
    assert names_of(twin) == names_of(model)
    from lowrank_kernels.pairs import owners

    assert owners()[id(twin.blocks[0].query.lora_A)] is twin.blocks[0].query


def test_state_dict_round_trip_restores_the_decoupled_flag() -> None:
    model = adapted_net()
    state = model.state_dict()
    twin = Net().double()
    lrk.adapt(twin, "sds", rank=2, target_modules=["query", "value", "up", "down"])
    for assign in (False, True):
        twin.load_state_dict(state, assign=assign)
        assert all(m.decoupled for m in twin.modules() if isinstance(m, lrk.LowRankLinear))
        assert torch.equal(twin(IDS), model(IDS))


def copied_in_place(twin: nn.Module, model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for x, y in zip([*twin.parameters(), *twin.buffers()], [*model.parameters(), *model.buffers()], strict=True):
            x.copy_(y)
    return twin


def averaged(twin: nn.Module, model: nn.Module) -> nn.Module:
    mean = torch.optim.swa_utils.AveragedModel(twin, use_buffers=True)
    mean.update_parameters(model)
    return mean


@pytest.mark.parametrize("follow", [copied_in_place, averaged])
def test_the_decoupled_flag_follows_its_buffer(follow: Callable[[nn.Module, nn.Module], nn.Module]) -> None:
    model = adapted_net()
    twin = randomize(copy.deepcopy(model))
    for layer in twin.modules():
        if isinstance(layer, lrk.LowRankLinear):
            layer.decoupled = False
    assert not torch.allclose(twin(IDS), model(IDS))
    assert torch.equal(follow(twin, model)(IDS), model(IDS))
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert torch.equal(torch.func.functional_call(randomize(adapted_net(), False), tensors, (IDS,)), model(IDS))


def test_the_decoupled_flag_is_read_once_per_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read waits for the device. DDP writes the buffers before every forward, and only its first time can bring news."""
    layer = randomize(lrk.LowRankLinear(nn.Linear(8, 6), 3, 0.7, method="sds"))
    reads, item = [], Tensor.item
    monkeypatch.setattr(Tensor, "item", lambda self: reads.append(None) or item(self))
    x = torch.randn(2, 8)
    layer(x), layer(x)
    assert len(reads) == 0  # the setter knows what it writes
    layer.is_decoupled.zero_()
    assert not layer.decoupled and len(reads) == 1
    layer(x), layer(x)
    assert len(reads) == 1
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", nn.Identity())
    for _ in range(3):
        layer.is_decoupled.fill_(1)
        layer(x)
        assert layer.decoupled and len(reads) == 2
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    assert layer.decoupled and len(reads) == 2


def test_meta_device_then_loading() -> None:
    model = adapted_net()
    with torch.device("meta"):
        empty = Net().double()
    empty.unembed.weight = empty.embedding.weight
    lrk.adapt(empty, "sds", rank=2, target_modules=["query", "value", "up", "down"])
    assert all(t.is_meta for t in empty.state_dict().values())
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(IDS), model(IDS))


def test_moving_to_another_dtype_moves_everything() -> None:
    model = adapted_net()
    y = model(IDS)
    model.float()
    layer = model.blocks[0].query
    assert {layer.lora_A.dtype, layer.q_a.dtype, layer.q_b.dtype, layer.base_layer.weight.dtype} == {torch.float32}
    assert layer.is_decoupled.dtype == torch.uint8
    torch.testing.assert_close(model(IDS), y.float(), rtol=1e-4, atol=1e-5 * float(y.detach().abs().max()))


def test_reset_and_bad_layers() -> None:
    layer = randomize(lrk.LowRankLinear(nn.Linear(8, 6), 3, 0.7, method="sds"))
    layer.reset_parameters()
    assert not layer.decoupled and layer.delta_weight().abs().max() == 0 and layer.lora_A.abs().max() > 0
    bound = 1 / 8**0.5  # Kaiming-uniform as nn.Linear's
    assert layer.lora_A.abs().max() <= bound
    with pytest.raises(ValueError, match="cannot be decoupled"):
        lrk.LowRankLinear(nn.Linear(8, 6), 3, 0.7).decoupled = True
    for bad in (
        *({"rank": rank} for rank in (7, 0, "2", 2.0, True)),
        *({"scale": scale} for scale in (float("nan"), float("inf"), "x", None, True, 10**400)),
        *({"dropout": dropout} for dropout in (1.0, "x", None)),
        *({"dtype": dtype} for dtype in (torch.int32, "float32")),
        *({"base_layer": base} for base in (None, nn.Conv2d(8, 6, 1), nn.Bilinear(8, 8, 6), Net())),
        *({"method": method} for method in ("x", ["lora"], None)),
    ):
        with pytest.raises((TypeError, ValueError), match=f"LowRankLinear: {next(iter(bad))} must be"):
            lrk.LowRankLinear(**{"base_layer": nn.Linear(8, 6), "rank": 3, "scale": 1.0} | bad)
    layer = lrk.LowRankLinear(nn.Linear(8, 6), 3, 0.7)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    a, b = torch.ones(3, 8), torch.ones(6, 3)
    for factors in ((None, None), (a, None), (a[:1], b), (a, b[:, :1])):
        with pytest.raises((TypeError, ValueError), match="LowRankLinear: .*start_from"):
            layer.start_from(*factors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_bare_attention_projections_are_named() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12)
    with pytest.warns(UserWarning, match=r"q, k and v of 1 nn.MultiheadAttention \(the first is 'self_attn'\)"):
        lrk.adapt(layer, rank=2)
    assert sorted(n for n, m in layer.named_modules() if isinstance(m, lrk.LowRankLinear)) == ["linear1", "linear2", "self_attn.out_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lrk.adapt(nn.TransformerEncoderLayer(8, 2, 12), rank=2, target_modules=["linear1"])
        lrk.adapt(nn.TransformerEncoderLayer(8, 2, 12), rank=2, modules_to_save=["self_attn"])


# --- merge, unmerge, delta_weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "sds"])
def test_merge_and_unmerge(method: str) -> None:
    model = adapted_net(method).eval()
    weights = {n: (p, p.clone()) for n, p in model.named_parameters()}
    expected = model(IDS)
    assert lrk.merge(model) is model
    calls = registry.call_counts().get(("lora_linear", "reference"), 0)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), expected, rtol=1e-12, atol=1e-12)
    assert registry.call_counts().get(("lora_linear", "reference"), 0) == calls  # one GEMM per layer, no adapter
    for name, p in model.named_parameters():
        assert p is weights[name][0] and torch.equal(p, weights[name][1])
    assert lrk.unmerge(model) is model
    assert torch.equal(model(IDS), expected)


def test_merge_leaves_a_tied_weight_alone() -> None:
    model = Net()
    randomize(lrk.adapt(model, rank=2, target_modules=["unembed"]))
    embedded = model.embedding(IDS).clone()
    lrk.merge(model)
    assert torch.equal(model.embedding(IDS), embedded)
    lrk.merge(model, unload=True)
    assert torch.equal(model.embedding(IDS), embedded) and model.unembed.weight is not model.embedding.weight


def test_training_a_merged_model_loses_nothing() -> None:
    """Training mode computes with the factors; what they became is merged anew at the next evaluation."""
    model, twin = (m := adapted_net(dropout=0.3)), copy.deepcopy(m)
    lrk.merge(model)
    losses = []
    for net in (model, twin):
        optimizer = torch.optim.SGD((p for p in net.parameters() if p.requires_grad), lr=1e-3)
        torch.manual_seed(0)
        for _ in range(2):
            loss = net.train()(IDS).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                losses.append((loss, net.eval()(IDS)))
    for (loss, merged), (expected_loss, expected) in zip(losses[:2], losses[2:], strict=True):
        assert torch.equal(loss, expected_loss)
        torch.testing.assert_close(merged, expected, rtol=1e-11, atol=1e-11)
    # In eval mode too, a gradient that is asked for is computed.
    model.eval()(IDS).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_merged_models_follow_loaded_values_and_moves() -> None:
    model, other = adapted_net().eval(), adapted_net().eval()
    lrk.merge(model)
    with torch.no_grad():
        model(IDS)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(IDS), other(IDS), rtol=1e-12, atol=1e-12)
        model.float()
        assert model(IDS).dtype == torch.float32
        torch.testing.assert_close(model(IDS), other(IDS).float(), rtol=1e-3, atol=1e-4 * float(other(IDS).abs().max()))
    assert {"blocks.0.query.lora_A", "blocks.0.query.q_a"} <= model.state_dict().keys()
    assert not any("merged" in key for key in model.state_dict())


def test_a_merged_model_follows_parameters_whose_contents_are_swapped() -> None:
    model, other = adapted_net().eval(), adapted_net().eval()
    lrk.merge(model)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.no_grad():
            model(IDS)
            model.load_state_dict(other.state_dict())
            torch.testing.assert_close(model(IDS), other(IDS), rtol=1e-12, atol=1e-12)
            assert model.float()(IDS).dtype == torch.float32
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_a_weight_merged_in_inference_mode_serves_outside_too() -> None:
    model = adapted_net().eval().requires_grad_(False)
    model.embedding.requires_grad_(True)  # so that autograd goes through the merged layers
    expected = torch.autograd.grad(model(IDS).sum(), model.embedding.weight)
    lrk.merge(model)
    with torch.no_grad():
        model.blocks[0].query.lora_A.mul_(1)  # merged anew
    with torch.inference_mode():
        model(IDS)
    torch.testing.assert_close(torch.autograd.grad(model(IDS).sum(), model.embedding.weight), expected, rtol=1e-10, atol=1e-10)


def test_a_merged_model_follows_factors_that_are_swapped_in() -> None:
    """``functional_call`` with a tensor that lives for the call: a later one may have its id, and the same version."""
    model = randomize(lrk.adapt(nn.Sequential(nn.Linear(8, 6)).double(), rank=2)).eval()
    x, b = torch.randn(4, 8, dtype=torch.float64), model[0].lora_B.detach()

    @torch.no_grad()
    def output(factor: Tensor) -> Tensor:
        return functional_call(model, {"0.lora_B": factor}, (x,))

    expected = output(3 * b)
    lrk.merge(model)
    first = 2 * b
    number = id(first)
    output(first)
    del first
    made = [3 * b]
    while id(made[-1]) != number and len(made) < 10_000:
        made.append(3 * b)
    torch.testing.assert_close(output(made[-1]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merged_weight_is_rounded_once(dtype: torch.dtype) -> None:
    model = randomize(lrk.adapt(nn.Sequential(nn.Linear(64, 48)).to(dtype), "sds", rank=4))
    layer = model[0]
    exact = layer.base_layer.weight.double() + layer.scale * (
        layer.q_b.double() @ layer.lora_A.double() + layer.lora_B.double() @ layer.q_a.double()
    )
    error = (layer.merged_weight().double() - exact).abs()
    assert layer.merged_weight().dtype == dtype
    assert (error <= torch.finfo(dtype).eps * exact.abs() / 2 + 32 * torch.finfo(torch.float32).eps * exact.abs().max()).all()


def test_unload_gives_plain_linears() -> None:
    model = adapted_net(modules_to_save=["classifier"]).eval()
    expected = model(IDS)
    bias = model.blocks[0].query.bias
    assert lrk.merge(model, unload=True) is model
    assert not any(isinstance(m, lrk.LowRankLinear) for m in model.modules())
    assert type(model.blocks[0].query) is nn.Linear and model.blocks[0].query.bias is bias and model.blocks[0].value.bias is None
    torch.testing.assert_close(model(IDS), expected, rtol=1e-12, atol=1e-12)
    plain = Net().double()
    plain.unembed.weight = nn.Parameter(plain.unembed.weight.clone())
    plain.load_state_dict(model.state_dict())  # the names of the unadapted model
    torch.testing.assert_close(plain(IDS), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="has no adapter"):
        lrk.merge(model)


def test_merge_errors() -> None:
    with pytest.raises(ValueError, match="merge: the model has no adapter"):
        lrk.merge(Net())
    with pytest.raises(ValueError, match="unmerge: the model has no adapter"):
        lrk.unmerge(Net())
    with pytest.raises(ValueError, match="delta_weights: the model has no low-rank adapters"):
        lrk.delta_weights(Net())
    with torch.device("meta"):
        model = lrk.adapt(Block(), rank=2)
    with pytest.raises(ValueError, match="meta device"):
        lrk.merge(model)


def test_delta_weights_are_what_the_adapters_add() -> None:
    model = adapted_net()
    plain = Net().double()
    plain.load_state_dict({n.replace(".base_layer", ""): t for n, t in model.state_dict().items() if "lora" not in n}, strict=False)
    deltas = lrk.delta_weights(model)
    assert list(deltas) == names_of(model)
    with torch.no_grad():
        for name, delta in deltas.items():
            plain.get_parameter(f"{name}.weight").add_(delta)
    torch.testing.assert_close(plain(IDS), model(IDS), rtol=1e-11, atol=1e-11)


def test_delta_weights_of_peft_models() -> None:
    peft = pytest.importorskip("peft")
    base = Net()
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["query", "up"], init_lora_weights=False)
    )
    deltas = lrk.delta_weights(model)
    assert list(deltas) == [f"blocks.{i}.{n}" for i in (0, 1) for n in ("query", "up")]
    for name, delta in deltas.items():
        torch.testing.assert_close(delta, base.get_submodule(name).get_delta_weight("default"))
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    assert torch.equal(lrk.delta_weights(model)["blocks.0.query"], deltas["blocks.0.query"])  # only "default" is active
    model.base_model.set_adapter(["default", "second"])
    both = sum(base.blocks[0].query.get_delta_weight(adapter) for adapter in ("default", "second"))
    torch.testing.assert_close(lrk.delta_weights(model)["blocks.0.query"], both)
    dora = peft.get_peft_model(Net(), peft.LoraConfig(r=3, use_dora=True, target_modules=["query"]))
    with pytest.raises(ValueError, match="its update is not s·B A"):
        lrk.delta_weights(dora)
    with pytest.raises(ValueError, match="another library's"):
        lrk.merge(dora)


def test_public_names() -> None:
    wanted = {
        "adapt", "merge", "unmerge", "delta_weights", "pairs", "Pair", "save_adapter", "load_adapter", "adapter_state_dict",
        "load_adapter_state_dict", "export_peft", "ops", "LowRankLinear", "__version__",
    }  # fmt: skip
    assert wanted <= set(lrk.__all__) and all(hasattr(lrk, name) for name in lrk.__all__)
    assert callable(lrk.pairs) and callable(lrk.merge) and callable(lrk.adapt)
