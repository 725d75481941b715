"""Adapters on disk: our own safetensors files."""

from __future__ import annotations

import json
import math
import os
import secrets
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .._checks import as_flag, check_path, first_few
from ..backends.dtypes import FLOATING
from ..parallel.shards import is_sharded
from ._model import adapted_layers, check_model, clean_name
from .adapt import check_unadapted, install
from .layer import LowRankLinear, check_settings
from .state_dict import adapter_state_dict, copy_state, factor_tensors, joined, plan_copies, split_starts

FORMAT_VERSION = 1
#: The one metadata key of our files; its value is JSON.
METADATA_KEY = "lowrank_kernels"


@dataclass(frozen=True)
class LayerSettings:
    """What a file says of one adapted layer, beside its tensors."""

    rank: int
    scale: float
    method: str
    dropout: float


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write :func:`adapter_state_dict` and the adapters' settings to one safetensors file.

    The file is either complete or absent, whatever happens meanwhile: it is written next to ``path`` and renamed.

    Raises:
        TypeError, ValueError: ``path`` is none or empty, the model has no adapters, or they are on the meta device or sharded (FSDP2).
        OSError: the file could not be written; an earlier file of that name is unchanged. So is what is no file (a folder, a FIFO).
    """
    check_target("save_adapter", "path", path)
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"save_adapter: no folder {str(folder)!r}; create it first")
    state = {name: tensor.contiguous() for name, tensor in adapter_state_dict(model).items()}
    refuse_unsavable("save_adapter", state)
    layers = adapted_layers(check_model("save_adapter", model))
    settings = {name: asdict(LayerSettings(x.rank, x.scale, x.method, x.dropout)) for name, x in layers.items()}
    metadata = json.dumps({"format_version": FORMAT_VERSION, "layers": settings}, ensure_ascii=False)
    write_atomically(path, lambda temporary: save_file(unshared(state), temporary, {"format": "pt", METADATA_KEY: metadata}))


def refuse_unsavable(function: str, state: Mapping[str, Tensor]) -> None:
    """Refuse tensors without values, and those of which this rank holds a part."""
    on_meta = next((name for name, tensor in state.items() if tensor.is_meta), None)
    if on_meta is not None:
        raise ValueError(f"{function}: {on_meta} is on the meta device and has no values to save")
    sharded = next((name for name, tensor in state.items() if is_sharded(tensor)), None)
    if sharded is not None:
        raise ValueError(
            f"{function}: {sharded} is sharded (a DTensor), and no rank holds all of it. On every rank get the whole state, "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)); "
            "load it into a model that was adapted alike and is not sharded, and save that one"
        )


def unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory (views of one flat buffer, say): give each its own."""
    storages = Counter(tensor.untyped_storage().data_ptr() for tensor in state.values() if tensor.numel())
    return {
        name: tensor.clone() if tensor.numel() and storages[tensor.untyped_storage().data_ptr()] > 1 else tensor
        for name, tensor in state.items()
    }


def check_target(function: str, argument: str, path: str | os.PathLike[str]) -> None:
    """Refuse what a rename would not write to but replace: a folder, a device, a pipe."""
    check_path(function, argument, path)
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{function}: {os.fspath(path)!r} is a folder; name a file in it")
    if target.exists() and not target.is_file():
        raise OSError(f"{function}: {os.fspath(path)!r} is no regular file, and writing would replace it; name another one")


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], None]) -> None:
    """Let ``write`` make a file beside ``path``, put it on the disk, and only then give it its name."""
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        write(str(temporary))
        os.chmod(temporary, mode)  # what the umask gives; safetensors makes files that only their owner reads
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name != "nt":  # the rename itself; Windows cannot open folders
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, LayerSettings], dict[str, Tensor]]:
    """The settings and tensors of one of our files.

    Raises:
        OSError, ValueError: it cannot be read, is damaged, or is another program's.
    """
    check_path("load_adapter", "path", path)
    if Path(path).is_dir():
        what = (
            "; it holds a PEFT adapter: load it with peft.PeftModel.from_pretrained"
            if (Path(path) / "adapter_config.json").exists()
            else ""
        )
        raise IsADirectoryError(f"load_adapter: {os.fspath(path)!r} is a folder, not a file of save_adapter{what}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"load_adapter: no file {os.fspath(path)!r}")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"load_adapter: {os.fspath(path)!r} is damaged or not a safetensors file: {error}") from None
    if METADATA_KEY not in metadata:
        raise ValueError(f"load_adapter: {os.fspath(path)!r} was not written by save_adapter (a PEFT adapter is loaded by peft)")
    try:
        header = json.loads(metadata[METADATA_KEY])
        version = header["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version!r}, this release reads {FORMAT_VERSION}")
        layers = {name: LayerSettings(**settings) for name, settings in header["layers"].items()}
        for name, layer in layers.items():
            _check_layer(name, layer, state)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"load_adapter: {os.fspath(path)!r} has settings that cannot be used: {error}") from None
    return layers, state


