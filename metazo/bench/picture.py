"""Plots the time of a step over that of two forward passes, from speed.json; one row of axes per processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metazo.bench.processors import TITLES, labels, shown_part
from metazo.bench.steps import CORE, PASSES
from metazo.io.extras import needs

_MARKS = (("#000000", "s"), ("#0072B2", "o"), ("#56B4E9", "^"), ("#D55E00", "D"), ("#E69F00", "v"))  # Okabe, Ito (2008)


def plot(result: dict[str, Any], path: Path) -> bool:
    """Plot steps by shape and by model size, as dots with quartiles above the bound set by memory; written as PNG.

    Returns whether there was anything to plot; if not, nothing is written.
    """
    with needs("report"):
        from matplotlib.figure import Figure

        from metazo.plots.style import png

    every = [
        (label, {name: there["suites"][name] for name in ("steps", "scaling") if name in there["suites"]})
        for label, there in zip(labels(result), result["processors"])
    ]
    every = [(label, suites) for label, suites in every if suites]
    if not every:
        return False
    across = max(len(suites) for _, suites in every)
    most = max(len(parts) for _, suites in every for parts in suites.values())
    size = (max(6.4, 1.4 * most) * across, 4.2 * len(every))
    drawing = Figure(figsize=size, layout="constrained")
    for row, (label, suites) in zip(drawing.subplots(len(every), across, squeeze=False), every):
        for axis in row[len(suites) :]:
            axis.axis("off")
        for axis, (name, parts) in zip(row, suites.items()):
            _dots(axis, parts)
            title = TITLES[name] if len(every) == 1 else f"{TITLES[name]}\n{label}"
            axis.set(title=title, yscale="log", ylabel="step / (2 × forward)")
            axis.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
            axis.minorticks_off()
            axis.set_xticks(range(len(parts)), [shown_part(part) for part in parts])
            axis.set_xlim(-0.5, len(parts) - 0.5)
            axis.set_ylim(bottom=0.8)
            axis.grid(axis="y", alpha=0.25)
            axis.legend(frameon=False, fontsize=8)
    png(drawing, path)
    return True


def _dots(axis: Any, parts: dict[str, Any]) -> None:
    for place, (case, (colour, mark)) in enumerate(zip(CORE, _MARKS)):
        found = [(i, r["ratio"]) for i, part in enumerate(parts.values()) for r in part["rows"] if r["case"] == case]
        at = [i + 0.15 * (place - 2) for i, _ in found]
        middle = [ratio["median"] for _, ratio in found]
        errors = [[r["median"] - r["low"] for _, r in found], [r["high"] - r["median"] for _, r in found]]
        axis.errorbar(
            at, middle, errors, fmt=mark, color=colour, markersize=5, capsize=2, label=case if found else None
        )
        for x, y in zip(at, middle):
            axis.annotate(f"{y:.2f}", (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=7)
    for i, part in enumerate(parts.values()):
        floor = next(1 + row["ratio"]["median"] for row in part["rows"] if row["case"] == PASSES)
        label = "two forwards + three plain passes" if i == 0 else None
        axis.hlines(floor, i - 0.45, i + 0.45, color="0.5", linewidth=1, linestyle="--", label=label)
