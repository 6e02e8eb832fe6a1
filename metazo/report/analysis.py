"""Analyses a comparison: which tasks count, which column is better, how many forward passes and seconds it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, median

import numpy as np

from metazo.comparisons.grid import FASTER

from .comparison import FIRST, FORWARD_ONLY, UNTRAINED, Comparison
from .numbers import Run, part
from .statistics import Average, Paired, average, equal, holm, paired

RULE = (
    "A task counts in averages and tests if two columns learn it: the best one trained with gradients, and the reference. "
    "Learning means that the mean loss on dev (or objective, if the runs minimise one) at the end is below that before "
    "training and, if the task has classes, "
    "that the accuracy on test (on dev, if no run was tested) is above the share of the commonest class by more than two "
    "standard errors for that many examples, sqrt(p (1 - p) / n). If no column has gradients, or the reference has "
    "no finished run on any task, the other decides."
)
CONSTANT = "constant"  # the schedule of the learning rate that does not lower it


@dataclass(frozen=True)
class TaskVerdict:
    """Whether a task counts in averages, and why not."""

    task: str
    counts: bool
    reason: str


@dataclass(frozen=True)
class Reached:
    """Forward passes until a loss was reached: median over runs (inf: half of them or more did not reach it), the number of
    runs that did, and of all, failed and missing ones included. A missing run is not in the median.
    """

    forwards: float
    reached: int
    runs: int


@dataclass(frozen=True)
class AtTime:
    """Losses at a time budget, of the runs that have one. kind: `exact`, `read off` a slower run's curve, `early`: the same,
    before the learning rate had come to the end of its schedule, `ended` before the time was up; runs: the number of all,
    failed and missing ones included.
    """

    losses: tuple[float, ...]
    kind: str
    runs: int


class Analysis:
    """The analysis by one measure, `loss` or `metric`; the tables use one of each.

    needs_reference: whether a task counts only if the reference learns it.
    """

    def __init__(self, data: Comparison, measure: str, *, needs_reference: bool = True):
        self.data, self.measure, self.needs_reference = data, measure, needs_reference
        self.sign = -1.0 if measure == "loss" else 1.0

    # -- which tasks count -------------------------------------------------------------------------------------------

    @cached_property
    def verdicts(self) -> list[TaskVerdict]:
        return [self._verdict(task) for task in self.data.tasks]

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks that count for this measure."""
        return [v.task for v in self.verdicts if v.counts and (self.measure == "loss" or self.data.metric_of(v.task))]

    def _verdict(self, task: str) -> TaskVerdict:
        data = self.data
        if not any(data.of(task, column) for column in data.columns):
            return TaskVerdict(task, False, "No run on it has finished.")
        gradients = [c for c in data.columns if data.family(c) == FIRST and data.of(task, c)]
        if gradients and not any(learns(data, task, column) for column in gradients):
            none = "None of the columns trained with gradients learns it"
            named = none if len(gradients) > 1 else f"{gradients[0]}, trained with gradients, does not learn it"
            text = f"{named} (see the rule), so the others cannot be expected to learn it."
            return TaskVerdict(task, False, text)
        reference = data.reference
        note = self._unchecked(task, gradients)
        if reference is None:
            return TaskVerdict(task, True, note)
        if not data.of(task, reference):
            return TaskVerdict(task, False, f"{reference}, the reference, has no finished run on it.")
        if self.needs_reference and not learns(data, task, reference):
            text = f"{reference}, the reference, ends no better than before training or than the commonest class."
            return TaskVerdict(task, False, text)
        return TaskVerdict(task, True, note)

    def _unchecked(self, task: str, gradients: Sequence[str]) -> str:
        """What is not known of a task that counts."""
        data, reference, notes = self.data, self.data.reference, []
        if reference is None:
            notes.append(
                f"{data.wanted}, the reference, has no finished run, so it is not known whether it learns the task."
            )
        if not gradients:
            notes.append("No column trained with gradients, so it is not known whether the model can learn the task.")
        judged: list[str] = list(gradients)
        if reference and self.needs_reference and reference not in judged:
            judged.append(reference)
        blind = [c for c in judged if data.has_classes(task) and not any(map(_has_share, data.of(task, c)))]
        if blind:
            notes.append(
                f"Not checked: whether {', '.join(blind)} is above the commonest class, because its results hold no "
                "accuracy or no share of that class."
            )
        return " ".join(notes)

    # -- who is better -----------------------------------------------------------------------------------------------

    def average(self, column: str) -> Average | None:
        """The average over the tasks that count; None if the column has no finished run on one of them, or runs that were not
        tested, although others were.
        """
        if column in self._untested:
            return None
        groups = [self.data.values(task, column, self.measure) for task in self.tasks]
        return average(groups) if groups and all(groups) else None

    @cached_property
    def ranking(self) -> list[tuple[str, Average]]:
        """Columns with an average, best first."""
        known = [(column, value) for column in self.data.columns if (value := self.average(column)) is not None]
        return sorted(known, key=lambda pair: -self.sign * pair[1].mean)

    @cached_property
    def _untested(self) -> list[str]:
        return self.data.untested(self.tasks)

    @cached_property
    def contest(self) -> list[tuple[str, Average]]:
        """The ranking of the columns that can come first: those with forward passes only that are steady."""
        data = self.data
        return [(c, v) for c, v in self.ranking if data.family(c) in FORWARD_ONLY and data.steady(c, self.tasks)]

    @cached_property
    def first(self) -> list[str]:
        """The columns that come first; several if their averages tie."""
        return [column for column, value in self.contest if equal(value.mean, self.contest[0][1].mean)]

    def finished(self, column: str) -> tuple[int, int]:
        """The number of a column's scores on the tasks that count, and of those that were asked for."""
        every = [len(self.data.values(task, column, self.measure)) for task in self.tasks]
        wanted = 1 if self.data.family(column) == UNTRAINED else len(self.data.seeds)
        return sum(every), sum(max(wanted, number) for number in every)

    def gains(self, column: str, other: str) -> dict[str, list[float]]:
        """By task, how much better each run of a column is than the other column's run with the same seed.

        If one run of a pair failed, the difference is -inf or +inf; pairs with a missing run or two failed runs are left out.
        """
        data = self.data
        found: dict[str, list[float]] = {}
        for task in self.tasks:
            sides = []
            for name in (column, other):
                mine: dict[int, float | None] = {**data.by_seed(task, name, self.measure)}
                sides.append(mine | dict.fromkeys(data.failed(task, name), None))
            ours, theirs = sides
            gains = [self._gain(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
            known = [gain for gain in gains if gain is not None]
            if known:
                found[task] = known
        return found

    def _gain(self, ours: float | None, theirs: float | None) -> float | None:
        if ours is None or theirs is None:
            return None if ours is theirs else math.inf if theirs is None else -math.inf
        return self.sign * (ours - theirs)

    @cached_property
    def tests(self) -> dict[str, Paired]:
        """The test of each column that trains against the reference, with p corrected by Holm over all of them."""
        return self.against(self.data.reference) if self.data.reference else {}

    def against(self, other: str, chosen: bool = False) -> dict[str, Paired]:
        """As `tests`, against any column. chosen: it was chosen by these runs, so that the tests are some of those of all pairs
        of columns, and p is corrected for as many.
        """
        columns = [c for c in self.data.columns if c != other and self.data.family(c) != UNTRAINED]
        found = {column: paired(gains) for column in columns if (gains := self.gains(column, other))}
        values = {column: test.p for column, test in found.items() if test.p is not None}
        family = len(values) * (len(values) + 1) // 2 if chosen else len(values)
        corrected = dict(zip(values, holm([*values.values()], family)))
        least = dict(zip(values, holm([found[column].least or 1.0 for column in values], family)))
        return {c: replace(test, holm=corrected.get(c), least_holm=least.get(c)) for c, test in found.items()}

    # -- how much it takes -------------------------------------------------------------------------------------------

    def target(self, task: str) -> float | None:
        """The reference's loss on dev at the end, mean over seeds."""
        ends = [run.curve[-1].loss for run in self.data.of(task, self.data.reference or "") if run.curve]
        return fmean(ends) if ends else None

    def reached(self, task: str, column: str) -> Reached | None:
        """The point at which a column's runs were first evaluated at or below the reference's final loss.

        None if that loss is no lower than before training, which every run has reached when it begins.
        """
        target = self.target(task)
        starts = [run.curve[0].loss for run in self.data.of(task, self.data.reference or "") if run.curve]
        curves = [run.curve for run in self.data.of(task, column) if run.curve]
        if target is None or target >= fmean(starts):
            return None
        firsts = [next((p.forwards for p in curve if p.loss <= target), math.inf) for curve in curves]
        firsts += [math.inf] * len(self.data.failed(task, column))
        if not firsts:
            return None
        return Reached(median(firsts), sum(map(math.isfinite, firsts)), max(len(self.data.seeds), len(firsts)))

    def at_time(self, task: str, column: str) -> AtTime | None:
        """Loss on dev of a column's runs at the time budget: the last evaluation within it, after a step at least. None without
        any run.

        The runs are those as long as the time budget if there are any, be it failed ones. Every seed needs one.
        """
        budget = self.data.time_budget(task)
        runs, failed = self.data.timed.get((task, column), {}), self.data.failed(task, column, "time")
        if not runs and not failed:
            runs, failed = self.data.runs.get((task, column), {}), self.data.failed(task, column)
        wanted = len({*self.data.seeds, *runs, *failed})
        curves = [run.curve for run in runs.values() if run.curve]
        if budget is None or not (curves or failed):
            return None
        within = [[point.loss for point in curve if point.forwards and point.seconds <= budget] for curve in curves]
        losses = tuple(points[-1] for points in within if points)
        last = median(curve[-1].seconds for curve in curves) if curves else budget
        kind = "read off" if last > budget else "ended" if last < 0.9 * budget else "exact"
        schedules = {part(run.info, "configuration").get("schedule") or CONSTANT for run in runs.values()}
        if budget < FASTER * last and schedules - {CONSTANT}:
            kind = "early"
        return AtTime(losses, kind, wanted)


def learns(data: Comparison, task: str, column: str) -> bool:
    """Whether a column's runs on a task end below their start and above the commonest class; see RULE."""
    runs = data.of(task, column)
    ways = [(run.start, run.curve[-1].minimised) for run in runs if run.curve]
    falls = [start - end for start, end in ways if start is not None and end is not None]
    if falls and fmean(falls) <= 0:
        return False
    known = [run for run in runs if _has_share(run)]
    if not known:
        return bool(runs)
    share = fmean(run.majority for run in known if run.majority is not None)
    error = math.sqrt(share * (1 - share) / known[0].examples)
    return fmean(run.accuracy for run in known if run.accuracy is not None) > share + 2 * error


def _has_share(run: Run) -> bool:
    """Whether a run can be compared with the commonest class. Accuracy need not be the task's first metric."""
    return run.accuracy is not None and run.majority is not None and run.examples > 0


def band(runs: Sequence[Run], axis: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Median and middle half over runs of the loss on dev, on the points of `axis` (forwards, seconds) all runs cover."""
    lines = [([getattr(p, axis) for p in run.curve], [p.loss for p in run.curve]) for run in runs if run.curve]
    start, end = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    points = np.unique(np.concatenate([x for x, _ in lines]))
    points = points[(points >= start) & (points <= end)]
    losses = np.array([np.interp(points, x, y) for x, y in lines])
    low, middle, high = np.quantile(losses, (0.25, 0.5, 0.75), axis=0)
    return points, middle, low, high
