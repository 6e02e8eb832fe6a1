"""Builds the report of a comparison: a story, then sections of tables and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

from metazo.io.extras import needs
from metazo.plots.style import svg

from . import costs, figures, rivals, sigma, tables
from .analysis import Analysis
from .comparison import CONTROL, Comparison
from .numbers import Run
from .story import Story, story
from .table import Table, listed, score

with needs("report"):
    from matplotlib.figure import Figure

SIGMA_PICTURES = 6


@dataclass
class Picture:
    """alt: a description for readers who cannot see the picture; draw: called to make it."""

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable[[], Figure]

    @cached_property
    def svg(self) -> str:
        return svg(self.draw())


@dataclass
class Section:
    name: str
    title: str
    text: str
    parts: list[Table | Picture] = field(default_factory=list)

    def add(self, *parts: Table | Picture) -> Section:
        self.parts += [part for part in parts if not (isinstance(part, Table) and not part.rows)]
        return self


@dataclass
class Report:
    """headline: the picture of the first screen, None if no task counts."""

    data: Comparison
    story: Story
    headline: Picture | None
    sections: list[Section]

    @property
    def tables(self) -> list[Table]:
        return [part for section in self.sections for part in section.parts if isinstance(part, Table)]

    @property
    def pictures(self) -> list[Picture]:
        parts = [part for section in self.sections for part in section.parts if isinstance(part, Picture)]
        return [*([self.headline] if self.headline else []), *parts]


def build(data: Comparison, metric: Literal["loss", "accuracy"] | None = None) -> Report:
    """metric: the measure that ranks; by default accuracy if every task that counts has it, else loss."""
    by_loss, by_metric = Analysis(data, "loss"), Analysis(data, "metric")
    names = {data.metric_of(task) for task in by_loss.tasks}
    if metric is None:
        metric = "accuracy" if names == {"accuracy"} else "loss"
    main, other = (by_loss, by_metric) if metric == "loss" else (by_metric, by_loss)
    sections = [
        _results(main, other),
        _tests(main, other),
        _way(by_loss),
        _rivals(data),
        _memory(main),
        _rates(data),
    ]
    sections += [_blocks(data), _holes(by_loss), _setting(data)]
    return Report(data, story(main, other), _headline(main), [section for section in sections if section.parts])


def _headline(main: Analysis) -> Picture | None:
    if not main.ranking:
        return None
    best = ", ".join(f"{column} {score(found.mean, main.measure)}" for column, found in main.ranking[:5])
    what = "loss" if main.measure == "loss" else tables.metric_name(main.data, main.tasks)
    return Picture(
        "headline",
        f"Average {what} on {main.data.split(main.tasks)} of every column",
        "Dot: average over the tasks that count. Bar: 95 % interval over seeds; no bar means one seed. "
        + _hollow(main, "dot")
        + (f"Dashed line: {main.data.reference}." if main.data.reference else ""),
        f"Columns by average {what}, best first: {best}.",
        partial(figures.headline, main),
    )


def _hollow(analysis: Analysis, mark: str) -> str:
    """What a hollow mark means, if there is one."""
    if all(analysis.data.steady(column, analysis.tasks) for column, _ in analysis.ranking):
        return ""
    return f"Hollow {mark}: some of the column’s runs failed, cannot be read or are missing. "


def _results(main: Analysis, other: Analysis) -> Section:
    section = Section("results", "Results", "").add(tables.summary(main, other))
    for analysis in (main, other):
        if analysis.measure == "loss" or any(map(analysis.data.metric_of, analysis.data.tasks)):
            section.add(tables.scores(analysis))
    return section


def _tests(main: Analysis, other: Analysis) -> Section:
    text = (
        "Runs with the same task and seed are compared in pairs, so that shared effects of the seed cancel; n is tasks "
        "× seeds, of the tasks that count. Gain: mean over tasks of the difference to the reference (positive is better), "
        "with its 95 % interval over seeds. p: two-sided, of the pairs that differ: by Wilcoxon’s signed-rank test, or by all "
        "sign flips if fewer than 6 pairs differ; so many cannot give less than “least p” (0.0625 for 5). Holm: corrected for "
        "all rows. A failed run loses its pair against a finished one and is not in the gain. The pairs tell what other seeds "
        "on these tasks would give; only “tasks won” says something about other tasks."
    )
    return Section("tests", "Significance", text).add(*(tables.tests(a) for a in (main, other) if a.data.reference))


def _way(by_loss: Analysis) -> Section:
    data = by_loss.data
    section = Section("way", "Loss during training: forward passes and time", "")
    named = ", ".join(figures.highlighted(by_loss))
    shaky = [column for column in data.columns if not data.steady(column, data.tasks)]
    left = (
        f" Lines of {listed(shaky)} are of the runs that are left: some failed, cannot be read or are missing."
        if shaky
        else ""
    )
    for axis, what in (("forwards", "forward passes"), ("seconds", "seconds of training")):
        if any(len(run.curve) > 1 for runs in data.runs.values() for run in runs.values()):
            section.add(
                Picture(
                    f"curves-{axis}",
                    f"Loss against {what}",
                    "Line: median over seeds; shade: middle half of the seeds. Named: the reference, the best with gradients, "
                    "the best tuner and the best others; grey: all other columns. Lower and further left is better."
                    + left,
                    f"Loss on dev against {what}, one panel per task, for {named}.",
                    partial(figures.curves, by_loss, axis),
                )
            )
    if data.reference:
        section.add(costs.reach(by_loss))
    if any(data.time_budget(task) for task in data.tasks):
        section.add(costs.equal_time(by_loss))
    return section


def _rivals(data: Comparison) -> Section:
    """Empty for results without a measured cost. A task counts here even if the reference does not learn it."""
    section, by_loss = Section("rivals", "Loss, work and memory", ""), Analysis(data, "loss", needs_reference=False)
    if not data.reference or not by_loss.tasks or not rivals.measured(data):
        return section
    section.add(
        Picture(
            "plane",
            "Loss against work and memory",
            "Left: mean loss on dev over seeds and tasks, of columns with a finished run on each task; a forward-equivalent "
            f"is the work of one forward pass of {data.reference}. Right: loss on {data.split(by_loss.tasks)} at the end "
            "against the peak memory of a step. " + _hollow(by_loss, "point"),
            "Average loss of every column against its work and its peak memory; the numbers are in the table below.",
            partial(rivals.plane, by_loss),
        )
    )
    section.add(rivals.table(by_loss))
    if (best := rivals.rivals(by_loss)[0]).rank is not None:
        section.add(tables.tests(by_loss, best.column, "tests-best"))
    return section.add(rivals.pairs(by_loss))


def _memory(main: Analysis) -> Section:
    section = Section("memory", "Memory and time", "")
    if any(r.memory for column, _ in main.ranking for task in main.tasks for r in main.data.of(task, column)):
        section.add(
            Picture(
                "pareto",
                "Result against memory",
                "Line: columns that no other column beats in both, of those that lack no run. Result: mean over tasks and "
                "seeds. Memory: median over the runs of the same tasks; its scale is logarithmic. "
                + _hollow(main, "point"),
                "Average result of every column against its peak memory; the table below has the memory over all tasks.",
                partial(figures.pareto, main),
            )
        )
    return section.add(costs.cost(main.data), costs.cells(main.data))


def _rates(data: Comparison) -> Section:
    text = "Every column has its own learning rate for each task, chosen by runs on seeds that are not reported above."
    section = Section("rates", "Learning rates", text)
    if figures.searched(data):
        picture = Picture(
            "sensitivity",
            "Loss against learning rate",
            "Ring: the chosen rate; square: chosen at the edge of the tried rates; diamond: the next larger one, far from it, "
            "diverged. Cross: a run at this rate diverged. "
            "The vertical axis ends a third above the column’s loss before training.",
            "What the search compares on dev against learning rate, one panel per column, one line per task.",
            partial(figures.sensitivity, data),
        )
        section.add(picture)
    if figures.searched(data):
        section.add(costs.by_rate(data))
    return section.add(costs.search(data))


def _blocks(data: Comparison) -> Section:
    text = (
        "The scale σ of each block of weights, which a tuner has learned or a rule computes; a step perturbs a block in "
        "proportion to σ. Light blocks have the largest σ. Each row is a kind of block, each column of squares is a layer of "
        "the model, and each picture is a step of one run."
    )
    section = Section("blocks", "Block scales", text)
    caption = "σ as a multiple of its geometric mean over all blocks at that step. Grey: there is no such block."
    shown = sorted((c for c in data.columns if data.family(c) != CONTROL), key=lambda column: not data.tuner(column))
    runs = [(c, task, run) for c in shown for task in data.tasks if (run := _with_scales(data.of(task, c)))]
    for number, (column, task, (seed, scales)) in enumerate(runs[:SIGMA_PICTURES], start=1):
        title = f"{column} on {task}, seed {seed}"
        alt = f"Scale by block of {title}, at several steps."
        section.add(Picture(f"sigma-{number}", title, caption, alt, partial(sigma.picture, scales)))
    return section


def _with_scales(runs: Sequence[Run]) -> tuple[int, sigma.Scales] | None:
    """Seed and scales of the first run whose scales were kept and are complete."""
    for run in runs:
        with suppress(ValueError):
            if run.sigma:
                return run.seed, sigma.read(run.sigma)
    return None


def _holes(by_loss: Analysis) -> Section:
    data = by_loss.data
    section = Section("holes", "Tasks that count, failed runs, missing runs", "")
    return section.add(tables.tasks(by_loss), costs.failures(data), costs.missing(data))


def _setting(data: Comparison) -> Section:
    return Section("setting", "Settings and reproduction", "").add(costs.configuration(data))
