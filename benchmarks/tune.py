"""``python -m benchmarks.tune``: time launch configurations of the Triton kernels on this GPU, and write the table that the package reads.

For each kernel with knobs (``lowrank_kernels.backends.triton._tuned.KNOBS``), padded rank and dtype, a small grid around the
heuristic's choice is timed on data of its own. A configuration that does not launch, or gives another result than the
heuristic's, is passed over; one enters the table only if it is 3 % faster. The table goes where the package looks for it
(``tuned/sm_90.json`` beside the kernels); elsewhere (``--out``), name it in LOWRANK_KERNELS_TUNED. Nothing is tuned while a program
runs: kernels that update in place are never timed on live data.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from lowrank_kernels.backends.moments import Maps, Numbers, Stepped
from lowrank_kernels.backends.triton import _tuned, adamw, gram, lora_linear, solve
from lowrank_kernels.backends.triton._launch import padded_rank

#: What is tried for each knob.
GRID: dict[str, dict[str, tuple[int, ...]]] = {
    "project": {"BLOCK_T": (16, 32, 64, 128), "BLOCK_D": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    "expand": {"BLOCK_T": (32, 64, 128), "BLOCK_D": (32, 64, 128, 256), "num_warps": (4, 8)},
    "token_sum": {"BLOCK_T": (32, 64, 128), "BLOCK_D": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    "output_grads": {"BLOCK_T": (32, 64), "BLOCK_D": (128, 256, 512), "num_warps": (4, 8), "num_stages": (2, 3)},
    "partial_gram": {"BLOCK_D": (16, 32, 64), "num_warps": (4, 8), "num_stages": (2, 3)},
    "substitute": {"BLOCK_D": (16, 32, 64, 128), "num_warps": (2, 4, 8)},
    "mapped_adamw": {"BLOCK_D": (16, 32, 64, 128), "num_warps": (4, 8)},
    "mapped_adamw_heavy": {"BLOCK_D": (16, 32, 64), "num_warps": (4, 8)},
}
#: A gain below this is taken for noise.
GAIN = 0.03

Measure = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Problem:
    """One kernel on data of one rank and dtype, to be timed.

    Attributes:
        run: one launch; may change the problem's data, which are nobody else's.
        results: from fresh copies of the data, what the kernel computes.
    """

    kernel: str
    bucket: str
    run: Callable[[], object]
    results: Callable[[], list[Tensor]]


def problems(rank: int, dtype: torch.dtype, device: torch.device, tokens: int, width: int, layers: int) -> Iterator[Problem]:
    """Every kernel with knobs on Gaussian data: activations (tokens, width), or ``layers`` factors (width, rank)."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) / shape[-1] ** 0.5).to(of)

    def pure(kernel: str, dtypes: tuple[torch.dtype, ...], run: Callable[[], Any]) -> Problem:
        def results() -> list[Tensor]:
            found = run()
            return [t for t in (found if isinstance(found, tuple) else (found,)) if isinstance(t, Tensor)]

        return Problem(kernel, _tuned.bucket(padded_rank(rank), *dtypes), run, results)

    x, hidden, a, q, b = draw(tokens, width), draw(tokens, rank), draw(rank, width), draw(rank, width), draw(width, rank)
    y, of_a = torch.empty_like(x), torch.empty_like(a)

    def expand() -> Tensor:
        lora_linear.expand(y, x, None, 0.5, hidden, b, hidden, b, False)
        return y

    yield pure("project", (dtype,), lambda: lora_linear.project(x, None, 1.0, a.mT, q.mT, True))
    yield pure("expand", (dtype,), expand)
    yield pure("token_sum", (dtype,), lambda: lora_linear.token_sum(hidden, x, None, 0.5, of_a, 1, width))
    yield pure("output_grads", (dtype,), lambda: lora_linear.output_grads(x, hidden, b, b, 1.0, 0.5))
    factors = [draw(width, rank) for _ in range(layers)]
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    for accumulator in dict.fromkeys((torch.float64, sums)):
        grams = torch.empty(layers, rank, rank, dtype=accumulator, device=device)
        yield pure("partial_gram", (dtype, accumulator), lambda grams=grams: (gram.grouped_gram(factors, None, grams), grams)[1])
        spd, solved = torch.eye(rank, dtype=accumulator, device=device).repeat(layers, 1, 1) * 2, [torch.empty_like(f) for f in factors]

        def substitute(spd: Tensor = spd, solved: list[Tensor] = solved) -> tuple[Tensor, ...]:
            solve.grouped_solve(spd, factors, 1e-3, False, solved)
            return tuple(solved)

        yield pure("substitute", (accumulator, dtype), substitute)
    maps = torch.eye(rank, dtype=sums, device=device).repeat(layers, 1, 1)
    grads, firsts, seconds = [draw(width, rank) for _ in factors], [draw(width, rank, of=sums) for _ in factors], [
        draw(width, rank, of=sums).square() for _ in factors
    ]  # fmt: skip
    numbers = Numbers.of(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, step=1)
    for heavy in (False, True):

        def step(params: list[Tensor], m: list[Tensor], v: list[Tensor], heavy: bool = heavy) -> None:
            adamw.grouped_adamw_(Stepped(params, grads, m, v), Maps(maps, maps, maps if heavy else None), [1] * layers, None, numbers)

        own = tuple([t.clone() for t in tensors] for tensors in (factors, firsts, seconds))

        def updated(step: Callable[..., None] = step) -> list[Tensor]:
            copies = tuple([t.clone() for t in tensors] for tensors in (factors, firsts, seconds))
            step(*copies)
            return [t for tensors in copies for t in tensors]

        name = "mapped_adamw_heavy" if heavy else "mapped_adamw"
        yield Problem(name, _tuned.bucket(padded_rank(rank), dtype), lambda step=step, own=own: step(*own), updated)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether two results differ by no more than another order of summation."""
    return all(
        bool((one.double() - other.double()).abs().max() <= 64 * torch.finfo(one.dtype).eps * other.double().abs().max())
        for one, other in zip(found, expected, strict=True)
        if other.numel()
    )


def tune(problem: Problem, measure: Measure, deadline: float) -> dict[str, int] | None:
    """The fastest configuration of the grid that is right; None where the heuristic's is as good, or no time is left."""
    with _tuned.using({}):
        expected = [t.clone() for t in problem.results()]
        best_time = measure(problem.run) * (1 - GAIN)
    best = None
    knobs = GRID[problem.kernel]
    for values in product(*knobs.values()):
        if time.monotonic() > deadline:
            break
        candidate = dict(zip(knobs, values, strict=True))
        with _tuned.using({problem.kernel: {problem.bucket: candidate}}):
            try:
                if not same(problem.results(), expected):
                    continue
                duration = measure(problem.run)
            except (RuntimeError, triton.TritonError):  # does not compile, or needs more than a multiprocessor has
                continue
        if duration < best_time:
            best, best_time = candidate, duration
    return best


