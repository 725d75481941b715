"""Warnings that stand at the line of the user's code that has led to them."""

from __future__ import annotations

import sys
import warnings
from os.path import dirname, join

import torch

#: Where no line of the user's stands.
_OUR_AND_TORCHS_CODE = (join(dirname(dirname(dirname(__file__))), ""), join(dirname(torch.__file__), ""))


def warn(message: str) -> None:
    """Warn at the line of the user's code that has led here: how many of ours and of torch's lie between depends on the method."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OUR_AND_TORCHS_CODE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
