"""Fine-tune a real sentence encoder with plain LoRA and with the methods of this package: same data, same batches, same steps.

    python examples/finetune_text.py                          # 200 steps of each method, about a minute each on two cores
    python examples/finetune_text.py --sweep --seeds 0 1 2    # the best of three learning rates each, three seeds
    python examples/finetune_text.py --layers peft            # unmodified PEFT layers: only the optimizer is ours
    python examples/finetune_text.py --methods lora altlora+ lora-rite    # side by side; --methods all for every one
    python examples/finetune_text.py --methods oplora --lrs 0.05          # its lr is SGD's on the full weight, not Adam's
    python examples/finetune_text.py --task smollm2           # a language model, all seven linear layers of its blocks

The model is MiniLM-L6, the task to tell positive from negative Rotten Tomatoes sentences; or SmolLM2-135M, to go on with
Shakespeare's plays. A table is printed at the end; figures (JSON, CSV) and the loss curves (PNG) go to ``examples/output/``.

A method is one line of :data:`METHODS`; :func:`train` is the loop that any user would write.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from data import Batch
from rich.console import Console
from rich.table import Table
from tasks import TASKS
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from tqdm import tqdm

import lowrank_kernels as lrk
from lowrank_kernels.backends import call_counts

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """How a method changes a training script: its adapter, and its optimizer.

    Attributes:
        label: for tables and plots.
        adapter: ``method=`` of ``lowrank_kernels.adapt``.
        optimizer: from parameter groups and the settings, ``model`` among them, to an optimizer.
        peft_rank: with ``--layers peft``, the rank of PEFT's layers, in units of ``--rank``.
        peft: for methods that are PEFT's own: the options of ``LoraConfig``. They always train PEFT's layers.
        scale: s; None means α/√r (rsLoRA), as the papers have it for all methods but LoRA.
    """

    label: str
    adapter: str
    optimizer: Callable[[Groups, argparse.Namespace], torch.optim.Optimizer]
    peft_rank: int = 1
    peft: dict[str, Any] | None = None
    scale: float | None = None


#: The methods that are compared when none is named.
DEFAULT_METHODS = ("lora", "sds")


def torch_adamw(groups: Groups, run: argparse.Namespace) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True)


def short_od_lora(groups: Groups, run: argparse.Namespace) -> torch.optim.Optimizer:
    """OD-LoRA's rounds take 50 steps, which runs of a hundred cannot spare: the model is back at W0 after them."""
    return lrk.ODLoRA(groups, total_steps=run.steps, scale=run.named_scale, rounds=2, round_steps=5)


