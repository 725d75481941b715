"""``share_inputs``: layers that get one tensor (q, k, v; gate, up) project it to their ranks together, in one read of it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.dtypes import autocast_dtype
from ..backends.versions import version_of
from ..ops import lora_down
from ..ops._library import is_plain_eager
from ._model import adapted_layers, check_model
from .layer import Call, LowRankLinear, is_plain

#: Names of layers that share an input, as ``transformers`` and others call them.
SHARED_NAMES: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)


class Projected(NamedTuple):
    """What a layer takes from its group: x for the base layer, ``x Aᵀ`` and, decoupled, ``x Q_A``."""

    x: Tensor
    hidden: Tensor
    hidden_q: Tensor | None


def _circumstances(x: Tensor) -> tuple[Any, ...]:
    """All that decides, beside x itself, whether what was computed from it serves here too.

    The hooks are those of non-reentrant checkpointing: what one checkpoint computed must not be used in another, which would be
    recomputed without it.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return version_of(x), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast_dtype(x), hooks


def _factors(layer: LowRankLinear) -> tuple[Any, ...]:
    """What changes when the factors by which a layer projects are replaced, written, frozen or thawed, or when it is decoupled."""
    used = (layer.lora_A, layer.q_a) if layer.decoupled else (layer.lora_A,)
    return tuple((id(tensor), version_of(tensor), tensor.requires_grad) for tensor in used)


class _Held(threading.local):
    """What a group has projected and not handed out yet. Threads that call one model have each their own."""

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.circumstances: tuple[Any, ...] = ()
        self.parts: dict[int, tuple[tuple[Any, ...], Projected]] = {}  # beside each, of which factors it is


