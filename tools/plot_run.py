"""Draws the curves of one or more runs into a PNG: python tools/plot_run.py RUN_DIR [RUN_DIR ...] [--out FILE] [--smooth N] [--seeds]

Reads RUN_DIR/metrics.jsonl, also of a run still at work. A panel is there if one of its metrics is; several runs share the panels.
With --seeds runs share a colour whose directories are named alike but for a number at the end: xpo_0, xpo_1, xpo_2.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from megapref.metrics_file import read_metrics

ROLES = {"training": 0, "chosen": 0, "evaluation": 1, "rejected": 1, "opponent": 2}  # place in COLORS: the same in every panel
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito: distinct to the colour-blind
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))
LOG_SCALE_FROM = 50  # times the median: the largest of positive values from which on an axis is logarithmic
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@dataclass(frozen=True)
class Panel:
    """A plot: title, metrics with their labels, a level to compare with, the metrics between which a band is shaded."""

    title: str
    series: tuple[tuple[str, str], ...]  # (metric, label)
    level: float | None = None
    band: tuple[str, str] | None = None
    limits: tuple[float, float] | None = None


PANELS = (
    Panel("Loss", (("loss", "training"),)),
    Panel("Win rate", (("eval/win_rate", "evaluation"),), level=0.5, band=("eval/win_rate_low", "eval/win_rate_high"), limits=(0.0, 1.0)),
    Panel("Reward of samples", (("objective/scores", "training"), ("eval/reward", "evaluation"), ("eval/reward_opponent", "opponent"))),
    Panel("Implicit reward", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")), level=0.0),
    Panel("Implicit reward margin", (("rewards/margins", "training"),), level=0.0),
    Panel("Implicit reward accuracy", (("rewards/accuracies", "training"),), level=0.5, limits=(0.0, 1.0)),
    Panel("KL to the reference", (("objective/kl", "training"), ("eval/kl", "evaluation"))),
    Panel("Completion length (tokens)", (("eval/length", "evaluation"),)),
    Panel("Gradient norm", (("grad_norm", "training"),)),
)


def validation_panels(keys: set[str]) -> list[Panel]:
    """Loss and accuracy on every validation set that there are metrics of."""
    names = sorted(key.removeprefix("validation-").removesuffix("_loss") for key in keys if key.startswith("validation-") and key.endswith("_loss"))
    of_set = lambda name, metric: ((f"validation-{name}_{metric}", "evaluation"),)  # noqa: E731
    losses = [Panel(f"Loss, {name}", of_set(name, "loss")) for name in names]
    return losses + [Panel(f"Accuracy, {name}", of_set(name, "rewards/accuracies"), level=0.5, limits=(0.0, 1.0)) for name in names]


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over the last `window` values, fewer at the start; NaNs are left out of the means and stay NaN."""
    known = np.isfinite(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(known, values, 0.0), known))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    means = (sums[end] - sums[start]) / np.maximum(counts[end] - counts[start], 1)
    return np.where(known, means, np.nan)