METHODS = {
    "lora": Method("LoRA, torch AdamW (fused)", "lora", torch_adamw),
    "sds": Method("SDS-LoRA", "sds", lambda groups, run: lrk.SDSLoRA(groups, total_steps=run.steps, scale=run.named_scale), peft_rank=2),
    "lora+": Method("LoRA+ (B's lr × 4)", "lora", lambda groups, run: lrk.AdamW(groups, lr_ratio=4.0)),
    "altlora+": Method("AltLoRA+", "lora", lambda groups, run: lrk.AltLoRAPlus(groups, scale=run.named_scale)),
    "altlora": Method("AltLoRA", "lora", lambda groups, run: lrk.AltLoRA(groups, scale=run.named_scale)),
    "scaled-adamw": Method("ScaledAdamW", "lora", lambda groups, run: lrk.ScaledAdamW(groups, scale=run.named_scale)),
    "lora-pro": Method("LoRA-Pro", "lora", lambda groups, run: lrk.LoRAPro(groups, scale=run.named_scale)),
    "oplora": Method("OPLoRA×2 (lr is SGD's)", "lora", lambda groups, run: lrk.OPLoRA(groups, model=run.model)),
    "lora-rite": Method("LoRA-RITE", "lora", lambda groups, run: lrk.LoRARITE(groups, scale=run.named_scale)),
    "od": Method("OD-LoRA", "sds", lambda groups, run: lrk.ODLoRA(groups, total_steps=run.steps, scale=run.named_scale), peft_rank=2),
    "od-short": Method("OD-LoRA, 2 rounds of 5 steps", "sds", short_od_lora, peft_rank=2),
    "lora-s2": Method("LoRA with s = 2", "lora", torch_adamw, scale=2.0),
    "peft": Method("LoRA of PEFT, torch AdamW (fused)", "lora", torch_adamw, peft={}),
    "pissa": Method("PiSSA (PEFT)", "lora", torch_adamw, peft={"init_lora_weights": "pissa"}),
    "dora": Method("DoRA (PEFT)", "lora", torch_adamw, peft={"use_dora": True}),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler, batches: Iterable[Batch]) -> Iterator[float]:
    """The training loop; it hands back the loss after every step."""
    model.train()
    for inputs, labels in batches:
        loss = cross_entropy(model(**inputs).flatten(0, -2), labels.flatten())
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        yield loss.item()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch]) -> tuple[float, float]:
    """Mean loss and accuracy."""
    model.eval()
    loss, correct, count = 0.0, 0, 0
    for inputs, labels in batches:
        logits, labels = model(**inputs).flatten(0, -2), labels.flatten()
        loss += cross_entropy(logits, labels, reduction="sum").item()
        correct += int((logits.argmax(dim=1) == labels).sum())
        count += len(labels)
    return loss / count, correct / count


def adapted_model(method: Method, args: argparse.Namespace, seed: int) -> nn.Module:
    """The pretrained model with fresh adapters (and head, if it has one); the seed decides both."""
    torch.manual_seed(seed)
    model = TASKS[args.task].load_model()
    scale = scale_of(args, method)
    if args.layers == "ours" and method.peft is None:
        shape = {"rank": args.rank, "alpha": scale * args.rank, "rank_scaling": "lora"}
        try:
            lrk.adapt(model.backbone, method=method.adapter, target_modules=args.target_modules, **shape)
        except ValueError as error:  # --rank or --target-modules: known once the model is loaded
            raise SystemExit(f"error: {error}") from None
    else:
        from peft import LoraConfig, get_peft_model

        rank = method.peft_rank * args.rank
        config = LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=args.target_modules, **(method.peft or {}))
        model.backbone = get_peft_model(model.backbone, config)
    return model.to(args.device)


def scale_of(args: argparse.Namespace, method: Method | None = None) -> float:
    """s: the method's own, or α/√r (rsLoRA), as in the papers."""
    own = method.scale if method is not None else None
    return args.alpha / args.rank**0.5 if own is None else own


