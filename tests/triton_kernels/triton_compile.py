"""Compiles the Triton kernels ahead of time, at the configurations that the backend launches; needs no GPU.

    python tests/triton_kernels/triton_compile.py GROUP ARCH...

calls the backend's host functions on CPU tensors with the launch replaced by a recorder, compiles each distinct
recorded configuration for every ARCH (80, 90, 100) and prints one JSON line for each cubin: kernel, case, architecture,
registers, stack bytes (spills), local bytes, shared bytes, matrix instructions, widths of loads and stores, whether "tf32"
stands in the TTIR, asynchronous copies to shared memory, Triton's version. Without arguments it prints the names of the groups.
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

from benchmarks.kernels import instructions
from lowrank_kernels.backends.moments import Maps, Numbers, Stepped
from lowrank_kernels.backends.sums import Sums, Sweeps
from lowrank_kernels.backends.triton import (
    _launch,
    _thin,
    adamw,
    damped_inverse,
    dropout,
    eigh,
    gram,
    lora_linear,
    lorsum,
    polar,
    preconditioner,
    qr,
    solve,
    svd_product,
)

TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
         torch.int32: "i32", torch.bool: "i1", torch.int8: "i8", torch.uint8: "u8"}  # fmt: skip
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


def gram_case(rank: int, dtype: torch.dtype, accumulator: torch.dtype, cross: bool = False) -> None:
    xs = [torch.zeros(256, rank, dtype=dtype)]
    gram.grouped_gram(xs, xs if cross else None, torch.empty(1, rank, rank, dtype=accumulator))


def solve_case(rank: int, dtype: torch.dtype, accumulator: torch.dtype) -> None:
    rhs = [torch.zeros(256, rank, dtype=dtype)]
    solve.grouped_solve(torch.empty(1, rank, rank, dtype=accumulator), rhs, 1e-6, False, [torch.empty_like(x) for x in rhs])


def preconditioner_case(rank: int, dtype: torch.dtype, in_turn: bool = False) -> None:
    grams, (drifts, *out) = torch.empty(1, rank, rank, dtype=torch.float64), (torch.empty(1, rank, rank, dtype=dtype) for _ in range(3))
    xs = [torch.zeros(256, rank, dtype=dtype)]
    chunks = (_thin.thin_table("grouped_gram", xs, None, xs, 512), torch.empty(1, rank * rank, dtype=grams.dtype))
    preconditioner.precondition(grams, drifts, 1e-6, 1.0, False, *out, chunks if in_turn else None)


def polar_case(rank: int, dtype: torch.dtype) -> None:
    xs = [torch.zeros(256, rank, dtype=dtype)]
    polar.grouped_polar(xs, [torch.empty_like(x) for x in xs])


def eigh_case(rank: int, dtype: torch.dtype) -> None:
    xs = torch.zeros(1, rank, rank, dtype=dtype)
    for vectors in (torch.empty_like(xs), None):
        eigh.grouped_eigh(xs, torch.empty(1, rank, dtype=dtype), vectors)


def damped_inverse_case(rank: int, dtype: torch.dtype) -> None:
    rs = torch.zeros(1, rank, rank, dtype=dtype)
    damped_inverse.grouped_damped_inverse(rs, 1e-6, torch.empty_like(rs))


def adamw_case(
    dtype: torch.dtype,
    rank: int = 0,
    on_device: bool = False,
    new_maps: bool = False,
    drifting: bool = False,
    strided: bool = False,
) -> None:
    params = [torch.zeros(256, max(rank, 1), dtype=dtype)]
    grads, ms, vs = [torch.zeros_like(params[0])], *([torch.zeros(256, max(rank, 1), dtype=wide(dtype))] for _ in range(2))
    if strided:
        grads = [g.mT.contiguous().mT for g in grads]
    maps = torch.zeros(1, rank, rank, dtype=wide(dtype)) if rank else None
    lr = torch.tensor(1e-3) if on_device else 1e-3
    step = torch.tensor(1.0) if on_device else 1
    given = Maps(*[maps] * (4 if new_maps else 2))
    drifts = torch.empty(1, rank, rank, dtype=wide(dtype)) if drifting else None
    dims = [1] if rank else []
    numbers = Numbers(lr, 0.9, 0.999, 1e-8, 0.0, step, [], True, False)
    adamw.grouped_adamw_(Stepped(params, grads, ms, vs), given, dims, drifts, numbers)


def lora_case(rank: int, dtype: torch.dtype, decoupled: bool = True, drop: str = "") -> None:
    x, weight, grad = (torch.zeros(1024, 64, dtype=dtype), None, torch.zeros(1024, 96, dtype=dtype))
    a, b = torch.zeros(rank, 64, dtype=dtype), torch.zeros(96, rank, dtype=dtype)
    q_a, q_b = (a, b) if decoupled else (None, None)
    mask = torch.ones(1024, 64, dtype=torch.bool) if drop == "mask" else None
    seed = torch.zeros(1, dtype=torch.int64) if drop == "seed" else None
    tail = (mask, 0.75)
    _, hidden = lora_linear.lora_linear(x, torch.zeros(96, 64, dtype=dtype), None, a, b, q_a, q_b, 1.0, *tail, None, seed)
    needs = [True, False, False, True, True]
    lora_linear.lora_linear_backward(grad, x, weight, a, b, q_a, q_b, hidden, 1.0, *tail, needs, None, seed)


def mask_case() -> None:
    dropout.dropout_mask(torch.zeros(1, dtype=torch.int64), 1024, 64, 0.75)


def core_case(rank: int, dtype: torch.dtype) -> None:
    """The projections that multiply by the core too; what follows them are the kernels of plain LoRA."""
    x, a, core = torch.zeros(1024, 64, dtype=dtype), torch.zeros(rank, 64, dtype=dtype), torch.zeros(rank, rank, dtype=wide(dtype))
    lora_linear.project(x, None, 1.0, a.mT, None, True, mix=core.mT)
    lora_linear.project(x, None, 1.0, a.mT.contiguous(), None, False, mix=core)


def lorsum_case(rank: int, dtype: torch.dtype, captured: torch.dtype) -> None:
    us, vs, dense = [torch.zeros(256, rank, dtype=dtype)], [torch.zeros(rank, 192, dtype=dtype).mT], [torch.zeros(256, 192, dtype=captured)]
    lorsum.grouped_lorsum((us, vs), Sums([*us, *dense], [*vs, None], [1.0, 0.1], None), Sweeps(2, 1e-3, True), (us, vs))


def lorsum_product_case(rank: int, dtype: torch.dtype) -> None:
    xs, dense = [torch.zeros(rank, 192, dtype=dtype).mT], [torch.zeros(256, 192, dtype=dtype)]
    lefts, ys = [torch.zeros(256, rank, dtype=dtype)], [torch.zeros(256, rank, dtype=wide(dtype))]
    lorsum.grouped_lorsum_product(xs, Sums([*lefts, *dense], [*xs, None], [1.0, 0.1], None), ys)


#: The cases of each group: a group is one subprocess of the test. Only `make test-all` compiles the wide ones.
GROUPS: dict[str, dict[str, Callable[[], None]]] = {
    "qr": {
        "r16 fp32": lambda: qr_case(16, torch.float32),
    },
    "qr_wide": {
        "r64 fp32": lambda: qr_case(64, torch.float32),
        "r128 fp32": lambda: qr_case(128, torch.float32),
        "r64 fp64": lambda: qr_case(64, torch.float64),
    },
    "svd": {
        "r16 fp32": lambda: svd_case(16, torch.float32),
        "r64 fp32": lambda: svd_case(64, torch.float32),
    },
    "small": {
        "gram r16 bf16": lambda: gram_case(16, torch.bfloat16, torch.float64),
        "gram r32 fp32": lambda: gram_case(32, torch.float32, torch.float32, cross=True),
        "gram r128 fp32": lambda: gram_case(128, torch.float32, torch.float32, cross=True),
        "gram r128 fp64": lambda: gram_case(128, torch.float64, torch.float64, cross=True),
        "solve r16 fp64": lambda: solve_case(16, torch.float64, torch.float64),
        "solve r128 fp32": lambda: solve_case(128, torch.float32, torch.float32),
        "solve r128 fp64": lambda: solve_case(128, torch.float64, torch.float64),
        "preconditioner r16 fp32": lambda: preconditioner_case(16, torch.float32),
        "preconditioner r128 fp32": lambda: preconditioner_case(128, torch.float32),
        "turn r16 fp32": lambda: preconditioner_case(16, torch.float32, in_turn=True),
        "polar r64": lambda: polar_case(64, torch.float32),
    },
    "stacks": {
        "eigh r16 fp64": lambda: eigh_case(16, torch.float64),
        "eigh r64 fp64": lambda: eigh_case(64, torch.float64),
        "damped inverse r16 fp64": lambda: damped_inverse_case(16, torch.float64),
        "damped inverse r64 fp64": lambda: damped_inverse_case(64, torch.float64),
    },
    "lorsum": {
        "r16 fp32, bf16 terms": lambda: lorsum_case(16, torch.float32, torch.bfloat16),
        "r32 fp32": lambda: lorsum_case(32, torch.float32, torch.float32),
    },
    "lorsum_wide": {
        "r64 fp32": lambda: lorsum_case(64, torch.float32, torch.float32),
        "r128 fp32, bf16 terms": lambda: lorsum_case(128, torch.float32, torch.bfloat16),
        "product r16 bf16": lambda: lorsum_product_case(16, torch.bfloat16),
    },
    "lora_linear": {
        "r16 bf16": lambda: lora_case(16, torch.bfloat16, drop="seed"),
        "r16 bf16 mask": lambda: lora_case(16, torch.bfloat16, drop="mask"),
        "r128 fp32": lambda: lora_case(128, torch.float32),
        "r128 fp32 seed": lambda: lora_case(128, torch.float32, drop="seed"),
        "core r16 bf16": lambda: core_case(16, torch.bfloat16),
        "core r128 fp32": lambda: core_case(128, torch.float32),
        "mask": mask_case,
    },
    "adamw": {
        "fp32": lambda: adamw_case(torch.float32),
        "bf16 on device": lambda: adamw_case(torch.bfloat16, on_device=True),
        "r16 fp32": lambda: adamw_case(torch.float32, 16),
        "r16 fp32 strided": lambda: adamw_case(torch.float32, 16, strided=True),
        "r16 bf16 drifts": lambda: adamw_case(torch.bfloat16, 16, on_device=True, drifting=True),
        "r16 fp32 all maps, drifts": lambda: adamw_case(torch.float32, 16, new_maps=True, drifting=True),
        "r32 fp32 all maps, drifts": lambda: adamw_case(torch.float32, 32, new_maps=True, drifting=True),
        "r128 fp32": lambda: adamw_case(torch.float32, 128),
        "r128 fp32 all maps, drifts": lambda: adamw_case(torch.float32, 128, new_maps=True, drifting=True),
        "r128 fp64 all maps, drifts": lambda: adamw_case(torch.float64, 128, new_maps=True, drifting=True),
    },
}


#: What a group leaves to another one.
_QR = {"gram_kernel", "factor_kernel", "apply_kernel", "guarded_kernel"}
ELSEWHERE = {"svd": _QR, "small": {*_QR, "jacobi_kernel"}, "adamw": {"partial_gram_kernel", "sum_chunks_kernel"}}
#: Cases that are not compiled for every architecture: at most 120 cubins in `make test`, for the time that they take.
ONLY: dict[tuple[str, str], tuple[int, ...]] = {
    ("qr_wide", "r64 fp32"): (90,),
    ("qr_wide", "r128 fp32"): (90,),
    ("qr_wide", "r64 fp64"): (80,),
    ("lora_linear", "r16 bf16 mask"): (90,),
    ("lora_linear", "r128 fp32"): (90,),
    ("lora_linear", "r128 fp32 seed"): (90,),
    ("lora_linear", "mask"): (90,),
    ("lora_linear", "core r16 bf16"): (90,),
    ("lora_linear", "core r128 fp32"): (90,),
    ("lorsum", "r16 fp32, bf16 terms"): (80,),
    ("lorsum", "r32 fp32"): (90, 100),
    ("lorsum_wide", "r64 fp32"): (90,),
    ("lorsum_wide", "r128 fp32, bf16 terms"): (100,),
    ("lorsum_wide", "product r16 bf16"): (90,),
    ("small", "gram r32 fp32"): (90,),
    ("small", "gram r128 fp32"): (90,),
    ("small", "gram r128 fp64"): (90,),
    ("small", "solve r128 fp32"): (90,),
    ("small", "solve r128 fp64"): (90, 100),
    ("small", "preconditioner r16 fp32"): (80,),
    ("small", "turn r16 fp32"): (100,),
    ("small", "preconditioner r128 fp32"): (90,),
    ("small", "polar r64"): (90,),
    ("stacks", "eigh r16 fp64"): (80, 100),
    ("stacks", "eigh r64 fp64"): (90,),
    ("stacks", "damped inverse r16 fp64"): (80, 100),
    ("stacks", "damped inverse r64 fp64"): (90,),
    ("adamw", "bf16 on device"): (90,),
    ("adamw", "r16 fp32"): (90,),
    ("adamw", "r16 fp32 strided"): (90,),
    ("adamw", "r16 bf16 drifts"): (80, 100),
    ("adamw", "r16 fp32 all maps, drifts"): (90,),
    ("adamw", "r32 fp32 all maps, drifts"): (90, 100),
    ("adamw", "r128 fp32"): (90,),
    ("adamw", "r128 fp32 all maps, drifts"): (90,),
    ("adamw", "r128 fp64 all maps, drifts"): (80, 90),
}


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
    """The compiler's input for a recorded launch: types and specializations (1, multiples of 16) as the launch would infer them."""
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
        elif isinstance(value, int) and value == 1 and not (parameter.do_not_specialize or parameter.annotation_type):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = parameter.annotation_type or ("fp32" if isinstance(value, float) else "i32")
            aligned = isinstance(value, int) and value % 16 == 0
            if aligned and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), {"enable_fp_fusion": True, **compile_options}


