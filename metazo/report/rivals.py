"""Columns at their measured cost: average rank, work until the reference's final loss, memory beside inference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from metazo.io.extras import needs
from metazo.plots.style import log_axis, look, styled

from .analysis import Analysis
from .comparison import FIRST, UNTRAINED, Comparison
from .figures import highlighted, shared_legend, unsteady
from .numbers import Run, number, part
from .point_names import clipped, name_points
from .table import NONE, Cell, Table, count, listed, loss, p_value
from .tables import best_of, by_family, metric_name, metric_note, split_note

with needs("report"):
    from matplotlib.figure import Figure
    from scipy.stats import rankdata

LEVEL = 1.1  # times the other's loss: about as good
TENTH = 0.1


@dataclass(frozen=True)
class Rival:
    """A column at its measured cost, over the tasks that count.

    rank: mean over the cells (task, seed) that all ranked columns have, 1 is best; equivalents: of a run, in forward passes of
    the reference on the same batch, by operations; ratio: median over cells of the equivalents until the reference's final loss
    on dev, by those of the reference's run (inf: half of them or more did not reach it); tenth: share of cells at or below
    1/10; memory: peak of a step by that of inference. None if the results hold no measured cost.
    """

    column: str
    rank: float | None
    equivalents: float | None
    ratio: float | None
    tenth: float | None
    memory: float | None


def rivals(analysis: Analysis) -> list[Rival]:
    """Every column that trains, the best average rank first and those that lack runs last."""
    data, ranked = analysis.data, ranks(analysis)
    found = []
    for column in by_family(data):
        if data.family(column) == UNTRAINED:
            continue
        runs = [(task, run) for task in analysis.tasks for run in data.of(task, column)]
        spent = [e for task, run in runs if (e := equivalents(data, task, run)) is not None]
        ratios = [ratio for task in analysis.tasks for ratio in _ratios(data, task, column)]
        above = [m for _, run in runs if (m := memory(run)) is not None]
        found.append(
            Rival(
                column,
                ranked.get(column),
                median(spent) if spent else None,
                median(ratios) if ratios else None,
                fmean(ratio <= TENTH for ratio in ratios) if ratios else None,
                median(above) if above else None,
            )
        )
    lacking = {c for c in data.columns if any(data.lacks(task, c) for task in analysis.tasks)}
    return sorted(found, key=lambda r: (r.column in lacking, math.inf if r.rank is None else r.rank))


def ranks(analysis: Analysis) -> dict[str, float]:
    """Average rank by column over the cells (task, seed) in which every ranked column has a run; a run that failed is last.
    Columns without a run on one of the tasks have no rank, and neither have those with runs that were not tested, although
    others were. Empty if no cell has a run of all the others.
    """
    data, untested = analysis.data, analysis.data.untested(analysis.tasks)

    def known(task: str, column: str) -> dict[int, float]:
        failed = dict.fromkeys(data.failed(task, column), -analysis.sign * math.inf)
        return data.by_seed(task, column, analysis.measure) | failed

    trained = [column for column in data.columns if data.family(column) != UNTRAINED and column not in untested]
    columns = [column for column in trained if all(known(task, column) for task in analysis.tasks)]
    rows = []
    for task in analysis.tasks:
        sides = [known(task, column) for column in columns]
        shared = set.intersection(*map(set, sides)) if sides else set()
        rows += [[side[seed] for side in sides] for seed in sorted(shared)]
    if not rows:
        return {}
    places = rankdata(-analysis.sign * np.array(rows, dtype=float), axis=1)
    return dict(zip(columns, places.mean(0).tolist()))


def memory(run: Run) -> float | None:
    """Peak memory of a step by that of inference."""
    cost = part(run.info, "cost")
    step, inference = number(cost.get("step_bytes")), number(cost.get("inference_bytes"))
    return step / inference if step and inference else None


def equivalents(data: Comparison, task: str, run: Run, forwards: float | None = None) -> float | None:
    """A run's work up to so many of its own forward passes (by default all) in forward passes of the reference."""
    operations = number(part(run.info, "cost").get("step_flops"))
    of_reference = [part(other.info, "cost") for other in data.of(task, data.reference or "")]
    one = next((flops for cost in of_reference if (flops := number(cost.get("forward_flops")))), None)
    if operations is None or one is None or not run.steps or not run.forwards:
        return None
    share = 1.0 if forwards is None else forwards / run.forwards
    return share * run.steps * operations / one


