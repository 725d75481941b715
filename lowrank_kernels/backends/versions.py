"""Whether tensors are what they were, so that what was computed from them still holds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .lists import PLAIN


def version_of(tensor: Tensor) -> int:
    """What changes when a tensor is written in place (inference tensors do not count their writes)."""
    return -1 if tensor.is_inference() else tensor._version


class Seen:
    """Tensors as they are now. A write through ``.data`` is not seen, as torch does not count it; ``x.data = …`` is.

    They are held: a new one may get the id of one that is gone. (Not by weak references, with which torch would not swap a parameter's
    contents, as it does under ``torch.__future__``.)
    """

    __slots__ = ("_marks", "_tensors")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._marks = _marks(tensors)

    def still(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, and hold what they held."""
        same = len(tensors) == len(self._tensors) and all(x is y for x, y in zip(tensors, self._tensors, strict=True))
        return same and _marks(tensors) == self._marks


def _marks(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(version_of(x), x.data_ptr() if type(x) in PLAIN else 0) for x in tensors]
