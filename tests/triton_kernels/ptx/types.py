"""PTX's types as NumPy's: registers hold 64 bits, values are what an instruction makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint64]
_LETTERS = {"b": "u", "u": "u", "s": "i", "f": "f"}
TYPES = {
    f"{letter}{width}": np.dtype(f"{code}{width // 8}")
    for letter, code in _LETTERS.items()
    for width in (8, 16, 32, 64)
    if (letter, width) != ("f", 8)
}
UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


def decode(bits: Bits, kind: str) -> NDArray[Any]:
    """The low bits as values; bf16 become fp32, predicates bool."""
    if kind == "pred":
        return bits != 0
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    dtype = TYPES[kind]
    return bits.astype(UNSIGNED[dtype.itemsize], copy=False).view(dtype)


def encode(values: NDArray[Any], kind: str) -> Bits:
    """Values as bits, zeros above; to bf16 they are rounded to nearest even."""
    if kind == "bf16":
        bits = values.astype(np.float32).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
        return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint64)
    if kind == "pred":
        return values.astype(np.uint64)
    dtype = TYPES[kind]
    return np.ascontiguousarray(values, dtype=dtype).view(UNSIGNED[dtype.itemsize]).astype(np.uint64)