def _check_layer(name: str, layer: LayerSettings, state: Mapping[str, Tensor]) -> None:
    check_settings(name, layer.method, layer.rank, layer.dropout, None)
    if not isinstance(layer.scale, float) or not math.isfinite(layer.scale):
        raise ValueError(f"{name} has the scale {layer.scale!r}")
    kinds = ("lora_A", "lora_B", *{"sds": ("q_a", "q_b", "is_decoupled"), "xs": ("lora_R",)}.get(layer.method, ()))
    for kind in kinds:
        if f"{name}.{kind}" not in state:
            raise ValueError(f"the tensor {name}.{kind} is missing")
    flag = state.get(f"{name}.is_decoupled")
    if flag is not None and (flag.numel() != 1 or not 0 <= float(flag) <= 1):
        raise ValueError(f"{name}.is_decoupled must be 0 or 1 (between them in an average of models), got {flag.tolist()}")
    if state[f"{name}.lora_A"].ndim != 2 or state[f"{name}.lora_A"].shape[0] != layer.rank:
        raise ValueError(f"{name}.lora_A has shape {tuple(state[f'{name}.lora_A'].shape)}, but its rank is {layer.rank}")


def load_adapter(model: nn.Module, path: str | os.PathLike[str], strict: bool = True) -> nn.Module:
    """Load what :func:`save_adapter` wrote; return the model.

    A model without adapters is adapted as the file says (in place, as :func:`~lowrank_kernels.adapt` does, with the file's other
    trained parameters set trainable); an adapted one must have the file's layers, methods, ranks and scales. Outputs
    afterwards are those of the saved model, bit for bit, if the frozen rest is: BatchNorm in training mode moves its running statistics,
    which are saved for ``modules_to_save`` only. Where PiSSA or LoRA-GA started the saved model, the base weights are changed again as they
    were then; so the model must have the original ones, or have been started by the same factors.

    Args:
        model: the base model, adapted or not.
        path: the file.
        strict: as in :func:`load_adapter_state_dict`. False also leaves out, with a warning, layers of the file that the model does not
            have; a module of that name that is no Linear, or of another size, is an error all the same, and a model with none of them.

    Raises:
        OSError, TypeError, ValueError: the file cannot be read, is damaged or another program's, or does not fit the
            model. Nothing was changed then.
    """
    root = check_model("load_adapter", model)
    as_flag("load_adapter", "strict", strict)
    settings, state = _read(path)
    layers = adapted_layers(root)
    if layers:
        _check_same_settings(settings, layers, strict)
        state, starts = split_starts("load_adapter", root, layers, state)
        copy_state(layers, plan_copies("load_adapter", root, state, strict)[1], starts)
        return model
    check_unadapted("load_adapter", model)
    modules = {clean_name(name): module for name, module in root.named_modules()}
    new = _make_layers(modules, settings, state, strict)
    skipped = [name for name in settings if name not in new]
    state = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in skipped}
    state, starts = split_starts("load_adapter", root, new, state)
    # The rest of the file is checked against the bare model (the names do not depend on the adapters), so that nothing
    # is changed before everything fits.
    factors = {joined(name, key): tensor for name, layer in new.items() for key, tensor in factor_tensors(layer).items()}
    _check_factors(factors, state)
    others = {name: tensor for name, tensor in state.items() if name not in factors}
    _, copies = plan_copies("load_adapter", root, others, strict=False)
    parameters = {clean_name(name): parameter for name, parameter in root.named_parameters()}
    buffers = {clean_name(name) for name, _ in root.named_buffers()}
    unknown = [name for name in others if name not in parameters and name not in buffers]
    if unknown and strict:
        which = first_few(unknown, 6)
        raise ValueError(f"load_adapter: the file has tensors that the model does not: {which}; pass strict=False to skip them")
    install(
        "load_adapter",
        root,
        {id(modules[name]): layer for name, layer in new.items()},
        [parameters[name] for name in others if name in parameters],
    )
    if skipped:
        warnings.warn(f"load_adapter: skipped the adapters of {first_few(skipped)}: the model has no such modules", stacklevel=2)
    copy_state(new, copies + [(target, state[name]) for name, target in factors.items()], starts)
    return model


