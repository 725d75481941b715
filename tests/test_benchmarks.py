"""The benchmark harness: it must not show the time of a wrong answer, nor favour a provider, nor lose rows."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import re
import time
from dataclasses import replace

import pytest
import torch

import lowrank_kernels as lrk
from benchmarks import compare, plot, readme
from benchmarks.__main__ import COMMANDS, parse_arguments
from benchmarks.ceilings import Ceilings
from benchmarks.compiled import compiled
from benchmarks.harness import Budget, Case, Trial, interleave, passes, peak_temporary_bytes, run_case, worst
from benchmarks.methods import METHODS, OTHER_GRADIENTS, StepJudge
from benchmarks.results import Row, as_text, read, upsert
from benchmarks.shapes import MODELS, layers
from benchmarks.suites import OPERATIONS, SUITES, Setting
from benchmarks.suites.scaling import OP, host_time_per_layer
from lowrank_kernels.backends import BackendError, count_launch

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_bandwidth=1e9, gemm_flops={torch.bfloat16: 4e12, torch.float32: 1e12, torch.float64: 1e11})
QUICK = Budget(seconds=0.5, warmup=1, min_rounds=4, max_rounds=4)


def make_case(**providers) -> Case:
    return Case("op", "model/all", 8, torch.float32, CPU, bytes=1000, tensors=1, providers=providers)


def make_row(provider: str, median: float | None, **more) -> Row:
    return Row("op", provider, "minilm/all", 8, "float32", "cpu", "a, processor", 2, median_ms=median, **more)


def test_upsert_replaces_the_row_with_the_same_key_and_keeps_the_others(tmp_path):
    path = tmp_path / "new" / "results.csv"
    upsert(path, [make_row("naive", 2.0), make_row("ours", 1.0, copy_share=0.5)])
    upsert(path, [make_row("naive", 3.0)])
    upsert(path, [make_row("ours", None, note="wrong: error 1 exceeds 0.1, by far"), make_row("other", 4.0)])
    other_rank = make_row("naive", 5.0)
    other_rank.rank = 16
    upsert(path, [other_rank])
    rows = read(path)
    assert [(row["provider"], row["rank"], row["median_ms"]) for row in rows] == [
        ("naive", "8", "3"),
        ("ours", "8", ""),
        ("other", "8", "4"),
        ("naive", "16", "5"),
    ]
    assert rows[1]["copy_share"] == "", "a column of the replaced row must not survive in the new one"
    assert rows[1]["note"] == "wrong: error 1 exceeds 0.1, by far" and rows[0]["device_name"] == "a, processor"


def test_a_wrong_provider_shows_no_time_and_is_not_timed():
    calls = {"right": 0, "wrong": 0, "nan": 0}

    def provider(name: str, error: float):
        def build() -> Trial:
            def run() -> None:
                calls[name] += 1

            return Trial(run, lambda: (error, 1e-6))

        return build

    def unavailable() -> Trial:
        raise BackendError("not on this machine")

    case = make_case(naive=provider("right", 1e-7), wrong=provider("wrong", 1e-2), nan=provider("nan", math.nan), absent=unavailable)
    rows = {row.provider: row for row in run_case(case, CEILINGS, QUICK)}
    assert rows["naive"].median_ms is not None and rows["naive"].ratio_to_naive == 1.0 and rows["naive"].note == ""
    for name in ("wrong", "nan", "absent"):
        row = rows[name]
        times = (row.median_ms, row.p20_ms, row.p80_ms, row.graph_ms, row.wall_ms, row.ratio_to_naive, row.copy_share)
        assert times == (None,) * 7 and row.note
    assert rows["wrong"].error == 1e-2 and rows["wrong"].note.startswith("wrong")
    assert calls["wrong"] == calls["nan"] == 1, "only the call that was judged"


def test_the_suites_reject_a_wrong_result(monkeypatch):
    """The gate of each suite sees a kernel that does nothing, one that forgets a tensor, and one that ignores the old signs."""
    from benchmarks.suites import linalg, optimizer

    setting = Setting("minilm", "qv", 4, torch.float32, CPU)
    for broken in (lambda *args, **kwargs: None, lambda p, g, m, v, **kwargs: optimizer.adamw_(p[1:], g[1:], m[1:], v[1:], **kwargs)):
        monkeypatch.setattr(optimizer, "grouped_adamw_", broken)
        factors = optimizer.make_factors(setting)
        trial = optimizer.operation("reference", factors.copy(), optimizer.Judge(factors))
        trial.run()
        assert not passes(*trial.check())
    right = linalg.grouped_qr
    for broken in (lambda xs, previous, out: None, lambda xs, previous, out: right(xs, None, out=out)):
        monkeypatch.setattr(linalg, "grouped_qr", broken)
        bases = linalg.make_bases(setting)
        trial = linalg.operation("reference", bases.copy(), linalg.Judge(bases))
        trial.run()
        assert not passes(*trial.check())


@pytest.mark.parametrize("suite", sorted(SUITES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_provider_of_the_suites_is_right(suite, dtype):
    if suite == "step" and dtype == torch.bfloat16:
        pytest.skip("a model in bf16 is slow on a CPU")
    cases = list(SUITES[suite](Setting("minilm", "all" if suite == "step" else "qv", 4, dtype, CPU, tokens=24)))
    found, known = {case.op for case in cases}, set(OPERATIONS[suite])
    assert found == known if dtype == torch.float32 else found <= known
    for case in cases[:1] if suite == "scaling" else cases:
        rows = {row.provider: row for row in run_case(case, CEILINGS, QUICK)}
        assert rows["naive"].median_ms and any(row.median_ms for name, row in rows.items() if name.startswith("ours"))
        assert not [(name, row.note) for name, row in rows.items() if row.note.startswith(("wrong", "failed"))]


def test_providers_take_turns_and_the_first_of_a_round_rotates():
    order: list[str] = []

    def call(name: str):
        def measure() -> dict[str, float]:
            order.append(name)
            return {"main": float(len(order))}

        return measure

    times = interleave({name: call(name) for name in "abc"}, Budget(seconds=9.0, warmup=1, min_rounds=3, max_rounds=3))
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert [len(times[name]["main"]) for name in "abc"] == [3, 3, 3], "the warm-up round is not recorded"
    assert times["b"]["main"] == [4.0, 9.0, 11.0]


def test_the_budget_decides_how_many_rounds():
    def rounds(seconds_per_call: float, **budget) -> int:
        def measure() -> dict[str, float]:
            time.sleep(seconds_per_call)
            calls.append(0)
            return {"main": 1.0}

        calls: list[int] = []
        recorded = len(interleave({"a": measure}, Budget(**budget))["a"]["main"])
        assert len(calls) - recorded == (budget["warmup"] if seconds_per_call == 0 else 1)
        return recorded

    assert rounds(0.0, seconds=10.0, warmup=5, min_rounds=2, max_rounds=6) == 6, "the largest number, if there is time"
    assert rounds(0.05, seconds=0.001, warmup=5, min_rounds=9, max_rounds=50) == 3, "too slow: three rounds are enough"
    assert 4 <= rounds(0.02, seconds=0.07, warmup=1, min_rounds=4, max_rounds=50) < 8, "then no more than there is time for"


def test_ratio_is_taken_within_rounds(monkeypatch):
    """A machine that slows down tenfold in the middle does not change the ratio."""
    from benchmarks import harness

    speeds = {"naive": 4.0, "ours": 1.0}
    rounds = {"naive": 0, "ours": 0}

    def clock(trial: Trial):
        name = trial.run()

        def measure() -> dict[str, float]:
            rounds[name] += 1
            return {"main": speeds[name] * (10 if rounds[name] > 2 else 1)}

        return measure

    monkeypatch.setattr(harness, "_cpu_clock", clock)
    providers = {name: (lambda name=name: Trial(lambda: name, lambda: (0.0, 1.0), ours=name == "ours")) for name in speeds}
    rows = {row.provider: row for row in run_case(make_case(**providers), CEILINGS, QUICK)}
    assert rows["ours"].ratio_to_naive == rows["ours"].ratio_to_rival == 0.25
    assert rows["ours"].copy_share == pytest.approx(1000 / (rows["ours"].median_ms * 1e-3) / 1e9)


def test_the_roofline_is_the_longer_of_bytes_and_of_flops_each_in_its_dtype():
    flops = {torch.float32: 10**6, torch.float64: 10**6}
    assert CEILINGS.seconds(1000, flops) == pytest.approx((1e-6, 1e-6 + 1e-5))
    case = replace(make_case(naive=lambda: Trial(lambda: None, lambda: (0.0, 1.0))), flops=flops)
    (row,) = run_case(case, CEILINGS, QUICK)
    assert row.flops == 2 * 10**6
    assert row.roofline_share == pytest.approx(1.1e-5 / (1e-3 * row.median_ms)) == pytest.approx(11 * row.copy_share)


def test_a_triton_error_is_a_row_and_not_the_end():
    triton = pytest.importorskip("triton")

    def too_large() -> Trial:
        raise triton.runtime.errors.OutOfResources(147456, 101376, "shared memory")

    rows = run_case(make_case(naive=lambda: Trial(lambda: None, lambda: (0.0, 1.0)), large=too_large), CEILINGS, QUICK)
    assert [row.note[:22] for row in rows] == ["", "failed: out of resourc"]


class StandInCuda:
    """torch.cuda's captures: one that fails leaves its stream current and the generator unusable until another succeeds (torch 2.11)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.generator_is_usable = "eager", True
        outer = self

        class Stream(str):
            def wait_stream(self, other: object) -> None:
                pass

        @contextlib.contextmanager
        def use(stream: Stream):
            before, self.current = self.current, stream
            yield
            self.current = before

        class Capture:
            def __init__(self, graph: object) -> None:
                pass

            def __enter__(self) -> None:
                self.before, outer.current, outer.generator_is_usable = outer.current, "capturing", False

            def __exit__(self, *error: object) -> None:
                if error[0] is not None:
                    raise RuntimeError("operation failed due to a previous error during capture")
                outer.current, outer.generator_is_usable = self.before, True

        class Graph:
            def replay(self) -> None:
                pass

        replaced = {"CUDAGraph": Graph, "graph": Capture, "Stream": lambda device: Stream("side"), "stream": use}
        replaced |= {"current_stream": lambda device: Stream(self.current), "device": lambda device: contextlib.nullcontext()}
        replaced |= {"synchronize": lambda device: None, "set_stream": lambda stream: setattr(self, "current", str(stream))}
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_a_failed_capture_leaves_the_device_as_it_was(monkeypatch):
    """Else the next provider that draws a random number fails, and all that follows runs on the stream of the capture."""
    from benchmarks import harness

    cuda = StandInCuda(monkeypatch)

    def waits_for_the_device() -> None:
        if cuda.current == "capturing":
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    assert harness._capture(Trial(waits_for_the_device, lambda: (0.0, 1.0)), CPU) is None
    assert cuda.current == "eager" and cuda.generator_is_usable
    assert isinstance(harness._failed_captures.pop(), torch.cuda.CUDAGraph), "the allocator still refers to it"
    assert harness._capture(Trial(lambda: None, lambda: (0.0, 1.0)), CPU) is not None
    assert cuda.current == "eager" and cuda.generator_is_usable and not harness._failed_captures


