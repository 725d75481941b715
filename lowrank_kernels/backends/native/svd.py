"""``grouped_svd`` has no compiled version of its own; this file registers the reason, for ``explain()``."""

from __future__ import annotations

from typing import Any

from ..registry import implements


def verify(*args: Any) -> tuple[bool, str]:
    return False, "its time is torch's own GEMMs with the dense matrices (oneDNN, MKL); the reference batches equal shapes"


@implements("grouped_svd", "native", verify)
def never_chosen(*args: Any) -> Any:
    raise AssertionError(f"verify refuses every call: {verify()[1]}")
