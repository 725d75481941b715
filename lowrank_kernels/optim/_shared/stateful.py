"""What all optimizers of the package hold: groups of parameters, the pairs among them, and their state, how it is made, saved and loaded.

What an optimizer takes is in ``arguments``, what its parameters are in ``pairing``, what state must look like in ``state``.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Never

import torch
from torch import Tensor, nn

from ...backends.dtypes import compute_dtype
from ...backends.lists import PLAIN, complete, partition, signature
from ...pairs import factors_of, owners, switch_count
from ...parallel.shards import FLATTENED, is_sharded
from .arguments import (
    ParamsT,
    check_hyperparameters,
    check_options,
    check_parameters,
    groups_of,
    named_as_the_others,
    pythons_hyperparameter,
    refuse_unknown,
)
from .idle_halves import take_over
from .notices import warn
from .pairing import Core, FactorPair, Kind, LikePairs, Method, Pairing, Position, name_at
from .search import find_pairs
from .state import as_saved, check_is_state_dict, checked_state_dict, may_step, moments

#: AdamW's weight decay, for parameters that are no factors, when the user does not give one. Factors get none (papers).
REST_WEIGHT_DECAY = 1e-2


class StatefulOptimizer(torch.optim.Optimizer, Method):
    """What :class:`~lowrank_kernels.optim._shared.base.LowRankOptimizer` holds; its arguments and its state are described there."""

    #: The model, where it was given, for what is added later; it is not kept alive, nor part of a copy.
    _model: weakref.ref[nn.Module] | None = None
    #: The hyperparameters of all groups that were checked last, and what of ``defaults`` is none but the method's own count.
    _checked: Sequence[Any] = ()
    counts: frozenset[str] = frozenset()
    #: The hyperparameters that are numbers, in the order in which they are checked; a method adds its own.
    numbers: tuple[str, ...] = ("lr", "eps", "weight_decay", "factor_weight_decay", "lr_ratio", "momentum")
    #: The hyperparameters that say which state there is, or what it and the counters mean: none of them changes after the first step.
    fixed: frozenset[str] = frozenset()
    #: Of which argument a hyperparameter comes, where that has another name.
    argument_names: Mapping[str, str] = {}
    #: What of a group is a list of positions of its parameters; in a ``state_dict()`` it is a list of one bool per parameter.
    positions: frozenset[str] = frozenset()
    #: Whether factors are stepped by AdamW, as parameters that are none are; else a method steps them itself.
    adamw_takes_factors = True
    #: Whether the step of a factor reads its partner, also where that is frozen (LoRA-FA).
    reads_frozen_partners = False
    #: ``switch_count()`` when no layer was last found to be decoupled.
    _plain_at: int | None = None
    #: The pairs as :meth:`_alike` has them, and of which parameters.
    _buckets: tuple[object, list[LikePairs]] = (None, [])

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        scale: float | None = None,
        lr_ratio: float = 1.0,
        nonfinite_grads: str = "keep",
        atomic: bool = False,
        model: nn.Module | None = None,
        method_defaults: dict[str, Any] | None = None,
        **unknown: Never,
    ) -> None:
        name = type(self).__name__
        refuse_unknown(type(self), unknown)
        check_options(
            name,
            amsgrad=amsgrad,
            differentiable=differentiable,
            foreach=foreach,
            fused=fused,
            scale=scale,
            model=model,
            capturable=capturable,
            nonfinite_grads=nonfinite_grads,
            atomic=atomic,
        )
        self._nonfinite_grads, self._atomic = nonfinite_grads, bool(atomic)
        #: How many steps ``nonfinite_grads="skip"`` has left out in this process.
        self.skipped_steps = 0
        #: Why this optimizer cannot go on: a step failed half-way.
        self._torn: str | None = None
        self._pairing = Pairing()
        self._scale = scale
        self._constructed = False
        model = params if isinstance(params, nn.Module) else model
        self._model = None if model is None else weakref.ref(model)
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            fused=fused,
            lr_ratio=lr_ratio,
            method=name,
            **(method_defaults or {}),
        )
        super().__init__(
            groups_of(name, params, self.reads_frozen_partners),
            {key: pythons_hyperparameter(key, value, self.numbers) for key, value in defaults.items()},
        )
        self._constructed = True
        self._find_pairs(since_group=0)

    # ---------------------------------------------------------------- arguments

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; pairs among the new parameters (and with unpaired older ones) are found. If it raises, nothing was added.

        Parameters without names are taken beside named ones (a model's have names), and are named by their positions.
        """
        if isinstance(param_group, dict):  # torch says what is wrong with anything else
            if "params" not in param_group:
                raise ValueError(f"{type(self).__name__}: a parameter group must have 'params', got the keys {list(param_group)}")
            for key, value in param_group.items():
                param_group[key] = value if key == "params" else pythons_hyperparameter(key, value, self.numbers)
            self._check_hyperparameters({**self.defaults, **param_group})
            if isinstance(param_group.get("params"), nn.Module):
                raise TypeError(f"{type(self).__name__}: params of a group must be tensors, got a module; pass its parameters()")
            param_group = named_as_the_others(self.param_groups, param_group)
        before = self._pairing
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            check_parameters(type(self).__name__, group)
            decay = group["weight_decay"]
            group["factor_weight_decay"] = 0.0 if decay is None else None  # None: as everything else
            group["weight_decay"] = REST_WEIGHT_DECAY if decay is None else decay
            group["step"], group["cleared_at"], group["missed"] = 0, 0, {}
            if self._constructed:
                self._find_pairs(since_group=len(self.param_groups) - 1)
        except BaseException:
            self.param_groups.pop()
            self._pairing, self._buckets = before, (None, [])
            raise

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        """Refuse hyperparameters out of range; a method adds its own."""
        check_hyperparameters(type(self).__name__, group, self.numbers)

    @cached_property
    def _hyperparameters(self) -> tuple[str, ...]:
        """What of a group may be edited, but never to what :meth:`_check_hyperparameters` refuses."""
        return (*(key for key in self.defaults if key not in self.counts), "factor_weight_decay")

    def _check_edits(self) -> None:
        """:meth:`_check_hyperparameters` of the groups, if one was edited (a schedule edits lr) since that was last done."""
        values = self._values()
        if len(values) != len(self._checked) or not all(map(operator.is_, values, self._checked)):
            self._refuse_edits_of_fixed()
            for group in self.param_groups:
                self._check_hyperparameters(group)
                group["betas"] = tuple(group["betas"])  # a list could be edited in place, unseen
                if self.state:
                    self._place_counter(group)
            self._checked = self._values()

    @staticmethod
    def _place_counter(group: dict[str, Any]) -> None:
        """Put a group's step counter where it counts: on the device if ``capturable``, since a graph repeats what it reads there alone."""
        on_device = isinstance(group["step"], Tensor)
        if group["capturable"] and not on_device:
            group["step"] = torch.tensor(float(group["step"]), device=next((p.device for p in group["params"]), None))
        elif on_device and not group["capturable"]:
            group["step"] = int(group["step"])

    def _values(self) -> list[Any]:
        """The hyperparameters of all groups, one after the other."""
        return [group.get(key) for group in self.param_groups for key in self._hyperparameters]

    def _refuse_edits_of_fixed(self) -> None:
        """Refuse a change of what is :attr:`fixed`, once there is state."""
        keys, before = self._hyperparameters, iter(self._checked)
        for index, group in enumerate(self.param_groups if self.state else ()):
            for key, old in zip(keys, before, strict=False):
                new = group.get(key)
                if key in self.fixed and new is not old and (type(new) is not type(old) or new != old):
                    given = f" with {self.argument_names[key]}=…" if key in self.argument_names else ""
                    raise ValueError(
                        f"{type(self).__name__}: {key} of param_groups[{index}] cannot change once the optimizer has stepped, from {old!r} "
                        f"to {new!r:.80}; set it back, or build a new optimizer{given}. Nothing was changed"
                    )

    # ---------------------------------------------------------------- pairs

    def _find_pairs(self, since_group: int) -> None:
        """Pair what is not paired yet; what is new are the groups from ``since_group`` on."""
        model = None if self._model is None else self._model()
        known, never = ([], []) if model is None else factors_of(model, self.trains_convolutions)
        self._pairing, notices = find_pairs(self, self.param_groups, self._pairing, known, never, self._scale, since_group)
        self._buckets = (None, [])
        self._accept_pairs()
        take_over(self, (p for group in self.param_groups for p in group["params"]))
        for notice in notices:
            warn(notice)

    @property
    def _pairs(self) -> list[FactorPair]:
        return self._pairing.pairs

    @property
    def _cores(self) -> list[Core]:
        return self._pairing.cores

    @property
    def _factors(self) -> list[frozenset[int]]:
        return self._pairing.factors

    @property
    def _second_factors(self) -> list[frozenset[int]]:
        return self._pairing.second_factors

    @property
    def _lone_factors(self) -> list[frozenset[int]]:
        return self._pairing.lone_factors

    @property
    def _kinds(self) -> list[dict[bool, list[Kind]]]:
        return self._pairing.kinds

    def _at(self, position: Position) -> Tensor:
        return self.param_groups[position[0]]["params"][position[1]]

    def _name_at(self, position: Position) -> str:
        return name_at(self.param_groups, position)

    def _accept_as_given(self) -> None:
        """Refuse parameters that a framework has flattened or sharded in a way that the method cannot train. Before the first step."""
        name = type(self).__name__
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.is_meta and p.requires_grad:
                    raise RuntimeError(
                        f"{name}: {self._name_at((g, i))} is on the meta device and holds no values; give the model memory and values "
                        "(to_empty, load_state_dict), which may replace its parameters, and make the optimizer after that"
                    )
        for pair in self._pairs:
            for position in (pair.a, pair.b):
                params = self.param_groups[position[0]]["params"]
                if position[1] >= len(params) or params[position[1]].ndim < 2:
                    raise RuntimeError(f"{name}: {pair.name} was a pair of matrices and is none any more: {FLATTENED}")
            a, b = self._at(pair.a), self._at(pair.b)
            if a.dtype != b.dtype and self.requires_pairs:
                raise RuntimeError(f"{name}: A of {pair.name} is {a.dtype} and B is {b.dtype}; cast both to one dtype")
            if is_sharded(self._at(pair.a)) or is_sharded(self._at(pair.b)):
                self._accept_sharded(pair)

    def _accept_sharded(self, pair: FactorPair) -> None:
        """Refuse a pair of DTensors. Here: AdamW's arithmetic is elementwise, any sharding will do."""

    def _accept_pairs(self) -> None:
        """A method refuses here the pairs that it cannot train; called whenever pairs were found."""

    def _refuse_decoupled(self) -> None:
        """Refuse decoupled layers, for a method that trains plain LoRA."""
        layers = owners()
        for pair in self._pairs:
            if pair.holds_bases and getattr(layers.get(id(self._at(pair.a))), "decoupled", False):
                raise ValueError(
                    f"{type(self).__name__}: {pair.name} is decoupled, ΔW = s(Q_B A + B Q_Aᵀ); this method trains plain LoRA, "
                    "ΔW = sBA. Train it with SDSLoRA, or adapt the model with method='lora'"
                )
        self._plain_at = switch_count()  # to look may be to find that a layer has switched

    def _refuse_switched(self) -> None:
        """The same of layers that have become decoupled since then, as by a state dict of the model; before a step changes anything."""
        if self._plain_at != switch_count():
            self._refuse_decoupled()

    def _rank(self, pair: FactorPair) -> int:
        """The trained rank r."""
        return self._at(pair.a).shape[0]

    def _alike(self, pairs: Iterable[FactorPair]) -> Iterator[LikePairs]:
        """The pairs in lists of one device, dtype, rank and parameter groups: what one call of an operation takes."""

        def kind(pair: FactorPair) -> tuple[Any, ...]:
            a = self._at(pair.a)
            mesh = None if type(a) in PLAIN else getattr(a, "device_mesh", None)
            return a.device, a.dtype, self._rank(pair), pair.a[0], pair.b[0], mesh

        return map(LikePairs, partition(pairs, kind).values())

    def _all_alike(self) -> list[LikePairs]:
        """:meth:`_alike` of all pairs; kept from step to step while the parameters' dtypes, devices and shapes stay as they are."""
        seen = [signature(group["params"]) for group in self.param_groups]
        if None in seen or seen != self._buckets[0]:
            self._buckets = (seen, list(self._alike(self._pairs)))
        return self._buckets[1]

    # ---------------------------------------------------------------- state

    def _trained_parts(self, group_index: int) -> dict[int, tuple[slice, ...]]:
        """For parameters of which only a part is trained: position → the slice that is."""
        return {}

    def _factor_state(self, group: dict[str, Any], part: Tensor, rank: int) -> dict[str, Tensor]:
        """The initial state of a factor, of which ``part`` is trained; ``rank``: of its pair, as trained, which may exceed its width."""
        return moments(part, "exp_avg", "exp_avg_sq")

    def _keeps_state(self, group: dict[str, Any]) -> bool:
        """Whether factors have any state under the hyperparameters of ``group``."""
        return True

    def _states_due(self) -> Iterable[dict[str, Tensor]]:
        """The states, as far as there are, of all parameters that have any, where some factors have none."""
        return (
            self.state.get(group["params"][index], {})
            for group, kinds in zip(self.param_groups, self._kinds, strict=True)
            for is_factor, _, members in kinds[False]
            if not is_factor or self._keeps_state(group)
            for index in members
        )

    def _has_state(self) -> bool:
        """Whether there is nothing to create, as in every step but the first: every parameter of the groups has its state. Their number
        alone does not tell, since a parameter may have been put in the place of another."""
        some_have_none = not all(map(self._keeps_state, self.param_groups))
        if not complete(self.state, [group["params"] for group in self.param_groups], some_have_none):
            return False
        return not some_have_none or all(self._states_due())

    def _refuse_replaced_factors(self) -> None:
        """Refuse a factor that stands in the place of another one, whose state is still here: what the method knows of the pair is of that.

        Other parameters begin anew, as in torch, whose AdamW does so with all.
        """
        if not self.adamw_takes_factors or self.requires_pairs:
            here = {id(p) for group in self.param_groups for p in group["params"]}
            gone = any(id(p) not in here for p in self.state)
            for g, factors in enumerate(self._factors):
                params = self.param_groups[g]["params"]
                for index in sorted(factors) if gone else ():
                    if params[index] not in self.state and may_step(params[index]):
                        raise RuntimeError(
                            f"{type(self).__name__}: {self._name_at((g, index))} was replaced by another parameter after the first step(), "
                            "and its state, and what is known of its pair, are of the old one; write the new values into the old parameter "
                            "(copy_ under torch.no_grad()), or make a new optimizer. Nothing was changed"
                        )

    def _create_state(self) -> bool:
        """Every key of every parameter's state, at once, in its final shape; whether any was missing."""
        if self._has_state():
            return False
        self._refuse_replaced_factors()
        created, wanted = False, self._reads_of_frozen()
        for group_index, group in enumerate(self.param_groups):
            self._place_counter(group)
            parts = None
            for index, p in enumerate(group["params"]):
                # Asked for what it lacks, torch's defaultdict has an empty state, which is none, unless the method keeps none.
                if (may_step(p) or (group_index, index) in wanted) and not self.state.get(p):
                    parts = self._trained_parts(group_index) if parts is None else parts
                    part = p[parts[index]] if index in parts else p
                    state = self._initial_state(group_index, group, index, part)
                    if state or p not in self.state:
                        if due := int(self._updates_due(group_index, index)):
                            group["missed"][index] = due
                        self.state[p], created = state, True
        return created

    def _initial_state(self, group_index: int, group: dict[str, Any], index: int, part: Tensor) -> dict[str, Tensor]:
        """Of a parameter, factor or not, of which ``part`` is trained."""
        if index not in self._factors[group_index]:
            return moments(part, "exp_avg", "exp_avg_sq")
        return self._factor_state(group, part, part.shape[1 if index in self._second_factors[group_index] else 0])

    def _reads_of_frozen(self) -> frozenset[Position]:
        """Factors that get state though they may be frozen, since a step of their partners reads or writes it."""
        return frozenset()

    def _updates_due(self, group_index: int, index: int, group: dict[str, Any] | None = None) -> int | Tensor:
        """How many updates, counted since its moments were zero, the parameter has had if it always had a gradient; by the counters of
        ``group``, a checkpoint's, if given."""
        group = self.param_groups[group_index] if group is None else group
        return group["step"] - group["cleared_at"] if index in self._factors[group_index] else group["step"]

    # ---------------------------------------------------------------- saving, loading, copying

    def _refuse_if_torn(self, what: str) -> None:
        if self._torn is not None:
            raise RuntimeError(
                f"{type(self).__name__}: {what} after a step that failed half-way ({self._torn}): some parameters are updated, others not. "
                "Load a checkpoint of model and optimizer; atomic=True keeps a copy during each step and undoes one that fails"
            )

    def state_dict(self) -> dict[str, Any]:
        """As torch's.

        Raises:
            RuntimeError: a step failed half-way; what would be saved is of two different moments.
        """
        self._refuse_if_torn("state_dict()")
        here = {id(p) for group in self.param_groups for p in group["params"]}
        gone = {p: state for p, state in self.state.items() if isinstance(p, Tensor) and id(p) not in here}
        for p in gone:  # replaced by others: what has no place in a group has none in a checkpoint
            del self.state[p]

        def save(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:  # before the user's hooks
            for index, group in enumerate(state_dict["param_groups"]):
                due = [0 if key in state_dict["state"] else int(self._updates_due(index, i)) for i, key in enumerate(group["params"])]
                group.update(as_saved(group, self.positions, due))

        try:
            with self.register_state_dict_post_hook(save, prepend=True):
                return super().state_dict()
        finally:
            self.state.update(gone)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps the dtype it was saved in (torch casts it down to the parameter's).

        Hooks may change what is loaded (``register_load_state_dict_pre_hook``): what they make of it is what must fit.

        Raises:
            ValueError: the checkpoint is of another method, or its shapes do not fit; nothing was changed.
        """
        check_is_state_dict(type(self).__name__, state_dict)
        loaded: list[dict[str, Any]] = []

        def check(_: torch.optim.Optimizer, hooked: dict[str, Any]) -> dict[str, Any]:  # after the user's hooks
            loaded.append(self._checked_state_dict(hooked))
            return loaded[-1]

        def take(_: torch.optim.Optimizer) -> None:  # before the user's hooks
            self._take_state(*loaded)

        with self.register_load_state_dict_pre_hook(check), self.register_load_state_dict_post_hook(take, prepend=True):
            super().load_state_dict(state_dict)

    def _take_state(self, state_dict: dict[str, Any]) -> None:
        """What torch has loaded, as it was saved."""
        self._torn = None
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group["betas"] = tuple(group["betas"])  # a list, of a full state dict
            if isinstance(group["step"], Tensor):
                group["step"] = group["step"].to(group["params"][0].device)
            else:
                group["step"] = int(group["step"])
            for p, key in zip(group["params"], saved_group["params"], strict=True):
                for name, value in state_dict["state"].get(key, {}).items():
                    if isinstance(value, Tensor):
                        dtype = compute_dtype(p.dtype) if value.is_floating_point() else value.dtype
                        self.state[p][name] = value.detach().to(p.device, dtype, copy=True).contiguous()
            self._place_counter(group)
        self._checked = self._values()

    def _expected_states(self, group_index: int, group: dict[str, Any]) -> Iterator[tuple[Position, dict[str, Tensor]]]:
        """What the state of each parameter holds under the hyperparameters of ``group``, as tensors without memory."""
        parts = self._trained_parts(group_index)
        for index, p in enumerate(self.param_groups[group_index]["params"]):
            shape = (p[parts[index]] if index in parts else p).shape
            like = torch.empty(shape, dtype=p.dtype, device="meta")
            yield (group_index, index), self._initial_state(group_index, group, index, like)

    def _checked_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint with its groups as they are here, not as they are saved. Refuses what this optimizer cannot go on from; a method may
        ask for more."""
        # torch puts "differentiable" into the defaults of an optimizer that was unpickled or loaded.
        needed = self.defaults.keys() - {"differentiable"} | {"factor_weight_decay", "step", "cleared_at", "missed"}
        name, here = type(self).__name__, (self._expected_states, self._updates_due)
        state_dict = checked_state_dict(name, state_dict, self.param_groups, needed, self.positions, *here)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            self._check_hyperparameters({**group, **saved})
        return state_dict

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_pairing", "_scale", "_constructed", "_nonfinite_grads", "_atomic", "skipped_steps", "_torn")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}, "_checked": self._checked}
