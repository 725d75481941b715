"""What fine-tuning has made of a model, by name; and how it is copied into another model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._checks import as_flag, first_few
from ..parallel.shards import is_sharded
from ._model import adapted_layers, check_model, clean_name, require_adapters
from .layer import LowRankLinear
from .starts import check_changeable

#: The buffers that hold the factors which a start subtracted from a base weight, and those factors by layer.
START = ("start_A", "start_B")
Starts = dict[str, tuple[Tensor, Tensor]]


class IncompatibleKeys(NamedTuple):
    """What did not fit together, as ``nn.Module.load_state_dict`` reports it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def factor_tensors(layer: LowRankLinear) -> dict[str, Tensor]:
    """The layer's own parameters and buffers (not its base layer's): everything that ΔW depends on except s."""
    layer.reread_decoupled()
    return {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}


def trained_modules(root: nn.Module) -> dict[str, nn.Module]:
    """Modules outside the adapters that own a trainable parameter, by name."""
    return {
        name: module
        for name, module in root.named_modules()
        if not isinstance(module, LowRankLinear) and any(p.requires_grad for p in module.parameters(recurse=False))
    }


def bare_name(name: str, layers: Mapping[str, LowRankLinear]) -> str:
    """The name that a parameter, buffer or module had before the model was adapted: without ``base_layer`` and wrappers' names."""
    parts = clean_name(name).split(".")
    for i, part in enumerate(parts):
        if part == "base_layer" and ".".join(parts[:i]) in layers:
            return ".".join(parts[:i] + parts[i + 1 :])
    return ".".join(parts)


def live_tensors(root: nn.Module) -> dict[str, Tensor]:
    """What :func:`adapter_state_dict` saves, as the model's own tensors."""
    layers = adapted_layers(root)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= {joined(name, key): tensor for key, tensor in factor_tensors(layer).items()}
    seen: set[int] = set()
    for name, module in trained_modules(root).items():
        own: dict[str, Tensor] = {key: p for key, p in module.named_parameters(recurse=False) if p.requires_grad}
        own |= {key: b for key, b in module.named_buffers(recurse=False) if key not in module._non_persistent_buffers_set}
        for key, tensor in own.items():
            if id(tensor) not in seen:  # tied parameters are saved under their first name
                seen.add(id(tensor))
                tensors[bare_name(joined(name, key), layers)] = tensor
    return tensors


def joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What fine-tuning has made, and nothing of the base model: every adapter's factors (with its constant bases Q and the decoupled flag,
    or with the factors that a start subtracted from W0), and the trainable parameters outside the adapters (``modules_to_save``) with
    their modules' buffers.

    Names are those of the model before it was adapted and wrapped (by ``torch.compile``, DDP, checkpointing). Tensors are
    detached, not copied.

    Raises:
        ValueError: the model has no adapters of :func:`~lowrank_kernels.adapt`.
    """
    root = check_model("adapter_state_dict", model)
    require_adapters("adapter_state_dict", root)
    return {name: tensor.detach() for name, tensor in live_tensors(root).items()}


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> IncompatibleKeys:
    """Copy what :func:`adapter_state_dict` returned into an adapted model.

    Args:
        model: adapted with the same method, ranks, targets, ``alpha`` and ``rank_scaling``. The state holds no scale s, and another one
            goes unnoticed; what :func:`save_adapter` writes holds it, and :func:`load_adapter` compares.
        state: name → tensor, on any device.
        strict: the names must be exactly those that the model would save. If not, missing ones keep their values and
            unexpected ones are ignored, except that a tensor that the model has frozen is still loaded.

    Returns:
        ``(missing_keys, unexpected_keys)``, as ``nn.Module.load_state_dict`` does.

    Raises:
        TypeError, ValueError: names, shapes or dtypes do not fit; nothing was changed.
    """
    root = check_model("load_adapter_state_dict", model)
    as_flag("load_adapter_state_dict", "strict", strict)
    layers = require_adapters("load_adapter_state_dict", root)
    _check_state("load_adapter_state_dict", state)
    state, starts = split_starts("load_adapter_state_dict", root, layers, state)
    incompatible, copies = plan_copies("load_adapter_state_dict", root, state, strict)
    copy_state(layers, copies, starts)
    return incompatible


def _check_state(function: str, state: object) -> None:
    if not isinstance(state, Mapping) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items()):
        raise TypeError(f"{function}: state must map names to tensors, as adapter_state_dict returns it")


def split_starts(
    function: str, root: nn.Module, layers: Mapping[str, LowRankLinear], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Starts]:
    """``state`` without what these layers need not be given, and the starts that they must be given first.

    A layer that was started already must have been started by the same factors: its base weight fits no others.
    """
    rest, starts = dict(state), {}
    for name, layer in layers.items():
        own = [x for x in (layer.start_A, layer.start_B) if x is not None]
        a, b = (rest.get(joined(name, key)) for key in START)
        if not own and a is not None and b is not None:
            if (a.shape, b.shape) != (layer.lora_A.shape, layer.lora_B.shape) or layer.method != "lora":
                raise ValueError(f"{function}: {name!r} cannot be started by factors of shapes {tuple(a.shape)} and {tuple(b.shape)}")
            starts[name] = (rest.pop(joined(name, START[0])), rest.pop(joined(name, START[1])))
        elif (
            own
            and joined(name, "lora_A") in rest
            and not all(x is not None and torch.equal(x.cpu(), mine.cpu()) for x, mine in zip((a, b), own, strict=True))
        ):
            raise ValueError(
                f"{function}: {name!r} was started by other factors, and its base weight has been changed by them; "
                "load the adapter over the original base model"
            )
    check_changeable(function, root, {name: layers[name] for name in starts})
    return rest, starts


def plan_copies(
    function: str, root: nn.Module, state: Mapping[str, Tensor], strict: bool
) -> tuple[IncompatibleKeys, list[tuple[Tensor, Tensor]]]:
    """Check ``state`` against the model; return what does not fit together and the pairs (of the model, of the file) to copy."""
    expected = live_tensors(root)
    layers = adapted_layers(root)
    known = {bare_name(name, layers): t for name, t in (*root.named_parameters(), *root.named_buffers())} | expected
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in known or (strict and name not in expected)]
    if strict and (missing or unexpected):
        raise ValueError(
            f"{function}: names do not fit the model; "
            + "; ".join(f"{what}: {first_few(names, 6)}" for what, names in (("missing", missing), ("unexpected", unexpected)) if names)
            + "; adapt the model with the same method, target_modules and modules_to_save, or pass strict=False"
        )
    copies = []
    for name, source in state.items():
        if name not in known:
            continue
        target = known[name]
        if target.shape != source.shape:
            raise ValueError(f"{function}: {name} has shape {tuple(source.shape)}, the model's has {tuple(target.shape)}")
        if target.dtype != source.dtype:
            raise TypeError(f"{function}: {name} is {source.dtype}, the model's is {target.dtype}; cast one of them")
        if target.is_meta or source.is_meta:
            raise ValueError(f"{function}: {name} is on the meta device; materialize it first")
        if is_sharded(target) != is_sharded(source):
            raise ValueError(
                f"{function}: {name} is sharded (a DTensor) in the {'model' if is_sharded(target) else 'state'} only; load it before "
                "fully_shard(model), or load a checkpoint of torch.distributed.checkpoint"
            )
        copies.append((target, source))
    return IncompatibleKeys(missing, unexpected), copies


@torch.no_grad()
def copy_state(layers: Mapping[str, LowRankLinear], copies: list[tuple[Tensor, Tensor]], starts: Starts) -> None:
    for name, (a, b) in starts.items():
        layers[name].start_from(a, b)
    for target, source in copies:
        target.copy_(source)
    for layer in layers.values():
        if layer.method == "sds":
            layer.decoupled = bool(layer.is_decoupled.item())
