"""The tables of costs (forward passes, time, memory, search), and of missing runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from statistics import fmean, median
from typing import Any

from .analysis import Analysis
from .comparison import UNTRAINED, Comparison
from .numbers import number, part
from .table import NONE, Cell, Table, count, loss, megabytes, seconds
from .tables import best_of, by_family

SPACING = "The figures are as fine as the spacing of evaluations."


def reach(analysis: Analysis) -> Table:
    data = analysis.data
    trained = [column for column in by_family(data) if data.family(column) != UNTRAINED]
    table = Table(
        "reach",
        f"Forward passes until {data.reference}’s final loss",
        f"Median over seeds of the first evaluation whose loss on dev was at or below {data.reference}’s mean at the end "
        "(second row, of its finished runs). (n of m): n of m runs reached it; failed ones did not, and missing ones are in no "
        f"median; “not reached”: half of the runs or more did not. {SPACING} There are none if that loss is no lower than "
        "before training.",
        ["column", *data.tasks],
    )
    targets = {task: analysis.target(task) for task in data.tasks}
    table.add("that loss (nats)", *(_of_reference(data, t, loss, v) for t, v in targets.items()))
    found = {task: {c: analysis.reached(task, c) for c in trained} for task in data.tasks}
    best = {
        t: best_of(data, [t], lambda c, t=t: r.forwards if (r := found[t].get(c)) and r.reached else None, lower=True)
        for t in data.tasks
    }
    for column in trained:
        cells = []
        for task in data.tasks:
            reached = found[task][column]
            if reached is None:
                cells.append(Cell(NONE))
                continue
            text = count(reached.forwards) if math.isfinite(reached.forwards) else "not reached"
            text += _fewer(reached.reached, reached.runs)
            cells.append(Cell(text, column in best[task] and math.isfinite(reached.forwards)))
        table.add(column, *cells)
    return table


def equal_time(analysis: Analysis) -> Table:
    data = analysis.data
    marks = {"exact": "", "read off": "", "early": " ‡", "ended": " †"}
    longer = (
        "; faster columns were run again, with as many forward passes as the time allows"
        if data.grid.get("time_budget")
        else ""
    )
    budgets = {task: data.time_budget(task) for task in data.tasks}
    columns = [column for column in by_family(data) if data.family(column) != UNTRAINED]
    found = {task: {c: analysis.at_time(task, c) for c in columns} for task in data.tasks}
    early = ""
    if any(at and at.kind == "early" for of_task in found.values() for at in of_task.values()):
        early = (
            "‡ Read off before the learning rate had come to the end of its schedule, unlike in runs of faster columns: runs "
            "that are planned for this time might end lower. "
        )
    table = Table(
        "time",
        "Loss at equal time (nats, lower is better)",
        "Mean over seeds of the last loss on dev within the time of the second row, which counts training without "
        f"evaluation. Values of slower columns are read off their curves{longer}. "
        f"† The runs ended before nine tenths of the time were used, so more time might have helped. "
        f"{early}(n of m): of n of m runs. " + SPACING,
        ["column", *data.tasks],
    )
    given = number(data.grid.get("time_budget"))
    table.add(
        "time (s)",
        *(
            seconds(v) if v is not None and v == given else _of_reference(data, t, seconds, v)
            for t, v in budgets.items()
        ),
    )
    best = {
        t: best_of(
            data,
            [t],
            lambda c, t=t: (
                fmean(f.losses) if (f := found[t].get(c)) and len(f.losses) >= len(data.of(t, c)) > 0 else None
            ),
            lower=True,
        )
        for t in data.tasks
    }
    for column in columns:
        cells = []
        for task in data.tasks:
            at = found[task][column]
            text = loss(fmean(at.losses)) + marks[at.kind] if at and at.losses else NONE
            text += _fewer(len(at.losses), at.runs) if at else ""
            cells.append(Cell(text, column in best[task]))
        table.add(column, *cells)
    return table


def _of_reference(data: Comparison, task: str, text: Callable[[float], str], value: float | None) -> str:
    """A number of the reference's finished runs, with how many these are."""
    if value is None:
        return NONE
    return text(value) + _fewer(len(data.of(task, data.reference or "")), len(data.seeds))


def _fewer(known: int, wanted: int) -> str:
    return f" ({known} of {wanted})" if known < wanted else ""


def cost(data: Comparison) -> Table:
    table = Table(
        "cost",
        "Time and memory of a run",
        "Medians over the runs of all tasks and seeds; columns that lack runs cannot be compared. Time is training without "
        "evaluation. Memory is the peak of resident memory above "
        "the idle process: model, data, optimizer, activations (on a GPU: the peak of its allocator).",
        ["column", "runs", "forward passes", "time (s)", "time per 1,000 forward passes (s)", "trained weights",
         "peak memory (MB)"],
    )  # fmt: skip
    for column in by_family(data):
        runs = [run for task in data.tasks for run in data.of(task, column)]
        if not runs:
            table.add(column, "0", *[NONE] * 5)
            continue
        memory = [run.memory for run in runs if run.memory is not None]
        rates = [1000 * run.seconds / run.forwards for run in runs if run.forwards]
        weights = [run.trained for run in runs if run.trained is not None]
        table.add(
            column,
            str(len(runs)),
            count(median(run.forwards for run in runs)),
            seconds(median(run.seconds for run in runs)),
            seconds(median(rates)) if rates else NONE,
            count(median(weights)) if weights else NONE,
            megabytes(median(memory)) if memory else NONE,
        )
    return table


