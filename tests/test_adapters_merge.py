"""``merge``, ``unmerge``, ``unload`` and ``delta_weights``."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from _adapters import IDS, Block, Net, adapted_net, names_of, randomize
from torch import Tensor, nn
from torch.func import functional_call

import lowrank_kernels as lrk
from lowrank_kernels.backends import registry


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


def test_delta_weights_name_the_adapters_that_they_leave_out() -> None:
    peft = pytest.importorskip("peft")

    def adapted(*targets: str) -> nn.Module:
        model = nn.ModuleDict({"conv": nn.Conv2d(3, 3, 3), "embedding": nn.Embedding(5, 4), "linear": nn.Linear(4, 4)})
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(targets)))

    assert list(lrk.delta_weights(adapted("conv", "embedding", "linear"))) == ["linear"]
    for target, factor in (("conv", "lora_A.default.weight"), ("embedding", "lora_embedding_A.default")):
        with pytest.raises(ValueError, match=rf"no low-rank adapter of a linear layer.*{target}\.{factor}.*left out"):
            lrk.delta_weights(adapted(target))


# --- heads that transformers ties to the embeddings ------------------------------------------------------------------


def tied_model(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True)).eval()
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, max_position_embeddings=16)).eval()  # a tied bias, too


@pytest.mark.parametrize(("kind", "head"), [("llama", "lm_head"), ("bert", "cls.predictions.decoder")])
def test_an_adapted_head_stays_tied_and_is_saved(kind: str, head: str, tmp_path: Path) -> None:
    model = tied_model(kind)
    of_class = dict(type(model)._tied_weights_keys)
    before = dict(model.all_tied_weights_keys)
    lrk.adapt(model, rank=2, target_modules=[head])
    ties = {name.replace(head, f"{head}.base_layer"): source for name, source in before.items()}
    assert model._tied_weights_keys == model.all_tied_weights_keys == ties and type(model)._tied_weights_keys == of_class
    model.save_pretrained(tmp_path / "adapted")  # which refuses what is tied without its knowledge
    model.tie_weights()
    layer = model.get_submodule(head)
    assert layer.base_layer.weight is model.get_input_embeddings().weight
    randomize(model)
    expected = model(IDS).logits
    assert copy.deepcopy(model)._tied_weights_keys == ties
    if kind == "llama":  # what stays tied in BERT, a bias, needs the setting
        with pytest.warns(UserWarning, match=r"no longer tied to the embeddings; its config\.tie_word_embeddings is False now"):
            lrk.merge(model, unload=True)
    else:
        lrk.merge(model, unload=True)
    assert head + ".weight" not in model._tied_weights_keys and type(model)._tied_weights_keys == of_class
    model.tie_weights()
    model.save_pretrained(tmp_path / "merged")
    for merged in (model, type(model).from_pretrained(tmp_path / "merged").eval()):
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_head_resized_after_adapting_is_refused_by_name() -> None:
    model = lrk.adapt(tied_model("llama"), rank=2, target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"base layer's weight is \(50, 16\) now, the factors are those of a 40 × 16 one; resize a layer"):
        model.resize_token_embeddings(50)
    with pytest.raises(ValueError, match=r"weight must be \(40, 16\).*an adapted layer cannot be resized"):
        model(IDS)
    model = lrk.adapt(tied_model("llama"), rank=2, target_modules=["lm_head"])
    with pytest.warns(UserWarning, match="no longer tied"):
        lrk.merge(model, unload=True)
    model.resize_token_embeddings(50)
    assert model(IDS).logits.shape[-1] == 50


class Ties(nn.Module):
    """What keeps a record of tied weights, of any kind."""

    def __init__(self, ties: object) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)])
        for head in self.heads[1:]:
            head.weight = self.heads[0].weight
        self.rest = nn.Linear(4, 4)
        self._tied_weights_keys = ties

    def get_expanded_tied_weights_keys(self, all_submodels: bool) -> dict[str, str]:
        return {f"heads.{i}.weight": "heads.0.weight" for i in (1, 2)}


@pytest.mark.parametrize("targets", [["rest"], ["heads.2"], ["heads.0"], ["heads.0", "heads.1", "heads.2"]], ids=str)
@pytest.mark.parametrize("ties", [{r"heads.[12]": "heads.0"}, ["heads.1.weight", r"heads\.2\.w"], {}, None], ids=str)
def test_records_of_ties_follow_the_layers(ties: object, targets: list[str]) -> None:
    model = Ties(copy.copy(ties))
    lrk.adapt(model, rank=2, target_modules=targets)
    adapted = {f"{name}.weight": f"{name}.base_layer.weight" for name in targets}
    names = ["heads.1.weight", "heads.2.weight"]
    if not ties or targets == ["rest"] or (isinstance(ties, list) and targets == ["heads.0"]):
        expected = ties
    elif isinstance(ties, list):
        expected = [adapted.get(name, name) if name in adapted or name == names[0] else ties[1] for name in names]
    else:
        expected = {adapted.get(name, name): adapted.get("heads.0.weight", "heads.0.weight") for name in names}
    assert model._tied_weights_keys == expected
    lrk.merge(model, unload=True)
    if not ties or targets == ["rest"] or (isinstance(ties, list) and targets == ["heads.0"]):
        assert model._tied_weights_keys == ties
    elif len(targets) == 3:
        assert not model._tied_weights_keys
    elif targets == ["heads.2"]:
        assert model._tied_weights_keys == (["heads.1.weight"] if isinstance(ties, list) else {"heads.1.weight": "heads.0.weight"})
    else:  # the others are tied among themselves
        assert model._tied_weights_keys == {"heads.2.weight": "heads.1.weight"}
