"""Adapters on disk: our own safetensors files, and export as a PEFT adapter folder."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..ops import grouped_svd_product
from ..optim._shared.shards import is_sharded
from ._model import adapted_layers, check_model, clean_name
from .adapt import check_settings, check_unadapted, install
from .layer import LowRankLinear
from .starts import check_changeable

FORMAT_VERSION = 1
#: The one metadata key of our files; its value is JSON.
METADATA_KEY = "lowrank_kernels"


class IncompatibleKeys(NamedTuple):
    """What did not fit together, as ``nn.Module.load_state_dict`` reports it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


@dataclass(frozen=True)
class LayerSettings:
    """What a file says of one adapted layer, beside its tensors."""

    rank: int
    scale: float
    method: str
    dropout: float


#: Factors that were subtracted from a base weight, with its settings: what a start consists of.
START = ("start_A", "start_B")
Starts = dict[str, tuple[Tensor, Tensor]]


def _factor_tensors(layer: LowRankLinear) -> dict[str, Tensor]:
    """The layer's own parameters and buffers (not its base layer's): everything that ΔW depends on except s."""
    return {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}


def _trained_modules(root: nn.Module) -> dict[str, nn.Module]:
    """Modules outside the adapters that own a trainable parameter, by name."""
    return {
        name: module
        for name, module in root.named_modules()
        if not isinstance(module, LowRankLinear) and any(p.requires_grad for p in module.parameters(recurse=False))
    }


def _bare_name(name: str, layers: Mapping[str, LowRankLinear]) -> str:
    """The name that a parameter, buffer or module had before the model was adapted: without ``base_layer`` and wrappers' names."""
    parts = clean_name(name).split(".")
    for i, part in enumerate(parts):
        if part == "base_layer" and ".".join(parts[:i]) in layers:
            return ".".join(parts[:i] + parts[i + 1 :])
    return ".".join(parts)


def _live_tensors(root: nn.Module) -> dict[str, Tensor]:
    """What :func:`adapter_state_dict` saves, as the model's own tensors."""
    layers = adapted_layers(root)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= {_join(name, key): tensor for key, tensor in _factor_tensors(layer).items()}
    seen: set[int] = set()
    for name, module in _trained_modules(root).items():
        own: dict[str, Tensor] = {key: p for key, p in module.named_parameters(recurse=False) if p.requires_grad}
        own |= {key: b for key, b in module.named_buffers(recurse=False) if key not in module._non_persistent_buffers_set}
        for key, tensor in own.items():
            if id(tensor) not in seen:  # tied parameters are saved under their first name
                seen.add(id(tensor))
                tensors[_bare_name(_join(name, key), layers)] = tensor
    return tensors


def _join(name: str, key: str) -> str:
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
    _require_adapters("adapter_state_dict", root)
    return {name: tensor.detach() for name, tensor in _live_tensors(root).items()}


def _require_adapters(function: str, root: nn.Module) -> dict[str, LowRankLinear]:
    layers = adapted_layers(root)
    if not layers:
        raise ValueError(f"{function}: the model has no adapter of `lowrank_kernels.adapt`")
    return layers


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> IncompatibleKeys:
    """Copy what :func:`adapter_state_dict` returned into an adapted model.

    Args:
        model: adapted with the same method, ranks and targets.
        state: name → tensor, on any device.
        strict: the names must be exactly those that the model would save. If not, missing ones keep their values and
            unexpected ones are ignored, except that a tensor that the model has frozen is still loaded.

    Returns:
        ``(missing_keys, unexpected_keys)``, as ``nn.Module.load_state_dict`` does.

    Raises:
        TypeError, ValueError: names, shapes or dtypes do not fit; nothing was changed.
    """
    root = check_model("load_adapter_state_dict", model)
    layers = _require_adapters("load_adapter_state_dict", root)
    _check_state("load_adapter_state_dict", state)
    state, starts = _split_starts("load_adapter_state_dict", root, layers, state)
    incompatible, copies = _plan("load_adapter_state_dict", root, state, strict)
    _copy(layers, copies, starts)
    return incompatible


def _check_state(function: str, state: object) -> None:
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise TypeError(f"{function}: state must map names to tensors, as adapter_state_dict returns it")


