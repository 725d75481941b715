"""What the machine can do at best, measured in the same run as everything that is compared with it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ceilings:
    """Peak rates of one device.

    Attributes:
        copy_bandwidth: bytes per second beyond all caches, reads and writes both counted: the better of a copy and of an
            update in place (on a CPU a copy also reads the lines that it overwrites, an update in place has them already).
        gemm_flops: floating-point operations per second of a large matrix product, by dtype.
    """

    copy_bandwidth: float
    gemm_flops: Mapping[torch.dtype, float]

    def seconds(self, bytes_moved: int, flops: Mapping[torch.dtype, int]) -> tuple[float, float]:
        """How long at least so many bytes take, and so many operations, by dtype."""
        return bytes_moved / self.copy_bandwidth, sum(count / self.gemm_flops[dtype] for dtype, count in flops.items())


def _best_seconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median of the faster half: a ceiling is what the undisturbed machine reaches."""
    seconds = []
    for index in range(rounds + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index >= 2:
            seconds.append(time.perf_counter() - start)
    return statistics.median(sorted(seconds)[: max(1, rounds // 2)])


def measure(device: torch.device, dtype: torch.dtype, rounds: int = 10) -> Ceilings:
    """Measure the ceilings on ``device``; the products in ``dtype``, and in fp32 and fp64, in which small matrices are computed."""
    dtypes = dict.fromkeys((dtype, torch.float32, torch.float64))
    return Ceilings(_copy_bandwidth(device, rounds), {dtype: _gemm_flops(device, dtype, rounds) for dtype in dtypes})


def _copy_bandwidth(device: torch.device, rounds: int) -> float:
    count = (1 << 29) if device.type == "cuda" else (1 << 26)  # fp32 elements: 2 GiB and 256 MiB
    source, target = torch.ones(count, device=device), torch.empty(count, device=device)
    passes = (lambda: target.copy_(source), lambda: source.neg_())
    return 2 * source.nbytes / min(_best_seconds(one, device, rounds) for one in passes)


def _gemm_flops(device: torch.device, dtype: torch.dtype, rounds: int) -> float:
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _best_seconds(lambda: torch.mm(a, b, out=out), device, rounds)
