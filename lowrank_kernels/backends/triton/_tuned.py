"""Launch configurations that were measured: one table for each architecture, made by ``python -m benchmarks.tune``.

A kernel asks with what its heuristic chose; the table of the device may name other values, and only values that every kernel is right with.
A table is looked for in ``LOWRANK_KERNELS_TUNED`` (the path of a file; ``off``: the heuristics alone), then in this package, as
``tuned/sm_90.json`` for compute capability 9.0. None is shipped so far: none was measured.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

ENVIRONMENT_VARIABLE = "LOWRANK_KERNELS_TUNED"
FOLDER = Path(__file__).parent / "tuned"
FORMAT = 1
#: What a table says beside the configurations, for its reader.
NOTES = ("device", "torch", "triton")
#: The knobs of each kernel that has some.
KNOBS: dict[str, tuple[str, ...]] = {
    "project": ("BLOCK_T", "BLOCK_D", "num_warps", "num_stages"),
    "expand": ("BLOCK_T", "BLOCK_D", "num_warps"),
    "token_sum": ("BLOCK_T", "BLOCK_D", "num_warps", "num_stages"),
    "output_grads": ("BLOCK_T", "BLOCK_D", "num_warps", "num_stages"),
    "partial_gram": ("BLOCK_D", "num_warps", "num_stages"),
    "substitute": ("BLOCK_D", "num_warps"),
    "mapped_adamw": ("BLOCK_D", "num_warps"),
    "mapped_adamw_heavy": ("BLOCK_D", "num_warps"),
}
#: The least and the largest value of each knob. Blocks are at least what ``tl.dot`` takes, divide a chunk of the Gram kernel (512 rows)
#: and hold whole groups of columns of a dropout counter (8).
RANGES = {"BLOCK_T": (16, 256), "BLOCK_D": (16, 512), "num_warps": (1, 16), "num_stages": (1, 8)}
RANKS = (16, 32, 64, 128)
#: Kernels that may write what they read.
IN_PLACE = frozenset({"expand", "substitute", "mapped_adamw", "mapped_adamw_heavy"})
_NAMES = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
Configurations = Mapping[str, Mapping[str, Mapping[str, int]]]


class TunedTableError(ValueError):
    """A table that cannot be read, or asks for what the kernels cannot do."""


def bucket(padded_rank: int, *dtypes: torch.dtype) -> str:
    """The name of what a configuration is for: "r16 bfloat16"."""
    return " ".join((f"r{padded_rank}", *(_NAMES[dtype] for dtype in dtypes)))


def check(kernels: Any, source: str) -> Configurations:
    """``kernels`` itself, if every entry is one that the kernels are right with.

    Raises:
        TunedTableError: it is not; the text names ``source``.
    """

    def fail(what: str) -> None:
        raise TunedTableError(f"lowrank_kernels: tuned table {source}: {what}")

    if not isinstance(kernels, Mapping):
        fail(f"the configurations must be a mapping of kernels, got {type(kernels).__name__}")
    for kernel, buckets in kernels.items():
        if kernel not in KNOBS:
            fail(f"unknown kernel {kernel!r}; known are {', '.join(KNOBS)}")
        if not isinstance(buckets, Mapping):
            fail(f"{kernel} must be a mapping of buckets such as {bucket(16, torch.bfloat16)!r}, got {type(buckets).__name__}")
        for name, configuration in buckets.items():
            rank, *dtypes = name.split(" ")
            if rank not in {f"r{r}" for r in RANKS} or not dtypes or not set(dtypes) <= set(_NAMES.values()):
                fail(f"{kernel}: unknown bucket {name!r}; write a padded rank (16, 32, 64, 128) and dtypes, as 'r16 bfloat16'")
            if not isinstance(configuration, Mapping):
                fail(f"{kernel}, {name}: must be a mapping of {', '.join(KNOBS[kernel])}, got {type(configuration).__name__}")
            for knob, value in configuration.items():
                if knob not in KNOBS[kernel]:
                    fail(f"{kernel}, {name}: unknown key {knob!r}; known are {', '.join(KNOBS[kernel])}")
                least, most = RANGES[knob]
                whole = isinstance(value, int) and not isinstance(value, bool)
                power = knob == "num_stages" or (whole and value & (value - 1) == 0)
                if not (whole and power and least <= value <= most):
                    fail(
                        f"{kernel}, {name}: {knob} must be {'an integer' if knob == 'num_stages' else 'a power of two'} from {least} to {most}, got {value!r}"
                    )
            across = configuration.get("BLOCK_T") if "BLOCK_T" in KNOBS[kernel] else int(rank[1:])
            block, warps = configuration.get("BLOCK_D"), configuration.get("num_warps")
            if kernel in IN_PLACE and across and block and warps and block * across < 32 * warps:
                fail(
                    f"{kernel}, {name}: {warps} warps are too many for {block} × {across} elements: several threads would hold one element, "
                    "and a late one could read what another has updated"
                )
    return kernels


def read(path: Path, architecture: str | None = None) -> Configurations:
    """The configurations of a table.

    Raises:
        TunedTableError: it cannot be read, is ill-formed, or is for another ``architecture``; the text names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TunedTableError(f"lowrank_kernels: tuned table {path}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise TunedTableError(f"lowrank_kernels: tuned table {path}: not of format {FORMAT}; make it anew by `python -m benchmarks.tune`")
    unknown = set(content) - {"format", "architecture", "kernels", *NOTES}
    if unknown or "kernels" not in content or "architecture" not in content:
        what = f"unknown keys {', '.join(sorted(unknown))}" if unknown else "it needs the keys 'architecture' and 'kernels'"
        raise TunedTableError(f"lowrank_kernels: tuned table {path}: {what}")
    if architecture is not None and content["architecture"] != architecture:
        raise TunedTableError(f"lowrank_kernels: tuned table {path}: it is for {content['architecture']}, the device is {architecture}")
    return check(content["kernels"], str(path))


def architecture(device: torch.device) -> str | None:
    """ "sm_90" for a GPU of compute capability 9.0; None for other devices, and for ROCm."""
    if device.type != "cuda" or torch.version.hip:
        return None
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


_NOTHING: Configurations = {}
_using: list[Configurations] = []


@functools.cache
def _of_device(device: torch.device, named: str) -> Configurations:
    found = architecture(device)
    if named:
        return _NOTHING if named == "off" else read(Path(named), found)
    path = FOLDER / f"{found}.json"
    return read(path, found) if found is not None and path.exists() else _NOTHING


def configuration(
    kernel: str, padded_rank: int, dtypes: tuple[torch.dtype, ...], device: torch.device, default: dict[str, int]
) -> dict[str, int]:
    """``default``, the heuristic's choice, or what the table of the device says instead.

    Raises:
        TunedTableError: the device's table cannot be used.
    """
    table = _using[-1] if _using else _of_device(device, os.environ.get(ENVIRONMENT_VARIABLE, ""))
    if not table:
        return default
    return default | table.get(kernel, {}).get(bucket(padded_rank, *dtypes), {})


@contextlib.contextmanager
def using(kernels: Configurations) -> Iterator[None]:
    """Within the context, kernels take these configurations, and no file's."""
    _using.append(check(kernels, "given to using()"))
    try:
        yield
    finally:
        _using.pop()
