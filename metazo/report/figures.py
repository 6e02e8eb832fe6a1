"""The pictures of a comparison. The axes of each give the quantity and its unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from metazo.io.extras import needs
from metazo.plots.style import COLOURS, cut, log_axis, look, short, styled

from .analysis import Analysis, band
from .comparison import CONTROL, FIRST, UNTRAINED, ZEROTH, Comparison
from .point_names import clipped, name_points
from .tables import by_family, metric_name, worst

with needs("report"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

# By the way a column trains: colour, marker, and label in the legend.
FAMILIES = {
    ZEROTH: (COLOURS[0], "o", "forward passes only"),
    CONTROL: ("#666666", "D", "control: random tuner"),
    FIRST: (COLOURS[1], "s", "gradients"),
    UNTRAINED: ("#000000", "X", "no training"),
}
HIGHLIGHTED = 6
GREY = "#bbbbbb"
CHOSEN = {None: "chosen", "edge": "chosen, at the edge", "gap": "chosen, below a gap"}
LAST = (*(label for *_, label in FAMILIES.values()), "others", *CHOSEN.values(), "diverged")


def headline(analysis: Analysis) -> Figure:
    """Average of each column with its interval, best at the top, and a line at the reference."""
    data, percent = analysis.data, analysis.measure != "loss"
    rows = analysis.ranking[::-1]
    factor = 100 if percent else 1
    handles: dict[str, Any] = {}
    least = worst(data, analysis.tasks) if percent else 0.0
    with styled():
        figure = Figure(
            figsize=(7.6, 1.1 + (0.29 if len(rows) <= 12 else 0.215) * max(4, len(rows))), layout="constrained"
        )
        axes = figure.subplots()
        for place, (column, found) in enumerate(rows):
            colour, marker, label = FAMILIES[data.family(column)]
            if found.low is not None and found.high is not None:
                low, high = max(found.low, least), min(found.high, 1.0) if percent else found.high
                axes.plot([factor * low, factor * high], [place] * 2, color=colour, linewidth=2.2)
            hollow = unsteady(analysis, column)
            (dot,) = axes.plot(
                factor * found.mean, place, marker=marker, color=colour, markersize=7.5, linestyle="", **hollow
            )
            if not hollow or label not in handles:
                handles[label] = dot
            if column == data.reference:
                axes.axvline(factor * found.mean, color="#444444", linewidth=1, linestyle="--", zorder=0)
        axes.set_yticks(range(len(rows)), [clipped(column) for column, _ in rows])
        for text, (column, _) in zip(axes.get_yticklabels(), rows):
            text.set_fontweight("bold" if column == data.reference else "normal")
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(axis="y", visible=False)
        better = "→ better" if percent else "← better"
        what = metric_name(data, analysis.tasks) if percent else "loss (nats)"
        axes.set_xlabel(f"{what} on {data.split(analysis.tasks)}, average   {better}")
        legend = [label for *_, label in FAMILIES.values() if label in handles]
        figure.legend(
            [handles[label] for label in legend], legend, loc="outside upper left", ncols=len(legend), fontsize=9
        )
    return figure


def unsteady(analysis: Analysis, column: str) -> dict[str, Any]:
    """The look of a point of a column whose mean is over the runs that are left: hollow. Empty if it lacks none."""
    steady = analysis.data.steady(column, analysis.tasks)
    return {} if steady else {"markerfacecolor": "white", "markeredgewidth": 1.5}


def highlighted(analysis: Analysis) -> list[str]:
    """Columns with a colour in plots of curves: the reference, the best others, the best with gradients, the best tuner."""
    data = analysis.data
    ranked = [column for column, _ in analysis.ranking] or by_family(data)
    chosen = [data.reference] if data.reference else []
    chosen += [column for column in ranked if data.family(column) == FIRST][:1]
    chosen += [c for c in ranked if data.family(c) == ZEROTH and data.tuner(c)][:1]
    chosen += [column for column in ranked if data.family(column) == ZEROTH]
    chosen += [column for column in ranked if data.family(column) != UNTRAINED]
    return list(dict.fromkeys(chosen))[:HIGHLIGHTED]


def curves(analysis: Analysis, axis: str) -> Figure:
    """Loss on dev against `forwards` or `seconds`, one panel per task: median and middle half over seeds."""
    data, chosen = analysis.data, highlighted(analysis)
    tasks = [task for task in data.tasks if any(data.of(task, column) for column in data.columns)]
    with styled():
        figure, panels = grid(tasks, 3.6, 2.8)
        for axes, task in zip(panels, tasks):
            least, highest = math.inf, 0.0
            for column in [c for c in by_family(data) if c not in chosen] + chosen:
                runs = [run for run in data.of(task, column) if len(run.curve) > 1]
                if not runs:
                    continue
                points, middle, low, high = band(runs, axis)
                if column not in chosen:
                    axes.plot(points, middle, color=GREY, linewidth=0.9, label="others", zorder=1)
                    continue
                style = look(chosen.index(column))
                every = max(1, len(points) // 6)
                axes.plot(points, middle, label=clipped(column), markevery=every, zorder=3, **style)
                axes.fill_between(points, low, high, color=style["color"], alpha=0.15, linewidth=0, zorder=2)
                least, highest = min(least, low.min()), max(highest, 1.5 * middle[0])
            cut(axes, least, highest)
            axes.set(title=clipped(task), ylabel="loss on dev (nats)")
            axes.set_xlabel("forward passes over a batch" if axis == "forwards" else "seconds of training")
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        shared_legend(figure, panels)
    return figure


def pareto(analysis: Analysis) -> Figure:
    """Average score, or loss, against peak memory, one point per column; a line joins columns that none beats in both,
    of those that lack no run.
    """
    data, percent = analysis.data, analysis.measure != "loss"
    points = []
    for column, found in analysis.ranking:
        memory = [r.memory for task in analysis.tasks for r in data.of(task, column) if r.memory]
        if memory:
            points.append((median(memory) / 1e6, found.mean * (100 if percent else 1), column))
    with styled():
        figure = Figure(figsize=(9.6, 4.8), layout="constrained")
        axes = figure.subplots()
        whole = [point for point in points if data.steady(point[2], analysis.tasks)]
        for memory, value, column in sorted(
            points, key=lambda point: point not in whole
        ):  # the legend has the first look
            colour, marker, label = FAMILIES[data.family(column)]
            hollow = unsteady(analysis, column)
            axes.plot(
                memory, value, marker=marker, color=colour, markersize=8, linestyle="", label=label, zorder=3, **hollow
            )
        axes.set_xlabel("peak memory of a run (MB, logarithmic)   ← better")
        split = data.split(analysis.tasks)
        what = (
            f"{metric_name(data, analysis.tasks)} on {split}, average"
            if percent
            else f"loss on {split}, average (nats)"
        )
        axes.set_ylabel(f"{what}   {'→' if percent else '←'} better")
        axes.set_xscale("log")
        axes.margins(x=0.12, y=0.1)
        if points:
            log_axis(axes, "x")
            front = frontier(whole, higher=percent)
            axes.plot(
                [m for m, _, _ in front], [v for _, v, _ in front], color="#999999", linewidth=1.1, drawstyle="steps-post",
                zorder=1,
            )  # fmt: skip
            name_points(axes, points)
        shared_legend(figure, [axes])
    return figure


def frontier(points: Sequence[tuple[float, float, str]], higher: bool) -> list[tuple[float, float, str]]:
    """The points that no other point beats in both, ordered by memory."""
    kept: list[tuple[float, float, str]] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1] if higher else p[1])):
        if not kept or (point[1] > kept[-1][1] if higher else point[1] < kept[-1][1]):
            kept.append(point)
    return kept


def searched(data: Comparison) -> list[str]:
    """Columns for which more than one learning rate was tried."""
    tried = {column for found in data.searches.values() for column, search in found.items() if len(search.losses) > 1}
    return [column for column in by_family(data) if column in tried]


def sensitivity(data: Comparison) -> Figure:
    """What the search compares (the loss, or an objective) against learning rate, one panel per column and one line per task;
    the chosen rate has a ring.
    """
    columns, objectives = searched(data), data.objectives()
    with styled():
        figure, panels = grid(columns, 2.7, 2.1, across=4)
        for axes, column in zip(panels, columns):
            least, highest = math.inf, 0.0
            for index, task in enumerate(data.tasks):
                found = data.searches.get(task, {}).get(column)
                if found is None:
                    continue
                style, known = look(index), {float(r): v for r, v in found.losses.items() if v is not None}
                axes.plot(*zip(*sorted(known.items())) if known else ([], []), label=clipped(task), **style)
                if found.lr in known:
                    ring = {"markersize": 11, "markerfacecolor": "none", "linestyle": ""}
                    shape = {None: "o", "edge": "s", "gap": "D"}[found.doubt]
                    axes.plot(
                        found.lr, known[found.lr], marker=shape, color="#000000", label=CHOSEN[found.doubt], **ring
                    )
                    least = min(least, *known.values())
                    start = None if column in objectives else data.before(task, column) or data.before(task)
                    highest = max(highest, 1.3 * (start or 3 * known[found.lr]))
                diverged = [float(rate) for rate, value in found.losses.items() if value is None]
                transform = axes.get_xaxis_transform()
                axes.plot(
                    diverged,
                    [0.97] * len(diverged),
                    "x",
                    color="#000000",
                    transform=transform,
                    label="diverged",
                    markersize=6,
                )
            cut(axes, least, highest)
            what = "objective on dev" if column in objectives else "loss on dev (nats)"
            axes.set(title=clipped(column), ylabel=what, xlabel="learning rate")
            log_axis(axes, "x")
            axes.tick_params(labelsize=8)
        shared_legend(figure, panels)
    return figure


def grid(items: Sequence[object], width: float, height: float, across: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per item, in rows; unused panels of the last row are left out."""
    columns = max(1, min(across, len(items)))
    rows = max(1, math.ceil(len(items) / columns))
    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(items) :]:
        axes.remove()
    return figure, panels[: len(items)]


def shared_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend above all panels, with each label once and those of LAST at its end."""
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels()) if label not in handles}
    order = sorted(handles, key=lambda label: LAST.index(label) if label in LAST else -1)
    if order:
        figure.legend(
            [handles[label] for label in order], order, loc="outside upper left", ncols=min(8, len(order)), fontsize=8.5,
            handlelength=2, handletextpad=0.5, columnspacing=1.2, borderaxespad=0.2,
        )  # fmt: skip
