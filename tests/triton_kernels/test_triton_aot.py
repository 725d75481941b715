"""Every Triton kernel compiles ahead of time for sm_80, sm_90 and sm_100, without spills and without tf32. No GPU needed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.kernels import ARCHITECTURES, compile_group, instructions, read, table_rows

pytest.importorskip("triton")
GROUPS = {
    "adamw": {"adamw_kernel", "mapped_adamw_kernel"},
    "qr": {"gram_kernel", "factor_kernel", "apply_kernel", "guarded_kernel"},
    "qr_wide": {"gram_kernel", "factor_kernel", "apply_kernel", "guarded_kernel"},
    "svd": {"jacobi_kernel"},
    "small": {"partial_gram_kernel", "sum_chunks_kernel", "cholesky_kernel", "substitute_kernel", "preconditioner_kernel", "join_kernel"},
    "stacks": {"eigh_kernel", "damped_inverse_kernel"},
    "lorsum": {"copy_kernel", "contract_kernel", "factor_kernel", "map_kernel", "expand_kernel", "finish_kernel"},
    "lorsum_wide": {"copy_kernel", "contract_kernel", "factor_kernel", "map_kernel", "expand_kernel", "finish_kernel"},
    "lora_linear": {"project_kernel", "expand_kernel", "token_sum_kernel", "output_grads_kernel", "add_splits_kernel", "mask_kernel"},
}
#: How many cubins a group may take.
MOST = {"adamw": 15, "qr": 18, "qr_wide": 18, "svd": 6, "small": 27, "stacks": 9, "lorsum": 18, "lorsum_wide": 17, "lora_linear": 36}
#: Those that only `make test-all` compiles.
WIDE = {"qr_wide", "stacks", "lorsum_wide"}


TRITON = tuple(int(part) for part in version("triton").split(".")[:2])


def test_the_time_is_bounded() -> None:
    assert sum(count for group, count in MOST.items() if group not in WIDE) <= 120


@pytest.mark.parametrize("group", [pytest.param(group, marks=pytest.mark.large if group in WIDE else ()) for group in GROUPS])
def test_compiles_without_spills(group: str) -> None:
    reports = compile_group(group)
    assert {report["kernel"] for report in reports} == GROUPS[group]
    assert len(reports) <= MOST[group]
    assert group in WIDE or {report["arch"] for report in reports} == set(ARCHITECTURES)
    if TRITON >= (3, 7):
        # Triton 3.6 allocates registers worse, above all for fp64 products on sm_100: slower there, not wrong.
        assert [report for report in reports if report["stack"] or report["local"]] == []
    # What a block may have on a consumer's GPU (8.6, 8.9, 12.0), where an A100 has 163 KiB: beyond that the launch is an error.
    assert [report for report in reports if report["shared"] > 99 * 1024] == []
    # tf32 would round operands to 10 bits; the interpreter would not show it.
    assert [report for report in reports if report["tf32"]] == []
    for report in reports:
        # Loops over rows load ahead of their products, unless a branch (for 16 bits) or a loop in the loop (r128) hides the loads.
        looped = report["kernel"] in ("partial_gram_kernel", "gram_kernel", "contract_kernel") and group != "qr_wide"
        if looped and report["case"] != "gram r16 bf16":
            assert report["prefetches"] > 0, report
        # Tables of pointers lose their vector loads without a hint; matrices may lose them with a stride of unknown alignment.
        if report["kernel"] == "adamw_kernel":
            # Vectors where all is aligned only: a hint that leaks into the branch for the rest would write beyond the moments.
            vectors = {"fp32": ("128:4 ", "128:3 "), "bf16 on device": ("128:2 ", "128:2 ")}[report["case"]]
            assert (report["loads"][:6], report["stores"][:6]) == vectors, report
        if report["kernel"] == "mapped_adamw_kernel" and not any(word in report["case"] for word in ("strided", "fp64")):
            assert "128:" in report["loads"] and "128:" in report["stores"], report
        if group == "lora_linear" and "bf16" in report["case"] and report["kernel"] not in ("add_splits_kernel", "mask_kernel"):
            assert "MMA" in report["tensor_cores"], report
    committed = [row for row in read() if row["group"] == group]
    if {row["triton"] for row in committed} == {version("triton")}:
        assert table_rows(group, reports) == committed, "benchmarks/results/kernels.csv is old: python -m benchmarks kernels"


def test_instructions_are_counted_by_width() -> None:
    sass = """
        /*0100*/                   LDG.E.128 R4, [R2.64] ;
        /*0110*/              @!P0 LDG.E.U16.CONSTANT R8, [R2.64+0x10] ;
        /*0120*/                   LDGSTS.E.BYPASS.128 [R9], [R2.64] ;
        /*0130*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*0140*/                   LDS.128 R8, [R2] ;
        /*0150*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0160*/             @UP0  UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
        /*1170*/                   STG.E.64 desc[UR4][R2.64], R4 ;
    """
    assert instructions(sass) == {"tensor_cores": "HMMA:1 UTCHMMA:1", "loads": "128:2 32:1 16:1", "stores": "64:1"}


def test_launches_reach_the_driver() -> None:
    """What only a GPU runs otherwise: arguments and options of a launch are bound by Triton, the interpreter asks for less."""
    cases = (
        "adamw:bf16 on device",
        "adamw:r16 fp32",
        "lora_linear:r16 bf16",
        "small:gram r16 bf16",
        "lorsum:r16 fp32, bf16 terms",
        "qr:r16 fp32",
    )
    script = Path(__file__).parent / "triton_launch.py"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(script.parent), str(script.parents[2]), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run([sys.executable, str(script), *cases], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    expected = set.union(*(GROUPS[group] for group in ("adamw", "lora_linear", "lorsum", "qr"))) - {"mask_kernel"}
    assert set(done.stdout.split()) == expected | {"partial_gram_kernel", "sum_chunks_kernel"}
