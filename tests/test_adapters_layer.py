"""``LowRankLinear``: its definition, and how it stands up to hooks, copies, compilation, dtypes, state dicts and devices."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _adapters import IDS, Net, adapted_net, names_of, randomize
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lrk


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


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("decoupled", [False, True], ids=["plain", "decoupled"])
def test_a_traced_layer_holds_torchs_operations_alone(decoupled: bool, recorded: bool) -> None:
    layer = lrk.LowRankLinear(nn.Linear(8, 6).requires_grad_(False), 3, 0.7, method="sds")
    randomize(layer, decoupled)
    with torch.set_grad_enabled(recorded):
        traced = torch.jit.trace(layer, torch.randn(2, 4, 8))
    assert "lowrank_kernels::" not in str(traced.inlined_graph)
    x = torch.randn(3, 5, 8, requires_grad=True)
    results = []
    for function in (layer, traced):
        y = function(x)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), (x, layer.lora_A, layer.lora_B))])
    torch.testing.assert_close(*results)


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
    mean = swa_utils.AveragedModel(twin, use_buffers=True)
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


@pytest.mark.parametrize("remedy", ["eval", "eager"])
def test_a_compiled_average_says_that_it_is_of_the_other_kind(remedy: str) -> None:
    """No guard sees that an average's flag was written: its graph went on computing plain LoRA with decoupled factors."""
    model, plain = adapted_net(), plain_net()
    mean = swa_utils.AveragedModel(plain, use_buffers=True)
    compiled = torch.compile(mean, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), plain(IDS))
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS), plain(IDS))
        mean.update_parameters(model)
        with pytest.raises(RuntimeError, match=r"is_decoupled was written by others .* Call eval\(\)"):
            compiled(IDS)
        compiled.eval() if remedy == "eval" else mean(IDS)
        torch.testing.assert_close(compiled(IDS), model(IDS))


def test_flags_of_several_models_at_once_compile() -> None:
    layer = randomize(lrk.LowRankLinear(nn.Linear(8, 6), 3, 0.7, method="sds"))
    flags, x = torch.ones(2), torch.randn(2, 8)

    def ensemble(flags: Tensor, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda flag, x: torch.func.functional_call(layer, {"is_decoupled": flag}, (x,)))(flags, x)

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(ensemble, fullgraph=True, backend="aot_eager")(flags, x), layer(x))


def plain_net() -> nn.Module:
    """:func:`adapted_net` in its warm-up."""
    model = lrk.adapt(Net().double(), "sds", rank=2, target_modules=["query", "value", "up", "down"])
    return randomize(model, decoupled=False)


AVERAGES = {
    "EMA": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
    "EMA, one by one": {"avg_fn": swa_utils.get_ema_avg_fn(0.999)},
    "SWA": {},
    "SWA, many at once": {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("average", AVERAGES)
def test_averages_of_models_are_saved_and_copied_as_what_they_compute(average: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """From before the switch on: an integer flag was rounded to 0 where the average computed with bases, and the file held plain LoRA."""
    model = plain_net().to(dtype)
    mean = swa_utils.AveragedModel(model, use_buffers=True, **AVERAGES[average])
    for step in range(6):
        if step == 3:
            randomize(model.float()).to(dtype)
        mean.update_parameters(model)
    with torch.no_grad():  # as Lightning writes the average into the model
        for x, y in zip([*model.parameters(), *model.buffers()], [*mean.module.parameters(), *mean.module.buffers()], strict=True):
            x.data.copy_(y.data)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, lrk.LowRankLinear)}
    assert all(layer.decoupled and layer.is_decoupled > 0 for layer in (*layers.values(), mean.module.blocks[0].query))
    lrk.save_adapter(model, tmp_path / "adapter.safetensors")
    twins = [copy.deepcopy(model), copy.deepcopy(mean).module, adapted_net().to(dtype), adapted_net().to(dtype)]
    twins[2].load_state_dict(model.state_dict())
    lrk.load_adapter(twins[3], tmp_path / "adapter.safetensors")
    for twin in twins:
        deltas = lrk.delta_weights(twin)
        assert all(torch.equal(deltas[name], layer.delta_weight()) for name, layer in layers.items())
    lrk.export_peft(model, tmp_path / "peft")
    exported = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    a, b = (exported[f"base_model.model.blocks.0.query.lora_{side}.weight"] for side in "AB")
    query = layers["blocks.0.query"]
    assert torch.equal(a, torch.cat([query.lora_A, query.q_a])) and torch.equal(b, torch.cat([query.q_b, query.lora_B], dim=1))


@pytest.mark.parametrize("asks", ["state_dict", "adapter_state_dict", "delta_weights", "deepcopy", "merge", "export"])
def test_a_flag_that_was_written_unseen_is_seen_by_what_saves_or_copies(asks: str, tmp_path: Path) -> None:
    model = adapted_net()
    model(IDS)
    plain = plain_net()
    for x, y in zip([*model.parameters(), *model.buffers()], [*plain.parameters(), *plain.buffers()], strict=True):
        x.data.copy_(y.data)
    {
        "state_dict": model.state_dict,
        "adapter_state_dict": lambda: lrk.adapter_state_dict(model),
        "delta_weights": lambda: lrk.delta_weights(model),
        "deepcopy": lambda: copy.deepcopy(model),
        "merge": lambda: lrk.unmerge(lrk.merge(model)),
        "export": lambda: lrk.export_peft(model, tmp_path / "peft"),
    }[asks]()
    assert torch.equal(model(IDS), plain(IDS)) and not model.blocks[0].query.decoupled


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
    assert layer.is_decoupled.dtype == torch.float32 and layer.decoupled
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
    hook = layer.base_layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="start_from needs plain LoRA over a plain"):
        layer.start_from(a, b)
    hook.remove()
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


def test_stacked_experts_are_named() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(8, 4)
            self.experts = nn.Module()
            self.experts.down_proj = nn.Parameter(torch.zeros(4, 8, 6))
            self.position = nn.Parameter(torch.zeros(1, 5, 8))
            self.mix = nn.Conv1d(8, 8, 3)

    model = Mixture()
    with pytest.warns(UserWarning, match=r"stacks of matrices, .*\(1, the first is 'experts.down_proj', \(4, 8, 6\)\)"):
        lrk.adapt(model, rank=2)
    assert not model.experts.down_proj.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lrk.adapt(Mixture(), rank=2, target_modules=["router"])
        lrk.adapt(Mixture(), rank=2, modules_to_save=["experts"])
        del (dense := Mixture()).experts
        lrk.adapt(dense, rank=2)


def test_a_layer_made_by_hand_leaves_its_base_as_trainable_as_it_was() -> None:
    """As the docstring says: freezing is what ``adapt`` does, when nothing can fail any more."""
    for wanted in (True, False):
        layer = lrk.LowRankLinear(nn.Linear(4, 4).requires_grad_(wanted), 2, 1.0)
        assert {name: p.requires_grad for name, p in layer.base_layer.named_parameters()} == {"weight": wanted, "bias": wanted}
    model = lrk.adapt(nn.Sequential(nn.Linear(4, 4)), rank=2)
    assert not any(p.requires_grad for p in model[0].base_layer.parameters())
    assert "by hand does not" in " ".join((lrk.LowRankLinear.__doc__ or "").split())
