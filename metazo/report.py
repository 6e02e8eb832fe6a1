"""Pictures of runs: loss and metric against forward passes, on paper and for colour-blind eyes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

# Okabe and Ito (2008): eight colours that all eyes tell apart, each with a line style for black-and-white print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
STYLES = ("-", "--", "-.", ":")


def plot_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    path: Path,
    *,
    x: str,
    y: str,
    title: str = "",
    levels: Mapping[str, tuple[str, float]] | None = None,
) -> None:
    """One panel a key, one line a label: (x, y) points. levels: a named horizontal line by panel. Written as PNG."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False, layout="constrained")
    for axis, (name, lines) in zip(axes[0], panels.items()):
        for index, (label, points) in enumerate(lines.items()):
            colour, style = COLOURS[index % len(COLOURS)], STYLES[index % len(STYLES)]
            axis.plot(*zip(*points), color=colour, linestyle=style, marker="o", markersize=3, label=label)
        if levels and name in levels:
            label, height = levels[name]
            axis.axhline(height, color="0.5", linewidth=1, label=label)
        axis.set(title=name, xlabel=x, ylabel=y)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=9)
    if title:
        figure.suptitle(title)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def plot_run(records: Sequence[dict[str, Any]], path: Path, title: str, metrics: Sequence[str] = ()) -> None:
    """The curves of one run from its metrics.jsonl: loss on train and dev, and the dev metric beside it."""
    losses = {
        "train (mean since the point before)": [(r["forwards"], r["train_loss"]) for r in records if r["train_loss"]],
        "dev": [(r["forwards"], r["dev"]["loss"]) for r in records if "loss" in r["dev"]],
    }
    panels = {"loss": {label: points for label, points in losses.items() if points}}
    levels = {}
    for metric in metrics[:1]:
        points = [(r["forwards"], r["dev"][metric]) for r in records if metric in r["dev"]]
        if points:
            panels[metric] = {"dev": points}
        if records and metric == "accuracy" and "majority" in records[0]["dev"]:
            levels[metric] = ("majority class", records[0]["dev"]["majority"])
    plot_curves(panels, path, x="forward passes over a batch", y="loss (nats), metric", title=title, levels=levels)
