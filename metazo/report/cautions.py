"""What to know before trusting a comparison: failed runs, doubtful learning rates, settings and machines that differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from statistics import median
from typing import Any

from metazo.comparisons.columns import RESERVED, Column
from metazo.comparisons.key import INCIDENTAL
from metazo.errors import UserError

from .analysis import Analysis
from .comparison import UNTRAINED, Comparison
from .numbers import Run, part
from .table import listed, some
from .tables import metric_name

BUSY = 1.5  # clock time over processor time


def cautions(analysis: Analysis, other: Analysis) -> list[tuple[str, str]]:
    """Cautions: the other measure ranks another method first, tasks left out, learning rates at the edge, failed runs.
    A run of a search may diverge: that is a result of the search.
    """
    data, parts = analysis.data, []
    if analysis.first and other.first and set(other.first) != set(analysis.first):
        by = "loss" if other.measure == "loss" else metric_name(data, other.tasks)
        parts.append(f"By {by}, {listed(other.first)} {'share first place' if len(other.first) > 1 else 'is first'}.")
    out = [verdict.task for verdict in analysis.verdicts if not verdict.counts]
    if out:
        parts.append(f"{listed(out)}: not in the averages (“Which tasks count” says why).")
    shaky = [c for c in data.columns if not data.steady(c, analysis.tasks) and c not in data.untested(analysis.tasks)]
    failed = [c for c in shaky if any(data.failed(task, c) for task in analysis.tasks)]
    for columns, what in ((failed, "failed"), ([c for c in shaky if c not in failed], "are missing or cannot be read")):
        if known := [column for column in columns if analysis.average(column) is not None]:
            parts.append(
                f"{listed(known)}: some runs {what}, so the average is over the others only and cannot come first."
            )
    if without := [column for column in shaky if analysis.average(column) is None]:
        parts.append(f"{listed(without)}: no run finished on one of the tasks, so there is no average.")
    if untested := data.untested(data.tasks):
        parts.append(f"{listed(untested)}: scored on dev, not on test as the others, and so not compared with them.")
    if on_dev := [task for task in data.tasks if data.split_of(task) == "dev"]:
        parts.append(
            f"No run on {listed(on_dev)} was tested, so its scores are on dev. They may be too good, because dev also "
            "chooses learning rates and the weights that are kept."
        )
    if not data.grid:
        parts.append(
            "grid.yaml is missing or cannot be read, so it is not known which runs were asked for, which column is the "
            f"reference ({data.reference or 'none'} was taken) and what the time budget is."
        )
    searches = [(column, search) for found in data.searches.values() for column, search in found.items()]
    if edges := {column for column, search in searches if search.doubt == "edge"}:
        parts.append(
            f"{listed(sorted(edges))}: the learning rate is at the edge of the tried rates, so a better one may exist."
        )
    if gaps := {column for column, search in searches if search.doubt == "gap"}:
        parts.append(
            f"{listed(sorted(gaps))}: the next larger learning rate that was tried diverged and is far from the chosen one, so "
            "a better one may be between."
        )
    if lost := {column for column, search in searches if search.lr is None}:
        parts.append(f"{listed(sorted(lost))}: no learning rate of a search gave a finite loss.")
    if others := data.objectives():
        named = listed(list(dict.fromkeys(others.values())))
        parts.append(
            f"{listed(list(others))}: training minimised an objective ({named}) and not the loss, so that losses, and the "
            "work and time until a loss, say little about it."
        )
    busy = _busy(run for runs in data.runs.values() for run in runs.values())
    if busy > BUSY:
        parts.append(
            f"The machine was busy: runs took {busy:.1f} times their processor time, so times are not reliable."
        )
    elif slow := _slowed(data):
        parts.append(
            f"The machine was busy during runs of {listed(list(slow))}, which took up to {max(slow.values()):.1f} times their "
            "processor time, so times, and losses at equal time, are not reliable."
        )
    broken = [f for f in data.failures if f.kind.startswith("search") and f.readable and f.status == "failed"]
    if broken:
        parts.append(
            f"{listed(list(dict.fromkeys(f.column for f in broken)))}: the learning-rate search is incomplete, because "
            f"{some(len(broken), 'run')} of it failed ({broken[0].reason.rstrip('.')}); the same metazo compare command "
            "repeats what failed."
        )
    unfinished = sum(f.status != "diverged" or not f.kind.startswith("search") for f in data.failures)
    missing = len(data.missing) + len(data.untimed)
    if data.surplus:
        parts.append(f"{some(data.surplus, 'run')} of seeds that the grid does not ask for: left out.")
    if others := _other_settings(data):
        parts.append(
            f"Runs of {listed(others)} have other settings than the grid's, so the columns cannot be compared."
        )
    if scored := _by_column(data, lambda run: run.examples):
        parts.append(f"Columns are scored on different numbers of examples ({scored}), so scores cannot be compared.")
    if sizes := _by_column(data, lambda run: part(run.info, "configuration").get("batch_size")):
        parts.append(f"Columns have batches of different sizes ({sizes}), so equal forward passes are not equal work.")
    if models := _models(data):
        parts.append(f"Runs are of different models ({models}), so the columns cannot be compared.")
    if machines := _machines(data):
        parts.append(
            f"Columns ran on different machines ({machines}), so time, memory and losses at equal time cannot be compared."
        )
    parts += [f"{listed(columns)}: {note.rstrip('.')}." for note, columns in _notes(data).items()]
    if unfinished or missing:
        parts.append(
            f"{some(unfinished, 'run')} failed or cannot be read, {some(missing, 'run')} missing: listed below."
        )
    return [("What to know before trusting it", " ".join(parts))] if parts else []


def _busy(runs: Iterable[Run]) -> float:
    """Median over runs of clock time over processor time; well above 1 means that the machine had other work."""
    ratios = [run.wall / run.cpu for run in runs if run.wall is not None and run.cpu]
    return median(ratios) if ratios else 0.0


def _slowed(data: Comparison) -> dict[str, float]:
    """The columns whose runs, or runs to the time budget, were slowed down by other work: clock time over processor time."""
    found: dict[str, float] = {}
    for column in data.columns:
        for kinds in (data.runs, data.timed):
            busy = _busy(run for task in data.tasks for run in kinds.get((task, column), {}).values())
            if busy > max(BUSY, found.get(column, 0.0)):
                found[column] = busy
    return found


def _other_settings(data: Comparison) -> list[str]:
    """Columns with reported runs of another grid, which a part of a changed grid leaves in place: "name (setting)"."""
    found: dict[str, str] = {}
    for column in data.columns:
        infos = [run.info for task in data.tasks for run in data.of(task, column)]
        settings, asked = [_settings(info) for info in infos], _asked(data, column)
        tuners = {str(part(info, "hashes").get("tuner")) for info in infos}
        if len(tuners) < 2 and tuners != {"None"}:  # the same file, however it was named
            asked.pop("tuner", None)
        for name, value in asked.items():
            if others := [had[name] for had in settings if name in had and not _equal(had[name], value)]:
                found.setdefault(column, f"{column} ({name} {others[0]}, not {value})")
        own = {name for info in infos for name in part(info, "configuration", "method")}
        for name in dict.fromkeys(name for had in settings for name in had if name != "tuner"):
            values = [str(had.get(name, "its default")) for had in settings if name in had or name in own]
            if name != "lr" and len(set(values)) > 1:
                found.setdefault(column, f"{column} ({name} {' and '.join(dict.fromkeys(values))})")
    return [*found.values()]


def _asked(data: Comparison, column: str) -> dict[str, Any]:
    """The settings that the grid names for the runs of a column, those of the method among them."""
    entry, config = data.entries.get(column, {}), part(data.grid, "config")
    own = {str(name).replace("-", "_"): value for name, value in data.options(column).items()}
    with suppress(UserError, TypeError, AttributeError):
        own = Column(column, str(entry.get("optimizer") or column), own).settings()
    rates = entry.get("lrs") or data.grid.get("lrs")
    found = {**config, **part(config, "method"), **own, **part(own, "method")}
    if isinstance(rates, list) and len(rates) == 1:
        found["lr"] = rates[0]
    if entry.get("optimizer") and column in data.first_info:
        found["optimizer"] = entry["optimizer"]
    return {name: value for name, value in found.items() if value is not None and not isinstance(value, dict)}


def _settings(info: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that may change its numbers, those of the method among them."""
    had = part(info, "configuration")
    set_by_grid = {*RESERVED, *INCIDENTAL, "model", "method"}
    found = {name: value for name, value in had.items() if name not in set_by_grid} | part(had, "method")
    return found | {name: info[name] for name in ("optimizer", "lr") if info.get(name) is not None}


