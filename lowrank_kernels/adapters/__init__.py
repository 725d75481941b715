"""Modules that hold low-rank factors, and what turns a model into an adapted one and back."""

from .layer import LowRankLinear

__all__ = ["LowRankLinear"]