def parameter_groups(model: nn.Module, lr: float, head_lr: float) -> Groups:
    """Adapters and head, each with its own learning rate, no weight decay."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapter = [(name, parameter) for name, parameter in trainable if not name.startswith("head.")]
    head = [(name, parameter) for name, parameter in trainable if name.startswith("head.")]
    groups = [{"params": adapter, "lr": lr, "weight_decay": 0.0}, {"params": head, "lr": head_lr, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@dataclass
class Result:
    """What one training run gave. Times in milliseconds."""

    method: str
    lr: float
    seed: int
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    backends: dict[str, int] = field(default_factory=dict)
    validation_loss: float = float("nan")
    test_loss: float = float("nan")
    test_accuracy: float = float("nan")

    @property
    def train_loss(self) -> float:
        """Mean loss of the last twenty steps."""
        return statistics.fmean(self.losses[-20:])


class Run:
    """One model in training, advanced a step at a time, so that several runs can take turns."""

    def __init__(self, name: str, lr: float, seed: int, batches: list[Batch], args: argparse.Namespace) -> None:
        method = METHODS[name]
        self.device = torch.device(args.device)
        self.result = Result(name, lr, seed)
        self.model = adapted_model(method, args, seed)
        run = argparse.Namespace(**vars(args), model=self.model)
        optimizer = self.optimizer = method.optimizer(parameter_groups(self.model, lr, args.head_lr), run)
        scheduler = LambdaLR(optimizer, lambda step: 1 - step / args.steps)
        optimizer.register_step_pre_hook(lambda *_: self._start_clock())
        optimizer.register_step_post_hook(lambda *_: self.result.optimizer_ms.append(self._stop_clock()))
        self.training = train(self.model, optimizer, scheduler, batches)

    def step(self) -> float:
        before, start = Counter(call_counts()), time.perf_counter()
        loss = next(self.training)
        self._synchronize()
        self.result.step_ms.append(1e3 * (time.perf_counter() - start))
        self.result.losses.append(loss)
        ran = Counter(call_counts()) - before
        self.result.backends = dict(Counter(self.result.backends) + Counter({f"{op}: {backend}": n for (op, backend), n in ran.items()}))
        return loss

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _start_clock(self) -> None:
        self._synchronize()
        self._started = time.perf_counter()

    def _stop_clock(self) -> float:
        self._synchronize()
        return 1e3 * (time.perf_counter() - self._started)


def run_side_by_side(lr: float, seed: int, args: argparse.Namespace) -> list[Result]:
    """Train every method on the same batches, one step of each in turn: whatever slows the machine down slows all of them."""
    device = torch.device(args.device)
    splits = TASKS[args.task].splits(args)
    batches = splits.train.training_batches(args.steps, args.batch_size, seed, device)
    runs = [Run(name, lr, seed, batches, args) for name in args.methods]
    with tqdm(range(args.steps), desc=f"lr {lr:g}, seed {seed}", disable=args.quiet, file=sys.stdout) as progress:
        for step in progress:
            turn = step % len(runs)
            for run in runs[turn:] + runs[:turn]:
                run.step()
            progress.set_postfix({run.result.method: f"{statistics.fmean(run.result.losses[-20:]):.3f}" for run in runs})
    for run in runs:
        run.result.validation_loss, _ = evaluate(run.model, splits.validation.evaluation_batches(device))
        run.result.test_loss, run.result.test_accuracy = evaluate(run.model, splits.test.evaluation_batches(device))
    return [run.result for run in runs]


def _peak_rss(name: str, args: argparse.Namespace, answer: Any) -> None:
    steps = min(args.steps, 15)  # past the warm-up and the first refreshes
    batches = TASKS[args.task].splits(args).train.training_batches(args.steps, args.batch_size, args.seeds[0], torch.device(args.device))
    # The longest sentences decide the peak.
    batches.sort(key=lambda batch: -batch[0]["input_ids"].shape[1])
    run = Run(name, args.lrs[0], args.seeds[0], batches[:steps], args)
    for _ in range(steps):
        run.step()
    answer.put(peak_rss_mib())


def peak_rss_mib() -> float:
    """Peak resident memory of this process. Linux carries ``ru_maxrss`` over from the parent through exec, so VmHWM is read there."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure_peak_rss(name: str, args: argparse.Namespace) -> float:
    """Peak resident memory (MiB) of a fresh process that trains this method alone on the 15 longest batches."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_peak_rss, args=(name, args, answer))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"error: the process that measures the memory of {name!r} ended with code {process.exitcode}; see above")
    return answer.get()


def mean_and_spread(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def best_lr(results: list[Result], method: str) -> float:
    """The learning rate with the lowest validation loss, averaged over the seeds."""
    lrs = sorted({r.lr for r in results})
    return min(lrs, key=lambda lr: statistics.fmean(r.validation_loss for r in results if (r.method, r.lr) == (method, lr)))


def quality_table(results: list[Result]) -> Table:
    seeds = len({r.seed for r in results})
    table = Table(title="Quality", caption=f"{seeds} seed(s), mean ± standard deviation; * lowest validation loss")
    for column in ("method", "lr", "test accuracy", "test loss", "validation loss", "final train loss"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for name in dict.fromkeys(r.method for r in results):
        best = best_lr(results, name)
        for lr in sorted({r.lr for r in results}):
            rows = [r for r in results if (r.method, r.lr) == (name, lr)]
            chosen = lr == best
            table.add_row(
                METHODS[name].label,
                f"{lr:g}{'*' if chosen else ' '}",
                mean_and_spread([r.test_accuracy for r in rows], 3),
                mean_and_spread([r.test_loss for r in rows], 3),
                mean_and_spread([r.validation_loss for r in rows], 3),
                mean_and_spread([r.train_loss for r in rows], 3),
                style="bold" if chosen else "",
            )
    return table


def cost_figures(results: list[Result], peak_rss: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Per method: median times over all steps (after the first five of longer runs), the mean too (it contains the refreshes).

    ``step_ratio`` is the median over the steps of this method's time by the first method's, for the same batch.
    """
    figures: dict[str, dict[str, Any]] = {}
    skip = 5 if len(results[0].step_ms) > 10 else 0
    baseline = {(r.lr, r.seed): r.step_ms[skip:] for r in results if r.method == results[0].method}
    for name in dict.fromkeys(r.method for r in results):
        rows = [r for r in results if r.method == name]
        step = [ms for r in rows for ms in r.step_ms[skip:]]
        optimizer = [ms for r in rows for ms in r.optimizer_ms[skip:]]
        figures[name] = {
            "step_ms_median": statistics.median(step),
            "step_ratio": statistics.median(
                own / first for r in rows for own, first in zip(r.step_ms[skip:], baseline[r.lr, r.seed], strict=True)
            ),
            "optimizer_ms_median": statistics.median(optimizer),
            "optimizer_ms_mean": statistics.fmean(optimizer),
            "peak_rss_mib": peak_rss.get(name),
            "backends": sorted(rows[-1].backends),
        }
    return figures


