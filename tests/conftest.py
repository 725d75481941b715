"""Shared by all tests. Without a GPU, Triton kernels run in Triton's interpreter, which must be chosen before its import."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels can run: the GPU if there is one, else the CPU by the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
