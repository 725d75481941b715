"""``FullGradientProbe``: the full gradient of every adapted layer, measured in the backward pass and released at once."""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from .._checks import as_integer, as_number, check_module
from ..backends.lists import partition
from ..pairs import HoldsPair, Pair, halves_are_bases, pairs
from .measures import (
    CORE,
    RULE_OF,
    Projections,
    alignment,
    delta_spectrum,
    effective_rank,
    frames,
    gradient_ranks,
    rule,
    stable_rank,
    stable_ranks,
    subspace_drift,
)
from .record import Row, RowWriter


class FullGradientProbe:
    """Measures, layer by layer, how the low-rank gradient relates to the full one (figures of SDS-LoRA and OD-LoRA).

    As a context around one training step, or, with nothing to change in the loop, as a callback::

        probe = FullGradientProbe(model, every=10, csv="run.csv")
        for batch in batches:
            with probe:                      # off, this compares two integers
                loss = model(batch).loss
                loss.backward()
                optimizer.step()             # inside, if the drift of Q is wanted
            optimizer.zero_grad()
        # or, once:  probe.attach(optimizer)

    From the first forward pass of a measured step (one with autograd) to the step's end, the frozen base weights ask for their gradient;
    autograd gives G of one layer, the probe takes two thin products of it and drops it before the next layer's comes. So the memory is
    that of one layer's gradient and of one set of bases; the time is that of the weight gradients which frozen layers save, up to half as
    much again as the linear layers take, and of two thin products a layer. Steps in between cost nothing: no hook, no requires_grad.

    Of several backward passes in one step (gradient accumulation) each one's gradient is measured, and the row has the means of these
    measures, those that are NaN left out: with two micro-batches ``gradient_norm`` is the mean of two norms, not the norm of the mean
    gradient, which is smaller wherever the two disagree. (A base weight that is trained has its sum so far in ``.grad``, and that is
    measured.) Drifts, stable ranks and spectra are of the step. Under data parallelism each rank sees the gradient of its own shard.

    Measures of a layer, all of the same batch and of the factors as they were in the forward pass:
        ``alignment``: cos(G, G̃), and ``alignment_unscaled``, what it would be if the singular values of the same subspaces were
        left out (Figures 1(b), 3(b)); ``rank_grad_a``, ``rank_grad_b``: effective ranks of ∇A and ∇B, and ``…_unscaled`` (Figure 1(a));
        ``stable_rank_a``, ``stable_rank_b`` (Figure 5); ``drift_a``, ``drift_b``: cosine of Q_A, Q_B before and after, NaN where the
        step changed no basis (Figure 4); ``delta_effective_rank``, ``delta_stable_rank`` and ``spectrum``, the singular values of ΔW.
        ``gradient_norm`` is ‖G‖_F.

    Args:
        model: with adapters of this package, PEFT or torchtune.
        method: a key of ``diagnostics.RULES``; None: that of the attached optimizer, else "sds" for decoupled layers,
            "lora-xs" for those with a core R, "lora" for others.
            With "sds" the rank-2r layers of other libraries are read as ``[Q_B B] [A; Q_Aᵀ]``.
        damping: δ of the preconditioned family; None: the attached optimizer's, else 0.
        ratio: learning rate of B over that of A (LoRA+); None: the attached optimizer's, else 1.
        every: measure the first step and then each ``every``-th.
        csv: a file to append to.
        run: the name of this run in the file; several runs in one file are compared by ``plot``.
        tensorboard: a folder for TensorBoard (layer means), if that is installed.

    Attributes:
        step: steps seen so far; set it when a run is resumed.
        rows: what was measured, one dictionary a layer and step.

    Raises:
        TypeError, ValueError: no adapted layer, an unknown method, one of a core R over layers without, a base weight that has no gradient
            (quantized), or another argument out of range. Nothing was written then.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        method: str | None = None,
        damping: float | None = None,
        ratio: float | None = None,
        every: int = 1,
        csv: str | Path | None = None,
        run: str = "run",
        tensorboard: str | Path | None = None,
    ) -> None:
        check_module("FullGradientProbe", model)
        cored = method is not None and rule(method).terms == CORE
        self.damping = None if damping is None else as_number("FullGradientProbe", "damping", damping, 0.0)
        self.ratio = None if ratio is None else as_number("FullGradientProbe", "ratio", ratio, positive=True)
        self.every = as_integer("FullGradientProbe", "every", every)
        if not pairs(model):
            raise ValueError("FullGradientProbe: found no pair of low-rank factors in the model; adapt(model, …) first")
        for pair in pairs(model):
            _base_weight(pair)
            if cored and pair.core is None:
                raise ValueError(f"FullGradientProbe: method={method!r} is of layers with a core R (method='xs'), and {pair.name} has none")
        self.model, self.method = model, method
        self.step = 0
        self._row_writer = RowWriter(csv, run, tensorboard)
        self._armed: _Measurement | None = None
        self._handle: RemovableHandle | None = None

    @property
    def rows(self) -> list[Row]:
        return self._row_writer.rows

    # ---------------------------------------------------------------- context manager

    def __enter__(self) -> FullGradientProbe:
        self._begin()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._end(failed=kind is not None)

    def log(self, **values: float) -> None:
        """Record numbers of the whole model (``loss=…``) at the present step."""
        self._row_writer.write([{"step": self.step, "layer": "", **values}])

    def adopt(self, optimizer: torch.optim.Optimizer) -> FullGradientProbe:
        """Take the method, δ and LoRA+'s ratio from an optimizer, unless they were given.

        Raises:
            TypeError: it is none.
        """
        if not isinstance(getattr(optimizer, "param_groups", None), list):
            raise TypeError(f"FullGradientProbe: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        group = optimizer.param_groups[0]
        if self.method is None:
            self.method = RULE_OF.get(type(optimizer).__name__)
        if self.damping is None:
            self.damping = float(group.get("damping", 0.0))
        if self.ratio is None:
            self.ratio = float(group.get("lr_ratio", 1.0))
        return self

    def attach(self, optimizer: torch.optim.Optimizer) -> FullGradientProbe:
        """:meth:`adopt` it, and measure around its steps from now on, with no other change of the training loop; :meth:`detach` ends it.

        Raises:
            TypeError: it is no optimizer.
            RuntimeError: the probe is attached already.
        """
        if self._handle is not None:
            raise RuntimeError("FullGradientProbe: it is attached to an optimizer already; detach() it first, or make a probe for each")
        self.adopt(optimizer)

        def next_step(*_: Any) -> None:
            self._end()
            self._begin()

        self._begin()
        self._handle = optimizer.register_step_post_hook(next_step)
        return self

    def detach(self) -> None:
        """Stop; the step that has begun is not measured. Nothing happens if it is not attached."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            self._end(failed=True)

    # ---------------------------------------------------------------- one step

    def _begin(self) -> None:
        if self._armed is not None:
            raise RuntimeError("FullGradientProbe: it measures a step already; attach() it, or enter `with probe:` in each step, not both")
        self.step += 1
        if (self.step - 1) % self.every == 0:
            self._armed = _Measurement(self.model, self.method, self.damping or 0.0, 1.0 if self.ratio is None else self.ratio)

    def _end(self, *, failed: bool = False) -> None:
        if self._armed is None:
            return
        measurement, self._armed = self._armed, None
        measurement.disarm()
        if failed:
            return
        rows = [{"step": self.step, **row} for row in measurement.rows()]
        if not rows:
            warnings.warn(
                "FullGradientProbe: no gradient of an adapted layer came in a step that was to be measured; the forward pass must run "
                "after the probe has begun (inside `with probe:`), and a function around it be compiled after that, too",
                stacklevel=3,
            )
        self._row_writer.write(rows)


