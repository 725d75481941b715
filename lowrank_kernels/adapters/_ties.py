"""The names of tied weights that models of ``transformers`` keep: they follow a layer into its adapter, and out again.

Saving (``save_pretrained``, the Trainer) takes weights that share memory for a mistake unless these names say so, and ``tie_weights``
ties by them. Release 5 keeps ``{tied name: the name it is tied to}``, release 4 a list; both also regular expressions, on the class or the
instance.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from .layer import LowRankLinear

_RECORDS = ("_tied_weights_keys", "all_tied_weights_keys")
#: Where a record goes, its name and the record itself: set by :func:`write_ties`, after the layers have been replaced.
Change = tuple[nn.Module, str, "dict[str, str] | list[str]"]


def ties_when_adapted(root: nn.Module, layers: Collection[int]) -> list[Change]:
    """What the records must say once each of these layers, given by id, is the ``base_layer`` of what stands in its place."""
    changes: list[Change] = []
    for module, records in _records(root):
        names = _parameter_names(module, layers)
        renames = {name + key: f"{name}base_layer.{key}" for name, key in names}
        for record, ties in records.items():
            renamed = _renamed(_written_out(module, ties, renames), renames)
            if renamed != ties:
                changes.append((module, record, renamed))
    return changes


def ties_when_unloaded(root: nn.Module, layers: Mapping[int, LowRankLinear]) -> list[Change]:
    """What the records must say once each of these layers, by id, is a Linear with its merged weight, which shares no memory.

    ``transformers`` would tie it again when the saved model is loaded, and ΔW would be lost: where nothing else is tied, the configuration
    says so too.
    """
    owners: dict[int, set[int]] = {}
    for module in root.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    changes: list[Change] = []
    for module, records in _records(root):
        names = [
            (name, key, len(owners.get(id(layers[layer].base_layer.weight), ())) > 1)
            for layer in layers
            for name, key in _parameter_names(module, [layer], inside="base_layer.")
        ]
        renames = {f"{name}base_layer.{key}": name + key for name, key, _ in names}
        untied = {f"{name}base_layer.{key}" for name, key, shared in names if shared and key == "weight"}
        for record, ties in records.items():
            left = _without(ties, untied)
            renamed = _renamed(left, renames)
            if renamed != ties:
                changes.append((module, record, renamed))
    return changes


def write_ties(changes: list[Change]) -> None:
    """Set the records, on the instances: a class is others' too."""
    for module, record, ties in changes:
        if record in module.__dict__ and getattr(type(module), record, None) == ties:
            delattr(module, record)
        else:
            setattr(module, record, ties)
        config = getattr(module, "config", None)
        if not ties and getattr(config, "tie_word_embeddings", None) is True:
            config.tie_word_embeddings = False  # type: ignore[union-attr]
            warnings.warn(
                f"merge: the merged weight of {type(module).__name__}'s head is no longer tied to the embeddings; "
                "its config.tie_word_embeddings is False now",
                stacklevel=3,
            )


def _records(root: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    for module in root.modules():
        found = {record: getattr(module, record, None) for record in _RECORDS}
        records = {record: ties for record, ties in found.items() if isinstance(ties, (dict, list)) and ties}
        if records:
            yield module, records


def _parameter_names(module: nn.Module, layers: Collection[int], inside: str = "") -> list[tuple[str, str]]:
    """``("lm_head.", "weight")`` of each parameter that these layers, or what is ``inside`` them, hold, as ``module`` names it."""
    return [
        (f"{name}.", key.removeprefix(inside))
        for name, layer in module.named_modules(remove_duplicate=False)
        if name and id(layer) in layers
        for key, _ in layer.named_parameters()
        if key.startswith(inside)
    ]


def _written_out(module: nn.Module, ties: Any, renames: Mapping[str, str]) -> Any:
    """Without regular expressions that mean a renamed parameter: the new names would not match, or the factors would match too."""
    if isinstance(ties, list):
        named = {tie: [name for name in renames if tie not in renames and re.search(tie, name)] for tie in ties}
        if not any(named.values()):
            return ties
        every = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        return [name for tie in ties for name in ([each for each in every if re.search(tie, each)] if named[tie] else [tie])]
    written = [name for tie in ties.items() for name in tie]
    expand = getattr(module, "get_expanded_tied_weights_keys", None)
    means = any(re.match(tie, name) for tie in written if tie not in renames for name in renames)
    return (means and callable(expand) and expand(all_submodels=False)) or ties


def _renamed(ties: Any, renames: Mapping[str, str]) -> Any:
    if isinstance(ties, list):
        return [renames.get(name, name) for name in ties]
    return {renames.get(name, name): renames.get(source, source) for name, source in ties.items()}


def _without(ties: Any, untied: Collection[str]) -> Any:
    """The ties without these names; what was tied to one of them is tied among itself from now on."""
    if isinstance(ties, list):
        return [name for name in ties if name not in untied]
    left: dict[str, str] = {}
    heirs: dict[str, str] = {}
    for name, source in ties.items():
        if name in untied:
            continue
        heir = heirs.setdefault(source, name) if source in untied else source
        if heir != name:
            left[name] = heir
    return left
