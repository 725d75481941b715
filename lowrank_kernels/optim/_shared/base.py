"""What all optimizers of the package share: what a step is, from its checks to the moment step. What they hold is in ``param_groups``
and ``stateful``.

A method is a subclass that says what happens to the factors of each pair; everything that is not a factor of a pair
(heads, norms, ``modules_to_save``) gets AdamW in the same ``step()``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...backends.lists import Gathered, first_sparse_gradient, gather, partition
from ...backends.moments import Maps, Numbers, Stepped
from ...ops.adamw import adamw_as_gathered_
from ...pairs import core_owners
from ...parallel.shards import local_parts
from .nonfinite import which_nonfinite
from .notices import warn
from .pairing import Kind
from .state import misfit
from .stateful import StatefulOptimizer
from .step_entry import entered
from .undo import Before

#: All parameters are trained as a whole.
NO_PARTS: Mapping[int, tuple[slice, ...]] = {}
NO_MAPS = Maps()


class LowRankOptimizer(StatefulOptimizer):
    """Base of all optimizers here: ``torch.optim.AdamW``'s leading arguments, pairing, lazily created fp32 state.

    Args:
        params: what ``torch.optim.AdamW`` takes (tensors, dicts of groups, named parameters), or the model itself
            (then its trainable parameters, and the frozen factors that a method's step reads). Factors are paired by our adapters or
            by name; s is read from the module when the model is given. Adapter parameters that are no pair of matrices (LoRA on
            embeddings and convolutions, DoRA's magnitudes) and lone factors get AdamW, with the factors' weight decay; one warning
            names them.
        lr, betas, eps, maximize: as ``torch.optim.AdamW``.
        capturable: ``step()`` reads nothing on the host and can be captured in a CUDA graph, after one ordinary step, which makes the
            state and the device tables. The graph keeps what the host knew when it was captured: numbers (an lr to be scheduled must be
            a tensor on the device, changed in place), and which parameters have a gradient.
        weight_decay: decoupled, multiplied by lr. None means 0 for adapters and AdamW's 0.01 for everything else (also for a bias beside a
            factor, PEFT's ``lora_bias=True``); a number holds for both. In a group, ``weight_decay`` is that of everything else, and of
            factors too where ``factor_weight_decay`` is None, which a number makes it; a number there is that of factors. Both may be
            edited.
        amsgrad, differentiable: not supported; True is an error.
        foreach, fused: accepted as ``torch.optim.AdamW`` accepts them; there is one, fused, implementation.
        scale: s of every pair whose module is not known (only tensors or names were given). Where it is known, its s is taken, as it is
            when the optimizer is made; a warning says so if that is another.
        lr_ratio: the learning rate of every B over that of its A (LoRA+, Hayou et al. 2024); 1 is AdamW's.
        nonfinite_grads: what a step does that meets an infinite or NaN gradient: "keep" computes with it, as torch does, and looks at
            nothing; "skip" changes nothing, neither parameters nor state nor counters, counts it in ``skipped_steps``, and warns the
            first time; "raise" raises ``FloatingPointError`` with the parameter's name, everything unchanged. Both read one flag from
            the device, which ``capturable`` forbids. With sharded parameters all ranks decide alike.
        atomic: keep a copy of parameters and state during the step, and put it back if the step raises (out of memory, an interrupt).
            Without it, a step that fails before it has written anything leaves everything as it was, too; one that fails later leaves
            an optimizer that refuses ``step()`` and ``state_dict()`` until a checkpoint is loaded.
        model: whose the parameters are, where ``params`` is not the model: read for their pairs and s, in later groups too. Not kept alive.

    State, one dictionary per parameter, tensors only, created by the first ``step()``: ``exp_avg`` and ``exp_avg_sq``
    in fp32 (fp64 for fp64 parameters). The step counter is one per group, ``group["step"]`` (a device tensor when
    ``capturable``); ``group["missed"]`` counts, by position, the steps in which a parameter had no gradient. In a ``state_dict()`` it is a
    list, one count per parameter of the group: ``torch.distributed.checkpoint`` keeps no empty containers and no keys but strings.

    A first step in which every group's lr is the number 0 and all gradients are exactly zero is how ``torch.distributed.checkpoint`` asks
    for that state: it makes the state and is not counted. A schedule that begins at 0 is counted, since some gradient is not zero then.
    """

    #: What the step found that is under way.
    _before: Before | None = None

    # ---------------------------------------------------------------- the step

    @entered
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the whole schedule of the method lives here. In a function that ``torch.compile`` compiles it runs outside the graph.

        Args:
            closure: re-evaluates the model and returns the loss (optional).
        """
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing() and not all(g["capturable"] for g in self.param_groups):
            raise RuntimeError(f"{type(self).__name__}: step() is being captured in a CUDA graph; make the optimizer with capturable=True")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.state and self._is_probe():
            self._create_state()
            return loss
        self._refuse_if_torn("step()")
        if not self.state:
            self._accept_as_given()
        self._check_groups()
        if self._nonfinite_grads != "keep" and self._skips_nonfinite():
            return loss
        if self._cores and not self.state:
            self._check_cores()
        self._before_update()
        self._create_state()
        before = Before(self.param_groups)
        if self._atomic:
            before.keep(self._written(), self.state)
        self._before = before
        try:
            for group in self.param_groups:
                group["step"] += 1
            self._update()
        except BaseException as error:
            if not before.put_back():
                self._torn = f"{type(error).__name__}: {error}"
            self._after_undo()
            if isinstance(error, Exception) and (what := misfit(self.param_groups, self.state, self._expected_states)):
                raise RuntimeError(f"{type(self).__name__}: {what}") from error
            raise
        finally:
            self._before = None
        return loss

    def _begin_writing(self) -> None:
        """To be called right before a step writes into parameters or state, by whatever may be the first to do so."""
        if self._before is not None:
            self._before.begin_writing()

    def _check_groups(self) -> None:
        """Refuse groups that were edited since pairs were found, hyperparameters that were edited to what none may be, and sparse gradients
        (which come from embeddings, never from factors)."""
        name = type(self).__name__
        self._check_edits()
        sizes = [len(group["params"]) for group in self.param_groups]
        known = [sum(len(members) for _, _, members in kinds[False]) for kinds in self._kinds]
        if sizes != known:
            raise RuntimeError(
                f"{name}: param_groups hold {sizes} parameters, but {known} when their pairs were found; change them by "
                "add_param_group, or make a new optimizer"
            )
        for g, kinds in enumerate(self._kinds):
            params = self.param_groups[g]["params"]
            for is_factor, _, members in kinds[False]:
                if not is_factor and (index := first_sparse_gradient(params, members)) is not None:
                    raise RuntimeError(
                        f"{name} does not support sparse gradients, as {self._name_at((g, index))} has one; use sparse=False, or "
                        "another optimizer for it; nothing was changed"
                    )

    def _skips_nonfinite(self) -> bool:
        """Whether this step is to be left out for a gradient that is not finite.

        Raises:
            FloatingPointError: if that is what was asked for.
        """
        named = [
            (self._name_at((g, i)), p.grad)
            for g, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
            if p.grad is not None
        ]
        which = which_nonfinite(named)
        if which is None:
            return False
        if self._nonfinite_grads == "raise":
            raise FloatingPointError(f"{type(self).__name__}: {which} is infinite or NaN; nothing was changed")
        if not self.skipped_steps:
            warn(f"{type(self).__name__}: {which} is infinite or NaN; such steps are skipped")
        self.skipped_steps += 1
        return True

    def _written(self) -> list[Tensor]:
        """All tensors that a step may write, apart from the counters."""
        params = [p for group in self.param_groups for p in group["params"] if p in self.state]
        return [*params, *(value for p in params for value in self.state[p].values())]

    def _after_undo(self) -> None:
        """What a method keeps elsewhere and derives from counters and tensors is derived anew here."""

    def _is_probe(self) -> bool:
        """Whether this is ``torch.distributed.checkpoint`` asking for empty state: lr 0 and all gradients zero."""
        if any(isinstance(g["lr"], Tensor) or g["lr"] != 0 for g in self.param_groups):
            return False
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        return bool(grads) and not any(grad.any() for grad in grads)

    def _check_cores(self) -> None:
        """Refuse cores between zero factors, which would never get a gradient."""
        layers = core_owners()
        for core in self._cores:
            layer = layers.get(id(self._at(core.position)))
            if layer is not None and not (layer.lora_A.any() and layer.lora_B.any()):  # type: ignore[operator]
                raise ValueError(
                    f"{type(self).__name__}: the constant factors of {core.name} are zero, so its core cannot learn; "
                    "call lora_sb_init(model, …) or initialize(model, 'svd') first, or load a checkpoint"
                )

    def _before_update(self) -> None:
        """Checks that must fail before anything has changed."""

    def _update(self) -> None:
        """What a step does, once ``group["step"]`` counts it. Here: AdamW for all."""
        for group_index, kinds in enumerate(self._kinds):
            self._moment_step(group_index, kinds[self.param_groups[group_index]["lr_ratio"] != 1.0])

    def _step_rest(self) -> None:
        """AdamW for all that is no factor."""
        for group_index, kinds in enumerate(self._kinds):
            if rest := [kind for kind in kinds[False] if not kind[0]]:
                self._moment_step(group_index, rest)

    def _moment_step(self, group_index: int, kinds: Iterable[Kind]) -> None:
        """AdamW on those parameters of a group, of these kinds, that have a gradient: one call per device, dtype and kind."""
        group, parts = self.param_groups[group_index], self._trained_parts(group_index)
        for is_factor, is_second, of_kind in kinds:
            kind: dict[str, Any] = {"is_factor": is_factor, "is_second": is_second, "parts": parts}
            found = gather(group["params"], of_kind, self.state)
            for index in found.idle:
                self._miss(group, index)
            if found.layout is not None:
                self._adamw(group_index, found.members, **kind, found=found)
                continue
            for members in partition(found.members, lambda index: _place(group["params"][index])).values():
                self._adamw(group_index, members, **kind)

    def _miss(self, group: dict[str, Any], index: int) -> None:
        """Note that a parameter does not take this step: its bias correction lags behind by one."""
        if group["params"][index] in self.state:
            group["missed"][index] = group["missed"].get(index, 0) + 1

    @staticmethod
    def _lr(group: dict[str, Any], is_second: bool) -> float | Tensor:
        """The learning rate of a group, or of the Bs in it."""
        return group["lr"] * group["lr_ratio"] if is_second and group["lr_ratio"] != 1.0 else group["lr"]

    @staticmethod
    def _factor_decay(group: dict[str, Any]) -> float | Tensor:
        """The weight decay of the factors of a group."""
        return group["weight_decay"] if group["factor_weight_decay"] is None else group["factor_weight_decay"]

    @staticmethod
    def _sgd(group: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """What makes the moment step of factors that of ``torch.optim.SGD`` with heavy-ball momentum μ, and weight decay decoupled; and by
        what the gradients are multiplied.

        The moment step averages, m = μ m + (1-μ) g; SGD adds up. Gradients divided by 1-μ make them equal, also where μ is scheduled: what
        is kept is SGD's buffer. (A step divided by it would make all that was kept count anew when μ changes.)
        """
        return {"betas": (group["momentum"], 0.0), "bias_correction": False}, 1.0 / (1.0 - group["momentum"])

    def _adamw(
        self,
        group_index: int,
        members: list[int],
        *,
        is_factor: bool,
        is_second: bool,
        found: Gathered | None = None,
        grads: list[Tensor] | None = None,
        parts: Mapping[int, tuple[slice, ...]] = NO_PARTS,
        operation: Callable[..., None] = adamw_as_gathered_,
        **options: Any,
    ) -> None:
        """One call of ``grouped_adamw_`` on parameters of which ``parts`` are trained; ``found``: all that is needed of them, where the
        caller has read it; ``grads`` in place of their own; ``options`` replace what AdamW would pass; ``operation``: one that is a moment
        step and more, which gets the rest of the ``options``."""
        group, lone = self.param_groups[group_index], self._lone_factors[group_index]
        found = gather(group["params"], members, self.state) if found is None else found
        layout, params, grads = found.layout, found.params, found.grads if grads is None else grads
        if parts:
            slices = [parts.get(index) for index in members]
            params = [p if part is None else p[part] for p, part in zip(params, slices, strict=True)]
            grads = [grad if part is None else grad[part] for grad, part in zip(grads, slices, strict=True)]
        tensors = (params, grads, found.exp_avgs, found.exp_avg_sqs)
        if layout is None or parts or grads is not found.grads:
            layout, tensors = None, tuple(map(local_parts, tensors))  # type: ignore[assignment]
        missed = [group["missed"].get(index, 0) for index in members] if group["missed"] else []
        arguments: dict[str, Any] = {
            "lr": self._lr(group, is_second),
            "betas": group["betas"],
            "eps": group["eps"],
            "weight_decay": self._factor_decay(group) if is_factor or members[0] in lone else group["weight_decay"],
            "step": self._updates_due(group_index, members[0]),
            "missed": missed if any(missed) else (),
            "maximize": group["maximize"],
            "layout": layout,
        }
        operation(*tensors, **{**arguments, "begin_writing": self._begin_writing, **options})

    # ---------------------------------------------------------------- explain()

    def _example_calls(self) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
        """``(operation, device type, arguments)`` as ``step()`` will make them, for ``explain()``; no data is read."""
        for group_index, kinds in enumerate(self._kinds):
            for is_factor, _, members in kinds[self.param_groups[group_index]["lr_ratio"] != 1.0]:
                if self.adamw_takes_factors or not is_factor:
                    yield from self._example_adamw(group_index, members)

    def _example_adamw(
        self,
        group_index: int,
        members: Iterable[int],
        maps: Maps = NO_MAPS,
        rank_dims: Sequence[int] = (),
        drifts: Tensor | None = None,
    ) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
        """The moment step of those parameters of a group that are trained, with these maps, rank_dims and drifts."""
        group, parts = self.param_groups[group_index], self._trained_parts(group_index)
        trained = [index for index in members if group["params"][index].requires_grad]
        for (device, _), indices in partition(trained, lambda index: _place(group["params"][index])).items():
            whole = [group["params"][index].detach() for index in indices]
            own = local_parts([p[parts[index]] if index in parts else p for index, p in zip(indices, whole, strict=True)])
            numbers = Numbers.of(**{key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "maximize")}, step=1)
            yield "grouped_adamw_", device.type, (Stepped(own, own, [], []), maps, list(rank_dims), drifts, numbers)


def _place(p: Tensor) -> tuple[torch.device, torch.dtype]:
    return p.device, p.dtype