def test_a_case_on_a_gpu_has_all_its_columns(monkeypatch):
    """The path that no other test takes: event times, replay and wall times, peak memory; a provider without a graph lacks that one."""
    cuda = StandInCuda(monkeypatch)
    clock = itertools.count()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(clock)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end) -> float:
            return float(end.at - self.at)

    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    replaced = {"Event": Event, "_sleep": lambda cycles: None, "get_device_name": lambda device: "a GPU"}
    memory = {"memory_allocated": 1 << 20, "max_memory_allocated": 3 << 20, "reset_peak_memory_stats": None}
    replaced |= {name: lambda device, value=value: value for name, value in memory.items()}
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def waits() -> None:
        if cuda.current == "capturing":
            raise RuntimeError("operation not permitted when stream is capturing")

    case = replace(
        make_case(naive=lambda: Trial(lambda: None, lambda: (0.0, 1.0)), waits=lambda: Trial(waits, lambda: (0.0, 1.0))),
        device=torch.device("cuda"),
    )
    rows = {row.provider: row for row in run_case(case, CEILINGS, QUICK)}
    for row in rows.values():
        assert (row.device, row.device_name, row.median_ms, row.peak_mib) == ("cuda", "a GPU", 1.0, 2.0) and row.wall_ms is not None
    assert rows["naive"].graph_ms == 1.0 and rows["waits"].graph_ms is None


