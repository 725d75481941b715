"""What a step found, to be put back where the step raises: the one place that undoes a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..backends.registry import call_counts

#: Operations that make new tensors only. A step that failed before any other one began has changed nothing.
_PURE_OPERATIONS = frozenset(
    {
        "lora_linear",
        "lora_linear_backward",
        "dropout_mask",
        "grouped_damped_inverse",
        "grouped_eigh",
        "grouped_gram",
        "grouped_preconditioner",
        "grouped_solve",
    }
)


def _writes_begun() -> int:
    """How many calls of operations that write into their arguments this process has begun."""
    return sum(count for (operation, _), count in call_counts().items() if operation not in _PURE_OPERATIONS)


class Before:
    """The groups, as far as the host counts, as they are now; and, with :meth:`keep`, everything else that a step may change."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self._groups = groups
        # The shallow copies hold what the host counts; what the device counts is counted back.
        self._old = [{**group, "missed": dict(group["missed"])} for group in groups]
        self._copies: list[tuple[Tensor, Tensor]] | None = None
        self._states: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._begun = _writes_begun()

    def keep(self, written: Iterable[Tensor], state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Copy all tensors that a step may write, and remember which ones are the state: a step may put others in their place."""
        self._copies = [(tensor, tensor.clone()) for tensor in written]
        self._states = [(of_parameter, dict(of_parameter)) for of_parameter in state.values()]

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
        return self._copies is not None or _writes_begun() == self._begun
