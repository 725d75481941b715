"""Shared by all tests. Without a GPU, Triton kernels run in Triton's interpreter, which must be chosen before its import."""

import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from _ranks import Ranks

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores; threads that wait for each other in turns would cost more than they bring.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in a test whichever tests ran before it."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.fixture
def guarded_scratch() -> Iterator[None]:
    """Compiled code that writes behind its scratch ends the process, and says so; elsewhere a kept, larger scratch may take it."""
    from lowrank_kernels.backends.extension import csrc

    if csrc is not None:
        csrc.guard_scratch(True)
    yield
    if csrc is not None:
        csrc.guard_scratch(False)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels can run: the GPU if there is one, else the CPU by the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes that form process groups."""
    started = Ranks()
    yield started
    started.close()


def pytest_configure() -> None:
    """Two repairs of Triton's interpreter.

    3.6 cannot use a one-element array as a loop bound, which NumPy 2.4 refuses without ``item()``. And every call of a device
    function patches ``triton.language`` anew, although the launch that it is part of has done so: a third of the time.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton import language
        from triton.runtime import interpreter
    except ImportError:
        return
    patch, patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor

    def patch_once(function: Any) -> Any:
        used = [module for module in (language, language.core) if any(value is module for value in function.__globals__.values())]
        if any(language.core.is_builtin(module.load) for module in used):
            return patch(function)
        return interpreter._LangPatchScope()  # nothing to undo

    def patch_with_index(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang = patch_once
    interpreter._patch_lang_tensor = patch_with_index
