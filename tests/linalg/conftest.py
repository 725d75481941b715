"""All tests here run with guarded scratch."""

import pytest


@pytest.fixture(autouse=True)
def guarded(guarded_scratch: None) -> None:
    """Nothing more."""