def _split_starts(
    function: str, root: nn.Module, layers: Mapping[str, LowRankLinear], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Starts]:
    """``state`` without what these layers need not be given, and the starts that they must be given first.

    A layer that was started already must have been started by the same factors: its base weight fits no others.
    """
    rest, starts = dict(state), {}
    for name, layer in layers.items():
        own = [x for x in (layer.start_A, layer.start_B) if x is not None]
        a, b = (rest.get(_join(name, key)) for key in START)
        if not own and a is not None and b is not None:
            if (a.shape, b.shape) != (layer.lora_A.shape, layer.lora_B.shape) or layer.method != "lora":
                raise ValueError(f"{function}: {name!r} cannot be started by factors of shapes {tuple(a.shape)} and {tuple(b.shape)}")
            starts[name] = (rest.pop(_join(name, START[0])), rest.pop(_join(name, START[1])))
        elif (
            own
            and _join(name, "lora_A") in rest
            and not all(x is not None and torch.equal(x.cpu(), mine.cpu()) for x, mine in zip((a, b), own, strict=True))
        ):
            raise ValueError(
                f"{function}: {name!r} was started by other factors, and its base weight has been changed by them; "
                "load the adapter over the original base model"
            )
    check_changeable(function, root, {name: layers[name] for name in starts})
    return rest, starts


