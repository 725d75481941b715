"""The processes of the distributed tests, and the size of the matrix in the summary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from _matrix import FEATURES, METHODS
from _ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes that form process groups."""
    started = Ranks()
    yield started
    started.close()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how large the matrix is and how much of it ran."""
    ran = [r for r in terminalreporter.getreports("passed") if "test_matrix.py::test_cell" in r.nodeid and r.when == "call"]
    if ran:
        size = len(METHODS) * len(FEATURES)
        terminalreporter.write_line(
            f"stacks: {len(METHODS)} optimizers × {len(FEATURES)} features = {size} cells; {len(ran)} of them ran and are green"
        )