def cost_table(figures: dict[str, dict[str, Any]]) -> Table:
    caption = (
        "Steps of all methods taken in turn on the same batches;\n"
        "× first method: median over steps of the ratio on the same batch;\n"
        "peak RSS of a process of its own on the 15 longest batches."
    )
    table = Table(title="Cost", caption=caption)
    for column in (
        "method",
        "step ms\nmedian",
        "× first\nmethod",
        "optimizer ms\nmedian",
        "optimizer ms\nmean",
        "peak RSS\nMiB",
        "backends that ran",
    ):
        table.add_column(column, justify="left" if column in ("method", "backends that ran") else "right")
    for name, row in figures.items():
        rss = row["peak_rss_mib"]
        table.add_row(
            METHODS[name].label,
            f"{row['step_ms_median']:.1f}",
            f"{row['step_ratio']:.3f}",
            f"{row['optimizer_ms_median']:.2f}",
            f"{row['optimizer_ms_mean']:.2f}",
            "–" if rss is None else f"{rss:.0f}",
            "\n".join(row["backends"]) or "torch",
        )
    return table


def plot_losses(results: list[Result], path: Path, title: str) -> None:
    """Training loss (mean over a window of 15 steps) of every method at its best learning rate; each seed a thin line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for index, name in enumerate(dict.fromkeys(r.method for r in results)):
        lr = best_lr(results, name)
        curves = torch.tensor([r.losses for r in results if (r.method, r.lr) == (name, lr)])
        window = min(15, curves.shape[1])
        smooth = curves.unfold(1, window, 1).mean(dim=2)
        steps = range(window, curves.shape[1] + 1)
        for curve in smooth:
            axes.plot(steps, curve, color=f"C{index}", linewidth=0.8, alpha=0.4)
        axes.plot(steps, smooth.mean(dim=0), color=f"C{index}", linewidth=2, label=f"{METHODS[name].label}, lr {lr:g}")
    axes.set(xlabel="step", ylabel=f"training loss (mean of {window} steps)", title=f"{title}, same batches")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save(results: list[Result], costs: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    output: Path = args.output
    output.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    settings |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    runs = [asdict(r) | {"train_loss": r.train_loss} for r in results]
    (output / "results.json").write_text(json.dumps({"settings": settings, "costs": costs, "runs": runs}, indent=1, default=str))
    columns = ("method", "lr", "seed", "test_accuracy", "test_loss", "validation_loss", "train_loss")
    with open(output / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([run[column] for column in columns] for run in runs)
    plot_losses(results, output / "losses.png", TASKS[args.task].title)


def task_parser(description: str) -> argparse.ArgumentParser:
    """The options that say what a run is, of any script that trains; the defaults of ``--task`` are filled in by :func:`parse`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="minilm", help="decides the other defaults")
    parser.add_argument("--layers", choices=("ours", "peft"), default="ours", help="whose adapter layers: this package's or PEFT's")
    parser.add_argument("--steps", type=int, help="of every run")
    parser.add_argument("--head-lr", type=float, default=5e-3, help="learning rate of what is trained in full")
    parser.add_argument("--rank", type=int, default=8, help="r of every adapter")
    parser.add_argument("--alpha", type=float, default=4.0, help="s = alpha / √rank")
    parser.add_argument("--target-modules", nargs="+", help="names of the layers to adapt")
    parser.add_argument("--batch-size", type=int, help="sentences or windows a step")
    parser.add_argument("--max-length", type=int, help="tokens")
    parser.add_argument("--held-out", type=int, help="sentences or windows for validation, and as many for the test")
    parser.add_argument("--train-examples", "--train-sentences", type=int, default=None, help="how many to train on (default: all others)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder of figures and rows")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with the task's defaults for what was not given."""
    known, _ = parser.parse_known_args(argv)
    parser.set_defaults(**TASKS[known.task].defaults)
    args = parser.parse_args(argv)
    for key in ("steps", "rank", "batch_size", "max_length", "held_out", "train_examples"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            parser.error(f"--{key.replace('_', '-')} must be at least 1, got {getattr(args, key)}")
    for option, values, least in (("lrs", getattr(args, "lrs", []), 1e-30), ("alpha", [args.alpha], 1e-30), ("head-lr", [args.head_lr], 0)):
        if not all(least <= value < math.inf for value in values):
            parser.error(f"--{option} must be {'positive' if least else '≥ 0'} and finite, got {' '.join(map(str, values))}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device must be one that torch has here, got {args.device!r}: {str(error).splitlines()[0]}")
    # The optimizer reads s from our layers; PEFT's parameters, given by name, do not tell it.
    args.named_scale = scale_of(args) if args.layers == "peft" else None
    return args


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = task_parser(__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "all"], default=list(DEFAULT_METHODS), help="what to compare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of every method and rate each")
    parser.add_argument("--lrs", type=float, nargs="+", default=[2e-3], help="learning rates of the adapters")
    parser.add_argument("--sweep", action="store_true", help="the same as --lrs 1.5e-3 3e-3 6e-3")
    parser.add_argument("--no-memory", action="store_true", help="do not measure the peak memory")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parse(parser, argv)
    if "all" in args.methods:
        args.methods = list(METHODS)
    if args.sweep:
        args.lrs = [1.5e-3, 3e-3, 6e-3]
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    peak_rss = {} if args.no_memory else {name: measure_peak_rss(name, args) for name in args.methods}
    results: list[Result] = []
    for lr in args.lrs:
        for seed in args.seeds:
            results += run_side_by_side(lr, seed, args)
            save(results, cost_figures(results, peak_rss), args)  # after every run: a sweep takes long
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(quality_table(results))
    console.print(cost_table(cost_figures(results, peak_rss)))
    console.print(f"Figures and loss curves: {args.output}", soft_wrap=True)


if __name__ == "__main__":
    main()
