"""Folding adapters into the weights and out again, and the weight changes that adapters stand for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import as_flag, first_few
from ..backends.dtypes import compute_dtype
from ..pairs import Pair, is_adapter_parameter, pairs
from ._model import check_model, clean_name, replace_modules, require_adapters
from ._ties import ties_when_unloaded, write_ties
from .layer import LowRankLinear, is_plain
from .shared import share_inputs


def merge(model: nn.Module, unload: bool = False) -> nn.Module:
    """Run inference on one weight ``W0 + ΔW`` per adapted layer; return the model.

    The base weights stay untouched (another layer may share them), so the merged weights cost as much memory again as
    the weights of the adapted layers, and :func:`unmerge` is exact. They are summed in fp32 at least and rounded once to
    the base weight's dtype. In training mode, and wherever a factor's gradient is asked for, a merged layer goes on computing with
    its factors; a factor that changes is merged anew at the next inference. Saving a merged model saves its factors.

    Two limits. Writes through ``.data`` (``layer.lora_B.data.add_(…)``) leave no trace in a tensor and go unnoticed: write under
    ``torch.no_grad()``, or merge again. And a graph of ``torch.compile`` cannot ask whether a factor has changed, so it computes with the
    factors; to compile the merged weights use ``unload=True``.

    Args:
        model: a model that :func:`~lowrank_kernels.adapt` has adapted.
        unload: replace each adapter layer by a plain ``nn.Linear`` with the merged weight (a tied base weight is then
            no longer shared; a ``transformers`` model's record of tied weights, and its ``config.tie_word_embeddings``, say so from then
            on). The factors are gone, the memory of the base weights is freed.

    Raises:
        TypeError, ValueError: no adapters, or a layer that cannot be merged (quantized, with hooks, …); ``unload`` is neither true nor
            false. Nothing was changed.
    """
    as_flag("merge", "unload", unload)
    layers = require_adapters("merge", model)
    for name, layer in layers.items():
        if not is_plain(layer.base_layer):
            raise ValueError(
                f"merge: {name!r} cannot be merged: its {type(layer.base_layer).__name__} has hooks, a quantized weight "
                "or a forward of its own"
            )
        if layer.base_layer.weight.is_meta:
            raise ValueError(f"merge: {name!r} cannot be merged: its weight is on the meta device")
    if unload:
        root = check_model("merge", model)
        if isinstance(root, LowRankLinear):
            raise ValueError("merge: the model is itself an adapter layer and cannot be replaced in place; use `unload=False`")
        ties = ties_when_unloaded(root, {id(layer): layer for layer in layers.values()})
        share_inputs(root, ())
        replace_modules(root, {id(layer): _merged_linear(layer) for layer in layers.values()})
        write_ties(ties)
    else:
        for layer in layers.values():
            layer.merged = True
    return model


def _merged_linear(layer: LowRankLinear) -> nn.Linear:
    layer.reread_decoupled()
    base = layer.base_layer
    linear = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.merged_weight(), requires_grad=base.weight.requires_grad)
    linear.bias = base.bias
    return linear.train(layer.training)


def unmerge(model: nn.Module) -> nn.Module:
    """Undo :func:`merge`, exactly: the merged weights are dropped, base weights and factors were never changed. Returns the model.

    Raises:
        ValueError: the model has no adapters of ours.
    """
    for layer in require_adapters("unmerge", model).values():
        layer.merged = False
    return model


def delta_weights(model: nn.Module) -> dict[str, Tensor]:
    """ΔW of every adapted linear layer, ``{name: (d_out, d_in)}``, in fp32 at least, without gradient.

    Names are those of the model before it was adapted, for our adapters as for PEFT's, so that ``name + ".weight"`` is
    the weight that ΔW is added to (before :func:`~lowrank_kernels.initialize` changed it, if it did). A layer with several active
    adapters gets their sum, one with none a zero.

    Left out is what PEFT adapts beside linear layers: convolutions, embeddings and bare parameters; and what only looks like a pair of
    matrices, as :func:`~lowrank_kernels.pairs` says.

    Raises:
        ValueError: the model has no adapters, none of a linear layer (those left out are named), or one whose update is not ``s·B A``
            (PEFT's DoRA, say).
    """
    root = check_model("delta_weights", model)
    names = {id(module): name for name, module in reversed(list(root.named_modules()))}
    deltas: dict[str, Tensor] = {}
    for pair in pairs(root):
        assert pair.layer is not None
        name = _original_name(root, names[id(pair.layer)])
        delta = pair.layer.delta_weight() if isinstance(pair.layer, LowRankLinear) else _foreign_delta(pair)
        deltas[name] = deltas[name] + delta if name in deltas else delta
    if not deltas:
        others = [name for name, _ in root.named_parameters() if is_adapter_parameter(name)]
        if others:
            raise ValueError(
                f"delta_weights: the model has no low-rank adapter of a linear layer with ΔW = s·B A; {first_few(others)} belong to other "
                "ones (convolutions, embeddings, …), which are left out; use get_delta_weight of those layers"
            )
        raise ValueError("delta_weights: the model has no low-rank adapters")
    return deltas


def _original_name(root: nn.Module, name: str) -> str:
    """Without the prefix of a ``PeftModel`` around the model, and without wrappers' names."""
    return clean_name(name.removeprefix("base_model.model.") if hasattr(root, "peft_config") else name)


@torch.no_grad()
def _foreign_delta(pair: Pair) -> Tensor:
    layer = pair.layer
    assert layer is not None
    adapter = pair.name.rpartition(".")[2]
    if pair.scale is None:
        raise ValueError(f"delta_weights: {pair.name!r} ({type(layer).__name__}) does not say what scale it applies")
    variants = getattr(layer, "lora_variant", None)  # PEFT's DoRA and its like
    if isinstance(variants, dict) and adapter in variants:
        raise ValueError(f"delta_weights: {pair.name!r} uses {type(variants[adapter]).__name__}, its update is not s·B A")
    active = getattr(layer, "active_adapters", None)
    dtype = compute_dtype(pair.A.dtype)
    delta = pair.scale * (pair.B.to(dtype) @ pair.A.to(dtype))
    if getattr(layer, "disable_adapters", False) is True or (isinstance(active, list) and adapter not in active):
        delta.zero_()
    return delta.mT.contiguous() if getattr(layer, "fan_in_fan_out", False) else delta
