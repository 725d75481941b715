"""The state of every optimizer: what it holds, how it is made, saved and loaded. What it must look like is in ``state``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...backends.dtypes import compute_dtype
from ...backends.lists import complete
from .pairing import Position
from .param_groups import ParamGroupsOptimizer
from .state import as_saved, check_is_state_dict, checked_state_dict, may_step, moments


class StatefulOptimizer(ParamGroupsOptimizer):
    """The state of :class:`~lowrank_kernels.optim._shared.base.LowRankOptimizer`, where it is described."""

    #: What of a group is a list of positions of its parameters; in a ``state_dict()`` it is a list of one bool per parameter.
    positions: frozenset[str] = frozenset()
    #: Whether factors are stepped by AdamW, as parameters that are none are; else a method steps them itself.
    adamw_takes_factors = True

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

    # ---------------------------------------------------------------- saving, loading

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
        name, here = type(self).__name__, (self._check_hyperparameters, self._expected_states, self._updates_due)
        return checked_state_dict(name, state_dict, self.param_groups, needed, self.positions, *here)
