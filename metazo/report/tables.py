"""The tables of results: scores, tests, and the tasks that count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, median

from .analysis import RULE, Analysis
from .comparison import CONTROL, FIRST, FORWARD_ONLY, UNTRAINED, ZEROTH, Comparison
from .statistics import equal
from .table import NONE, Cell, Table, listed, loss, megabytes, over_seeds, p_value, score, seconds, share, some

BOLD = (
    "Bold: the best column with forward passes only, without a failed or unreadable run, and without a missing one that others "
    "have; several if they tie."
)
SPREAD = "the root mean square over its tasks of the standard deviation over seeds, which says how much one task varies"
"""What ± is beside an average over tasks; the average of several varies less as a rule."""
METRICS = {
    "accuracy": "accuracy (%)",
    "macro_f1": "macro F1 (× 100)",
    "mcc": "Matthews correlation (× 100)",
    "f1": "F1 (× 100)",
    "exact_match": "exact answers (%)",
    "exact_number": "right numbers (%)",
}


def metric_name(data: Comparison, tasks: Iterable[str]) -> str:
    """The main metric of tasks, in words and with its unit; `score` if they differ."""
    names = {name for task in tasks if (name := data.metric_of(task))}
    return METRICS.get(next(iter(names)), next(iter(names))) if len(names) == 1 else "score (× 100)"


def split_note(data: Comparison, tasks: Sequence[str]) -> str:
    """Which scores are on dev beside others on test; empty if all are on one split."""
    on_dev, untested = [task for task in tasks if data.split_of(task) == "dev"], data.untested(tasks)
    note = f" No run on {', '.join(on_dev)} was tested: its scores are on dev." if 0 < len(on_dev) < len(tasks) else ""
    if untested:
        note += (
            f" Runs of {', '.join(untested)} were not tested, although others were: their scores are on dev, marked (dev) by "
            "task, and are in no average, rank or test, because scores on dev and on test cannot be compared."
        )
    return note


def metric_note(data: Comparison, tasks: Sequence[str]) -> str:
    """Which of the tasks that count have a metric, if only some do: averages of the loss are over more tasks."""
    scored = [task for task in tasks if data.metric_of(task)]
    if not 0 < len(scored) < len(tasks):
        return ""
    return (
        f" Averages of {metric_name(data, scored)} are over {len(scored)} of these tasks ({listed(scored)}), because the "
        "others have no metric."
    )


def commonest(data: Comparison, task: str) -> float | None:
    """The score by the task's metric of always giving the commonest answer; None if its share does not decide it."""
    if (metric := data.metric_of(task)) == "mcc":
        return 0.0
    return data.majority(task) if metric == "accuracy" else None


def worst(data: Comparison, tasks: Iterable[str]) -> float:
    """The least that an average score over tasks can be: a Matthews correlation may be negative."""
    return -1.0 if any(data.metric_of(task) == "mcc" for task in tasks) else 0.0


def by_family(data: Comparison) -> list[str]:
    """The columns in the grid's order, with those that train with forward passes only first."""
    order = (ZEROTH, CONTROL, FIRST, UNTRAINED)
    return sorted(data.columns, key=lambda column: order.index(data.family(column)))


def best_of(data: Comparison, tasks: Iterable[str], value: Callable[[str], float | None], lower: bool) -> list[str]:
    """The columns with the best value, which may tie, of those that use forward passes only and are steady on `tasks`."""
    fit = [c for c in data.columns if data.family(c) in FORWARD_ONLY and data.steady(c, tasks)]
    known = {c: v for c in fit if (v := value(c)) is not None}
    best = (min if lower else max)(known.values(), default=0.0)
    return [column for column, found in known.items() if equal(found, best)]


def summary(main: Analysis, other: Analysis) -> Table:
    """One row per column, best first. main: by the measure that ranks; other: by the other one."""
    data = main.data
    analyses = {analysis.measure: analysis for analysis in (main, other)}
    named, counted = metric_name(data, main.tasks), analyses["loss"].tasks
    paired_note = (
        f"“Better than {data.reference}”: pairs of runs with the same task and seed. p: the probability of a difference as "
        "large by chance, corrected for all columns tested. "
        if data.reference
        else ""
    )
    table = Table(
        "summary",
        "All columns, best first",
        f"Averages over the tasks that count ({len(counted)} of {len(data.tasks)}), on {data.split(counted)}; ± of an "
        f"average: {SPREAD}; ordered by {'loss' if main.measure == 'loss' else named}, "
        f"columns with failed, unreadable or missing runs last; (n of m): over n of m runs. {BOLD} {paired_note}"
        "Time without evaluations and memory above the idle process: medians over runs."
        f"{metric_note(data, counted)}{split_note(data, data.tasks)}",
        ["column", "what it is", "trains with", f"{named}", "loss (nats)",
         *([f"better than {data.reference}", "p (Holm)"] if data.reference else []), "time of a run (s)",
         "peak memory (MB)"],
        heads=3,
    )  # fmt: skip
    ranked = sorted((column for column, _ in main.ranking), key=lambda column: not data.steady(column, main.tasks))
    best = {
        m: best_of(data, a.tasks, lambda c, a=a: v.mean if (v := a.average(c)) else None, m == "loss")
        for m, a in analyses.items()
    }
    for column in [*ranked, *(column for column in by_family(data) if column not in ranked)]:
        cells: list[Cell | str] = [column, data.label(column), data.family(column)]
        for measure in ("metric", "loss"):
            cells.append(_average(analyses[measure], column, best[measure]))
        if data.reference:
            test = main.tests.get(column)
            cells += [f"{test.wins} of {test.pairs}", p_value(test.holm)] if test else [NONE, NONE]
        runs = [run for task in data.tasks for run in data.of(task, column)]
        memory = [run.memory for run in runs if run.memory is not None]
        cells.append(seconds(median(run.seconds for run in runs)) if runs else NONE)
        cells.append(megabytes(median(memory)) if memory else NONE)
        table.add(*cells)
    return table