def bench(run: Callable[[], object]) -> float:
    """Median milliseconds of device time, with a cold L2."""
    return float(triton.testing.do_bench(run, warmup=5, rep=30, return_mode="median"))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rank", type=lambda text: [int(part) for part in text.split(",")], default=[16, 32, 64, 128])
    parser.add_argument("--dtype", type=lambda text: text.split(","), default=["bfloat16", "float32"])
    parser.add_argument("--kernels", type=lambda text: text.split(","), default=list(GRID), help="only these")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=4096, help="d_in = d_out of the activations, rows of the factors")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=1800.0, help="stop then, with what was found until then")
    parser.add_argument("--out", type=Path, help="the table (default: where the package looks for that of this GPU)")
    args = parser.parse_args(argv)
    unknown = set(args.kernels) - set(GRID)
    if unknown:
        parser.error(f"--kernels: {', '.join(sorted(unknown))} is none of {', '.join(GRID)}")
    return args


def main(argv: list[str] | None = None, measure: Measure = bench) -> int:
    args = parse_arguments(argv)
    device = torch.device(args.device)
    if measure is bench and not (device.type == "cuda" and torch.cuda.is_available()):
        raise SystemExit("benchmarks.tune: no GPU here; configurations are measured, not guessed")
    architecture = _tuned.architecture(device)
    if args.out is None and architecture is None:
        raise SystemExit("benchmarks.tune: no table belongs to this device; name a file by --out")
    path = args.out or _tuned.FOLDER / f"{architecture}.json"
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    if path.exists():  # what is not measured now stays
        kernels = {kernel: {**buckets} for kernel, buckets in _tuned.read(path, architecture).items()}  # type: ignore[dict-item]
    deadline = time.monotonic() + args.seconds
    for rank, name in product(args.rank, args.dtype):
        for problem in problems(rank, getattr(torch, name), device, args.tokens, args.width, args.layers):
            if problem.kernel not in args.kernels or time.monotonic() > deadline:
                continue
            found = tune(problem, measure, deadline)
            print(f"{problem.kernel}, {problem.bucket}: {found or 'the heuristic'}", flush=True)
            kernels.setdefault(problem.kernel, {}).pop(problem.bucket, None)
            if found:
                kernels[problem.kernel][problem.bucket] = found
    content = {
        "format": _tuned.FORMAT,
        "architecture": architecture or device.type,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": _tuned.check({kernel: buckets for kernel, buckets in kernels.items() if buckets}, str(path)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