class SharedInput:
    """Layers of one module that may get the same tensor. The first one that does projects it for all; the others take their part.

    A layer that gets another tensor, or none, computes rightly all the same; the part computed for it is then lost. Nothing is kept after
    the last layer took its part, or after the forward of the module that holds the layers.
    """

    def __init__(self, layers: Iterable[LowRankLinear]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._held = _Held()

    def take(self, layer: LowRankLinear, x: Tensor) -> Projected | None:
        """The part of ``layer`` in the projections of x; None where it has to compute alone."""
        if not is_plain_eager(x):
            return None
        circumstances, held = _circumstances(x), self._held
        found = held.parts.get(id(layer))
        if found is None or x is not held.x or circumstances != held.circumstances or found[0] != _factors(layer):
            self._lead(layer, x)
            held.circumstances = circumstances
        found = held.parts.pop(id(layer), None)
        if not held.parts:
            self.clear()
        return None if found is None else found[1]

    def together(self, layer: LowRankLinear, x: Tensor) -> list[LowRankLinear]:
        """The layers that project x in one call now, ``layer`` among them; none if it computes alone."""
        layers = [found for reference in self._layers if (found := reference()) is not None and found.can_share(x)]
        layers = [found for found in layers if found.decoupled == layer.decoupled]
        return layers if layer in layers and len(layers) > 1 else []

    def example_calls(self, layer: LowRankLinear, x: Tensor) -> Iterator[Call]:
        """What ``layer``, which does not compute alone, calls for x (1, d_in), and what all of them call together."""
        layers, base, decoupled = self.together(layer, x), layer.base_layer, layer.decoupled
        weight = base.weight.detach() if is_plain(base) else None
        d_in, total = layer.in_features, sum(found.rank for found in layers)

        def empty(*shape: int) -> tuple[Tensor, Tensor | None]:
            return x.new_empty(shape), x.new_empty(shape) if decoupled else None

        (a, q_a), on = empty(total, d_in), empty(1, total)
        what = f"{len(layers)} layers of one input, {total} × {d_in}{', decoupled' if decoupled else ''}"
        yield "lora_down", x.device.type, what, (x, a, q_a)
        yield "lora_down_backward", x.device.type, what, (x, *on, x, a, q_a)
        (b, q_b), (hidden, hidden_q) = empty(layer.out_features, layer.rank), empty(1, layer.rank)
        what = f"{layer.out_features} × {d_in}, r = {layer.rank}{', decoupled' if decoupled else ''}"
        yield "lora_up", x.device.type, what, (None if weight is None else x, weight, None, hidden, b, hidden_q, q_b, 1.0)
        needs = [weight is not None, True, True, decoupled]
        yield "lora_up_backward", x.device.type, what, (x.new_empty(1, layer.out_features), weight, hidden, b, q_b, 1.0, needs)

    def _lead(self, layer: LowRankLinear, x: Tensor) -> None:
        self.clear()
        layers = self.together(layer, x)
        if not layers:
            return
        bases = [found.q_a for found in layers] if layer.decoupled else None
        passed, hiddens, hiddens_q = lora_down(x, [found.lora_A for found in layers], bases)
        rest: Sequence[Tensor | None] = hiddens_q or [None] * len(layers)
        parts = zip(layers, hiddens, rest, strict=True)
        self._held.parts = {id(found): (_factors(found), Projected(passed, h, h_q)) for found, h, h_q in parts}
        self._held.x = x

    def clear(self, *_: Any) -> None:
        """Forget what nobody took; also called as a hook, after the forward of the module that holds the layers."""
        self._held.x, self._held.parts = None, {}

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": [layer for reference in self._layers if (layer := reference()) is not None]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        SharedInput.__init__(self, state["layers"])


def _groups_of(names: Any) -> list[list[str]]:
    """The groups as lists, which may be read again for every module."""
    if isinstance(names, (str, Tensor)) or not isinstance(names, Iterable):
        groups: list[Any] = [None]
    else:
        groups = [list(group) if isinstance(group, Iterable) and not isinstance(group, (str, Tensor)) else None for group in names]
    if any(group is None or not all(isinstance(name, str) for name in group) for group in groups):
        raise TypeError(f"share_inputs: names must be groups of child names, such as [('q_proj', 'k_proj', 'v_proj')], got {names!r:.80}")
    return groups


def share_inputs(model: nn.Module, names: Iterable[Iterable[str]] = SHARED_NAMES) -> int:
    """Let adapted layers of one module that get the same input project it together: one read of it in the forward pass, one for ∂A.

    Outputs and gradients are those of separate layers, up to rounding. The layers still compute separately under ``torch.compile`` and
    other tracing, with active dropout (each layer drops entries of its own), merged in eval mode, with a core ("xs"), while an optimizer
    captures full gradients, and in a forward in which they get different tensors. The tensor must be the same object; a copy or a
    view of it is another one. Checkpoint the module that holds the layers, or a larger one; layers that are checkpointed one by one compute
    separately. Gradients through shared inputs cannot be differentiated again (``create_graph=True``); those of separate layers can.

    Args:
        model: with adapters; changed in place. Calling it again replaces the groups; ``names=()`` takes them away.
        names: groups of child names, such as ``("q_proj", "k_proj", "v_proj")``. Leave out layers that get different inputs (queries in
            cross-attention): their part would be computed for nothing.

    Returns:
        How many groups there are.

    Raises:
        TypeError: ``model`` is not a module, or ``names`` are not groups of names.
    """
    root = check_model("share_inputs", model)
    groups = _groups_of(names)
    for layer in adapted_layers(root).values():
        layer.shared_input = None
    count = 0
    for parent in root.modules():
        for key in [key for key, hook in parent._forward_hooks.items() if isinstance(getattr(hook, "__self__", None), SharedInput)]:
            del parent._forward_hooks[key]
            parent._forward_hooks_always_called.pop(key, None)
        children = dict(parent.named_children())
        for group in groups:
            layers = [child for name in group if isinstance(child := children.get(name), LowRankLinear) and child.shared_input is None]
            if len(layers) < 2 or len({layer.in_features for layer in layers}) > 1:
                continue
            shared = SharedInput(layers)
            for layer in layers:
                layer.shared_input = shared
            parent.register_forward_hook(shared.clear, always_call=True)
            count += 1
    return count
