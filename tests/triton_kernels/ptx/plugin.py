"""A plugin of pytest: Triton compiles kernels for a GPU, and launches go to the emulator. All tensors of the process are its memory."""

from __future__ import annotations

import gc
import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton
from numpy.typing import NDArray
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .cta import Cta
from .memory import Memory
from .parse import parse
from .types import encode

_FLOATS = {"fp32": "f32", "fp64": "f64"}


class Device:
    """What Triton asks a driver when it compiles for a launch."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def storages() -> dict[int, NDArray[np.uint8]]:
    """The memory of all tensors on the CPU, by address; tables hold addresses of tensors that no argument is. Subclasses (fake tensors) may
    have none."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu" and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = torch.tensor([], dtype=torch.uint8).set_(storage).numpy()
    return found


def bits_of(value: Any, kind: str) -> int:
    """A launch's argument as a kernel's parameter."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return int(encode(np.array([value], dtype=np.float64), _FLOATS[kind])[0]) if kind in _FLOATS else int(value)


def launch(ptx: str, shared: int, grid: Sequence[int], arguments: Sequence[int], without: str) -> None:
    """Run all programs of a grid, one after another."""
    program = parse(ptx, without)
    # Two more parameters, of scratch memory that no kernel here takes, follow the arguments.
    parameters = dict(itertools.zip_longest(program.parameters, arguments, fillvalue=0))
    blocks, epoch = storages(), 1
    memory = Memory(blocks)
    with np.errstate(all="ignore"):
        for position in np.ndindex(*reversed((*grid, 1, 1)[:3])):
            epoch = Cta(program, position[::-1], parameters, memory, shared, epoch).run()
    for start, block in blocks.items():
        if not np.array_equal(block, memory.block(start)):
            block[:] = memory.block(start)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ptx-architecture", type=int, default=90, help="what Triton compiles for")
    parser.addoption("--ptx-without", default="", help="KERNEL:INSTRUCTION to leave out, to see that it is noticed")


def pytest_collection_finish() -> None:
    """What is there before the tests holds no tensors of theirs, and would be looked through at every launch."""
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    assert not triton.knobs.runtime.interpret, "TRITON_INTERPRET=0, please"
    from lowrank_kernels.backends.triton import _launch

    _launch.INTERPRET = True  # Triton's kernels run where the tensors are
    driver.set_active(Device(config.getoption("--ptx-architecture")))
    run = JITFunction.run

    def emulated(kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)  # as for a launch, but for that
        named = {name: value for name, value in options.items() if name in kernel.arg_names}
        values = inspect.signature(kernel.fn).bind(*arguments, **named).arguments
        given = [bits_of(values[name], kind) for name, kind in compiled.src.signature.items() if kind != "constexpr"]
        launch(compiled.asm["ptx"], compiled.metadata.shared, grid, given, config.getoption("--ptx-without"))

    JITFunction.run = emulated