class _Measurement:
    """One measured step: hooks on the base weights, what they gather, and the rows made of it."""

    def __init__(self, model: nn.Module, method: str | None, damping: float, ratio: float) -> None:
        self.damping, self.ratio = damping, ratio
        self.seen: defaultdict[int, list[Projections]] = defaultdict(list)
        adapted = pairs(model)
        self.layers, self.modules = [_Layer(pair, method) for pair in adapted], {pair.layer for pair in adapted}
        self.frames: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        #: Stable ranks of A and B and the spectrum of ΔW; taken now, since the step may change the factors before they are written down.
        self.state: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.buckets = partition(range(len(self.layers)), lambda i: self.layers[i].kind)
        for members in self.buckets.values():
            count, layers = len(members), [self.layers[i] for i in members]
            found = frames([layer.through_b for layer in layers] + [layer.through_a for layer in layers])
            ranks = stable_ranks([layer.a.mT for layer in layers] + [layer.b for layer in layers])
            spectra = _spectra(layers)
            for k, i in enumerate(members):
                self.frames[i] = (found.bases[k], found.bases[count + k], found.sigma[k], found.sigma[count + k])
                self.state[i] = (ranks[k], ranks[count + k], spectra[k])
        self.bases = {i: [q.clone() for q in layer.bases] for i, layer in enumerate(self.layers) if layer.bases is not None}
        self.was_frozen: list[Tensor] = []
        # Not armed at once: until the next forward pass the weights must be as frozen as ever to whoever saves or copies the model or makes
        # an optimizer of it. A hook on all modules is called from outside of what wraps the model: compiled code has none of it.
        arm = weakref.WeakMethod(self._arm)  # the hook must not keep the model where a probe is forgotten

        @torch.compiler.disable
        def at_forward(called: nn.Module, _: Any) -> None:
            live = arm()
            if live is not None:
                live(called)

        self.handles: list[RemovableHandle] = [register_module_forward_pre_hook(at_forward)]
        weakref.finalize(self, self.handles[0].remove)

    def _arm(self, called: nn.Module) -> None:
        if not torch.is_grad_enabled() or self.modules.isdisjoint(called.modules()):
            return
        self.handles.pop().remove()
        for indices in partition(range(len(self.layers)), lambda i: id(self.layers[i].weight)).values():
            self._hook(self.layers[indices[0]].weight, indices)

    def _hook(self, weight: Tensor, indices: list[int]) -> None:
        frozen = not weight.requires_grad
        if frozen:
            weight.requires_grad_(True)
            self.was_frozen.append(weight)

        def measure(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            for i in indices:
                g = gradient.mT if self.layers[i].transposed else gradient
                self.seen[i].append(Projections.of(g.detach(), *self.frames[i][:2]))
            if frozen:
                parameter.grad = None

        self.handles.append(weight.register_post_accumulate_grad_hook(measure))

    def disarm(self) -> None:
        for handle in self.handles:
            handle.remove()
        for weight in self.was_frozen:
            weight.requires_grad_(False)
            weight.grad = None

    @torch.no_grad()
    def rows(self) -> list[Row]:
        return [
            row for (method, *_), members in self.buckets.items() for row in self._rows_of(method, [i for i in members if self.seen[i]])
        ]

    def _rows_of(self, method: str, members: list[int]) -> list[Row]:
        members = [i for i in members if self.seen[i]]
        if not members:
            return []
        layers = [self.layers[i] for i in members]
        columns: dict[str, Tensor] = {}
        passes = max(len(self.seen[i]) for i in members)
        gathered: defaultdict[str, list[Tensor]] = defaultdict(list)
        sigma_b, sigma_a = (torch.stack([self.frames[i][k] for i in members]) for k in (2, 3))
        for k in range(passes):
            p = Projections.concatenate([self.seen[i][min(k, len(self.seen[i]) - 1)] for i in members])
            one = torch.ones_like(sigma_b)
            gathered["alignment"].append(alignment(p, sigma_b, sigma_a, method, self.damping, self.ratio))
            gathered["alignment_unscaled"].append(alignment(p, one * (sigma_b > 0), one * (sigma_a > 0), method))
            for suffix, scaled in (("", True), ("_unscaled", False)):
                a, b = gradient_ranks(p, sigma_b, sigma_a, method, self.damping, scaled=scaled)
                gathered["rank_grad_a" + suffix].append(a)
                gathered["rank_grad_b" + suffix].append(b)
            gathered["gradient_norm"].append(p.norm2.sqrt())
        for key, values in gathered.items():
            columns[key] = torch.stack(values).nanmean(dim=0)
        columns["stable_rank_a"], columns["stable_rank_b"], spectra = (torch.stack([self.state[i][k] for i in members]) for k in range(3))
        for side, key in enumerate(("drift_b", "drift_a")):
            now = [layer.bases[side] for layer in layers if layer.bases is not None]
            if now:  # a bucket is of one method: all decoupled or none
                old = [self.bases[i][side] for i in members]
                same = torch.tensor([torch.equal(o, n) for o, n in zip(old, now, strict=True)], device=now[0].device)
                columns[key] = torch.where(same, torch.nan, subspace_drift(now, old))
        columns["delta_effective_rank"], columns["delta_stable_rank"] = effective_rank(spectra), stable_rank(spectra)
        table = {key: values.tolist() for key, values in columns.items()}
        return [
            {"layer": layer.name, "method": method, **{key: values[n] for key, values in table.items()}, "spectrum": spectrum}
            for n, (layer, spectrum) in enumerate(zip(layers, spectra.tolist(), strict=True))
        ]


def _spectra(layers: list[_Layer]) -> Tensor:
    lefts, rights = map(list, zip(*(layer.delta_factors() for layer in layers), strict=True))
    scales = torch.tensor([layer.scale for layer in layers], dtype=torch.float64, device=lefts[0].device)
    return scales[:, None] * delta_spectrum(lefts, rights)


@runtime_checkable
class _HoldsBases(Protocol):
    """A layer that can be decoupled: what one adapted with ``method="sds"`` looks like from here."""

    decoupled: bool
    q_a: Tensor
    q_b: Tensor


class _Layer:
    """A pair as it is now: its trained factors a (r, d_in) and b (d_out, r), and the tall factors through which its gradient passes."""

    def __init__(self, pair: Pair, method: str | None) -> None:
        self.name, self.scale = pair.name, 1.0 if pair.scale is None else pair.scale
        #: A layer of ours, which says itself what ΔW is.
        self.own = pair.layer if isinstance(pair.layer, HoldsPair) else None
        started = getattr(self.own, "start_A", None) is not None
        self.weight, self.transposed = _base_weight(pair)
        self.a, self.b = pair.A.detach(), pair.B.detach()
        #: Q_B (d_out, r) and Q_A (d_in, r) of a decoupled layer.
        self.bases: tuple[Tensor, Tensor] | None = None
        if isinstance(pair.layer, _HoldsBases):
            if pair.layer.decoupled:
                self.bases = pair.layer.q_b, pair.layer.q_a.mT
        elif method == "sds" and not started:
            self._split()
        self.through_b, self.through_a = (self.b, self.a.mT) if self.bases is None else self.bases
        # Before its bases exist a decoupled method is plain LoRA.
        own = "sds" if self.bases is not None else "lora" if pair.core is None else "lora-xs"
        self.method = own if method in (None, "sds") else str(method)
        #: What layers have in common that are measured in one batch.
        self.kind = self.method, started, self.through_b.shape[1], self.through_b.dtype, self.through_b.device
        if self.bases is not None and self.method != "sds":
            raise ValueError(f"FullGradientProbe: {self.name} is decoupled; its method is 'sds', got {method!r}")

    def _split(self) -> None:
        """The halves of an unmodified rank-2r layer, ``[Q_B B] [A; Q_Aᵀ]`` (decoupled) or ``[B 0] [A; …]`` (plain, as it starts)."""
        rank = self.a.shape[0] // 2
        if halves_are_bases(self.a, self.b):
            self.bases, self.b = (self.b[:, :rank], self.a[rank:].mT), self.b[:, rank:]
        else:
            self.b = self.b[:, :rank]
        self.a, self.own = self.a[:rank], None

    def delta_factors(self) -> tuple[Tensor, Tensor]:
        """(d_out, k) and (d_in, k) of ``ΔW = s · left @ rightᵀ``."""
        if self.own is not None:
            return self.own.delta_factors()
        if self.bases is None:
            return self.b, self.a.mT
        return torch.cat([self.bases[0], self.b], dim=1), torch.cat([self.a.mT, self.bases[1]], dim=1)


def _base_weight(pair: Pair) -> tuple[Tensor, bool]:
    """The frozen weight of a pair's layer, and whether it is stored (d_in, d_out), as in GPT-2's ``Conv1D``."""
    base = getattr(pair.layer, "base_layer", pair.layer)
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
        state = "quantized" if isinstance(weight, Tensor) else "missing"
        raise ValueError(
            f"FullGradientProbe: {pair.name}: its base weight is {state}, and autograd gives it no gradient; "
            "load the model in a floating-point dtype to look at its gradients"
        )
    return weight, bool(getattr(pair.layer, "fan_in_fan_out", False))