def series_of(records: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric; null reads NaN, records without it are left out."""
    known = [(record["step"], record[key]) for record in records if key in record]
    return np.array([step for step, _ in known]), np.array([value for _, value in known], dtype=float)


def figure_of(runs: dict[str, list[dict[str, Any]]], smooth: int = 1, seeds: bool = False) -> Figure:
    """The figure of runs (label -> records of metrics.jsonl), with each of PANELS that a run has data for; ValueError where none has.

    With `seeds` the runs whose labels differ in a number at the end alone have one colour.
    """
    colors = colors_of(runs, seeds)
    keys = {key for records in runs.values() for record in records for key in record}
    panels = [panel for panel in (*PANELS, *validation_panels(keys)) if any(key in keys for key, _ in panel.series)]
    if not panels:
        raise ValueError(f"nothing to plot: the records hold none of {', '.join(key for panel in PANELS for key, _ in panel.series)}")
    num_columns = min(3, len(panels))
    num_rows = -(-len(panels) // num_columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * num_columns, 2.9 * num_rows + 0.6), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.04)
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(num_rows, num_columns, index + 1)
            draw(axes, panel, runs, colors, smooth)
            if index >= len(panels) - num_columns:
                axes.set_xlabel("step")
        if len(runs) > 1:
            named = {kind_of(label) if seeds else label: color for label, color in colors.items()}
            lines = [Line2D([], [], color=color, linewidth=2.5) for color in named.values()]
            figure.legend(lines, list(named), loc="outside upper left", ncols=4, fontsize=11)
        else:
            figure.suptitle(next(iter(runs)), x=0.01, horizontalalignment="left", color="#444444")
    return figure


def kind_of(label: str) -> str:
    """The label without a number at its end."""
    return re.sub(r"[-_.]?\d+$", "", label) or label


def colors_of(labels: Iterable[str], seeds: bool) -> dict[str, str]:
    """Each run's colour; with `seeds` that of its kind."""
    kinds = {label: kind_of(label) if seeds else label for label in labels}
    places = {kind: place for place, kind in enumerate(dict.fromkeys(kinds.values()))}
    return {label: COLORS[places[kind] % len(COLORS)] for label, kind in kinds.items()}


def draw(axes: Axes, panel: Panel, runs: dict[str, list[dict[str, Any]]], colors: dict[str, str], smooth: int) -> None:
    """Draws a panel: one run tells its series apart by colour, several runs have their `colors` and tell the series apart by dashes."""
    axes.set_title(panel.title)
    if panel.level is not None:
        axes.axhline(panel.level, color="#999999", linewidth=1.0, linestyle=(0, (2, 2)), zorder=1)
    handles = {}
    for label_of_run, records in runs.items():
        for series_index, (key, label) in enumerate(panel.series):
            steps, values = series_of(records, key)
            if not len(steps):
                continue
            color = colors[label_of_run] if len(runs) > 1 else COLORS[ROLES[label]]
            dashes = DASHES[series_index] if len(runs) > 1 else "-"
            measured = key.startswith(("eval/", "validation-"))  # now and then: each value by itself, marked
            window = 1 if measured else smooth
            if window > 1:
                axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.25)
            (line,) = axes.plot(steps, smoothed(values, window), color=color, linewidth=1.8, linestyle=dashes)
            if measured:
                line.set(marker="o", markersize=3.5)
            legend_color = color if len(runs) == 1 else "#444444"
            handles.setdefault(label, Line2D([], [], color=legend_color, linestyle=dashes, marker=line.get_marker(), markersize=3.5))
            if panel.band:
                draw_band(axes, records, panel.band, color)
    if panel.limits:
        axes.set_ylim(*panel.limits)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
    drawn = np.concatenate([series_of(records, key)[1] for records in runs.values() for key, _ in panel.series])
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) and drawn.min() > 0 and drawn.max() > LOG_SCALE_FROM * np.median(drawn):
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    if len(handles) > 1:
        axes.legend(handles.values(), handles.keys(), handlelength=1.8, loc="best")


def draw_band(axes: Axes, records: list[dict[str, Any]], band: tuple[str, str], color: str) -> None:
    """Shades what is between two metrics, where a record has both."""
    both = [record for record in records if all(key in record for key in band)]
    (steps, low), (_, high) = (series_of(both, key) for key in band)
    axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)


def read_run(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run directory; ValueError where there is no run or it has no step yet."""
    path = run_dir / "metrics.jsonl"
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir}: no such directory; name a run directory, the run.dir of a training run")
    if not path.is_file():
        raise ValueError(f"{run_dir}: holds no metrics.jsonl; name a run directory, the run.dir of a training run that has made a step")
    records = read_metrics(path)
    if not records:
        raise ValueError(f"{path}: holds no whole line; wait until the run has made a step")
    return records


def labels_of(run_dirs: Iterable[Path]) -> list[str]:
    """The last part of each path, or the whole path where last parts are the same."""
    run_dirs = list(run_dirs)
    names = [run_dir.resolve().name for run_dir in run_dirs]
    return names if len(set(names)) == len(names) else [str(run_dir) for run_dir in run_dirs]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the curves of one or more runs into a PNG.")
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="run.dir of a training run, finished or at work")
    parser.add_argument("--out", type=Path, help="the PNG to write; default: RUN_DIR/curves.png, or curves.png here for several runs")
    parser.add_argument("--smooth", type=int, default=5, metavar="N", help="mean over the last N steps, on the raw curve (default 5)")
    parser.add_argument("--seeds", action="store_true", help="one colour for runs named alike but for a number at the end")
    options = parser.parse_args(arguments)
    out = options.out or (options.run_dirs[0] if len(options.run_dirs) == 1 else Path()) / "curves.png"
    try:
        if options.smooth < 1:
            raise ValueError(f"--smooth {options.smooth}: needs 1 (off) or more")
        runs = dict(zip(labels_of(options.run_dirs), map(read_run, options.run_dirs), strict=True))
        figure_of(runs, options.smooth, options.seeds).savefig(out, dpi=150)
    except (ValueError, OSError) as error:
        sys.exit(f"plot_run: {error}")
    print(out)


if __name__ == "__main__":
    main()
