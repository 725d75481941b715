"""What a step found, to be put back where the step raises: the one place that undoes a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor


class Before:
    """The groups, as far as the host counts, as they are now; and, with :meth:`keep`, everything else that a step may change."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self._groups = groups
        # The shallow copies hold what the host counts; what the device counts is counted back.
        self._old = [{**group, "missed": dict(group["missed"])} for group in groups]
        self._copies: list[tuple[Tensor, Tensor]] | None = None
        self._states: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._written = False

    def keep(self, written: Iterable[Tensor], state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Copy all tensors that a step may write, and remember which ones are the state: a step may put others in their place."""
        self._copies = [(tensor, tensor.clone()) for tensor in written]
        self._states = [(of_parameter, dict(of_parameter)) for of_parameter in state.values()]

    def begin_writing(self) -> None:
        """Said by the step right before it first writes into parameters or state: what fails until then has changed nothing."""
        self._written = True

    def put_back(self) -> bool:
        """Counters as before, tensors too if there are copies; whether all is as it was, since else some tensors may be written."""
        for group, old in zip(self._groups, self._old, strict=True):
            if isinstance(old["step"], Tensor) and group["step"] is old["step"]:
                old["step"].sub_(1)  # counted up in place
            group.update(old)
        for of_parameter, tensors in self._states:
            of_parameter.update(tensors)
        for tensor, copy in self._copies or ():
            tensor.copy_(copy)
        return self._copies is not None or not self._written
