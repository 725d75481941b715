"""How the functions of this room see a model: without wrappers, and under the names that its bare form has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from .._checks import check_module
from ..pairs import pairs, uncalled_projections
from .layer import LowRankLinear

#: What ``torch.compile`` and checkpoint wrappers put into module names.
_WRAPPER_NAMES = {"_orig_mod", "_checkpoint_wrapped_module"}
_COMPILED = "OptimizedModule"
_REPLICATED = ("DistributedDataParallel", "DataParallel")
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def _is_any(model: nn.Module, names: tuple[str, ...]) -> bool:
    """By class name, since the classes exist only in builds of torch with distributed support."""
    return any(cls.__name__ in names and cls.__module__.startswith("torch.") for cls in type(model).__mro__)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, DistributedDataParallel and DataParallel wrappers."""
    while True:
        if _is_any(model, (_COMPILED,)):
            model = model._orig_mod  # type: ignore[assignment]
        elif _is_any(model, _REPLICATED):
            model = model.module  # type: ignore[assignment]
        else:
            return model


def parallel_wrapper(model: nn.Module) -> str | None:
    """The name of a data-parallel wrapper around or in the model, or None. Such a wrapper has already made its list of parameters."""
    wrapper = next((module for module in model.modules() if _is_any(module, _REPLICATED + _SHARDED)), None)
    return None if wrapper is None else type(wrapper).__name__


def clean_name(name: str) -> str:
    """A module's or parameter's name without what wrappers inside the model have put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_NAMES)


def ends_with(name: str, suffixes: Iterable[str]) -> bool:
    """Whether the name is one of these, or ends with one as its last components: how names of layers are meant, by PEFT too."""
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def check_model(function: str, model: object) -> nn.Module:
    """``model`` without its wrappers.

    Raises:
        TypeError: it is not a module.
    """
    check_module(function, model)
    return unwrap(model)  # type: ignore[arg-type]


def adapted_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """Our layers by name; one that has several names (tied modules) under its first."""
    return {clean_name(name): module for name, module in unwrap(model).named_modules() if isinstance(module, LowRankLinear)}


def require_adapters(function: str, model: nn.Module) -> dict[str, LowRankLinear]:
    """:func:`adapted_layers`; a model that has none is refused."""
    root = check_model(function, model)
    layers = adapted_layers(root)
    if not layers:
        foreign = f"; its adapters are another library's, use what that library has for {function}" if pairs(root) else ""
        raise ValueError(f"{function}: the model has no adapter of `lowrank_kernels.adapt`{foreign}")
    return layers


def uncalled_layers(root: nn.Module) -> dict[str, LowRankLinear]:
    """Our layers that nothing calls, by name: ``nn.MultiheadAttention`` reads the weight of its ``out_proj``."""
    read = set(map(id, uncalled_projections(root)))
    return {name: layer for name, layer in adapted_layers(root).items() if id(layer) in read}


def compiled_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What stands in ``torch.compile`` wrappers inside the model, by name. A wrapper goes on calling what it was made of."""
    for name, module in root.named_modules():
        if _is_any(module, (_COMPILED,)):
            yield clean_name(name), module._orig_mod


def replace_modules(model: nn.Module, replacements: dict[int, nn.Module]) -> None:
    """Put ``replacements[id(module)]`` wherever ``module`` stands in the model, under all of its names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in replacements:
                setattr(parent, name, replacements[id(child)])