def cells(data: Comparison) -> Table:
    table = Table(
        "cells",
        "Time of a run by task (s)",
        "Medians over seeds of the training time; in brackets the total with loading and evaluation.",
        ["column", *data.tasks],
    )
    for column in by_family(data):
        texts = []
        for task in data.tasks:
            runs = data.of(task, column)
            whole = [run.wall for run in runs if run.wall is not None]
            text = seconds(median(run.seconds for run in runs)) if runs else NONE
            texts.append(text + (f" ({seconds(median(whole))})" if whole else ""))
        table.add(column, *texts)
    return table


def search(data: Comparison) -> Table:
    table = Table(
        "search",
        "Learning rates: the search’s choices and costs",
        "Chosen by the mean loss on dev (or objective, if there is one) over the search’s own seeds. ⚠ edge: "
        "the best rate is the smallest or largest tried, so a better one may be outside, and the column may be underrated. "
        "⚠ gap: the next larger rate that was tried diverged and is far from the best, so a better one may be between. “none”: "
        "no rate gave a finite loss. No runs: the rate was given.",
        ["column", *data.tasks, "runs of the search", "forward passes of the search"],
    )
    for column in by_family(data):
        found = [data.searches.get(task, {}).get(column) for task in data.tasks]
        if not any(found):
            continue
        cells = []
        for item in found:
            rate = NONE if item is None else "none" if item.lr is None else f"{item.lr:g}"
            cells.append(rate + (f" ⚠ {item.doubt}" if item and item.doubt else ""))
        runs, forwards = (sum(getattr(item, name) for item in found if item) for name in ("runs", "forwards"))
        table.add(column, *cells, count(runs), count(forwards))
    return table


def by_rate(data: Comparison) -> Table:
    named = "".join(f" Of {column}: the objective ({what})." for column, what in data.objectives().items())
    rates = sorted({float(r) for found in data.searches.values() for item in found.values() for r in item.losses})
    table = Table(
        "by-rate",
        "Loss by learning rate",
        "Mean loss on dev (nats) at the end of the search's runs; “diverged”: a run at this rate did (in results of earlier "
        "versions, it may have failed)." + named,
        ["task", "column", *(f"{rate:g}" for rate in rates)],
    )
    for task in data.tasks:
        for column in by_family(data):
            if (item := data.searches.get(task, {}).get(column)) is not None and len(item.losses) > 1:
                found = {
                    float(rate): "diverged" if value is None else loss(value) for rate, value in item.losses.items()
                }
                table.add(task, column, *(found.get(rate, NONE) for rate in rates))
    return table


def failures(data: Comparison) -> Table:
    table = Table(
        "failures",
        "Runs that failed, and files that cannot be read",
        "No mean includes them. A failed run loses its pair in the tests; an unreadable file is left out of the tests. A run "
        "of a search that diverged is a bad rate; one that failed tells nothing about its rate, and its search is incomplete.",
        ["task", "column", "run", "seed", "reason"],
        heads=5,
    )
    for failure in data.failures:
        table.add(failure.task, failure.column, failure.kind, failure.seed, failure.reason)
    return table


def missing(data: Comparison) -> Table:
    table = Table(
        "missing",
        "Missing runs of the grid",
        "The same metazo compare command continues and does these runs (time: a run as long as the time budget).",
        ["task", "column", "run", "seeds"],
        heads=4,
    )
    cells: dict[tuple[str, str, str], list[int]] = {}
    for kind, lacking in (("seed", data.missing), ("time", data.untimed)):
        for task, column, seed in lacking:
            cells.setdefault((task, column, kind), []).append(seed)
    for cell, seeds in cells.items():
        table.add(*cell, ", ".join(map(str, seeds)))
    return table


def configuration(data: Comparison) -> Table:
    """Settings, versions, machine and hashes of all runs; several values if the runs differ."""
    table = Table(
        "configuration",
        "Settings, versions and machines",
        "Settings that all runs share; the other settings of a run are in its file.",
        ["what", "value"],
        heads=2,
    )
    for name, key in (("model", "model"), ("budget (forward passes)", "budget"), ("workers", "workers")):
        table.add(name, "; ".join(dict.fromkeys(_text(info.get(key)) for info in data.infos)) or NONE)
    for block in ("versions", "machine", "hashes", "configuration"):
        names = dict.fromkeys(name for info in data.infos for name in part(info, block))
        for name in names:
            values = {_text(part(info, block).get(name)) for info in data.infos if name in part(info, block)}
            if block != "configuration" or (len(values) == 1 and values not in ({"null"}, {"[]"}, {"{}"})):
                shown = sorted(values)[:4]
                table.add(f"{block}: {name}", "; ".join(shown) + (" …" if len(values) > 4 else ""))
    for name in ("search_seeds", "search_budget", "extensions", "time_budget", "reference"):
        if name in data.grid:
            table.add(f"grid: {name}", _text(data.grid[name]))
    return table


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