def _equal(had: object, given: object) -> bool:
    """Whether a setting of a run is that of a grid, where numbers and words such as `no` may be texts."""
    if str(had) == str(given) or (isinstance(had, list) and had == [given]):
        return True
    if isinstance(had, bool):
        return isinstance(given, str) and given.lower() in (
            ("yes", "true", "on", "1") if had else ("no", "false", "off", "0")
        )
    with suppress(TypeError, ValueError):
        return float(had) == float(given)  # type: ignore[arg-type]
    return False


def _by_column(data: Comparison, value: Callable[[Run], object]) -> str:
    """The values of the runs, if columns have different ones on some task; empty if they are the same on each."""
    columns, differ = dict[str, dict[str, int]](), False
    for task in data.tasks:
        found = {
            (str(value(run)), column): 1
            for column in data.columns
            for run in data.of(task, column)
            if run.split == data.split_of(task)
        }
        differ = differ or len({words for words, _ in found}) > 1
        for words, column in found:
            columns.setdefault(words, {})[column] = 1
    return "; ".join(f"{words} for {listed([*found])}" for words, found in columns.items()) if differ else ""


def _models(data: Comparison) -> str:
    """The models of the runs, if columns that name none of their own have several; empty if the weights are the same."""
    columns, hashes = dict[str, dict[str, int]](), dict[str, set[str]]()
    plain = [column for column in data.columns if "model" not in data.options(column)]
    for task, column in ((task, column) for task in data.tasks for column in plain):
        for info in (run.info for run in data.of(task, column) if run.info.get("model")):
            columns.setdefault(str(info["model"]), {})[column] = 1
            hashes.setdefault(str(info["model"]), set()).add(str(part(info, "hashes").get("model")))
    if len(columns) < 2 or set.intersection(*hashes.values()) - {"None"}:
        return ""
    return "; ".join(f"{model} for {listed([*found])}" for model, found in columns.items())


