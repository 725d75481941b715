"""``python -m benchmarks kernels``: what the compiler makes of the Triton kernels, as ``benchmarks/results/kernels.csv``. No GPU needed.

One row for each kernel, configuration and architecture that the tests compile ahead of time (``tests/triton_kernels/triton_compile.py``):

    registers, shared  per thread; bytes per program
    spills             bytes of stack and local memory per thread: registers that did not fit
    tensor_cores       the matrix instructions of the machine code and how many: HMMA (sm_80), HGMMA (sm_90), UTCHMMA (sm_100)
    loads, stores      of global memory by width in bits and how many in the code: "128:4 32:1"; asynchronous copies included
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "benchmarks" / "results" / "kernels.csv"
COLUMNS = ("group", "kernel", "case", "arch", "registers", "shared", "spills", "tensor_cores", "loads", "stores", "triton")
ARCHITECTURES = (80, 90, 100)

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", re.MULTILINE)
_MATRIX = re.compile(r"^(HMMA|HGMMA|DMMA|IMMA|QGMMA|UTC\w*MMA)\b")


def _width(instruction: str) -> int:
    """Bits that one thread moves: LDG.E.128 → 128; nothing said means 32."""
    for part in instruction.split(".")[1:]:
        if match := re.fullmatch(r"[US]?(8|16|64|128|256)", part):
            return int(match[1])
    return 32


def instructions(sass: str) -> dict[str, str]:
    """The columns ``tensor_cores``, ``loads`` and ``stores`` of a disassembly."""
    found = [match[1] for match in _INSTRUCTION.finditer(sass)]
    matrix = Counter(match[1] for name in found if (match := _MATRIX.match(name)))
    loads = Counter(_width(name) for name in found if name.startswith(("LDG.", "LDGSTS.")))
    stores = Counter(_width(name) for name in found if name.startswith("STG."))
    return {
        "tensor_cores": " ".join(f"{name}:{count}" for name, count in sorted(matrix.items())),
        **{
            column: " ".join(f"{width}:{count}" for width, count in sorted(widths.items(), reverse=True))
            for column, widths in (("loads", loads), ("stores", stores))
        },
    }


def _compiler(*arguments: str) -> str:
    """What ``tests/triton_kernels/triton_compile.py`` prints, in a process of its own: here Triton may be the interpreter's."""
    # Nothing but the source and Triton's version may decide: no other ptxas, no options, no interpreter.
    environment = {key: value for key, value in os.environ.items() if key == "TRITON_CACHE_DIR" or not re.match("TRITON_|.*PTXAS", key)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, str(ROOT / "tests" / "triton_kernels" / "triton_compile.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-4000:]}")
    return done.stdout


def compile_group(group: str, architectures: Iterable[int] = ARCHITECTURES) -> list[dict[str, Any]]:
    """The reports of ``tests/triton_kernels/triton_compile.py`` on one of its groups.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    return [json.loads(line) for line in _compiler(group, *map(str, architectures)).splitlines() if line.startswith("{")]


def table_rows(group: str, reports: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    """Reports as the rows of the table."""
    return [
        {
            name: str(value)
            for name, value in ({"group": group, "spills": report["stack"] + report["local"]} | report).items()
            if name in COLUMNS
        }
        for report in reports
    ]


def read(path: Path = TABLE) -> list[dict[str, str]]:
    """The table as text."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    args = parser.parse_args(argv)
    groups = _compiler().split()
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = [row for group, reports in zip(groups, pool.map(compile_group, groups), strict=True) for row in table_rows(group, reports)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows written to {args.out}")
    return 0