def test_launches_are_counted_for_one_call_of_ours_only():
    def build(ours: bool):
        def run() -> None:
            count_launch()
            count_launch()

        return lambda: Trial(run, lambda: (0.0, 1.0), ours=ours)

    rows = {row.provider: row for row in run_case(make_case(naive=build(False), ours=build(True)), CEILINGS, QUICK)}
    assert rows["ours"].launches == 2 and rows["naive"].launches is None


def test_bytes_that_must_move_by_hand():
    # MiniLM, query and value: 6 blocks × 2 layers × (4 × 384 + 384 × 4) = 36,864 elements in 24 matrices.
    adamw, *_ = SUITES["optimizer"](Setting("minilm", "qv", 4, torch.float32, CPU))
    assert (adamw.tensors, adamw.bytes) == (24, 36_864 * 7 * 4)
    adamw, *_ = SUITES["optimizer"](Setting("minilm", "qv", 4, torch.bfloat16, CPU))
    assert adamw.bytes == 36_864 * (3 * 2 + 4 * 4), "the moments of bf16 parameters are fp32"
    qr, *_, sums = SUITES["linalg"](Setting("minilm", "qv", 4, torch.float32, CPU))
    assert (qr.tensors, qr.bytes) == (24, 3 * 36_864 * 4 + 24 * 4 * 4 * 4)
    # The weights read and written, the momentum read, and 256 rows of S and X of width 384 in each of 12 layers.
    assert (sums.tensors, sums.bytes) == (24, 3 * 36_864 * 4 + 12 * 256 * (384 + 384) * 4)
    forward, both, *_ = SUITES["forward"](Setting("minilm", "qv", 4, torch.float32, CPU, tokens=24))
    # Two layers: x and y, W, A and B; then ∂y, W, A and B, x, ∂x, ∂A and ∂B.
    once = 2 * (24 * (384 + 384) + 384 * 384 + 4 * (384 + 384))
    assert (forward.tensors, forward.bytes) == (2, once * 4)
    assert both.bytes == (once + once + 2 * (24 * 384 + 4 * (384 + 384))) * 4


