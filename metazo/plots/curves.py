"""Plots of runs: loss and metric against forward passes, readable in grey print and by colour-blind readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metazo.io.extras import needs

from .style import look, save, styled

with needs("report"):
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

UNITS = {
    "loss": "mean loss per example (nats)",
    "objective": "objective, which is minimised",
    "accuracy": "fraction of examples correct (0 to 1)",
    "macro_f1": "F1, mean over classes (0 to 1)",
    "mcc": "Matthews correlation (-1 to 1)",
    "f1": "F1 of the words (0 to 1)",
    "exact_match": "fraction of exact answers (0 to 1)",
    "exact_number": "fraction of correct numbers (0 to 1)",
}


def plot_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    path: Path,
    *,
    x: str,
    y: str | Mapping[str, str],
    title: str = "",
    levels: Mapping[str, tuple[str, float]] | None = None,
    below: bool = False,
) -> None:
    """One panel per key, one line per label: (x, y) points. Written as PNG or SVG, by the ending of `path`.

    y: the vertical axis with its unit, for all panels or by panel; levels: a named horizontal line by panel; below: one legend
    under the panels, which have the same lines, instead of one in each.
    """
    with styled():
        figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
        for axis, (name, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
            for index, (label, points) in enumerate(lines.items()):
                axis.plot(*zip(*points), label=label, **look(index))
            if levels and name in levels:
                label, height = levels[name]
                axis.axhline(height, color="#666666", linewidth=1, label=label)
            axis.set(title=name, xlabel=x, ylabel=y if isinstance(y, str) else y[name])
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            if lines and not below:
                axis.legend()
        if below:
            figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        if title:
            figure.suptitle(title, fontsize=11)
    save(figure, path)


def plot_run(
    records: Sequence[dict[str, Any]], path: Path, title: str, metrics: Sequence[str] = (), minimised: str = "loss"
) -> None:
    """The curves of one run from its metrics.jsonl: what it minimised (the loss, or its objective) on train and dev, and
    the loss and the metric on dev beside it."""
    train = [(r["forwards"], r["train_loss"]) for r in records if r["train_loss"] is not None]
    lines = {minimised: {"train (mean since the point before)": train}}
    for name in dict.fromkeys((minimised, "loss", *metrics[:1])):
        lines.setdefault(name, {})["dev"] = [(r["forwards"], r["dev"][name]) for r in records if name in r["dev"]]
    shown = {name: {label: points for label, points in each.items() if points} for name, each in lines.items()}
    panels = {name: each for name, each in shown.items() if each} or {minimised: {}}
    levels = {}
    if records and "accuracy" in metrics[:1] and "majority" in records[0]["dev"]:
        levels["accuracy"] = ("majority class", records[0]["dev"]["majority"])
    plot_curves(panels, path, x="forward passes over a batch", y=UNITS, title=title, levels=levels)
