"""``grouped_svd`` has no Triton version; this file registers the reason, for ``explain()``."""

from __future__ import annotations

from typing import Any

from ..registry import implements


def verify(*args: Any) -> tuple[bool, str]:
    return False, "its time is torch's batched GEMMs (cuBLAS) with the dense matrices, which are the floor; the reference calls those"


@implements("grouped_svd", "triton", verify)
def never_chosen(*args: Any) -> Any:
    raise AssertionError(f"verify refuses every call: {verify()[1]}")
