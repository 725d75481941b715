"""``lora_linear`` has no compiled version of its own; this file registers the reason, for ``explain()``."""

from __future__ import annotations

from typing import Any

from ..registry import implements


def verify(*args: Any) -> tuple[bool, str]:
    return False, "its time is torch's own GEMMs (oneDNN, MKL), which are the floor; the reference calls nothing else"


@implements("lora_linear", "native", verify)
@implements("lora_linear_backward", "native", verify)
def never_chosen(*args: Any) -> Any:
    raise AssertionError(f"verify refuses every call: {verify()[1]}")
