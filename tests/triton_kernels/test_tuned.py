"""Tuned launch configurations: a table changes nothing but the time, an ill-formed one is refused, and the script that writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from benchmarks import tune
from lowrank_kernels.backends.triton import _launch, _tuned

#: Sizes for the interpreter.
SMALL = (70, 48, 2)
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(HERE.type == "cpu" and not _launch.INTERPRET, reason="Triton needs a GPU or its interpreter")
#: Different from every heuristic's choice.
OTHER = {"BLOCK_T": 16, "BLOCK_D": 128, "num_warps": 2}


def table(tmp_path: Path, kernels: Any, **changes: Any) -> Path:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"format": 1, "architecture": "cpu", "kernels": kernels} | changes))
    return path


def launched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every launch from now on."""
    seen: list[dict[str, Any]] = []
    from lowrank_kernels.backends.triton import adamw, gram, lora_linear, solve

    for module in (adamw, gram, lora_linear, solve):
        launch = module.launch

        def spy(kernel: Any, grid: Any, *args: Any, launch: Any = launch, **options: Any) -> None:
            seen.append(options)
            launch(kernel, grid, *args, **options)

        monkeypatch.setattr(module, "launch", spy)
    return seen


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_configurations_give_the_same_results(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: set[str] = set()
    for index, problem in enumerate(tune.problems(5, dtype, HERE, *SMALL)):
        kernels.add(problem.kernel)
        monkeypatch.setenv(_tuned.ENVIRONMENT_VARIABLE, "off")
        expected: list[Tensor] = [t.clone() for t in problem.results()]
        chosen = {knob: value for knob, value in OTHER.items() if knob in _tuned.KNOBS[problem.kernel]}
        path = tmp_path / f"{index}.json"  # a table is read once, whatever becomes of the file
        path.write_text(json.dumps({"format": 1, "architecture": _tuned.architecture(HERE) or "cpu",
                                    "kernels": {problem.kernel: {problem.bucket: chosen}}}))  # fmt: skip
        monkeypatch.setenv(_tuned.ENVIRONMENT_VARIABLE, str(path))
        with monkeypatch.context() as spied:
            seen = launched(spied)
            assert tune.same(problem.results(), expected), problem.kernel
        assert any(chosen.items() <= options.items() for options in seen), problem.kernel
    assert kernels == set(_tuned.KNOBS) == set(tune.GRID)


def test_without_a_table_the_heuristic_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_tuned.ENVIRONMENT_VARIABLE, raising=False)
    default = {"BLOCK_T": 64}
    ask = ("project", 16, (torch.float32,), torch.device("cpu"), default)
    assert _tuned.configuration(*ask) is default
    with _tuned.using({"project": {"r16 float32": {"num_stages": 4}, "r32 float32": {"BLOCK_T": 16}}}):
        assert _tuned.configuration(*ask) == {"BLOCK_T": 64, "num_stages": 4}
        with _tuned.using({}):
            assert _tuned.configuration(*ask) is default
    assert _tuned.configuration(*ask) is default


def test_the_devices_own_table_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 77)
    monkeypatch.delenv(_tuned.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    ask = ("project", 16, (torch.float32,), gpu, {"BLOCK_T": 64})
    _tuned._of_device.cache_clear()
    assert _tuned.configuration(*ask) == {"BLOCK_T": 64}
    content = {"format": 1, "architecture": "sm_90", "kernels": {"project": {"r16 float32": {"BLOCK_T": 32}}}}
    (tmp_path / "sm_90.json").write_text(json.dumps(content))
    _tuned._of_device.cache_clear()
    assert _tuned.configuration(*ask) == {"BLOCK_T": 32}
    monkeypatch.setenv(_tuned.ENVIRONMENT_VARIABLE, "off")
    assert _tuned.configuration(*ask) == {"BLOCK_T": 64}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content | {"architecture": "sm_80"}))
    monkeypatch.setenv(_tuned.ENVIRONMENT_VARIABLE, str(other))
    with pytest.raises(_tuned.TunedTableError, match=r"other\.json: it is for sm_80, the device is sm_90"):
        _tuned.configuration(*ask)
    _tuned._of_device.cache_clear()