@pytest.mark.parametrize(
    ("model", "trainable"),
    # What `print_trainable_parameters()` says for these models at r = 16 on all linear layers.
    [("llama3-8b", 41_943_040), ("llama-1b", 11_272_192), ("gemma-2b", 19_611_648)],
)
def test_shape_tables_have_the_known_number_of_adapter_parameters(model, trainable):
    assert sum(16 * (d_out + d_in) for d_out, d_in in layers(model)) == trainable
    assert len(layers(model, "qv")) == 2 * MODELS[model].blocks


def test_worst_prefers_nan_and_judges_relative_to_the_tolerance():
    assert worst([(1e-3, 1.0), (1e-6, 1e-7), (0.5, 1.0)]) == (1e-6, 1e-7)
    assert math.isnan(worst([(10.0, 1.0), (math.nan, 1.0)])[0]) and not passes(math.nan, 1.0)


def test_peak_memory_sees_temporaries_that_are_gone_at_the_end():
    def call() -> torch.Tensor:
        first = torch.empty(1 << 18)
        second = first + 1
        del first
        return second.sum()

    peak = peak_temporary_bytes(call, CPU)
    assert 2 * 4 * (1 << 18) <= peak < 2.1 * 4 * (1 << 18)


def test_every_optimizer_is_in_the_table_of_methods():
    ours = {value for value in vars(lrk).values() if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)}
    assert ours - {method.optimizer for method in METHODS.values()} == OTHER_GRADIENTS, (
        "add it to benchmarks/methods.py, with its naive twin"
    )


@pytest.mark.parametrize("name", METHODS)
def test_the_judge_of_a_step_sees_one_layer_left_out(name):
    from benchmarks.suites.optimizer import make_factors

    factors = make_factors(Setting("small-6", "all", 4, torch.float32, CPU))
    method, layers = METHODS[name], factors.layers()
    judge, after = StepJudge(method, layers), factors.copy()
    for A, B, grad_A, grad_B in after.layers():
        method.twin(A, B, 1.0).step(grad_A, grad_B)
    pairs = [(A, B) for A, B, _, _ in after.layers()]
    assert passes(*judge(pairs))
    pairs[-1] = layers[-1][:2]
    assert not passes(*judge(pairs))


