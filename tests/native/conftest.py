"""All tests here run the compiled CPU backend, and no other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lowrank_kernels.backends import registry


@pytest.fixture(autouse=True)
def forced_native(guarded_scratch: None) -> Iterator[None]:
    with registry.force("native"):
        yield


@pytest.fixture
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each that this machine has: see below."""
    from _native import _csrc

    before = _csrc.instruction_set()
    assert _csrc.use_instruction_set(request.param)
    yield request.param
    assert _csrc.use_instruction_set(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Two threads, whatever the machine: work must be handed out, and large matrices split."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Asked of tests that were imported, hence with the extension; imported here at once, its absence would not be a skip."""
    if "instruction_set" in metafunc.fixturenames:
        from _native import INSTRUCTION_SETS

        metafunc.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
