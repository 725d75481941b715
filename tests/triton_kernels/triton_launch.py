"""Launches Triton kernels as on a GPU, through Triton's own launcher, down to the driver, which is a stand-in; needs no GPU.

    python tests/triton_kernels/triton_launch.py GROUP:CASE...

runs cases of ``triton_compile.GROUPS`` and prints the names of the kernels that reached the driver. On the way each launch is bound to
its kernel, with the options that it states, compiled, and refused if it takes more than the device has; the stand-in checks the grid and
that every argument is of the kind that its signature says.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton_compile  # sets TRITON_INTERPRET first
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launched: list[str] = []


class Launcher:
    """What Triton makes of a signature for each kernel, and calls for each launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name, self.signature = source.fn.fn.__name__, source.signature

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, packed: Any, metadata: Any, enter: Any, leave: Any,
                 *arguments: Any, **more: Any) -> None:  # fmt: skip
        assert 0 <= x < 1 << 31 and 0 <= y < 1 << 16 and 0 <= z < 1 << 16, (self.name, x, y, z)
        for (name, kind), value in zip(self.signature.items(), arguments, strict=True):
            fits = {"*": isinstance(value, torch.Tensor), "f": isinstance(value, float), "i": isinstance(value, int), "c": True}[kind[0]]
            assert fits, f"{self.name}: {name} is {kind}, got {value!r}"
        launched.append(self.name)


class Utilities:
    """Of an RTX 4090, in what is asked here."""

    def load_binary(self, *arguments: Any) -> tuple[Any, ...]:
        return "module", "function", 32, 0, 1024  # the last three: registers, spills, threads of a block

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 99 << 10, "multiprocessor_count": 128, "warpSize": 32}


class Driver:
    launcher_cls, utils = Launcher, Utilities()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)


if __name__ == "__main__":
    driver.set_active(Driver())
    for argument in sys.argv[1:]:
        group, case = argument.split(":")
        triton_compile.GROUPS[group][case]()
    print(*launched)
