"""The size of the matrix in the summary."""

from __future__ import annotations

from typing import Any

from _matrix import FEATURES, METHODS


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how large the matrix is and how much of it ran."""
    ran = [r for r in terminalreporter.getreports("passed") if "test_matrix.py::test_cell" in r.nodeid and r.when == "call"]
    if ran:
        size = len(METHODS) * len(FEATURES)
        terminalreporter.write_line(
            f"stacks: {len(METHODS)} optimizers × {len(FEATURES)} features = {size} cells; {len(ran)} of them ran and are green"
        )
