"""The parameter groups of every optimizer: their hyperparameters, checked when given and when edited, and the pairs among their parameters.

What an optimizer takes is in ``arguments``, what its parameters are in ``pairing``.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Never

import torch
from torch import Tensor, nn

from ...backends.lists import PLAIN, partition, signature
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

#: AdamW's weight decay, for parameters that are no factors, when the user does not give one. Factors get none (papers).
REST_WEIGHT_DECAY = 1e-2


class ParamGroupsOptimizer(torch.optim.Optimizer, Method):
    """The parameter groups of :class:`~lowrank_kernels.optim._shared.base.LowRankOptimizer`, where its arguments are described."""

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
        """What of a group may be edited, but never to what :meth:`_check_hyperparameters` refuses.

        The same for a copy and for what was loaded, whose defaults torch adds "differentiable" to: values are compared by their places.
        """
        own = (key for key in self.defaults if key not in self.counts and key != "differentiable")
        return (*own, "factor_weight_decay", "differentiable")

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

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_pairing", "_scale", "_constructed", "_nonfinite_grads", "_atomic", "skipped_steps", "_torn")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}, "_checked": self._checked}