def _descents(data: Comparison, task: str) -> list[Run]:
    """The reference's runs that end lower than they began: any run has reached the end of the others when it begins."""
    return [run for run in data.of(task, data.reference or "") if run.curve and run.curve[-1].loss < run.curve[0].loss]


def _ratios(data: Comparison, task: str, column: str) -> list[float]:
    """By seed; a failed run did not reach it. Cells without a run of the reference that ends lower than it began are left
    out.
    """
    theirs = {run.seed: run for run in _descents(data, task)}
    found = [math.inf for seed in data.failed(task, column) if seed in theirs]
    for run in data.of(task, column):
        if run.seed not in theirs or not run.curve:
            continue
        whole, target = equivalents(data, task, theirs[run.seed]), theirs[run.seed].curve[-1].loss
        first = next((point.forwards for point in run.curve if point.loss <= target), None)
        spent = math.inf if first is None else equivalents(data, task, run, first)
        if whole and spent is not None:
            found.append(spent / whole)
    return found


def table(analysis: Analysis) -> Table:
    """Empty if the results hold no measured cost."""
    data, found = analysis.data, rivals(analysis)
    over = f"the tasks that a column with gradients learns ({len(analysis.tasks)} of {len(data.tasks)})"
    gradients = [column for column in data.columns if data.family(column) == FIRST]
    none = "is trained with gradients" if not gradients else "with gradients has finished"
    if not any(data.of(task, column) for task in data.tasks for column in gradients):
        over = f"all tasks with runs ({len(analysis.tasks)} of {len(data.tasks)}; no column {none})"
    averaged = [rival.column for rival in found if analysis.average(rival.column) is not None]
    shaky = [c for c in averaged if any(data.failed(task, c) for task in analysis.tasks)]
    lacking = [c for c in averaged if any(data.lacks(task, c) for task in analysis.tasks)]
    split, ranked = data.split(analysis.tasks), sum(rival.rank is not None for rival in found)
    without = [r.column for r in found if r.rank is None and r.column not in data.untested(analysis.tasks)]
    ranking = "there are no ranks, because no pair of task and seed has a run of each column"
    if ranked:
        ranking = (
            f"best average rank first. Rank: of the loss on {split}, mean over pairs of task and seed that all have, 1 "
        )
        ranking += f"is the best of {ranked}"
        if without:
            ranking += f" (without {listed(without)}, for want of a run on one of the tasks)"
    every = sum(len(data.of(task, data.reference or "")) for task in analysis.tasks)
    lower = sum(len(_descents(data, task)) for task in analysis.tasks)
    made = Table(
        "rivals",
        "Columns at their measured cost",
        f"Over {over}, whether or not {data.reference} does; {ranking}; p: paired with {data.reference}, Holm. "
        f"Forward-equivalents: operations of a run by those of a forward pass of {data.reference} on the same batch, the first "
        "of a run; frozen layers are computed once and cost nothing. "
        f"“Until {data.reference}’s final loss”: the share of {data.reference}’s own run that a column needs to come to the "
        f"loss on dev at its end, median over the pairs in which that is lower than before training ({lower} of {every}; as "
        "fine as the spacing of evaluations), and the share of them that need at most a tenth. Memory: most bytes of "
        "tensors in a step on that batch by most in inference, weights included; longer batches take more."
        + (f" {listed(shaky)}: some runs failed, so that averages are over the others only." if shaky else "")
        + (f" {listed(lacking)}: some runs are missing or cannot be read, so that averages are over the others only. "
            "They are last, and all ranks are of the pairs that are left." if lacking else "")
        + metric_note(data, analysis.tasks)
        + split_note(data, analysis.tasks),
        ["column", "rank", "p (Holm)", "loss (nats)", metric_name(data, analysis.tasks), "forward-equivalents",
         f"until {data.reference}’s final loss", "pairs within 1/10 (%)", "memory (× inference)"],
    )  # fmt: skip
    if not any(rival.memory for rival in found):
        return made
    scores = Analysis(data, "metric", needs_reference=analysis.needs_reference)
    averages = {rival.column: analysis.average(rival.column) for rival in found}
    best = best_of(data, analysis.tasks, lambda c: v.mean if (v := averages.get(c)) else None, lower=True)
    for rival in found:
        average, score = averages[rival.column], scores.average(rival.column)
        test = analysis.tests.get(rival.column)
        made.add(
            rival.column,
            NONE if rival.rank is None else f"{rival.rank:.1f}",
            p_value(test.holm) if test else NONE,
            Cell(NONE if average is None else loss(average.mean), rival.column in best),
            NONE if score is None else f"{100 * score.mean:.1f}",
            NONE if rival.equivalents is None else count(rival.equivalents),
            NONE if rival.ratio is None else f"{rival.ratio:.2f}" if math.isfinite(rival.ratio) else "not reached",
            NONE if rival.tenth is None else f"{100 * rival.tenth:.0f}",
            NONE if rival.memory is None else f"{rival.memory:.2f}",
        )
    return made


