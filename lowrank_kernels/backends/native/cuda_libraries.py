"""Which cuSOLVER, cuBLAS and CUDA runtime serve this process, and where they came from."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from ..extension import csrc

CudaLibraryError: type[RuntimeError] = csrc.CudaLibraryError

#: CUDA major versions whose sonames and prototypes are known, newest first.
MAJORS = (13, 12)
#: Folders (separated like PATH) to search before everything else but the copies that torch has loaded.
FOLDERS_VARIABLE = "LOWRANK_KERNELS_CUDA_FOLDERS"


def library_folders() -> list[str]:
    """Folders that may hold CUDA libraries: those of :data:`FOLDERS_VARIABLE`, then the installed ``nvidia-*`` wheels'.

    The wheels come in two layouts: ``nvidia/cu13/lib`` (one folder for all of CUDA 13), ``nvidia/cublas/lib`` (CUDA 12).
    """
    folders = list(filter(None, os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep)))
    try:
        spec = importlib.util.find_spec("nvidia")
    except (ImportError, ValueError):
        spec = None
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for name in ("cu13", "cusolver", "cublas", "cuda_runtime"):
            folder = Path(root) / name / "lib"
            if folder.is_dir():
                folders.append(str(folder))
    return folders


def _majors() -> list[int]:
    """torch's own CUDA version if it has one, else all."""
    own = (torch.version.cuda or "").partition(".")[0]
    if not own:
        return list(MAJORS)
    return [int(own)] if int(own) in MAJORS else []


@functools.cache
def routines() -> Any:
    """The process's table of routines (``CudaRoutines``); opened at first use, kept for good."""
    return csrc.CudaRoutines(_majors(), library_folders())


@functools.cache
def problem(*symbols: str) -> str | None:
    """Why these symbols cannot be called here, or None."""
    if torch.version.hip is not None:
        return "this torch is built for ROCm; the native CUDA path calls cuSOLVER and cuBLAS"
    if torch.version.cuda is not None and not _majors():
        return f"torch is built for CUDA {torch.version.cuda}; known here: {', '.join(map(str, sorted(MAJORS)))}"
    status = cuda_status()
    missing = [name for name in symbols if name in status["missing_symbols"]]
    if not missing:
        return None
    errors = [library["error"] for library in status["libraries"].values() if library["error"]]
    return "; ".join(errors) if errors else f"not in the opened CUDA libraries: {', '.join(missing)}"


@functools.cache
def cuda_status() -> dict[str, Any]:
    """Facts for ``explain()``: ``cuda_major``, ``libraries`` (name → soname, path, origin, error), versions, ``missing_symbols``.

    Opens the libraries, but asks nothing of a GPU.
    """
    status: dict[str, Any] = routines().status()
    return status


def report() -> list[str]:
    """:func:`cuda_status` as lines of text."""
    status = cuda_status()
    lines = []
    for name, library in status["libraries"].items():
        where = f"{library['path']} ({library['origin']})" if library["path"] else library["error"]
        lines.append(f"{name}: {where}")
    for name in ("cuda_runtime_version", "cusolver_version"):
        if status[name]:
            lines.append(f"{name}: {status[name]}")
    # A library that was not found has said so above; name what a found one lacks.
    prefixes = tuple("cuda" if name == "cudart" else name for name, library in status["libraries"].items() if library["path"])
    missing = [symbol for symbol in status["missing_symbols"] if symbol.startswith(prefixes)]
    if missing:
        lines.append(f"missing symbols: {', '.join(missing)}")
    return lines
