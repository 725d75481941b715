"""The papers' figures from the CSV of a :class:`FullGradientProbe` (numbering of SDS-LoRA)."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._checks import as_integer, check_path
from ..backends.lists import partition
from .record import Row, layer_means, read

#: Title, label of the y axis, [(measure, style, note)].
Panel = tuple[str, str, list[tuple[str, str, str]]]
#: File name → title, and panels.
FIGURES: dict[str, tuple[str, list[Panel]]] = {
    "figure1": (
        "Anisotropic gradient scaling (Figure 1)",
        [
            (f"∇{side.upper()}", "effective rank", [(f"rank_grad_{side}", "-", ""), (f"rank_grad_{side}_unscaled", ":", "without σ")])
            for side in "ab"
        ]
        + [("G and G̃", "cosine", [("alignment", "-", ""), ("alignment_unscaled", ":", "without σ")])],
    ),
    "figure3": (
        "Convergence and alignment (Figure 3)",
        [("(a)", "training loss", [("loss", "-", "")]), ("(b)", "cos(G, G̃)", [("alignment", "-", "")])],
    ),
    "figure4": (
        "Change of the bases at a refresh (Figure 4)",
        [(f"Q_{side.upper()}", "cosine of old and new", [(f"drift_{side}", "-", "")]) for side in "ab"],
    ),
    "figure5": (
        "Stable rank of the factors (Figure 5)",
        [(side.upper(), "stable rank", [(f"stable_rank_{side}", "-", "")]) for side in "ab"],
    ),
}


def curves(rows: list[Row]) -> dict[str, dict[int, dict[str, float]]]:
    """Means over the layers: run → step → measure."""
    by_run = {run: partition(own, lambda row: row["step"]) for run, own in partition(rows, lambda row: row["run"]).items()}
    return {run: {step: layer_means(members) for step, members in sorted(steps.items())} for run, steps in by_run.items()}


def smooth(values: list[float], window: int) -> list[float]:
    """Mean over the last ``window`` values."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def plot(paths: Sequence[str | Path], output: str | Path, window: int = 5, labels: dict[str, str] | None = None) -> list[Path]:
    """Draw Figures 1, 3, 4 and 5, and the spectra of ΔW, of all runs in the CSV files, one PNG a figure.

    Args:
        paths: files that probes have written.
        output: a folder.
        window: curves are means over so many measured steps (OD-LoRA's figures take 5).
        labels: names of runs for the legend.

    Returns:
        The files; a figure of which nothing was recorded is left out.

    Raises:
        OSError, TypeError, ValueError: a file cannot be read or was not written by a probe, ``output`` is no folder, or another argument is
            of a wrong kind. Nothing was written then.
    """
    if isinstance(paths, (str, bytes)) or not isinstance(paths, Iterable):
        raise TypeError(f"plot: paths must be a list of files, got {paths!r:.80}; wrap it in [ ]")
    check_path("plot", "output", output)
    window = as_integer("plot", "window", window)
    if labels is not None and not isinstance(labels, Mapping):
        raise TypeError(f"plot: labels must map names of runs to labels, got {labels!r:.80}")
    if Path(output).exists() and not Path(output).is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "plot: output is no folder; name another one", os.fspath(output))
    try:
        from matplotlib.figure import Figure  # not pyplot, whose backend is the caller's
    except ImportError as error:
        raise ImportError("diagnostics: plots need the package matplotlib: pip install matplotlib") from error
    rows = [row for path in paths for row in read(path)]
    means, names = curves(rows), labels or {}
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {name: _figure_of_curves(Figure, title, panels, means, window, names) for name, (title, panels) in FIGURES.items()}
    figures["spectrum"] = _figure_of_spectra(Figure, {run: _last_spectrum(rows, run) for run in means}, names)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=150)
    return written


def _figure_of_curves(
    new: type[Any], title: str, panels: list[Panel], means: dict[str, dict[int, dict[str, float]]], window: int, names: Mapping[str, str]
) -> Any | None:
    """A figure of these panels, a colour for each run; None if nothing of it was recorded."""
    if not any(key in values for steps in means.values() for values in steps.values() for _, _, lines in panels for key, *_ in lines):
        return None
    figure = new(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)
    figure.suptitle(title)
    for axes, (heading, label, lines) in zip(all_axes[0], panels, strict=True):
        for index, (run, steps) in enumerate(means.items()):
            for key, style, note in lines:
                points = [(step, values[key]) for step, values in steps.items() if key in values]
                if points:
                    text = ", ".join(filter(None, (names.get(run, run), note)))
                    axes.plot([s for s, _ in points], smooth([v for _, v in points], window), style, color=f"C{index}", label=text)
        axes.set(title=heading, xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
    handles, texts = all_axes[0][-1].get_legend_handles_labels()
    if handles:
        figure.legend(handles, texts, fontsize="x-small", loc="outside right upper")
    return figure


def _figure_of_spectra(new: type[Any], spectra: Mapping[str, list[float]], names: Mapping[str, str]) -> Any | None:
    """The singular values of ΔW of each run; None if none has any."""
    if not any(spectra.values()):
        return None
    figure = new(figsize=(5, 3.8), layout="constrained")
    axes = figure.subplots()
    for index, (run, values) in enumerate(spectra.items()):
        if values:
            axes.semilogy(range(1, len(values) + 1), values, "o-", markersize=3, color=f"C{index}", label=names.get(run, run))
    axes.set(title="Spectrum of ΔW at the last measured step", xlabel="index", ylabel="singular value, mean over the layers")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    return figure


def _last_spectrum(rows: list[Row], run: str) -> list[float]:
    own = [row for row in rows if row["run"] == run and row.get("spectrum")]
    if not own:
        return []
    last = max(row["step"] for row in own)
    spectra = [row["spectrum"] for row in own if row["step"] == last]
    width = max(map(len, spectra))
    means = [sum(s[i] for s in spectra if i < len(s)) / sum(i < len(s) for s in spectra) for i in range(width)]
    return [value for value in means if value > 1e-12 * means[0]]