def _notes(data: Comparison) -> dict[str, list[str]]:
    """The notes that all runs of a column have and those of another do not, with the columns. Empty if results of an earlier
    version are among the runs, which tell of no notes.
    """
    runs = {column: [run for task in data.tasks for run in data.of(task, column)] for column in data.columns}
    if any(run.notes is None for found in runs.values() for run in found):
        return {}
    common = {
        column: [note for note in found[0].notes or () if all(note in (run.notes or ()) for run in found)]
        for column, found in runs.items()
        if found and data.family(column) != UNTRAINED
    }
    columns: dict[str, list[str]] = {}
    for column, notes in common.items():
        for note in dict.fromkeys(notes):
            columns.setdefault(note, []).append(column)
    return {note: found for note, found in columns.items() if len(found) < len(common)}


def _machines(data: Comparison) -> str:
    """The machines, if columns ran on different ones on some task; empty if all that are known are the same."""
    columns, differ = dict[str, dict[str, int]](), False
    for task in data.tasks:
        used: dict[str, set[str]] = {}
        for column in data.columns:
            for run in (*data.of(task, column), *data.timed.get((task, column), {}).values()):
                machine = part(run.info, "machine")
                if words := ", ".join(str(machine[name]) for name in ("cpu", "gpu") if machine.get(name)):
                    threads = machine.get("threads")
                    words += f", {some(threads, 'thread')}" if isinstance(threads, int) else ""
                    used.setdefault(column, set()).add(words)
                    columns.setdefault(words, {})[column] = 1
        differ = differ or len(set(map(frozenset, used.values()))) > 1
    return "; ".join(f"{machine} for {listed([*found])}" for machine, found in columns.items()) if differ else ""
