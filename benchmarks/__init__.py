"""Timings, baselines and the plain per-layer versions of every method. Run ``python -m benchmarks --help``."""
