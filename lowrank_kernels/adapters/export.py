"""Export of our adapters as a PEFT adapter folder."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .._checks import as_integer, check_path
from ..backends.dtypes import compute_dtype
from ..ops import grouped_svd_product
from ._model import adapted_layers, check_model, clean_name, ends_with, require_adapters, uncalled_layers
from .io import check_target, refuse_unsavable, unshared, write_atomically
from .layer import LowRankLinear
from .state_dict import bare_name, joined, live_tensors, trained_modules

#: What PEFT reads in an adapter's folder.
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


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
        TypeError, ValueError: no adapters, ones on the meta device or sharded (FSDP2), one on the ``out_proj`` of an
            ``nn.MultiheadAttention``, a bad rank, folder or base model's name, or trained parameters outside the adapters that PEFT's
            ``modules_to_save`` cannot express. Nothing was written then.
        OSError: ``folder`` is none and cannot be made one, or one of the two files is no regular one. Nothing was written then either.
    """
    root = check_model("export_peft", model)
    check_path("export_peft", "folder", folder)
    if base_model_name_or_path is not None and not isinstance(base_model_name_or_path, str):
        raise TypeError(f"export_peft: base_model_name_or_path must be a str or None, got {base_model_name_or_path!r:.80}")
    if Path(folder).exists() and not Path(folder).is_dir():
        raise NotADirectoryError(f"export_peft: folder {os.fspath(folder)!r} is no folder; name another one")
    for name in (WEIGHTS, CONFIG):
        check_target("export_peft", "folder", Path(folder) / name)
    layers = require_adapters("export_peft", root)
    places = Counter(id(module) for _, module in root.named_modules(remove_duplicate=False))
    for name, layer in layers.items():
        if places[id(layer)] > 1:
            raise ValueError(f"export_peft: {name!r} stands in the model under several names; PEFT would adapt the first only")
    uncalled = uncalled_layers(root)
    if uncalled:
        raise ValueError(
            f"export_peft: {next(iter(uncalled))!r} is the out_proj of an nn.MultiheadAttention, which reads its weight and never calls "
            "it: PEFT would load the adapter and compute without it. Leave it out of target_modules, or merge(model, unload=True) and save "
            "the whole model"
        )
    rank = None if rank is None else as_integer("export_peft", "rank", rank)
    refuse_unsavable("export_peft", live_tensors(root))
    saved = _peft_saved_modules(root, layers)
    _warn_of_fast_path(root, layers)
    factors, errors = _peft_factors(layers, rank)
    config = _peft_config(root, layers, factors, saved, base_model_name_or_path)
    prefix = "base_model.model."
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in factors.items():
        tensors |= {f"{prefix}{name}.lora_A.weight": a, f"{prefix}{name}.lora_B.weight": b}
    for name, module in saved.items():
        tensors |= {f"{prefix}{name}.{key}": tensor.detach() for key, tensor in module.state_dict().items()}
    tensors = unshared({name: tensor.contiguous() for name, tensor in tensors.items()})
    # Before anything is written: a text that cannot be made would leave new weights beside an old configuration.
    text = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"export_peft: folder {os.fspath(folder)!r} cannot be made: {error.strerror}") from None
    write_atomically(Path(folder) / WEIGHTS, lambda path: save_file(tensors, path, {"format": "pt"}))

    def write_config(path: str) -> None:
        Path(path).write_bytes(text)

    write_atomically(Path(folder) / CONFIG, write_config)
    return errors


def _warn_of_fast_path(root: nn.Module, layers: Mapping[str, LowRankLinear]) -> None:
    """Say where torch would read PEFT's base weights, as it reads ours with the adapter in them."""
    encoders = [module for module in root.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    read = {id(linear) for encoder in encoders for linear in (encoder.linear1, encoder.linear2)}
    name = next((name for name, layer in layers.items() if id(layer) in read), None)
    if name is not None:
        warnings.warn(
            f"export_peft: {name!r} is in an nn.TransformerEncoderLayer, whose fast path for inference reads weights and would pass over "
            "PEFT's adapter; call torch.backends.mha.set_fastpath_enabled(False) where PEFT loads it",
            stacklevel=3,
        )


@torch.no_grad()
def _peft_factors(layers: Mapping[str, LowRankLinear], rank: int | None) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """``{name: (lora_A, lora_B)}`` with ``ΔW = s·lora_B @ lora_A``, and the relative errors."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in layers.items():
        layer.reread_decoupled()
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
        compute = compute_dtype(dtype)
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
    return {name for name in _bare_modules(root) if ends_with(name, suffixes)}


def _bare_modules(root: nn.Module) -> list[str]:
    """The names of the modules of the model before it was adapted."""
    layers = adapted_layers(root)
    return list(dict.fromkeys(bare_name(name, layers) for name, _ in root.named_modules()))


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
    for raw, module in trained_modules(root).items():
        name = clean_name(raw)
        inside = [layer for layer in layers if layer == name or layer.startswith(joined(name, "")) or name.startswith(f"{layer}.")]
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
        own = getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None)
        base_model_name_or_path = own if isinstance(own, str) else None
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