@pytest.mark.parametrize(
    ("kernels", "changes", "message"),
    [
        ({"projekt": {}}, {}, "unknown kernel 'projekt'"),
        ([], {}, "mapping of kernels"),
        ({"project": 3}, {}, "mapping of buckets"),
        ({"project": {"r8 float32": {}}}, {}, "unknown bucket 'r8 float32'"),
        ({"project": {"r16": {}}}, {}, "unknown bucket 'r16'"),
        ({"project": {"r16 int8": {}}}, {}, "unknown bucket 'r16 int8'"),
        ({"project": {"r16 float32": 64}}, {}, "must be a mapping of BLOCK_T"),
        ({"expand": {"r16 float32": {"num_stages": 2}}}, {}, "unknown key 'num_stages'"),
        ({"project": {"r16 float32": {"BLOCK_D": 8}}}, {}, "BLOCK_D must be a power of two from 16 to 512, got 8"),
        ({"project": {"r16 float32": {"BLOCK_T": 48}}}, {}, "BLOCK_T must be a power of two"),
        ({"project": {"r16 float32": {"BLOCK_T": "64"}}}, {}, "BLOCK_T must be a power of two"),
        ({"project": {"r16 float32": {"num_warps": True}}}, {}, "num_warps must be a power of two"),
        ({"project": {"r16 float32": {"num_stages": 0}}}, {}, "num_stages must be an integer from 1 to 8"),
        ({"substitute": {"r16 float32": {"BLOCK_D": 16, "num_warps": 16}}}, {}, "16 warps are too many for 16 × 16 elements"),
        ({"expand": {"r64 float32": {"BLOCK_T": 16, "BLOCK_D": 16, "num_warps": 16}}}, {}, "16 warps are too many for 16 × 16 elements"),
        ({}, {"format": 2}, "not of format 1"),
        ({}, {"more": 1}, "unknown keys more"),
    ],
)
def test_ill_formed_tables_are_refused_by_name(kernels: Any, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(_tuned.TunedTableError, match=rf"table\.json: .*{message}"):
        _tuned.read(table(tmp_path, kernels, **changes))


def test_files_that_are_no_tables_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    for name in ("missing.json", "broken.json"):
        with pytest.raises(_tuned.TunedTableError, match=name):
            _tuned.read(tmp_path / name)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(_tuned.TunedTableError, match=r"list\.json: not of format"):
        _tuned.read(tmp_path / "list.json")


def test_grids_ask_for_what_tables_may_say() -> None:
    for kernel, knobs in tune.GRID.items():
        assert set(knobs) == set(_tuned.KNOBS[kernel])
        for knob, values in knobs.items():
            for value in values:
                _tuned.check({kernel: {"r16 float32": {knob: value}}}, "the grid")


@needs_triton
def test_the_script_keeps_the_fastest_right_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "GRID", {kernel: {"BLOCK_D": (16, 32, 64), "num_warps": (2, 4)} for kernel in ("mapped_adamw", "expand")})
    out = tmp_path / "new" / "table.json"
    seen: list[dict[str, Any]] = []

    def measure(run: Any) -> float:
        """As if 16 columns and two warps were fastest, and 32 columns did not launch."""
        run()
        table = _tuned._using[-1]
        (configuration,) = (c for buckets in table.values() for c in buckets.values()) if table else ({"BLOCK_D": 64, "num_warps": 4},)
        seen.append(configuration)
        if configuration["BLOCK_D"] == 32:
            raise RuntimeError("out of resources")
        return configuration["BLOCK_D"] * (1 if configuration["num_warps"] == 4 else 0.9)

    options = [*f"--device {HERE.type} --rank 5 --dtype float32 --tokens 33 --width 20 --layers 2 --out".split(), str(out)]
    assert tune.main([*options, "--kernels", "mapped_adamw,expand"], measure) == 0
    best = {"BLOCK_D": 16, "num_warps": 2}
    assert _tuned.read(out) == {"expand": {"r16 float32": best}, "mapped_adamw": {"r16 float32": best}}
    assert len(seen) == 2 * 7
    # A wrong result is never timed, what is as fast as the heuristic is not taken, and other entries stay.
    seen.clear()
    wrong = lambda found, expected: _tuned._using[-1]["expand"]["r16 float32"]["BLOCK_D"] == 64  # noqa: E731
    monkeypatch.setattr(tune, "same", wrong)
    assert tune.main([*options, "--kernels", "expand"], lambda run: seen.append({}) or 1.0) == 0
    assert len(seen) == 3 and _tuned.read(out) == {"mapped_adamw": {"r16 float32": best}}
    # Out of time: a valid table of what there is.
    assert tune.main([*options, "--seconds", "-1"], measure) == 0
    assert _tuned.read(out) == {"mapped_adamw": {"r16 float32": best}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_nothing_is_measured() -> None:
    for options in ([], ["--device", "cpu"]):
        with pytest.raises(SystemExit, match="no GPU"):
            tune.main(options)
    with pytest.raises(SystemExit, match="--out"):
        tune.main(["--device", "cpu"], lambda run: 1.0)