def _plan(
    function: str, root: nn.Module, state: Mapping[str, Tensor], strict: bool
) -> tuple[IncompatibleKeys, list[tuple[Tensor, Tensor]]]:
    """Check ``state`` against the model; return what does not fit together and the pairs (of the model, of the file) to copy."""
    expected = _live_tensors(root)
    layers = adapted_layers(root)
    known = {_bare_name(name, layers): t for name, t in (*root.named_parameters(), *root.named_buffers())} | expected
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in known or (strict and name not in expected)]
    if strict and (missing or unexpected):
        raise ValueError(
            f"{function}: names do not fit the model; "
            + "; ".join(f"{what}: {_some(names)}" for what, names in (("missing", missing), ("unexpected", unexpected)) if names)
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


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


@torch.no_grad()
def _copy(layers: Mapping[str, LowRankLinear], copies: list[tuple[Tensor, Tensor]], starts: Starts) -> None:
    for name, (a, b) in starts.items():
        layers[name].start_from(a, b)
    for target, source in copies:
        target.copy_(source)
    for layer in layers.values():
        if layer.method == "sds":
            layer.decoupled = bool(layer.is_decoupled.item())


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write :func:`adapter_state_dict` and the adapters' settings to one safetensors file.

    The file is either complete or absent, whatever happens meanwhile: it is written next to ``path`` and renamed.

    Raises:
        ValueError: the model has no adapters, or they are on the meta device or sharded (FSDP2).
        OSError: the file could not be written; an earlier file of that name is unchanged.
    """
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"save_adapter: no folder {str(folder)!r}; create it first")
    state = {name: tensor.contiguous() for name, tensor in adapter_state_dict(model).items()}
    on_meta = [name for name, tensor in state.items() if tensor.is_meta]
    if on_meta:
        raise ValueError(f"save_adapter: {on_meta[0]} is on the meta device and has no values to save")
    _refuse_shards("save_adapter", state)
    layers = adapted_layers(check_model("save_adapter", model))
    settings = {name: asdict(LayerSettings(x.rank, x.scale, x.method, x.dropout)) for name, x in layers.items()}
    metadata = json.dumps({"format_version": FORMAT_VERSION, "layers": settings}, ensure_ascii=False)
    _write_atomically(path, lambda temporary: save_file(_unshared(state), temporary, {"format": "pt", METADATA_KEY: metadata}))


def _refuse_shards(function: str, state: Mapping[str, Tensor]) -> None:
    sharded = next((name for name, tensor in state.items() if is_sharded(tensor)), None)
    if sharded is not None:
        raise ValueError(
            f"{function}: {sharded} is sharded (a DTensor), and no rank holds all of it. On every rank get the whole state, "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)); "
            "load it into a model that was adapted alike and is not sharded, and save that one"
        )


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory (views of one flat buffer, say): give each its own."""
    storages = Counter(tensor.untyped_storage().data_ptr() for tensor in state.values() if tensor.numel())
    return {
        name: tensor.clone() if tensor.numel() and storages[tensor.untyped_storage().data_ptr()] > 1 else tensor
        for name, tensor in state.items()
    }


def _write_atomically(path: str | os.PathLike[str], write: Callable[[str], None]) -> None:
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
    check_settings(layer.method, layer.rank, layer.dropout, None)
    if not isinstance(layer.scale, float) or not math.isfinite(layer.scale):
        raise ValueError(f"{name} has the scale {layer.scale!r}")
    kinds = ("lora_A", "lora_B", *{"sds": ("q_a", "q_b", "is_decoupled"), "xs": ("lora_R",)}.get(layer.method, ()))
    for kind in kinds:
        if f"{name}.{kind}" not in state:
            raise ValueError(f"the tensor {name}.{kind} is missing")
    flag = state.get(f"{name}.is_decoupled")
    if flag is not None and (flag.numel() != 1 or int(flag) not in (0, 1)):
        raise ValueError(f"{name}.is_decoupled must be 0 or 1, got {flag.tolist()}")
    if state[f"{name}.lora_A"].ndim != 2 or state[f"{name}.lora_A"].shape[0] != layer.rank:
        raise ValueError(f"{name}.lora_A has shape {tuple(state[f'{name}.lora_A'].shape)}, but its rank is {layer.rank}")


def load_adapter(model: nn.Module, path: str | os.PathLike[str], strict: bool = True) -> nn.Module:
    """Load what :func:`save_adapter` wrote; return the model.

    A model without adapters is adapted as the file says (in place, as :func:`~lowrank_kernels.adapt` does, with the file's other
    trained parameters set trainable); an adapted one must have the file's layers, methods, ranks and scales. Outputs
    afterwards are those of the saved model, bit for bit. Where PiSSA or LoRA-GA started the saved model, the base weights are changed
    again as they were then; so the model must have the original ones, or have been started by the same factors.

    Args:
        model: the base model, adapted or not.
        path: the file.
        strict: as in :func:`load_adapter_state_dict`.

    Raises:
        OSError, TypeError, ValueError: the file cannot be read, is damaged or another program's, or does not fit the
            model. Nothing was changed then.
    """
    root = check_model("load_adapter", model)
    settings, state = _read(path)
    layers = adapted_layers(root)
    if layers:
        _check_same_settings(settings, layers, strict)
        state, starts = _split_starts("load_adapter", root, layers, state)
        _copy(layers, _plan("load_adapter", root, state, strict)[1], starts)
        return model
    check_unadapted("load_adapter", model)
    modules = {clean_name(name): module for name, module in root.named_modules()}
    new: dict[str, LowRankLinear] = {}
    for name, layer in settings.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            found = "no such module" if module is None else f"a {type(module).__name__} there"
            raise ValueError(f"load_adapter: the file adapts the Linear {name!r}, the model has {found}")
        a, b = state[f"{name}.lora_A"], state[f"{name}.lora_B"]
        if (a.shape[1], *b.shape) != (module.in_features, module.out_features, layer.rank):
            raise ValueError(
                f"load_adapter: {name!r} is {module.out_features} × {module.in_features} in the model, but the file has "
                f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}"
            )
        new[name] = LowRankLinear(module, layer.rank, layer.scale, method=layer.method, dropout=layer.dropout, dtype=a.dtype)
        new[name].train(module.training)
    state, starts = _split_starts("load_adapter", root, new, state)
    # The rest of the file is checked against the bare model (the names do not depend on the adapters), so that nothing
    # is changed before everything fits.
    factors = {_join(name, key): tensor for name, layer in new.items() for key, tensor in _factor_tensors(layer).items()}
    for name, target in factors.items():
        if target.is_meta:
            raise ValueError(f"load_adapter: {name} would be on the meta device; materialize the model first")
        if target.shape != state[name].shape or target.dtype != state[name].dtype:
            raise ValueError(
                f"load_adapter: {name} is {state[name].dtype} {tuple(state[name].shape)}, expected {target.dtype} {tuple(target.shape)}"
            )
    others = {name: tensor for name, tensor in state.items() if name not in factors}
    _, copies = _plan("load_adapter", root, others, strict=False)
    parameters = {clean_name(name): parameter for name, parameter in root.named_parameters()}
    buffers = {clean_name(name) for name, _ in root.named_buffers()}
    unknown = [name for name in others if name not in parameters and name not in buffers]
    if unknown and strict:
        raise ValueError(f"load_adapter: the file has tensors that the model does not: {_some(unknown)}; pass strict=False to skip them")
    install(
        "load_adapter",
        root,
        {id(modules[name]): layer for name, layer in new.items()},
        [parameters[name] for name in others if name in parameters],
    )
    _copy(new, copies + [(target, state[name]) for name, target in factors.items()], starts)
    return model


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
        raise ValueError(f"load_adapter: the model has adapters that the file has not: {_some(missing)}")


