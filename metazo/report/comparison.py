"""The results of a comparison by task and column, read once for all tables and figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

from metazo.comparisons.columns import ZERO_SHOT
from metazo.comparisons.grid import FASTER, GRID, REFERENCE, SEARCH_SEED, task_name
from metazo.comparisons.packed import packed_grid, read_runs
from metazo.comparisons.results import KINDS, SEARCH, Result, Search, read_search
from metazo.errors import UserError
from metazo.io.files import is_file
from metazo.io.plain import read_yaml
from metazo.optimizers.outline import methods
from metazo.optimizers.registry import Method

from .numbers import Failure, Run, number, part, run_of
from .searched import searches_of

MAX_RUNS = 100_000
CONTROL, ZEROTH, FIRST, UNTRAINED = "control", "forward passes only", "gradients", "no training"
FORWARD_ONLY = (ZEROTH, CONTROL)


class Comparison:
    """Everything in a results folder that can be read, and a list of the files that cannot.

    runs, timed: task, column -> seed -> Run, at the budget of forward passes and as long as the time budget; failures:
    failed and unreadable files; missing: reported cells of the grid that have no file; untimed: cells to the time budget that
    have none; searches: task -> column -> Search; surplus: the number of runs of seeds that the grid does not ask for; these
    are left out.
    Raises UserError if the folder holds no results at all.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs: dict[tuple[str, str], dict[int, Run]] = {}
        self.timed: dict[tuple[str, str], dict[int, Run]] = {}
        self.failures: list[Failure] = []
        self.infos: list[dict[str, Any]] = []
        self._seen: set[tuple[str, str, str, str]] = set()
        self._searched: dict[tuple[str, str], list[Result]] = {}
        for path, result in read_runs(folder):
            self._read(path, result)
        self.grid = self._grid()
        self.searches = self._searches()
        self.tasks = self._order([task_name(task) for task in _items(self.grid.get("tasks"))], 0)
        entries = [c if isinstance(c, Mapping) else {"name": c} for c in _items(self.grid.get("columns"))]
        self.entries = {str(entry["name"]): entry for entry in entries if entry.get("name")}
        self.columns = self._order([*self.entries], 1)
        self.surplus = self._leave_out_surplus()
        self.reference = self.wanted if any(column == self.wanted for _, column in self.runs) else None
        self.missing = list(self._missing())
        self.untimed = list(self._untimed())

    def _read(self, file: Path, result: Result | UserError) -> None:
        task, column, (kind, _, rest) = file.parts[-3], file.parts[-2], file.stem.partition("-")
        if kind not in KINDS:
            return
        seed, readable, status = rest.rpartition("-")[2], False, "unreadable"
        try:
            if isinstance(result, UserError):
                raise result
            info = result.run_info
            task, column = str(info.get("task") or task), str(info.get("column") or column)
            seed = str(info.get("seed", seed))
            self.infos.append(info)
            readable = True
            status = "diverged" if result.diverged else "failed"
            if kind == "search":
                self._searched.setdefault((task, column), []).append(result)
            run = run_of(result)
        except (UserError, ValueError, TypeError, AttributeError) as error:
            text = str(error).replace(f"{file} ", "The file ").replace(str(file), file.name)
            if isinstance(error, TypeError | AttributeError):
                text = "The file is not a result of a comparison: its fields are not valid."
            rate = f" (learning rate {rest.rpartition('-')[0]})" if kind == "search" else ""
            self.failures.append(Failure(task, column, kind + rate, seed, text, readable, status))
        else:
            if kind != "search":
                (self.runs if kind == "seed" else self.timed).setdefault((task, column), {})[run.seed] = run
        self._seen.add((task, column, kind, seed))

    def _grid(self) -> dict[str, Any]:
        if not is_file(path := self.folder / GRID):
            return packed_grid(self.folder)
        try:
            return read_yaml(path, "grid")
        except UserError as error:
            self._unreadable(GRID, error)
            return {}

    def _searches(self) -> dict[str, dict[str, Search]]:
        """Those of search.json, and those of which only the runs tell."""
        found = searches_of(self._searched, self.infos)
        try:
            for task, columns in read_search(self.folder).items():
                found[task] = found.get(task, {}) | columns
        except UserError as error:
            self._unreadable(SEARCH, error)
        return found

    def _unreadable(self, name: str, error: UserError) -> None:
        text = str(error).replace(f"{self.folder}/", "")
        self.failures.append(Failure("all", "all", name, "", f"it cannot be read: {text}", False, "unreadable"))

    def _order(self, first: list[str], place: int) -> list[str]:
        """Names in the grid's order, then names that only the folder has."""
        held = {key[place] for key in self._seen}
        return [name for name in dict.fromkeys([*first, *sorted(held)]) if name in held or name in first]

    @property
    def wanted(self) -> str:
        """The name of the reference, whether or not it has a finished run."""
        return str(self.grid.get("reference") or REFERENCE)

    @property
    def seeds(self) -> list[int]:
        return self._asked or sorted({seed for runs in self.runs.values() for seed in runs})

    @property
    def _asked(self) -> list[int]:
        """The grid's seeds; empty if it names none."""
        given = self.grid.get("seeds")
        if isinstance(given, int):
            return list(range(min(given, SEARCH_SEED)))
        return [seed for seed in _items(given) if isinstance(seed, int)]

    def _leave_out_surplus(self) -> int:
        """metazo compare puts runs of other seeds than the grid's aside, but a folder may hold them for other reasons."""
        if not (asked := set(self._asked)):
            return 0
        surplus = [(runs, s) for runs in (*self.runs.values(), *self.timed.values()) for s in runs.keys() - asked]
        for runs, seed in surplus:
            del runs[seed]
        self.runs = {cell: runs for cell, runs in self.runs.items() if runs}
        failures, kinds = self.failures, ("seed", "time")
        self.failures = [f for f in failures if f.kind not in kinds or not f.seed.isdigit() or int(f.seed) in asked]
        return len(surplus) + len(failures) - len(self.failures)

    def _missing(self) -> Iterator[tuple[str, str, int]]:
        wanted = len(self.tasks) * len(self.columns) * len(self.seeds)
        if wanted > MAX_RUNS:
            raise UserError(f"{self.folder / GRID} asks for {wanted:,} runs; a report takes at most {MAX_RUNS:,}")
        for task in self.tasks:
            for column in self.columns:
                for seed in self.seeds:
                    if (task, column, "seed", str(seed)) not in self._seen:
                        yield task, column, seed

    def _untimed(self) -> Iterator[tuple[str, str, int]]:
        """Runs to the time budget of the columns that need them, which is known once their reported runs are there."""
        lacking = {(task, column) for task, column, _ in self.missing}
        for task in self.tasks if self.grid.get("time_budget") is not None else ():
            limit = self.time_budget(task)
            for column in self.columns:
                taken = self.seconds(task, column)
                if (task, column) not in lacking and limit and taken and taken < FASTER * limit:
                    for seed in self.seeds:
                        if (task, column, "time", str(seed)) not in self._seen:
                            yield task, column, seed

    # -- questions ---------------------------------------------------------------------------------------------------

    def of(self, task: str, column: str) -> list[Run]:
        """The finished runs of a cell, by seed."""
        return [run for _, run in sorted(self.runs.get((task, column), {}).items())]

    def seconds(self, task: str, column: str) -> float | None:
        """Median training time of a cell's finished runs."""
        found = [run.seconds for run in self.of(task, column)]
        return median(found) if found else None

    def time_budget(self, task: str) -> float | None:
        """The grid's time budget, else the median time of the reference's runs."""
        given = number(self.grid.get("time_budget"))
        return given if given is not None and given > 0 else self.seconds(task, self.reference or "")

    def values(self, task: str, column: str, measure: str) -> list[float]:
        """`loss` or `metric` of each finished run of a cell that has it on the task's split."""
        return list(self.by_seed(task, column, measure).values())

    def by_seed(self, task: str, column: str, measure: str) -> dict[int, float]:
        runs = [run for run in self.of(task, column) if run.split == self.split_of(task)]
        return {run.seed: value for run in runs if (value := run.value(measure)) is not None}

    def split_of(self, task: str) -> str:
        """The split on which scores on a task are compared: test if any run was tested, else dev."""
        return "dev" if self._splits.get(task) == {"dev"} else "test"

    @cached_property
    def _splits(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for (task, _), runs in self.runs.items():
            found.setdefault(task, set()).update(run.split for run in runs.values())
        return found

    def split(self, tasks: Iterable[str]) -> str:
        """The split of the scores on these tasks, in words."""
        return " or ".join(sorted({self.split_of(task) for task in tasks}, reverse=True)) or "test"

    def untested(self, tasks: Iterable[str]) -> list[str]:
        """Columns with runs on these tasks that were scored on dev alone, although runs of other columns were tested. Scores
        on dev and on test must not be compared.
        """
        tested = [task for task in tasks if self.split_of(task) == "test"]
        return [c for c in self.columns if any(run.split == "dev" for task in tested for run in self.of(task, c))]

    def failed(self, task: str, column: str, kind: str = "seed") -> dict[int, str]:
        """Reasons, by seed, why runs of a cell failed; unreadable files are not included."""
        mine = [f for f in self.failures if (f.task, f.column, f.kind) == (task, column, kind) and f.readable]
        return {int(failure.seed): failure.reason for failure in mine if failure.seed.isdigit()}

    def steady(self, column: str, tasks: Iterable[str]) -> bool:
        """Whether no run of a column on these tasks failed and it lacks none. A mean over only the others is biased."""
        return not any(self.failed(task, column) or self.lacks(task, column) for task in tasks)

    def lacks(self, task: str, column: str) -> bool:
        """Whether a run of a cell cannot be read, or is missing although another column that trains alike has the run."""
        held = {*self.runs.get((task, column), ()), *self.failed(task, column)}
        unreadable = any((f.task, f.column, f.kind) == (task, column, "seed") and not f.readable for f in self.failures)
        return unreadable or bool(self._held.get((task, self._way(column)), set()) - held)

    @cached_property
    def _held(self) -> dict[tuple[str, str], set[int]]:
        """The seeds of any finished run on a task, by the way in which its column trains."""
        found: dict[tuple[str, str], set[int]] = {}
        for (task, column), runs in self.runs.items():
            found.setdefault((task, self._way(column)), set()).update(runs)
        return found

    def _way(self, column: str) -> str:
        return ZEROTH if (family := self.family(column)) == CONTROL else family

    @cached_property
    def first_info(self) -> dict[str, dict[str, Any]]:
        """run_info of one run by column."""
        return {str(info.get("column")): info for info in reversed(self.infos)}

    def label(self, column: str) -> str:
        """A column in words; those of all its reported runs, if they differ."""
        infos = [run.info for task in self.tasks for run in self.of(task, column)] or [self.first_info.get(column, {})]
        return " or ".join(dict.fromkeys(str(info.get("label") or column) for info in infos))

    def objectives(self) -> dict[str, str]:
        """The objective, by column, of columns that minimise one in place of the loss."""
        found = {c: part(self.first_info.get(c), "configuration").get("objective") for c in self.columns}
        return {column: str(objective) for column, objective in found.items() if objective}

    def tuner(self, column: str) -> str:
        """The tuner of a column; empty if it has none."""
        info = self.first_info.get(column)
        settings = self.options(column) if info is None else part(info, "configuration")
        return str(settings.get("tuner") or "")

    def options(self, column: str) -> dict[str, Any]:
        """A column's own settings in the grid."""
        return part(self.entries.get(column), "options")

    def family(self, column: str) -> str:
        """How a column trains: by forward passes only, as a control for these, by gradients, or not at all.

        That follows from its method and tuner, and not from its name, which is the user's.
        """
        known = self.first_info.get(column) or self.entries.get(column) or {}
        optimizer = str(known.get("optimizer") or column)
        if optimizer == ZERO_SHOT:
            return UNTRAINED
        method = self._methods.get(optimizer)
        if optimizer.startswith("first-order-") if method is None else method.needs_gradient:
            return FIRST
        return CONTROL if self.tuner(column).startswith("random:") else ZEROTH

    @cached_property
    def _methods(self) -> dict[str, type[Method]]:
        return methods()

    def metric_of(self, task: str) -> str | None:
        """The task's main metric."""
        named = [info.get("metric") for info in self.infos if info.get("task") == task]
        return next((str(name) for name in named if name), None)

    def before(self, task: str, *columns: str) -> float | None:
        """Mean loss on dev before training of the first of these columns that has one; by default of the reference, or the
        first column that does.
        """
        for column in columns or (self.reference or "", *self.columns):
            if known := [run.before for run in self.of(task, column) if run.before is not None]:
                return fmean(known)
        return None

    def elsewhere(self, task: str) -> dict[str, float]:
        """The loss on dev before training of columns for which it is another than `before` by more than a hundredth."""
        usual = self.before(task)
        starts = {column: self.before(task, column) for column in self.columns}
        return {c: s for c, s in starts.items() if s is not None and usual and not math.isclose(s, usual, rel_tol=0.01)}

    def has_classes(self, task: str) -> bool:
        return any(r.majority is not None or r.accuracy is not None for c in self.columns for r in self.of(task, c))

    def majority(self, task: str) -> float | None:
        """Fraction of the commonest class, on the reported split."""
        runs = [r for column in self.columns for r in self.of(task, column) if r.split == self.split_of(task)]
        known = [run.majority for run in runs if run.majority is not None]
        return fmean(known) if known else None


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