def _average(analysis: Analysis, column: str, best: Sequence[str]) -> Cell:
    found = analysis.average(column)
    if found is None:
        return Cell(NONE)
    known, wanted = analysis.finished(column)
    mark = f" ({known} of {wanted})" if known < wanted else ""
    return Cell(score(found.mean, analysis.measure, found.spread) + mark, column in best)


def scores(analysis: Analysis) -> Table:
    """Mean and standard deviation over seeds by column and task, and the average over the tasks that count; see SPREAD."""
    data, measure = analysis.data, analysis.measure
    tasks = [task for task in data.tasks if measure == "loss" or data.metric_of(task)]
    named = {task: "nats" if measure == "loss" else metric_name(data, [task]) for task in tasks}
    shared = next(iter(named.values())) if len(set(named.values())) == 1 else ""
    split = data.split(tasks)
    by_task = f"on {split} by task"
    title = f"Loss {by_task} (nats, lower is better)" if measure == "loss" else f"{shared or 'Score'} {by_task}"
    left_out = [task for task in tasks if task not in analysis.tasks]
    average = f"average without {listed(left_out)}" if left_out else "average"  # where the table is without its note
    table = Table(
        "loss" if measure == "loss" else "metric",
        title[0].upper() + title[1:],
        f"Mean ± standard deviation over {some(len(data.seeds), 'seed')}; ± of an average: {SPREAD}; "
        f"(n of m): n of m runs finished. {BOLD}"
        + (f" Not in the average: {', '.join(left_out)}." if left_out else "")
        + split_note(data, tasks),
        ["column", *(t if shared else f"{t}, {named[t]}" for t in tasks), average],
    )
    values = {task: {c: data.values(task, c, measure) for c in data.columns} for task in tasks}
    best = {
        t: best_of(data, [t], lambda c, t=t: fmean(values[t][c]) if values[t][c] else None, measure == "loss")
        for t in tasks
    }
    overall = best_of(data, analysis.tasks, lambda c: v.mean if (v := analysis.average(c)) else None, measure == "loss")
    for column in by_family(data):
        wanted = 1 if data.family(column) == UNTRAINED else len(data.seeds)
        cells = []
        for t in tasks:
            known, mark = values[t][column], ""
            if not known and column in data.untested([t]):
                on_dev = (run.value(measure) for run in data.of(t, column))
                known, mark = [value for value in on_dev if value is not None], " (dev)"
            cells.append(Cell(over_seeds(known, measure, max(wanted, len(known))) + mark, column in best[t]))
        table.add(column, *cells, _average(analysis, column, overall))
    if measure == "metric":
        shares = {task: commonest(data, task) for task in tasks}
        known = [shares[task] for task in analysis.tasks]
        mean = share(fmean(s for s in known if s is not None)) if known and None not in known else NONE
        table.add("commonest class", *(NONE if s is None else share(s) for s in shares.values()), mean)
    return table


def tests(analysis: Analysis, other: str | None = None, name: str = "") -> Table:
    """The paired test of every column that trains against the reference, or against another that was chosen by these runs."""
    data = analysis.data
    measure = "loss" if analysis.measure == "loss" else metric_name(data, analysis.tasks)
    table = Table(
        name or f"tests-{analysis.measure}",
        f"Paired with {other or data.reference}, by {measure}",
        f"{other} was chosen by its rank in these runs, so p is corrected for all pairs of columns." if other else "",
        ["column", "pairs n", "won, lost, tied", "gain", "95 % interval", "test", "p", "least p", "p (Holm)", "tasks won"],
    )  # fmt: skip
    for column, test in (analysis.against(other, chosen=True) if other else analysis.tests).items():
        interval = NONE
        if test.low is not None and test.high is not None:
            interval = f"{score(test.low, analysis.measure)} to {score(test.high, analysis.measure)}"
        table.add(
            column,
            str(test.pairs),
            f"{test.wins}, {test.losses}, {test.ties}",
            NONE if test.gain is None else score(test.gain, analysis.measure),
            interval,
            test.test,
            p_value(test.p),
            p_value(test.least),
            p_value(test.holm),
            f"{test.tasks_won} of {test.tasks}",
        )
    return table


def tasks(analysis: Analysis) -> Table:
    """Which tasks count in the averages, and why not."""
    data = analysis.data
    others = [f"{c} {loss(start)} on {task}" for task in data.tasks for c, start in data.elsewhere(task).items()]
    starts = f" Columns with another model, head or dev rows start elsewhere: {listed(others)}." if others else ""
    whose = f" with which {data.reference} starts" if data.reference else ""
    table = Table(
        "tasks",
        "Which tasks count",
        f"{RULE} Before: loss on dev of the untrained model{whose}.{starts}",
        ["task", "metric", "commonest class (%)", "loss before (nats)", "counts", "why not, or what was not checked"],
        heads=6,
    )  # fmt: skip
    for verdict in analysis.verdicts:
        majority, before = data.majority(verdict.task), data.before(verdict.task)
        table.add(
            verdict.task,
            data.metric_of(verdict.task) or "loss only",
            NONE if majority is None else share(majority),
            NONE if before is None else loss(before),
            "yes" if verdict.counts else "no",
            verdict.reason,
        )
    return table