def test_host_time_per_layer_is_the_slope():
    rows = [
        as_text(Row(OP, name, f"small-{count}/all", 4, "float32", "cpu", "p", 2, median_ms=offset + slope * count))
        for name, slope, offset in (("torch-fused", 0.03, 1.0), ("ours-AdamW", 0.01, 5.0))
        for count in (6, 60, 200, 600)
    ]
    found = host_time_per_layer([*rows, as_text(make_row("ours-AdamW", 7.0))])
    assert found == {"torch-fused": pytest.approx(30.0), "ours-AdamW": pytest.approx(10.0)}


def test_compare_by_key_and_exit_status(tmp_path, capsys):
    a, b = tmp_path / "a.csv", tmp_path / "b.csv"
    upsert(a, [make_row("ours", 1.0), make_row("ours-lost", 1.0), make_row("naive", 1.0), make_row("only-in-a", 1.0)])
    upsert(b, [make_row("ours", 1.04), make_row("naive", 2.0), make_row("only-in-b", 1.0)])
    assert compare.main([str(a), str(b)]) == 0, "4 % of ours, and the baseline does not count"
    assert compare.main([str(a), str(b), "--threshold", "0.03"]) == 1
    assert compare.main([str(a), str(b), "--provider", ""]) == 1
    upsert(b, [make_row("ours-lost", None, note="wrong: error 1 exceeds 0.1")])
    assert compare.main([str(a), str(b)]) == 1
    assert "lost" in capsys.readouterr().out
    assert [change.ratio for change in compare.compare(read(a), read(b))] == [pytest.approx(1.04), 2.0, None]
    assert compare.main([str(a), str(tmp_path / "a.csv")]) == 0
    upsert(tmp_path / "other.csv", [make_row("elsewhere", 1.0)])
    assert compare.main([str(a), str(tmp_path / "other.csv")]) == 2


def test_plots_are_drawn_from_the_file(tmp_path):
    path = tmp_path / "cpu.csv"
    small = [Row(OP, "ours-AdamW", f"small-{n}/all", 4, "float32", "cpu", "a, processor", 2, median_ms=0.1 + n) for n in (6, 600)]
    shares = {"ratio_to_naive": 0.5, "roofline_share": 0.4}
    other_ranks = [make_row("ours", 3.0, **shares) for _ in range(2)]
    other_ranks[0].rank, other_ranks[1].rank = 16, 32
    upsert(path, [make_row("naive", 2.0, ratio_to_naive=1.0, copy_share=0.1), make_row("ours", 1.0, **shares), *other_ranks, *small])
    assert plot.main([str(path)]) == 0
    names = {file.name for file in tmp_path.glob("*.png")}
    assert names == {f"cpu-{kind}.png" for kind in ("bars", "roofline", "layers", "rank")}
    options = ["--out", str(tmp_path / "figures"), "--op", OP, "--threads", "2", "--format", "svg"]
    texts = []
    for _ in range(2):
        assert plot.main([str(path), *options]) == 0
        (file,) = (tmp_path / "figures").iterdir()
        texts.append(file.read_text())
    assert file.name == "cpu-layers.svg" and texts[0] == texts[1], "the same rows give the same file"
    assert plot.main([str(path), *options, "--without", "ours-AdamW", "--out", str(tmp_path / "none")]) == 0
    assert not list((tmp_path / "none").iterdir())


