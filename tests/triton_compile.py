"""Compiles the Triton kernels ahead of time, at the configurations that the backend launches; needs no GPU.

    python tests/triton_compile.py GROUP ARCH...

calls the backend's host functions on CPU tensors with the launch replaced by a recorder, compiles each distinct
recorded configuration for every ARCH (80, 90, 100) and prints one JSON line for each cubin: kernel, case, architecture,
registers, stack bytes (spills), local bytes, shared bytes, whether "tf32" stands in the TTIR.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowrank_kernels.backends.triton import _launch, adamw, lora_linear, qr, svd_product

TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
         torch.int32: "i32", torch.bool: "i1", torch.uint8: "u8"}  # fmt: skip
Recorded = tuple[Any, tuple[Any, ...], dict[str, Any]]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def qr_case(rank: int, dtype: torch.dtype, previous: bool = True) -> None:
    xs = [torch.zeros(256, rank, dtype=dtype)]
    rs = torch.empty(1, rank, rank, dtype=wide(dtype))
    qr.grouped_qr(xs, xs if previous else None, [torch.empty_like(x) for x in xs], rs)


def svd_case(rank: int, dtype: torch.dtype) -> None:
    xs, us = ([torch.zeros(256, rank, dtype=dtype)] for _ in range(2))
    svd_product.grouped_svd_product(xs, xs, us, torch.empty(1, rank, dtype=wide(dtype)), us)


def adamw_case(dtype: torch.dtype, rank: int = 0, on_device: bool = False) -> None:
    params = [torch.zeros(256, max(rank, 1), dtype=dtype)]
    grads, ms, vs = [torch.zeros_like(params[0])], *([torch.zeros(256, max(rank, 1), dtype=wide(dtype))] for _ in range(2))
    maps = torch.zeros(1, rank, rank, dtype=wide(dtype)) if rank else None
    lr = torch.tensor(1e-3) if on_device else 1e-3
    step = torch.tensor(1.0) if on_device else 1
    adamw.grouped_adamw_(params, grads, ms, vs, maps, maps, [1] if rank else [], lr, 0.9, 0.999, 1e-8, 0.0, step, [], True, False)


def lora_case(rank: int, dtype: torch.dtype, decoupled: bool = True, dropout: bool = False) -> None:
    x, weight, grad, mask = (torch.zeros(1024, 64, dtype=dtype), None, torch.zeros(1024, 96, dtype=dtype), None)
    a, b = torch.zeros(rank, 64, dtype=dtype), torch.zeros(96, rank, dtype=dtype)
    q_a, q_b = (a, b) if decoupled else (None, None)
    if dropout:
        mask = torch.ones(1024, 64, dtype=torch.bool)
    _, hidden = lora_linear.lora_linear(x, torch.zeros(96, 64, dtype=dtype), None, a, b, q_a, q_b, 1.0, mask, 0.9)
    lora_linear.lora_linear_backward(grad, x, weight, a, b, q_a, q_b, hidden, 1.0, mask, 0.9, [True, False, False, True, True])


#: The cases of each group: a group is one subprocess of the test.
GROUPS: dict[str, dict[str, Callable[[], None]]] = {
    "qr": {
        "r16 fp32": lambda: qr_case(16, torch.float32),
        "r64 fp32": lambda: qr_case(64, torch.float32),
        "r128 fp32": lambda: qr_case(128, torch.float32),
        "r64 fp64": lambda: qr_case(64, torch.float64),
    },
    "svd": {
        "r16 fp32": lambda: svd_case(16, torch.float32),
        "r64 fp32": lambda: svd_case(64, torch.float32),
    },
    "lora_linear": {
        "r16 bf16": lambda: lora_case(16, torch.bfloat16, dropout=True),
        "r128 fp32": lambda: lora_case(128, torch.float32),
    },
    "adamw": {
        "fp32": lambda: adamw_case(torch.float32),
        "bf16 on device": lambda: adamw_case(torch.bfloat16, on_device=True),
        "r16 fp32": lambda: adamw_case(torch.float32, 16),
        "r128 fp32": lambda: adamw_case(torch.float32, 128),
        "r64 fp64": lambda: adamw_case(torch.float64, 64),
    },
}


#: What a group leaves to another one, and cases that are compiled for one architecture only: some 115 cubins in all.
ELSEWHERE = {"svd": {"gram_kernel", "factor_kernel", "apply_kernel", "guarded_kernel"}}
ONE_ARCHITECTURE = {("qr", "r64 fp32"): 90}


def record(case: Callable[[], None]) -> list[Recorded]:
    """What ``case`` would launch."""
    found: list[Recorded] = []

    def recorder(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        found.append((kernel, args, options))

    modules = [module for name, module in sys.modules.items() if name.startswith("lowrank_kernels.backends.triton.")]
    for module in modules:
        if hasattr(module, "launch"):
            module.launch = recorder
    case()
    return found


def source(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """The compiler's input for a recorded launch: types as the launch would infer them, aligned pointers."""
    compile_options = {key: options.pop(key) for key in list(options) if key not in kernel.arg_names}
    names = list(inspect.signature(kernel.fn).parameters)
    values = dict(zip(names, args, strict=False)) | options
    signature, constants, attributes = {}, {}, {}
    for position, (name, parameter) in enumerate(zip(names, kernel.params, strict=True)):
        value = values[name]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif parameter.annotation_type:
            signature[name] = parameter.annotation_type
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    return ASTSource(kernel, signature, constants, attributes), {"enable_fp_fusion": True, **compile_options}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack, local and shared memory of a cubin, by Triton's own cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found: dict[str, int] = {}
    for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text):
        found[key.lower()] = max(int(value), found.get(key.lower(), 0))
    return found


def reports(group: str, architectures: list[int]) -> Iterator[dict[str, Any]]:
    """Compile every distinct configuration of ``group`` for every architecture."""
    seen = set()
    for case, call in GROUPS[group].items():
        for kernel, args, options in record(call):
            if kernel.fn.__name__ in ELSEWHERE.get(group, ()):
                continue
            src, compile_options = source(kernel, args, dict(options))
            identity = (kernel.fn.__name__, str(src.signature), str(src.constants), str(compile_options))
            if identity in seen:
                continue
            seen.add(identity)
            only = ONE_ARCHITECTURE.get((group, case))
            for architecture in architectures if only is None else [only]:
                compiled = triton.compile(src, target=GPUTarget("cuda", architecture, 32), options=compile_options)
                ptx = compiled.asm["ptx"]
                yield {"kernel": kernel.fn.__name__, "case": case, "arch": architecture, **resources(compiled.asm["cubin"]),
                       "tf32": "tf32" in compiled.asm["ttir"], "vector": bool(re.search(r"ld\.global\.v[24]", ptx))}  # fmt: skip


if __name__ == "__main__":
    assert not _launch.INTERPRET
    for report in reports(sys.argv[1], [int(a) for a in sys.argv[2:]]):
        print(json.dumps(report), flush=True)
