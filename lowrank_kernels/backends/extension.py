"""The compiled extension ``native/_csrc`` (``csrc``): loaded once, for the operations of ``native`` and for :mod:`.lists`.

It must be loaded after torch, whose copy of the OpenMP runtime it then shares; the line below sees to it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from os.path import dirname, join
from typing import Any

import torch  # noqa: F401

#: What this package asks of the extension; ``kInterface`` in csrc/bindings.cpp, where it says when to raise both.
INTERFACE = 9


def _load() -> Any:
    """The extension.

    Raises:
        ImportError: it is not built, is broken, or is of another version.
    """
    name = f"{__package__}.native._csrc"
    try:
        if name not in sys.modules:
            # Found in its folder rather than imported through its package, whose modules ask for it here.
            spec = PathFinder.find_spec(name, [join(dirname(__file__), "native")])
            if spec is None or spec.loader is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            sys.modules[name] = module
        extension: Any = import_module(name)
    except ImportError as error:
        raise ImportError(
            f"the compiled extension did not load ({error}). Install a C++17 compiler and reinstall the package with "
            "LOWRANK_KERNELS_REQUIRE_NATIVE=1, which shows the compiler's own error"
        ) from error
    found = getattr(extension, "interface", None)
    if found != INTERFACE:
        raise ImportError(
            f"the compiled extension is of another version ({extension.__file__} has interface {found}, this package needs {INTERFACE}); "
            "reinstall the package: `pip install .`, or `pip install -e .` for a checkout"
        )
    return extension


#: The extension; None if it did not load.
csrc: Any = None
#: Why it did not. Importing ``native`` raises it; the registry says so, and what is lost.
cause: ImportError | None = None
try:
    csrc = _load()
except ImportError as error:
    cause = error
