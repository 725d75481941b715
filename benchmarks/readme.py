"""``python -m benchmarks readme``: write the benchmark tables of README.md from ``benchmarks/results/cpu.csv``.

They stand between two comments; everything else of the README is left alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from .results import KEY, as_float, read_given
from .shapes import MODELS
from .suites.scaling import OP, host_time_per_layer

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- benchmarks: written by `python -m benchmarks readme` -->", "<!-- /benchmarks -->"
#: (shapes, rank) of the table of times.
CASES = (("minilm/all", "8"), ("roberta-base/all", "16"))
#: op → (what it is called, the yardstick's name, yardstick, ours), of the table of times
OPERATIONS = {
    "grouped_adamw_": ("AdamW `step()`", "torch's fused AdamW", "torch-fused", "ours-optimizer"),
    "sds_lora_refresh_step": ("SDS-LoRA `step()` with a refresh", "torch's fused AdamW", "torch-fused-adamw", "ours-optimizer"),
    "altlora_plus_step": ("AltLoRA+ `step()`", "torch's fused AdamW", "torch-fused-adamw", "ours-optimizer"),
    "training_step": ("whole training step, SDS-LoRA", "PEFT LoRA + fused AdamW", "peft-torch-fused", "ours-SDSLoRA"),
    "decoupled_linear_forward_backward": ("decoupled layer, forward + backward", "frozen layer alone", "frozen-linear", "ours-native"),
    "grouped_qr": ("`grouped_qr` (sign-aligned)", "stacked torch", "torch-batched", "ours-native"),
    "reparametrize": ("`grouped_svd_product`", "stacked torch", "torch-batched", "ours-native"),
    "lora_sb_init": ("`grouped_svd` (one block)", "`torch.svd_lowrank`", "torch-svd-lowrank", "ours-native"),
}
#: Ranks of the tables by shapes.
RANKS = ("8", "16")
#: op → (what it is called, ours), of the tables by shapes
STEPS = {
    "grouped_adamw_": ("AdamW `step()`", "ours-optimizer"),
    "altlora_plus_step": ("AltLoRA+ `step()`", "ours-optimizer"),
    "sds_lora_refresh_step": ("SDS-LoRA `step()` with a refresh", "ours-optimizer"),
}
LINEAR_ALGEBRA = {
    "grouped_qr": ("`grouped_qr`", "ours-native"),
    "grouped_gram": ("`grouped_gram`", "ours-native"),
    "grouped_solve": ("`grouped_solve`", "ours-native"),
    "grouped_svd_product": ("`grouped_svd_product`", "ours-native"),
    "grouped_lorsum": ("`grouped_lorsum`", "ours-native"),
}

#: op → what it is called, of the table of adapted layers
LAYERS = {
    "lora_linear_forward_backward": "plain",
    "lora_linear_dropout_forward_backward": "plain, dropout",
    "decoupled_linear_forward_backward": "decoupled (PEFT: of rank 2r)",
}
#: provider → what it is called, of the table of adapted layers
LAYER_PROVIDERS = {"frozen-linear": "frozen layer alone", "peft": "PEFT", "torch.compile": "`torch.compile`", "ours-native": "ours"}
#: Columns without which there are no tables.
NEEDED = (*KEY, "median_ms", "ratio_to_naive", "ratio_to_rival", "roofline_share", "copy_gb_s", "gemm_gflop_s", "torch", "date", "commit")

#: (op, shapes, rank, provider) → row
Found: TypeAlias = dict[tuple[str, str, str, str], dict[str, str]]


def _number(text: str) -> str:
    value = as_float(text)
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _by_shapes(found: Found, title: str, operations: Mapping[str, tuple[str, str]], cell: Callable[[dict[str, str]], str]) -> list[str]:
    """A table with a row for each operation and a column for each of the shapes and ranks; none without a row to show."""
    columns = [(f"{model}/all", rank) for model in MODELS for rank in RANKS]
    columns = [column for column in columns if any((op, *column, ours) in found for op, (_, ours) in operations.items())]
    if not columns:
        return []
    lines = [
        "",
        f"| {title} | " + " | ".join(f"{shapes.removesuffix('/all')}, r = {rank}" for shapes, rank in columns) + " |",
        "|" + "---|" * (1 + len(columns)),
    ]
    for op, (name, ours) in operations.items():
        cells = [cell(found[op, *column, ours]) if (op, *column, ours) in found else "" for column in columns]
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _ratio(text: str, *, inverse: bool = False) -> str:
    value = as_float(text)
    if value is None:
        return ""
    return f"{1 / value:.1f}" if inverse else f"{value:.2f}"


def _percent(text: str) -> str:
    value = as_float(text)
    return "" if value is None else f"{100 * value:.0f}"


def _layers(found: Found) -> list[str]:
    """The table of adapted layers, forward and backward: times by those of naive layers."""
    lines = []
    for op, name in LAYERS.items():
        for shapes in (f"{model}/all" for model in MODELS):
            rows = [found.get((op, shapes, RANKS[0], provider)) for provider in LAYER_PROVIDERS]
            if rows[-1] is not None:
                cells = ["" if row is None else _ratio(row["ratio_to_naive"]) for row in rows]
                lines.append(f"| {name} | {shapes.removesuffix('/all')}, {rows[-1]['tokens']} tokens | " + " | ".join(cells) + " |")
    title = f"Adapted layers, forward + backward, r = {RANKS[0]}, by naive layers' time"
    heads = ["", f"| {title} | | " + " | ".join(LAYER_PROVIDERS.values()) + " |", "|" + "---|" * (2 + len(LAYER_PROVIDERS))]
    return heads + lines if lines else []


def _qr_by_rank(found: Found) -> list[str]:
    """How many times faster QR is than its loop, by rank."""
    ours = {
        (shapes, int(rank)): row for (op, shapes, rank, provider), row in found.items() if (op, provider) == ("grouped_qr", "ours-native")
    }
    ranks = sorted({rank for _, rank in ours})
    wanted = [shapes for shapes in (f"{model}/all" for model in MODELS) if all((shapes, rank) in ours for rank in ranks)]
    if len(ranks) <= len(RANKS) or not wanted:
        return []
    lines = ["", "| `grouped_qr`, times faster than its loop, r = | " + " | ".join(map(str, ranks)) + " |", "|" + "---|" * (1 + len(ranks))]
    for shapes in wanted:
        cells = [_ratio(ours[shapes, rank]["ratio_to_naive"], inverse=True) for rank in ranks]
        lines.append(f"| {shapes.removesuffix('/all')} | " + " | ".join(cells) + " |")
    return lines


def _ceilings(rows: list[dict[str, str]]) -> str:
    """What the machine reached in the runs of these rows, and of which commits they are."""
    spans = []
    for column, unit in (("copy_gb_s", "GB/s"), ("gemm_gflop_s", "GFLOP/s")):
        values = [value for row in rows if (value := as_float(row[column])) is not None]
        low, high = f"{min(values):.0f}", f"{max(values):.0f}"
        spans.append(f"{low if low == high else f'{low} to {high}'} {unit}")
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    return f"Copies reached {spans[0]} and a large GEMM {spans[1]} in these runs (version {commits})."


def render(rows: list[dict[str, str]]) -> str:
    """The tables as Markdown: of the float32 rows with the largest number of threads of one processor."""
    rows = [row for row in rows if row["dtype"] == "float32"]
    if not rows:
        return ""
    newest = max(rows, key=lambda row: row["date"])
    rows = [row for row in rows if row["device_name"] == newest["device_name"]]
    threads = max(int(row["threads"]) for row in rows)
    rows = [row for row in rows if int(row["threads"]) == threads]
    found: Found = {(row["op"], row["shapes"], row["rank"], row["provider"]): row for row in rows}
    lines = [
        f"{newest['device_name']}, {threads} threads, torch {newest['torch'].split('+')[0]}, fp32, {newest['date']}. "
        f"{_ceilings(rows)} Median ms; in brackets × the yardstick:",
        "",
        "| one call for all layers | shapes | naive per-layer | yardstick | ours |",
        "|---|---|---|---|---|",
    ]
    for op, (title, rival_title, rival, ours) in OPERATIONS.items():
        for shapes, rank in CASES:
            naive, yardstick, mine = (found.get((op, shapes, rank, provider)) for provider in ("naive", rival, ours))
            if mine is None or yardstick is None or naive is None or not mine["ratio_to_rival"] or not yardstick["median_ms"]:
                continue
            ratio = as_float(mine["ratio_to_rival"])
            case = f"{shapes.removesuffix('/all')}, r = {rank}" + (f", {mine['tokens']} tokens" if mine.get("tokens") else "")
            lines.append(
                f"| {title} | {case} | {_number(naive['median_ms'])} | {rival_title} {_number(yardstick['median_ms'])} "
                f"| **{_number(mine['median_ms'])}** ({ratio:.2f} ×) |"
            )
    for title, operations, cell in (
        ("Time by that of torch's fused AdamW", STEPS, lambda row: _ratio(row["ratio_to_rival"])),
        ("Times faster than the loop over layers", STEPS | LINEAR_ALGEBRA, lambda row: _ratio(row["ratio_to_naive"], inverse=True)),
        ("% of the roofline", STEPS | LINEAR_ALGEBRA, lambda row: _percent(row["roofline_share"])),
    ):
        lines += _by_shapes(found, title, operations, cell)
    lines += _qr_by_rank(found)
    lines += _layers(found)
    slopes = host_time_per_layer(row for row in rows if row["op"] == OP)
    if "torch-fused" in slopes:
        lines += [
            "",
            "Host time of a step per layer (slope over 6 … 600 layers of 32 × 32, r = 4), µs; in brackets × torch's fused AdamW:",
            "",
            "| " + " | ".join(name.removeprefix("ours-") for name in slopes) + " |",
            "|" + "---|" * len(slopes),
            "| " + " | ".join(f"{slope:.1f} ({slope / slopes['torch-fused']:.2f} ×)" for slope in slopes.values()) + " |",
        ]
    return "\n".join(lines)


def replace_block(text: str, block: str) -> str:
    """``text`` with ``block`` between the two comments.

    Raises:
        ValueError: the comments are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"need the lines {BEGIN!r} and {END!r} once each, in this order")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "cpu.csv")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the README says something else")
    args = parser.parse_args(argv)
    if not args.readme.is_file():
        parser.error(f"argument --readme: there is no file {args.readme}")
    block = render(read_given(parser, "--results", args.results, NEEDED))
    try:
        text = args.readme.read_text(encoding="utf-8")
        new = replace_block(text, block)
        if args.check:
            return int(new != text)
        args.readme.write_text(new, encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(f"argument --readme: {args.readme}: {error}")
    return 0