def pairs(analysis: Analysis) -> Table:
    """Every two columns that train, in the pairs of task and seed that both have; a run that failed loses."""
    data, order = analysis.data, [rival.column for rival in rivals(analysis)]
    losses = {
        column: {
            (task, seed): value
            for task in analysis.tasks
            for seed, value in (
                data.by_seed(task, column, "loss") | dict.fromkeys(data.failed(task, column), math.inf)
            ).items()
        }
        for column in order
    }
    made = Table(
        "pairs",
        "Every two columns",
        f"Number of pairs of task and seed in which the row's loss on {data.split(analysis.tasks)} is lower than the column's, "
        f"and in brackets in which it is at most {LEVEL} times the column's. {NONE}: there is no pair.",
        ["column", *order],
    )
    for row in order:
        cells = []
        for other in order:
            both = [(losses[row][cell], losses[other][cell]) for cell in losses[row].keys() & losses[other].keys()]
            won = sum(ours < theirs for ours, theirs in both)
            level = sum(ours <= LEVEL * theirs for ours, theirs in both if math.isfinite(ours))
            cells.append(f"{won} ({level})" if both and row != other else NONE)
        made.add(row, *cells)
    return made


def plane(analysis: Analysis) -> Figure:
    """Left: mean loss on dev over tasks and seeds against forward-equivalents. Right: final loss against memory."""
    data, chosen = analysis.data, highlighted(analysis)
    found = {rival.column: rival for rival in rivals(analysis)}
    with styled():
        figure = Figure(figsize=(11.5, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for column in [*(c for c in found if c not in chosen), *(c for c in chosen if c in found)]:
            line = mean_curve(data, analysis.tasks, column)
            if line is None:
                continue
            if column in chosen:
                left.plot(*line, label=clipped(column), markevery=2, zorder=3, **look(chosen.index(column)))
            else:
                left.plot(*line, color="#bbbbbb", linewidth=0.9, label="others", zorder=1)
        left.set_xscale("log")
        left.set(xlabel="forward-equivalents (logarithmic)   ← better", ylabel="loss on dev, average (nats)")
        points = [
            (rival.memory, average.mean, column)
            for column, rival in found.items()
            if rival.memory and (average := analysis.average(column))
        ]
        for place, value, column in points:
            style = look(chosen.index(column)) if column in chosen else {"color": "#888888", "marker": "o"}
            right.plot(place, value, markersize=7, **style | {"linestyle": ""} | unsteady(analysis, column), zorder=3)
        right.set(
            xlabel="peak memory by that of inference   ← better",
            ylabel=f"loss on {data.split(analysis.tasks)}, average (nats)   ← better",
        )
        right.margins(x=0.3, y=0.1)
        if points:
            log_axis(left, "x")
            name_points(right, points)
        shared_legend(figure, [left])
    return figure


def mean_curve(
    data: Comparison, tasks: Sequence[str], column: str, points: int = 40
) -> tuple[list[float], list[float]] | None:
    """Forward-equivalents and loss on dev at even shares of a run after its start: mean over tasks of the mean over finished
    runs. None for a column that has no finished run on one of the tasks, because its mean would be over others.
    """
    shares = np.linspace(0, 1, points + 1)[1:]
    work, curves = [], []
    for task in tasks:
        runs = [run for run in data.of(task, column) if len(run.curve) > 1]
        spent = [value for run in runs if (value := equivalents(data, task, run)) is not None]
        if not runs or len(spent) < len(runs):
            return None
        losses = [
            np.interp(shares, [p.forwards / run.curve[-1].forwards for p in run.curve], [p.loss for p in run.curve])
            for run in runs
        ]
        work.append(fmean(spent))
        curves.append(np.mean(losses, 0))
    return (shares * fmean(work)).tolist(), np.mean(curves, 0).tolist()


def measured(data: Comparison) -> bool:
    """Whether the results hold a measured cost."""
    return any(part(info, "cost") for info in data.infos)
