"""What a method needs that steps by full gradients: it watches its layers in the backward pass, and reads G of them in ``step()``."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from itertools import product
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..._checks import as_integer, as_number, first_few
from ...backends.lists import partition
from ...pairs import owners, uncalled_projections
from ...parallel.ranks import check_process_group, data_parallel_group, group_of_a_copy
from .arguments import AdamWOptions, ParamsT
from .base import LowRankOptimizer
from .capture import Patches, Recorder, unwatch, watch, watch_ranks
from .explain_calls import thin_call
from .full_gradient import FullGradients
from .held_gradient import Dense, FullGradient, Probes, Sketch, TokenFactors
from .pairing import FactorPair, Position

#: Why there may be a gradient whose backward pass was not seen.
UNSEEN = (
    "Probable causes: a second step() on one gradient; an optimizer made after the forward pass, or after torch.compile compiled layers of "
    "that class, in another model too (torch._dynamo.reset() makes it compile anew); factors tied to another layer's; layers of which the "
    "weights are read and which are not called (out_proj of nn.MultiheadAttention; PEFT's target_parameters and VeLoRA). The last two need "
    "another optimizer, or are to be left out of what is adapted"
)


def never_called(model: nn.Module) -> set[int]:
    """By id, the parameters of adapters of which the weights are read and which are never called: nobody sees their inputs."""
    found = {id(p) for projection in uncalled_projections(model) for p in projection.parameters()}
    for module in model.modules():
        base: Any = getattr(module, "base_layer", None)
        if isinstance(base, nn.MultiheadAttention) or (base is not None and type(module).__name__ == "ParamWrapper"):  # PEFT's
            found.update({id(p) for p in module.parameters()} - {id(p) for p in base.parameters()})
    return found


class WatchingOptimizer(LowRankOptimizer):
    """For each pair a recorder holds G, the gradient of the full weight, from the backward passes until ``step()`` or ``zero_grad()``.

    How it is held is said by ``gradient`` and ``sketch_width``, which the method has among its hyperparameters.

    Args:
        seed: of the sketches.
        model: the module whose layers are to be watched, those of later groups too while it is there; ours are found without it. Not kept.
        process_group: over which G is averaged; None: the default group if ``torch.distributed`` is initialized; False: none.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        weight_decay: float | None,
        seed: int,
        process_group: Any,
        method_defaults: dict[str, Any],
        **options: Unpack[AdamWOptions],
    ) -> None:
        self._recorders: list[Recorder] = []  # in the order of the pairs
        self._handles: list[Any] = []
        self._seed = seed
        self._probes: dict[int, Probes] = {}  # by group, whose steps they count
        check_process_group(type(self).__name__, process_group)
        self._process_group = process_group
        super().__init__(params, lr, weight_decay=weight_decay, method_defaults=method_defaults, **options)
        self._close_when_collected()

    # ---------------------------------------------------------------- the layers

    def _accept_pairs(self) -> None:
        self._refuse_decoupled()
        layers, new = owners(), self._pairs[len(self._recorders) :]
        model = None if self._model is None else self._model()
        # Parameters only: our layers' `weight` is W0 + ΔW, computed when it is read.
        modules = {} if model is None else {id(w): m for m in model.modules() if (w := m._parameters.get("weight")) is not None}
        unseen = set() if model is None else never_called(model)
        uncalled = [pair.name for pair in new if id(self._at(pair.a)) in unseen]
        if uncalled:
            raise ValueError(
                f"{type(self).__name__}: {first_few(uncalled)} belong(s) to layers of which the weights are read and which are not called "
                "(out_proj of nn.MultiheadAttention; PEFT's target_parameters), so that their inputs cannot be seen; leave them out of "
                "target_modules, freeze their factors, or use another optimizer"
            )
        for pair in new:
            group, partner = self._group(pair), self.param_groups[pair.b[0]]
            different = [key for key in self.defaults if key != "weight_decay" and group[key] != partner[key]]
            different += ["weight_decay"] if self._factor_decay(group) != self._factor_decay(partner) else []
            if different:
                raise ValueError(
                    f"{type(self).__name__}: A and B of {pair.name} are in groups with different {', '.join(different)}; they move together"
                )
            a, b = self._at(pair.a), self._at(pair.b)
            if id(a) not in layers and not (id(a) in modules and id(b) in modules):
                raise ValueError(
                    f"{type(self).__name__}: the layer of {pair.name} is not known from its parameters, and its inputs must be seen; "
                    "pass the model, as params or as model="
                )
        ranks = data_parallel_group(self._process_group)
        for pair in new:  # all are accepted
            a, b = self._at(pair.a), self._at(pair.b)
            layer = layers.get(id(a))
            module: Any = modules.get(id(a))
            patches = Patches.of(module) if a.ndim > 2 else None
            recorder = Recorder(self._holder(pair.a[0]), 1.0 if layer is not None else pair.scale, patches)
            if layer is not None:
                layer.capture = recorder  # type: ignore[assignment]
            else:
                self._handles += watch(module, modules[id(b)], recorder)
            if ranks is not None:
                self._handles.append(watch_ranks(module if layer is None else layer, recorder))
            self._recorders.append(recorder)

    def _holder(self, group_index: int) -> FullGradient:
        group = self.param_groups[group_index]
        if group["gradient"] == "sketch":
            return Sketch(group["sketch_width"], self._probes.setdefault(group_index, Probes(self._seed)))
        return Dense() if group["gradient"] == "dense" else TokenFactors()

    def _close_when_collected(self) -> None:
        self._closing = weakref.finalize(self, unwatch, self._recorders, self._handles)
        self._closing.atexit = False

    def close(self) -> None:
        """Take the hooks off the model and drop what they recorded; also done when the optimizer is garbage-collected."""
        unwatch(self._recorders, self._handles)

    # ---------------------------------------------------------------- their factors

    def _group(self, pair: FactorPair) -> dict[str, Any]:
        return self.param_groups[pair.a[0]]

    def _updates(self, pairs: list[FactorPair]) -> list[int]:
        """How many steps each layer has taken, as ``group["step"]`` counts."""
        return [self.param_groups[g]["step"] - self.param_groups[g]["missed"].get(index, 0) for g, index in (pair.a for pair in pairs)]

    def _matrix(self, position: Position) -> Tensor:
        """A factor as a matrix, without autograd: itself, or, where the layout of a convolution's kernel allows no view, a copy."""
        factor = self._at(position).detach()
        return factor if factor.ndim == 2 else factor.flatten(1)

    def _grad(self, position: Position) -> Tensor:
        grad = self._at(position).grad
        assert grad is not None
        return grad if grad.ndim == 2 else grad.flatten(1)

    def _write_back(self, pairs: list[FactorPair], a: list[Tensor], b: list[Tensor]) -> None:
        """Take over new factors from the matrices that are copies."""
        positions = [*(pair.a for pair in pairs), *(pair.b for pair in pairs)]
        for position, matrix in zip(positions, [*a, *b], strict=True):
            factor = self._at(position)
            if factor.ndim > 2 and factor.data_ptr() != matrix.data_ptr():
                factor.copy_(matrix.view(factor.shape))

    # ---------------------------------------------------------------- their full gradients

    def _captured_gradients(self) -> list[FullGradients]:
        """G of all layers that have one, in lists of what one call takes, and checked."""
        active, unseen, ranks = [], [], data_parallel_group(self._process_group)
        if ranks is not None and any(recorder.joined for recorder in self._recorders):
            raise RuntimeError(
                f"{type(self).__name__}: DistributedDataParallel is in join(), where a rank that is out of data leaves the steps to the "
                "others, and a step sends products of gradients between all ranks; nothing was changed. Give every rank as many batches "
                "(drop_last=True), or end all at once, by join(throw_on_early_termination=True); after a join() that was left, "
                "ddp.join(enable=False) says so"
            )
        for pair, recorder in zip(self._pairs, self._recorders, strict=True):
            grads = self._at(pair.a).grad, self._at(pair.b).grad
            if grads[0] is None and grads[1] is None:
                recorder.clear()
            elif grads[0] is None or grads[1] is None:
                raise RuntimeError(
                    f"{type(self).__name__}: only one factor of {pair.name} has a gradient; a step moves both, so train both or freeze both"
                )
            elif recorder.gradient.empty and ranks is None and (grads[0].any() or grads[1].any()):
                unseen.append(pair.name)
            else:
                active.append(pair)
        if unseen:
            raise RuntimeError(
                f"{type(self).__name__}: no backward pass was seen since the last step() or zero_grad() of {first_few(unseen)}, "
                f"{len(unseen)} of the {len(unseen) + len(active)} layers with a gradient. {UNSEEN}"
            )
        recorders = dict(zip(map(id, self._pairs), self._recorders, strict=True))
        found = []
        for alike in self._alike(active):
            mine = [recorders[id(pair)] for pair in alike]
            factors = [(self._matrix(pair.a), self._matrix(pair.b)) for pair in alike]
            held, scales = [recorder.gradient for recorder in mine], [recorder.scale for recorder in mine]
            gradients = FullGradients(alike, factors, held, scales, ranks)
            gradients.measure([self._grad(pair.a) for pair in alike], [self._grad(pair.b) for pair in alike], type(self).__name__)
            found.append(gradients)
        return found

    @torch.no_grad()
    def clip_full_grad_norm_(self, max_norm: float, probes: int = 16) -> Tensor:
        """``clip_grad_norm_`` with the full gradients of the adapted layers in place of their factors': every ``.grad`` in the optimizer
        is multiplied by ``max_norm / norm`` if the norm is larger, which ``step()`` then does to G. Call it where ``clip_grad_norm_``
        stands, behind ``scaler.unscale_``.

        Args:
            max_norm: the largest norm, positive.
            probes: p; the norm is exact with ``gradient="dense"`` on one process, else estimated by a random matrix of p columns that
                all ranks share, ``‖GΩ‖_F/√p``, whose relative standard error is at most 1/√(2p) for one layer, less for many
                (``gradient="sketch"``: its own Ω, p = sketch_width).

        Returns:
            The norm before clipping, a tensor.
        """
        if not (isinstance(max_norm, float) and max_norm == math.inf):  # which clips nothing, as torch has it
            max_norm = as_number(type(self).__name__, "max_norm", max_norm, positive=True)
        probes = as_integer(type(self).__name__, "probes", probes)
        of_factors = {id(self._at(position)) for pair in self._pairs for position in (pair.a, pair.b)}
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        seed = self._seed + 1 + int(self.param_groups[0]["step"])
        squares = [g.squared_norms(probes, seed).sum() for g in self._captured_gradients()]
        grads = partition((p.grad for p in params), lambda grad: (grad.device, grad.dtype))
        others = partition((p.grad for p in params if id(p) not in of_factors), lambda grad: grad.device)
        squares += [torch.stack(torch._foreach_norm(of, 2, dtype=torch.float64)).square().sum() for of in others.values()]
        device = params[0].device if params else torch.device("cpu")
        norm = torch.stack([square.to(device) for square in squares]).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for (place, dtype), alike in grads.items():
            torch._foreach_mul_(alike, factor.to(place, dtype))
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; what was captured is dropped too."""
        super().zero_grad(set_to_none)
        self._forget()

    def _forget(self) -> None:
        """Drop what was captured."""
        for recorder in self._recorders:
            recorder.clear()
        for group_index, probes in self._probes.items():
            probes.step = int(self.param_groups[group_index]["step"])

    # ---------------------------------------------------------------- loading, copying

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_recorders", "_handles", "_seed", "_probes")
        group = group_of_a_copy(self._process_group)
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}, "_process_group": group}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_recorders" in state:  # a copy: torch's load_state_dict calls this too
            for recorder in self._recorders:
                recorder.active = True
            self._close_when_collected()

    # ---------------------------------------------------------------- explain()

    def _example_calls(self) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
        yield from super()._example_calls()
        for alike in self._alike(self._pairs):
            for operation, columns in sorted(self._operations(alike)):
                yield thin_call(operation, [self._matrix(pair.b) for pair in alike], columns)

    def _operations(self, pairs: list[FactorPair]) -> set[tuple[str, int]]:
        """What a step of layers of one rank and groups calls, and of how many columns the thin matrices there are. Here: to learn G."""
        group, rank = self._group(pairs[0]), self._rank(pairs[0])
        found = {("grouped_gram", rank), ("grouped_lorsum_product", rank)}  # c is measured
        if group["gradient"] == "sketch":
            sketched = {min(group["sketch_width"], len(self._at(pair.b)), self._matrix(pair.a).shape[1]) for pair in pairs}
            found |= {*product({"grouped_qr", "grouped_lorsum_product"}, sketched)}
        return found