PUBLISHED = str(readme.ROOT / "benchmarks" / "results" / "cpu.csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "x"], "argument --rank: 'x' is no integer"),
        (["--rank", "8,0"], "argument --rank: 0 is below 1"),
        (["--rank", "4096"], "argument --rank: 4096 is above 384, the smallest dimension of minilm/all"),
        (["--dtype", "int8"], "argument --dtype: 'int8' is none of float64"),
        (["--op", "grouped_qr,foo"], "argument --op: 'foo' is none of lora_linear_forward, .*training_step"),
        (["--suite", "init", "--op", "grouped_qr"], "argument --op: 'grouped_qr' is none of reparametrize, lora_sb_init"),
        (
            ["--suite", "memory,linalg", "--provider", "ours,foo"],
            "argument --provider: 'foo' is none of naive, torch-foreach, .*torch-batched",
        ),
        (["--suite", "linalg", "--op", "grouped_qr", "--provider", "torch-fused"], "'torch-fused' is none of naive, torch-batched, ours-"),
        (["--device", "foo"], "argument --device: 'foo' is no device"),
        (["--device", "cuda:99"], "argument --device: torch sees no 'cuda:99'"),
        (["--out", "{tmp}/file/results.csv"], "argument --out: cannot write"),
        (["plot", "{tmp}/file"], "argument RESULTS.csv: .* has no column device"),
        (["plot", "{tmp}/empty"], "argument RESULTS.csv: .* has no rows"),
        (["plot", PUBLISHED, "--op", "bogus", "--out", "{tmp}/d"], "argument --op: 'bogus' is none of those of the file: .*grouped_adamw_"),
        (["plot", PUBLISHED, "--without", "bogus"], "argument --without: 'bogus' is none of those of the file: .*naive"),
        (["plot", PUBLISHED, "--threads", "99"], "argument --threads: '99' is none of those of the file: "),
        (["plot", PUBLISHED, "--out", "{tmp}/file"], "argument --out: cannot write .*file"),
        (["compare", PUBLISHED, "{tmp}/file"], "argument B.csv: .*file holds no results of the benchmark: it has no column op"),
        (["compare", "{tmp}/binary", PUBLISHED], "argument A.csv: .*binary holds no results of the benchmark: .*decode"),
        (["compare", "{tmp}/absent", PUBLISHED], "argument A.csv: there is no file .*absent"),
        (["readme", "--results", "{tmp}/file"], "argument --results: .*file holds no results of the benchmark: it has no column op"),
        (["readme", "--readme", "{tmp}/absent"], "argument --readme: there is no file .*absent"),
        (["readme", "--results", "{tmp}/absent"], "argument --results: there is no file .*absent"),
        (["readme", "--readme", "{tmp}/file"], "argument --readme: .*once each"),
        (["readme", "--readme", "{tmp}/binary"], "argument --readme: .*binary: .*decode"),
        (["--seconds", "-1"], "argument --seconds: -1 is no time; give seconds, more than 0"),
        (["--seconds", "nan"], "argument --seconds: nan is no time"),
        (["--compile-seconds", "-1"], "argument --compile-seconds: -1 is no time; give seconds, 0 or more"),
        (["--tokens", "0"], "argument --tokens: 0 is below 1"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message, tmp_path, capsys):
    (tmp_path / "file").write_text("a,b\n1,2\n")
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    command, *options = [argument.format(tmp=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as caught:
        COMMANDS[command](options) if command in COMMANDS else parse_arguments([command, *options])
    assert caught.value.code == 2 and re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("path", sorted((readme.ROOT / "benchmarks" / "results").glob("*pu.csv")), ids=lambda path: path.name)
def test_what_is_published_was_right(path):
    notes = [f"{row['op']} {row['provider']} {row['shapes']} r = {row['rank']}: {row['note']}" for row in read(path)]
    assert not [note for note in notes if re.search(r": (wrong|failed)", note)]


def test_readme_shows_what_the_results_say(tmp_path):
    assert readme.main(["--check"]) == 0, "the README's figures are not those of benchmarks/results/cpu.csv: python -m benchmarks readme"
    block = readme.render(read(readme.ROOT / "benchmarks" / "results" / "cpu.csv"))
    assert "torch's fused AdamW" in block
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter"
    assert readme.replace_block(text, "new") == f"before\n{readme.BEGIN}\nnew\n{readme.END}\nafter"
    for broken in ("none", readme.END + readme.BEGIN, text + text):
        with pytest.raises(ValueError, match="once each"):
            readme.replace_block(broken, "new")


def test_torch_compile_stops_at_its_limit():
    def slow(_: object) -> None:
        time.sleep(60)

    importlib.import_module("torch._dynamo")  # before the clock starts: that may take longer than all the rest
    started = time.perf_counter()
    with pytest.raises(BackendError, match=r"took more than 0\.2 s"):
        compiled(torch.sin, 0.2, slow)
    assert time.perf_counter() - started < 30

    def broken(_: object) -> None:
        raise RuntimeError("no compiler\nand more")

    with pytest.raises(BackendError, match="^torch.compile: no compiler$"):
        compiled(torch.sin, 60, broken)