def export_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    base_model_name_or_path: str | None = None,
    *,
    rank: int | None = None,
) -> dict[str, float]:
    """Write the adapters as a PEFT adapter folder (``adapter_config.json``, ``adapter_model.safetensors``), which
    ``peft.PeftModel.from_pretrained(base_model, folder)`` loads.

    A decoupled layer is the LoRA of rank 2r ``lora_A = [A; Q_Aᵀ]``, ``lora_B = [Q_B B]`` with ``lora_alpha = 2·r·s``, exactly;
    a plain one stays as it is; ``s·B R A`` becomes the plain ``s·(B R) A``, multiplied out in fp32 at least. One that PiSSA or LoRA-GA
    started becomes the LoRA of rank 2r ``[A; A₀]``, ``[B −B₀]`` over the original W0, exactly: PEFT loads it over the base model as it is
    published.
    ``rank`` asks for at most that rank: a larger layer is replaced by its best approximation, the truncated SVD of ΔW through the thin
    factors. Straight after a refresh of the bases a decoupled layer has rank r, and its rank-r export is exact to rounding.

    Args:
        model: adapted by :func:`~lowrank_kernels.adapt`; not changed.
        folder: created if need be; the two files in it are replaced.
        base_model_name_or_path: noted in the configuration; None takes the model's own ``name_or_path``.
        rank: the largest rank to write; None writes everything exactly.

    Returns:
        ``{layer name: ‖ΔW_written − ΔW‖_F / ‖ΔW‖_F}``; 0 where the layer is written exactly.

    Raises:
        TypeError, ValueError: no adapters, sharded ones (FSDP2), a bad rank, or trained parameters outside the adapters that PEFT's
            ``modules_to_save`` cannot express. Nothing was written then.
    """
    root = check_model("export_peft", model)
    layers = _require_adapters("export_peft", root)
    places = Counter(id(module) for _, module in root.named_modules(remove_duplicate=False))
    for name, layer in layers.items():
        if places[id(layer)] > 1:
            raise ValueError(f"export_peft: {name!r} stands in the model under several names; PEFT would adapt the first only")
    if rank is not None and (not isinstance(rank, Integral) or isinstance(rank, bool)):
        raise TypeError(f"export_peft: rank must be an integer or None, got {rank!r}")
    if rank is not None and rank < 1:
        raise ValueError(f"export_peft: rank must be at least 1, got {rank}")
    _refuse_shards("export_peft", _live_tensors(root))
    saved = _peft_saved_modules(root, layers)
    factors, errors = _peft_factors(layers, rank)
    config = _peft_config(root, layers, factors, saved, base_model_name_or_path)
    prefix = "base_model.model."
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in factors.items():
        tensors |= {f"{prefix}{name}.lora_A.weight": a, f"{prefix}{name}.lora_B.weight": b}
    for name, module in saved.items():
        tensors |= {f"{prefix}{name}.{key}": tensor.detach() for key, tensor in module.state_dict().items()}
    tensors = _unshared({name: tensor.contiguous() for name, tensor in tensors.items()})
    Path(folder).mkdir(parents=True, exist_ok=True)
    _write_atomically(Path(folder) / "adapter_model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"

    def write_config(path: str) -> None:
        Path(path).write_text(text, encoding="utf-8")

    _write_atomically(Path(folder) / "adapter_config.json", write_config)
    return errors


@torch.no_grad()
def _peft_factors(layers: Mapping[str, LowRankLinear], rank: int | None) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """``{name: (lora_A, lora_B)}`` with ``ΔW = s·lora_B @ lora_A``, and the relative errors."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in layers.items():
        a, b = layer.lora_A.detach(), layer.lora_B.detach()
        if layer.decoupled:
            a, b = torch.cat([a, layer.q_a]), torch.cat([layer.q_b, b], dim=1)
        elif layer.method == "xs":
            core = layer.lora_R.detach()
            a, b = a.to(core.dtype), b.to(core.dtype) @ core
        elif layer.start_A is not None and layer.start_B is not None:
            a, b = torch.cat([a, layer.start_A]), torch.cat([b, -layer.start_B], dim=1)
        factors[name] = (a, b)
    errors = dict.fromkeys(layers, 0.0)
    groups: dict[tuple[int, torch.dtype, torch.device], list[str]] = {}
    for name, (a, _) in factors.items():
        if rank is not None and a.shape[0] > rank:
            groups.setdefault((a.shape[0], a.dtype, a.device), []).append(name)
    for (inner, dtype, _), names in groups.items():
        assert rank is not None
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        lefts = [factors[name][1].to(compute) for name in names]
        rights = [factors[name][0].mT.to(compute) for name in names]
        for name, (u, s, v) in zip(names, _truncated_svds(lefts, rights, inner), strict=True):
            root = s[:rank].sqrt()
            factors[name] = ((root[:, None] * v[:, :rank].mT).to(dtype), (u[:, :rank] * root).to(dtype))
            total = float(s.square().sum())
            errors[name] = math.sqrt(float(s[rank:].square().sum()) / total) if total else 0.0
    return factors, errors


def _truncated_svds(lefts: list[Tensor], rights: list[Tensor], inner: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """All ``inner`` singular triples of ``left_i @ right_iᵀ`` (fewer where the layer itself is smaller than that)."""
    tall = [i for i, (left, right) in enumerate(zip(lefts, rights, strict=True)) if min(len(left), len(right)) >= inner]
    us, ss, vs = grouped_svd_product([lefts[i] for i in tall], [rights[i] for i in tall], inner)
    found = dict(zip(tall, zip(us, ss, vs, strict=True), strict=True))
    for i, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        if i not in found:  # 2r > min(d): the layer is as small as its adapter, and so is the product
            u, s, vh = torch.linalg.svd(left @ right.mT, full_matrices=False)
            found[i] = (u, s, vh.mT)
    return [found[i] for i in range(len(lefts))]


def _peft_matches(root: nn.Module, suffixes: list[str]) -> set[str]:
    """The modules that PEFT will match with a list of names in a model like ours before it was adapted."""
    return {name for name in _bare_modules(root) if any(name == s or name.endswith(f".{s}") for s in suffixes)}


def _bare_modules(root: nn.Module) -> list[str]:
    """The names of the modules of the model before it was adapted."""
    layers = adapted_layers(root)
    return list(dict.fromkeys(_bare_name(name, layers) for name, _ in root.named_modules()))


def _peft_targets(root: nn.Module, names: list[str]) -> list[str] | str:
    """The shortest ``target_modules`` by which PEFT finds these layers and no other module."""
    by_suffix = sorted({name.rpartition(".")[2] for name in names})
    for candidate in (by_suffix, sorted(names)):
        if _peft_matches(root, candidate) == set(names):
            return candidate
    return "|".join(re.escape(name) for name in sorted(names))


def _peft_saved_modules(root: nn.Module, layers: Mapping[str, LowRankLinear]) -> dict[str, nn.Module]:
    """The trained modules outside the adapters, as PEFT's ``modules_to_save``: whole modules, found by the end of their names."""
    saved: dict[str, nn.Module] = {}
    for raw, module in _trained_modules(root).items():
        name = clean_name(raw)
        inside = [layer for layer in layers if layer == name or layer.startswith(_join(name, "")) or name.startswith(f"{layer}.")]
        if not name or inside:
            what = "the model itself" if not name else repr(name)
            raise ValueError(f"export_peft: {what} has trainable parameters beside adapters, which PEFT's modules_to_save cannot express")
        if not any(name.startswith(f"{other}.") for other in saved):
            also = [other for other in _bare_modules(root) if other.endswith(name) and other != name]
            if also:
                raise ValueError(f"export_peft: PEFT would take {also[0]!r} for the trained module {name!r}: it looks at the ends of names")
            saved[name] = module
    return saved


def _peft_config(
    root: nn.Module,
    layers: Mapping[str, LowRankLinear],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    saved: Mapping[str, nn.Module],
    base_model_name_or_path: str | None,
) -> dict[str, Any]:
    # PEFT applies s = lora_alpha / r.
    settings = {name: (len(factors[name][0]), len(factors[name][0]) * layer.scale) for name, layer in layers.items()}
    (common_rank, common_alpha), _ = Counter(settings.values()).most_common(1)[0]
    # PEFT looks for `(.*\.)?(key)$`: the `^` makes the key a full name.
    patterns = {name: (f"^{re.escape(name)}", *value) for name, value in settings.items()}
    config = getattr(root, "config", None)
    if base_model_name_or_path is None:
        base_model_name_or_path = getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None) or None
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "r": common_rank,
        "lora_alpha": common_alpha,
        "lora_dropout": max(layer.dropout for layer in layers.values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "target_modules": _peft_targets(root, list(layers)),
        "modules_to_save": sorted(saved) or None,
        "rank_pattern": {key: r for key, r, _ in patterns.values() if r != common_rank},
        "alpha_pattern": {key: alpha for key, _, alpha in patterns.values() if alpha != common_alpha},
    }
