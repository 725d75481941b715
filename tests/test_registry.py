"""The registry of backends: whose choice is forced, and what it says of a backend that cannot take a call."""

from __future__ import annotations

import _thread
import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lowrank_kernels as lrk
from lowrank_kernels.backends import registry

ENVIRONMENT = {**os.environ, "LOWRANK_KERNELS_BACKEND": ""}


def in_a_thread(function: Callable[[], None]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(10)


def in_a_foreign_thread(function: Callable[[], None]) -> None:
    """One that Python's ``threading`` did not start, as autograd's are."""
    done = threading.Event()
    _thread.start_new_thread(lambda: (function(), done.set()), ())
    assert done.wait(10)


@pytest.mark.parametrize("operation", registry.operations())
def test_a_verify_function_takes_what_its_implementation_takes(operation: str) -> None:
    for backend, implementation in registry.implementations(operation).items():
        parameters = inspect.signature(implementation.function).parameters.values()
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        for count in {sum(p.default is p.empty for p in positional), len(positional)}:
            try:
                inspect.signature(implementation.verify).bind(*range(count))
            except TypeError as error:
                pytest.fail(f"{operation} on {backend} with {count} arguments: {error}")


def test_a_forced_backend_is_the_threads_own() -> None:
    found: list[str | None] = []

    def look() -> None:
        found.append(registry._forced_backend("grouped_gram"))

    def force_too() -> None:
        with registry.force("native"):
            look()
        look()

    with registry.force("reference"):
        in_a_thread(look)
        in_a_thread(force_too)
        look()
        in_a_foreign_thread(look)
    look()
    assert found == [None, "native", None, "reference", "reference", None]
    assert not registry._forced_anywhere


def test_forces_that_end_in_another_order() -> None:
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with registry.force("native"):
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=other)
    with registry.force("reference"):
        thread.start()
        assert entered.wait(10)
    assert registry._forced_backend("grouped_gram") is None
    left.set()
    thread.join(10)
    with pytest.raises(registry.BackendError, match=r"^force\('nativ'\): cannot read 'nativ'"), registry.force("nativ"):
        pass
    with pytest.raises(TypeError, match="^force: backends must be a string, .* got None"), registry.force(None):
        pass
    for call in (registry.implementations, lambda name: registry.select(name, "cpu", ())):
        with pytest.raises(ValueError, match=r"^there is no operation 'x'; backends.registry.operations\(\) returns"):
            call("x")
    assert not registry._forced_anywhere


def run(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_does_not_import_torchs_compiler() -> None:
    run("import sys, lowrank_kernels; assert 'torch._dynamo' not in sys.modules")


@pytest.mark.parametrize("native", [True, False])
def test_threads_wait_until_all_backends_are_there(native: bool) -> None:
    """Each thread's first call is the first of the process, while the import of the backends takes its time."""
    run(
        "import sys, threading, time, torch\n"
        f"blocked = {not native}\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.startswith('lowrank_kernels.backends.') and name.endswith('.gram'): time.sleep(0.2)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "if blocked: sys.modules['lowrank_kernels.backends.native._csrc'] = None\n"
        "from lowrank_kernels import ops\n"
        "from lowrank_kernels.backends import call_counts, registry\n"
        "failed, barrier, x = [], threading.Barrier(4), [torch.randn(9, 3)]\n"
        "def first():\n"
        "    barrier.wait()\n"
        "    try: ops.grouped_gram(x)\n"
        "    except BaseException as error: failed.append(repr(error))\n"
        "threads = [threading.Thread(target=first) for _ in range(4)]\n"
        "for step in (threading.Thread.start, threading.Thread.join):\n"
        "    for thread in threads: step(thread)\n"
        "backend = 'reference' if 'native' in registry.unavailable() else 'native'\n"
        "assert not failed and call_counts() == {('grouped_gram', backend): 4}, (failed, call_counts())\n"
        "assert not blocked or backend == 'reference'\n"
    )


@pytest.mark.parametrize("interface", ["", "stale.interface = -1; "])
def test_an_extension_of_another_version_is_refused_and_the_reference_runs(interface: str) -> None:
    run(
        "import sys, types, warnings; stale = types.ModuleType('_csrc'); stale.__file__ = 'old.so'; " + interface + "\n"
        "sys.modules['lowrank_kernels.backends.native._csrc'] = stale\n"
        "import torch; from lowrank_kernels import ops; from lowrank_kernels.backends import registry\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    ops.grouped_qr([torch.randn(9, 3)])\n"
        "assert 'of another version (old.so' in str(caught[-1].message), caught\n"
        "assert registry.call_counts()['grouped_qr', 'reference'] == 1\n"
    )


def test_a_triton_that_lacks_what_the_kernels_need_is_remembered_not_raised() -> None:
    run(
        "import sys, types; old, language = types.ModuleType('triton'), types.ModuleType('triton.language')\n"
        "old.language, old.__path__ = language, []\n"
        "sys.modules.update({'triton': old, 'triton.language': language})\n"
        "import torch; from lowrank_kernels import ops; from lowrank_kernels.backends import registry\n"
        "ops.grouped_gram([torch.randn(9, 3)])\n"
        "assert 'triton cannot be imported: AttributeError' in registry.unavailable()['triton'], registry.unavailable()\n"
    )


def test_a_refusal_says_what_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lrk.adapt(nn.Sequential(nn.Linear(4, 4)), rank=2).bfloat16()
    exceptions = "native,lora_linear=reference,lora_linear_backward=reference"
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "native")
    with pytest.raises(registry.BackendError, match=rf"^lora_linear: .*; write {exceptions}$"):
        model(torch.ones(2, 4, dtype=torch.bfloat16))
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, exceptions)
    model(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
    with registry.force("native,lora_linear=native"), pytest.raises(registry.BackendError, match=r"lora_linear: .*(?<!reference)$"):
        model(torch.ones(2, 4, dtype=torch.bfloat16))


def test_autocast_is_off_inside_an_implementation_and_on_again_after_its_error() -> None:
    inside: list[bool] = []

    def fails() -> None:
        inside.append(torch.is_autocast_enabled("cpu"))
        raise RuntimeError("as asked")

    implementation = registry.Implementation("grouped_gram", "reference", fails, lambda: (True, ""))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError, match="as asked"):
            registry.call(implementation, "cpu", ())
        assert torch.is_autocast_enabled("cpu")
    assert inside == [False] and not torch.is_autocast_enabled("cpu")
