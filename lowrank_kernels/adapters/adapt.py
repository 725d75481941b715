"""``adapt``: put low-rank adapters on the linear layers of a model, in place."""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._checks import first_few
from ..pairs import pairs
from ._model import check_model, clean_name, compiled_modules, ends_with, parallel_wrapper, replace_modules
from ._ties import ties_when_adapted, write_ties
from .layer import LowRankLinear, check_settings, scale_of

ALL_LINEAR = "all-linear"
#: Top-level names of classification heads in ``transformers``: a head starts at random and wants full training, not an adapter.
_HEAD_NAMES = ("classifier", "score")


def adapt(
    model: nn.Module,
    method: str = "lora",
    rank: int = 8,
    alpha: float | None = None,
    rank_scaling: str | None = None,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    dropout: float = 0.0,
    modules_to_save: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Adapt the linear layers of ``model`` in place, freeze everything else, and return the model.

    ``W = W0 + ΔW`` with ``ΔW = s·B A`` (LoRA) or ``s·B R A`` (LoRA-XS), which starts at zero; the base weights are not touched, not
    copied, and tied weights stay tied. Call it before the optimizer is made and before the model is wrapped for data parallelism.

    Args:
        model: any module whose targets are ``nn.Linear`` (quantized subclasses included).
        method: "lora"; or "sds", which adds the constant bases that ``SDSLoRA`` and ``ODLoRA`` need for
            ``ΔW = s(Q_B A + B Q_Aᵀ)``. Until such an optimizer switches, both compute the same. "xs": ``ΔW = s·B R A`` of which only
            R (r × r) trains, by ``LoRASB`` or ``AdamW``; :func:`~lowrank_kernels.lora_sb_init` or
            :func:`~lowrank_kernels.initialize` must choose B and A first, which are zero until then.
        rank: r.
        alpha: α. None means 8 for "lora" (PEFT's default) and 4 for "sds" (its paper's); for "xs" it means s = 1.
        rank_scaling: "lora", s = α/r; or "rslora", s = α/√r. None means "lora" for "lora" and "rslora" for "sds" (its paper's).
        target_modules: which layers. A list of names: layers that have one as their full name or as its last components
            (``"query"``, ``"attention.self.query"``). A string: a regular expression that the full name must match entirely. (Both are
            PEFT's rules.) "all-linear": every ``nn.Linear`` except the output head, that is, what the model's
            ``get_output_embeddings()`` returns, or, where that returns nothing, the top-level module ``classifier`` or ``score``.
            (Bare parameters have no layer to adapt: q, k and v of ``nn.MultiheadAttention``, and the stacked experts of a mixture
            such as Mixtral. A warning says so.)
        dropout: probability of dropping an entry of the adapters' input, in training mode.
        modules_to_save: modules to train in full beside the adapters, such as a new classification head; named like targets.
            They are never adapted, even when ``target_modules`` matches them.
        dtype: of the factors; None means the base weight's, but fp32 for bf16, fp16 and quantized weights. For "xs", whose factors
            are constants, the dtype that the model computes in (what autocast casts to, if that is on): ``LoRASB`` corrects for the
            rounding of the factors as they are stored. None is the base weight's dtype then; R itself is fp32 at least.

    Raises:
        TypeError, ValueError: an argument does not fit, nothing matches, something matched is not a ``nn.Linear``, a rank is
            too large for a layer, or the model has adapters already. Nothing was changed then.
    """
    root = check_model("adapt", model)
    check_settings("adapt", method, rank, dropout, dtype)
    scale = _scale(method, rank, alpha, rank_scaling)
    check_unadapted("adapt", model)
    # Names as of the bare model; a module that has two (tied modules) has two entries.
    named = {clean_name(name): module for name, module in root.named_modules(remove_duplicate=False)}
    saved = _match_saved(named, modules_to_save)
    targets = _match_targets(root, named, target_modules, saved, modules_to_save)
    layers: dict[int, nn.Module] = {}
    for name, module in targets.items():
        if rank > min(module.in_features, module.out_features):
            raise ValueError(
                f"adapt: rank {rank} is too large for {name!r} ({module.out_features} × {module.in_features}); "
                f"use at most {min(module.in_features, module.out_features)}, or leave this layer out of target_modules"
            )
    for module in targets.values():
        if id(module) not in layers:
            layer = LowRankLinear(module, rank, scale, method=method, dropout=dropout, dtype=dtype)
            layers[id(module)] = layer.train(module.training)
    install("adapt", root, layers, [parameter for module in saved.values() for parameter in module.parameters()])
    return model


def install(function: str, root: nn.Module, layers: dict[int, nn.Module], trained: Iterable[nn.Parameter]) -> None:
    """Freeze ``root``, let ``trained`` train, and put ``layers[id(base layer)]`` in the base layers' places.

    Raises:
        ValueError: a base layer was compiled by itself; nothing was changed.
    """
    alone = next((name for name, wrapped in compiled_modules(root) if id(wrapped) in layers), None)
    if alone is not None:
        raise ValueError(
            f"{function}: {alone!r} was compiled by itself, torch.compile(linear), and would go on without the adapter; compile a module "
            "that holds the layer, or compile it afterwards"
        )
    ties = ties_when_adapted(root, layers)
    root.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    replace_modules(root, layers)
    write_ties(ties)


def check_unadapted(function: str, model: nn.Module) -> None:
    """Refuse a model that cannot be adapted in place now: one with adapters, wrapped for data parallelism, lazy, a lone Linear."""
    wrapper = parallel_wrapper(model)
    if wrapper is not None:
        raise ValueError(
            f"{function}: the model is already wrapped by {wrapper}, which would not see the new factors; adapt it before wrapping"
        )
    lazy = next((name for name, parameter in model.named_parameters() if is_lazy(parameter)), None)
    if lazy is not None:
        raise ValueError(f"{function}: {lazy!r} has no shape yet, as its module is lazy; run the model once, on any batch, before")
    present = pairs(model)
    if present:
        raise ValueError(
            f"{function}: the model already has {len(present)} low-rank adapters (the first at {present[0].name!r}); "
            "`merge(model, unload=True)` folds ours into the weights, PEFT's `unload()` or `merge_and_unload()` removes PEFT's"
        )
    if isinstance(check_model(function, model), nn.Linear):
        raise ValueError(f"{function}: the model is itself a Linear and cannot be replaced in place; wrap it, `nn.Sequential(layer)`")


def _scale(method: str, rank: int, alpha: float | None, rank_scaling: str | None) -> float:
    """s, with the method's own α and rule where they are None."""
    own_alpha, own_rule = (4.0, "rslora") if method == "sds" else (8.0, "lora")
    scale = scale_of("adapt", rank, own_alpha if alpha is None else alpha, own_rule if rank_scaling is None else rank_scaling)
    return 1.0 if method == "xs" and alpha is None else scale


def _inside(name: str, parents: Iterable[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def _check_names(argument: str, names: object) -> list[str]:
    if isinstance(names, (str, torch.Tensor)) or not isinstance(names, Iterable):
        raise TypeError(f"adapt: {argument} must be a list of module names, got {names!r}")
    found = list(names)
    if not all(isinstance(name, str) and name for name in found):
        raise TypeError(f"adapt: {argument} must contain module names, got {found!r}")
    if not found:
        raise ValueError(f"adapt: {argument} is empty")
    return found


def _close_names(wanted: Iterable[str], names: Iterable[str]) -> str:
    """A hint: what the model has that looks like ``wanted``, else the names of its layers."""
    full = [name for name in names if name]
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in full))
    close = {match: None for name in wanted for match in difflib.get_close_matches(name, last + full, n=3, cutoff=0.5)}
    shown = list(close) or [name for name in last if not name.isdigit()] or full
    return ("did you mean " if close else "the model has ") + first_few(map(repr, shown), 12)


def _match_saved(named: dict[str, nn.Module], modules_to_save: Sequence[str] | None) -> dict[str, nn.Module]:
    if modules_to_save is None:
        return {}
    wanted = _check_names("modules_to_save", modules_to_save)
    for suffix in wanted:
        if not any(ends_with(name, [suffix]) for name in named):
            raise ValueError(f"adapt: no module matches {suffix!r} of modules_to_save; {_close_names([suffix], named)}")
    saved = {name: module for name, module in named.items() if ends_with(name, wanted)}
    for name, module in saved.items():
        parameters = dict(module.named_parameters())
        if not parameters:
            raise ValueError(f"adapt: {name!r} of modules_to_save has no parameters to train")
        for key, parameter in parameters.items():
            if not (parameter.is_floating_point() or parameter.is_complex()):
                raise TypeError(f"adapt: {name!r} of modules_to_save cannot train, its {key} is {parameter.dtype}")
    return saved


def _output_heads(root: nn.Module, named: dict[str, nn.Module], saved: Iterable[str]) -> list[str]:
    """The names of the output head: what "all-linear" leaves out."""
    get_output = getattr(root, "get_output_embeddings", None)
    try:
        head = get_output() if callable(get_output) else None
    except NotImplementedError:
        head = None
    if head is not None:
        return [name for name, module in named.items() if module is head]
    heads = [name for name in _HEAD_NAMES if name in named]
    frozen = [name for name in heads if not _inside(name, saved) and any(True for _ in named[name].parameters())]
    if frozen:
        warnings.warn(
            f"adapt: the output head {frozen[0]!r} is neither adapted nor trained; "
            f"if it is new, train it with modules_to_save=[{frozen[0]!r}]",
            stacklevel=4,
        )
    return heads


def _warn_of_bare(named: dict[str, nn.Module], saved: Iterable[str]) -> None:
    """Say what "all-linear" leaves without an adapter though it multiplies: projections that are bare parameters of another module."""
    kept = {name: module for name, module in named.items() if not _inside(name, saved)}
    attentions = [name for name, module in kept.items() if isinstance(module, nn.MultiheadAttention)]
    stacks = {
        f"{name}.{key}".lstrip("."): tuple(parameter.shape)
        for name, module in kept.items()
        if not isinstance(module, (nn.Conv1d, nn.ConvTranspose1d))
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1
    }
    bare = []
    if attentions:
        bare.append(f"the projections to q, k and v of {len(attentions)} nn.MultiheadAttention (the first is {attentions[0]!r})")
    if stacks:
        name, shape = next(iter(stacks.items()))
        bare.append(f"stacks of matrices, such as the experts of a mixture ({len(stacks)}, the first is {name!r}, {shape}),")
    for what in bare:
        warnings.warn(
            f"adapt: {what} are bare parameters and no nn.Linear; they are frozen without an adapter. Train such a module in full by "
            "modules_to_save, or write it with Linear layers",
            stacklevel=4,
        )


def _left_out(named: dict[str, nn.Module], heads: list[str]) -> str:
    """For the message that "all-linear" found nothing: the heads that it leaves out, and what multiplies by a weight without being a
    Linear."""
    said = (
        f": 'all-linear' leaves out {first_few(map(repr, heads))} as the output head; name it in target_modules to adapt it"
        if heads
        else ""
    )
    others = {
        name: type(module).__name__
        for name, module in named.items()
        if not isinstance(module, (nn.Linear, nn.Embedding)) and isinstance(w := module._parameters.get("weight"), Tensor) and w.dim() > 1
    }
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(others.values()).items())
        said += f"; {kinds} (the first is {next(iter(others))!r}) are no nn.Linear: rewrite them as such, or let PEFT adapt them"
    return said


def _match_targets(
    root: nn.Module,
    named: dict[str, nn.Module],
    target_modules: str | Sequence[str],
    saved: Iterable[str],
    modules_to_save: Sequence[str] | None,
) -> dict[str, nn.Linear]:
    """The layers to adapt, by name; a tied one under each name that matches."""
    linears = [name for name, module in named.items() if isinstance(module, nn.Linear)]
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        heads = _output_heads(root, named, saved)
        matched = [name for name in linears if not _inside(name, heads)]
        head_modules = {id(named[name]) for name in heads}
        matched = [name for name in matched if id(named[name]) not in head_modules]
        _warn_of_bare(named, saved)
    elif isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(f"adapt: target_modules={target_modules!r} is not a regular expression: {error}") from None
        matched = [name for name in named if pattern.fullmatch(name)]
        if not matched:
            listed = [name for name in named if ends_with(name, [target_modules])]
            hint = f"for a name write a list, [{target_modules!r}]" if listed else _close_names([target_modules], linears)
            raise ValueError(f"adapt: no module's full name matches the regular expression {target_modules!r}; {hint}")
    else:
        wanted = _check_names("target_modules", target_modules)
        for suffix in wanted:
            if not any(ends_with(name, [suffix]) for name in named):
                raise ValueError(f"adapt: no module matches {suffix!r} of target_modules; {_close_names([suffix], linears)}")
        matched = [name for name in named if ends_with(name, wanted)]
    kept = [name for name in matched if not _inside(name, saved)]
    if not kept:
        nothing = f"the model has no nn.Linear to adapt{_left_out(named, linears)}"
        why = f"modules_to_save={list(modules_to_save or ())} leaves none of them" if matched else nothing
        raise ValueError(f"adapt: target_modules={target_modules!r} matches nothing to adapt: {why}")
    for name in kept:
        if not isinstance(named[name], nn.Linear):
            raise TypeError(
                f"adapt: {name!r} is a {type(named[name]).__name__}; only nn.Linear can be adapted: "
                "make target_modules match Linear layers only"
            )
    return {name: module for name in kept if isinstance(module := named[name], nn.Linear)}