def _make_layers(
    modules: Mapping[str, nn.Module], settings: Mapping[str, LayerSettings], state: Mapping[str, Tensor], strict: bool
) -> dict[str, LowRankLinear]:
    """Adapted layers as the file says, not yet in the model; if not strict, without those that it does not have."""
    new: dict[str, LowRankLinear] = {}
    for name, layer in settings.items():
        module = modules.get(name)
        if module is None and not strict:
            continue
        if not isinstance(module, nn.Linear):
            found = "no such module; pass strict=False to skip it" if module is None else f"a {type(module).__name__} there"
            raise ValueError(f"load_adapter: the file adapts the Linear {name!r}, the model has {found}")
        a, b = state[f"{name}.lora_A"], state[f"{name}.lora_B"]
        if (a.shape[1], *b.shape) != (module.in_features, module.out_features, layer.rank):
            raise ValueError(
                f"load_adapter: {name!r} is {module.out_features} × {module.in_features} in the model, but the file has "
                f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}"
            )
        new[name] = LowRankLinear(module, layer.rank, layer.scale, method=layer.method, dropout=layer.dropout, dtype=a.dtype)
        new[name].train(module.training)
        core = state.get(f"{name}.lora_R")
        if layer.method == "xs" and core is not None and core.dtype in FLOATING:  # a model that was cast has it in the factors' dtype
            new[name].lora_R.data = new[name].lora_R.data.to(core.dtype)
    if not new:
        raise ValueError(
            f"load_adapter: the model has none of the {len(settings)} Linear layers that the file adapts: {first_few(settings)}"
        )
    return new


def _check_factors(factors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Refuse factors of new layers that the file's do not fit."""
    for name, target in factors.items():
        if target.is_meta:
            raise ValueError(f"load_adapter: {name} would be on the meta device; materialize the model first")
        if target.shape != state[name].shape or target.dtype != state[name].dtype:
            raise ValueError(
                f"load_adapter: {name} is {state[name].dtype} {tuple(state[name].shape)}, expected {target.dtype} {tuple(target.shape)}"
            )


def _check_same_settings(settings: Mapping[str, LayerSettings], layers: Mapping[str, LowRankLinear], strict: bool) -> None:
    for name, saved in settings.items():
        layer = layers.get(name)
        if layer is None:
            if strict:
                raise ValueError(f"load_adapter: the file has an adapter for {name!r}, the model has none there")
            continue
        for what in ("method", "rank", "scale"):  # dropout belongs to the next run, not to what was learnt
            if getattr(layer, what) != getattr(saved, what):
                raise ValueError(f"load_adapter: {name!r} has {what} {getattr(layer, what)!r}, the file {getattr(saved, what)!r}")
    missing = [name for name in layers if name not in settings]
    if missing and strict:
        raise ValueError(f"load_adapter: the model has adapters that the file has not: {first_few(missing, 6)}")