def resources(cubin: bytes) -> dict[str, Any]:
    """Registers, stack, local memory and instructions of a cubin, by Triton's own tools."""
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    environment = os.environ | {"PATH": os.pathsep.join([tools, os.environ.get("PATH", "")])}  # cuobjdump calls nvdisasm
    command = [os.path.join(tools, "cuobjdump"), "--dump-resource-usage", "--dump-sass"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([*command, file.name], capture_output=True, text=True, check=True, env=environment).stdout
    found: dict[str, Any] = {"registers": 0, "stack": 0, "local": 0}
    for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text):
        name = "registers" if key == "REG" else key.lower()
        found[name] = max(int(value), found[name])
    return found | instructions(text)


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
            for architecture in ONLY.get((group, case), architectures):
                compiled = triton.compile(src, target=GPUTarget("cuda", architecture, 32), options=compile_options)
                yield {"kernel": kernel.fn.__name__, "case": case, "arch": architecture, **resources(compiled.asm["cubin"]),
                       "shared": compiled.metadata.shared, "tf32": "tf32" in compiled.asm["ttir"],
                       "prefetches": compiled.asm["ptx"].count("cp.async.c"), "triton": triton.__version__}  # fmt: skip


if __name__ == "__main__":
    assert not _launch.INTERPRET
    if len(sys.argv) == 1:
        print(*GROUPS)
        sys.exit()
    for report in reports(sys.argv[1], [int(a) for a in sys.argv[2:]]):
        print(json.dumps(report), flush=True)
