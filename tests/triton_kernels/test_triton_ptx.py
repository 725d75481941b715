"""Tests of Triton's kernels with the kernels' PTX for a GPU, in the emulator: results are right, nothing races or leaves its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
#: By file, tests of other files with small cases: odd ranks, ragged heights, slices that nothing aligns, members of zeros and NaN.
CASES: dict[str, Sequence[str]] = {
    "linalg": (
        "test_triton_linalg.py::test_gram[5-20-dtype3-accumulator3]",
        "test_triton_linalg.py::test_gram[33-None-dtype1-accumulator1]",
        "test_triton_linalg.py::test_qr_ragged[dtype1-4]",
        "test_triton_linalg.py::test_qr_reports_non_finite_per_matrix",
        "test_triton_linalg.py::test_solve[dtype7-4-rhs_dtype7-True]",
        "test_triton_linalg.py::test_solve[dtype12-33-None-False]",
        "test_triton_linalg.py::test_preconditioner[5-dtype1-True-True]",
        "test_triton_linalg.py::test_svd_product[dtype4-4-2]",
        "test_triton_linalg.py::test_polar[dtype3-4]",
        "test_triton_linalg.py::test_eigh[dtype1-5]",
        "test_triton_linalg.py::test_damped_inverse[dtype1-5-1e-05]",
    ),
    "moment_step": (
        "test_triton_moment_step.py::test_adamw[False-8-False-dtype2]",
        "test_triton_moment_step.py::test_adamw_with_all_maps_and_drifts[True-dtype2-5-D-True]",
    ),
    "lorsum": (
        "../test_lorsum.py::test_sweeps_are_those_of_listing_1[7-dtype1-triton]",
        "../test_lorsum.py::test_products_stay_in_their_layer_and_of_nothing_are_zero[triton]",
    ),
    "layers": (
        "test_triton_layers.py::test_lora_linear[core-seed-1-70-dtype0]",
        "test_triton_layers.py::test_lora_linear[decoupled-seed-1-70-dtype2]",
        "test_triton_layers.py::test_lora_linear[plain-mask-1-70-dtype0]",
        "test_triton_layers.py::test_lora_shared[decoupled-1-70-dtype2]",
        "test_triton_layers.py::test_lora_shared[plain-64-40-dtype0]",
        "test_triton_layers.py::test_the_kernels_masks_are_the_references[33-8]",
    ),
    "altlora_turn": (
        "test_triton_altlora_turn.py::test_a_turn_is_its_parts_to_the_bit[A-8-dtype1]",
        "test_triton_altlora_turn.py::test_a_turn_is_its_parts_to_the_bit[B-8-dtype2]",
    ),
}
#: More of them, for `make test-all`.
LARGE: dict[str, Sequence[str]] = {
    "linalg": (
        "test_triton_linalg.py::test_qr_ragged[dtype5-64]",
        "test_triton_linalg.py::test_qr_degenerate",
        "test_triton_linalg.py::test_preconditioner[33-dtype3-True-True]",
        "test_triton_linalg.py::test_svd_product[dtype1-8-4]",
        "test_triton_linalg.py::test_eigh[dtype3-8]",
        "test_triton_linalg.py::test_damped_inverse[dtype3-8-0.3]",
    ),
    "moment_step": ("test_triton_moment_step.py::test_adamw_with_all_maps_and_drifts[False-dtype5-40-PCTD-True]",),
    "layers": (
        "test_triton_layers.py::test_lora_linear[plain-mask-33-40-dtype2]",
        "test_triton_layers.py::test_lora_linear[plain-mask-8-530-dtype2]",
        "test_triton_layers.py::test_lora_shared[decoupled-24-530-dtype2]",
        "test_triton_layers.py::test_lora_shared[decoupled-64-40-dtype1]",
    ),
    "altlora_turn": ("test_triton_altlora_turn.py::test_a_turn_is_its_parts_to_the_bit[A-40-dtype2]",),
}


def run(cases: Sequence[str], *options: str) -> subprocess.CompletedProcess[str]:
    """Run tests in a process of their own: in this one Triton may be the interpreter."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-p", "ptx.plugin", "-p", "no:cacheprovider", *options]
    command += [str(HERE / case) for case in cases]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def check(cases: Sequence[str], *options: str) -> None:
    done = run(cases, *options)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    if " passed" not in done.stdout:
        pytest.skip("so were all of its tests")


@pytest.mark.parametrize("subject", CASES)
def test_hopper(subject: str) -> None:
    check(CASES[subject])


@pytest.mark.large
@pytest.mark.parametrize("subject", CASES)
def test_ampere(subject: str) -> None:
    check(CASES[subject], "--ptx-architecture=80")


@pytest.mark.large
@pytest.mark.parametrize("subject", LARGE)
def test_large(subject: str) -> None:
    check(LARGE[subject])


def test_missing_barriers_are_found() -> None:
    done = run(["test_triton_linalg.py::test_qr_ragged[dtype1-4]"], "--ptx-without=factor_kernel:bar.sync")
    assert done.returncode == 1 and "Violation: factor_kernel" in done.stdout and "race" in done.stdout, done.stdout
