"""The results folder of a grid: finds results that exist, moves away those of another grid, and writes new ones."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from metazo.comparisons.cell import Job, configuration, failed
from metazo.comparisons.columns import Column
from metazo.comparisons.examine import Facts
from metazo.comparisons.grid import SEARCH_SEED, Grid, Run, runs_of, search_run
from metazo.comparisons.key import key
from metazo.comparisons.rates import look
from metazo.comparisons.results import Result, Search, cell_path, read_search
from metazo.io.files import expanded
from metazo.tasks import resolve

BESIDE = ("inputs", "use", "rows")
"""What identifies a run beside its key."""


class Store:
    """The results folder of a grid. running: the folder of unfinished runs."""

    def __init__(self, grid: Grid, facts: dict[tuple[str, str], Facts], retry_failed: bool, running: Path):
        self.grid, self.facts, self.retry_failed = grid, facts, retry_failed
        self.names = {task: resolve(task).name for task in grid.tasks}
        self.running = running
        self.failed: dict[Path, str] = {}  # why a run of a search that is done again had failed

    def clear(self) -> None:
        """Remove the files of runs that were stopped."""
        shutil.rmtree(self.running, ignore_errors=True)

    def path(self, run: Run) -> Path:
        return cell_path(self.grid.out, self.names[run.task], run.column.name, run.kind, run.seed, run.lr)

    def job(self, run: Run) -> Job:
        path = self.path(run)
        config = run.config(self.grid, self.running / path.relative_to(self.grid.out / "cells").with_suffix(""))
        fact = self.facts[run.task, run.column.name]
        info: dict[str, Any] = {
            "task": self.names[run.task],
            "column": run.column.name,
            "label": run.column.label,
            "kind": run.kind,
            "seed": run.seed,
            "lr": run.lr,
            "model": _last_part(config.model),
            "optimizer": run.column.optimizer,
            "metric": fact.metric,
            "budget": run.forwards if run.column.trains else 0,
            "trained_weights": fact.trained,
            "cost": fact.cost,
            "configuration": configuration(config) | {"model": _last_part(config.model), "task": self.names[run.task]},
            "hashes": fact.hashes,
            "key": key(config, fact.hashes),
            "inputs": fact.inputs,
            "use": fact.use,
            "rows": fact.rows,
            "workers": self.grid.workers,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "status": "finished",
            "reason": None,
        }
        kept = self.grid.keep_models and run.kind != "search" and run.column.trains
        return Job(config, info, run.column.trains, self._model(path) if kept else None)

    def known(self, run: Run, job: Job) -> Result | None:
        """The result of an earlier call, or a failure without a run if no rate of the search gave a finite loss.

        A result without the model that the grid wants to keep does not count. A result of another grid that is in the run's
        place is put aside.
        """
        path = self.path(run)
        if path.exists() and not same(there := Result.load(path).run_info, job.info):
            self._put_aside(path, there)
        for place in (path, *self._aside(path)):  # a column that is asked for again gets its results back
            if place.exists():
                found = Result.load(place)
                failed_before = not (found.finished or found.diverged)
                again = failed_before and (self.retry_failed or run.kind == "search")  # a search needs all its runs
                if again and place == path and same(found.run_info, job.info):
                    self.failed[path] = str(found.run_info.get("reason"))
                lacks = job.keep is not None and found.finished and not self._model(place).is_dir()
                if same(found.run_info, job.info) and not again and not lacks:
                    if place != path:
                        self._move(place, path)
                    return found
        if run.column.trains and run.lr is None:
            minimised = "objective" if job.config.objective else "loss"
            result = failed(job, f"No learning rate of the search gave a finite {minimised} on dev.")
            self.save(run, result)
            return result
        return None

    def save(self, run: Run, result: Result) -> None:
        result.save(self.path(run))

    def remembered(self, superseded: set[tuple[str, str]]) -> dict[str, dict[str, Search]]:
        """Searches of an earlier call that are still valid, so that search.json is complete after a stop."""
        names, found = {column.name for column in self.grid.resolved}, read_search(self.grid.out)
        return {
            task: {
                name: found[task][name] for name in names & set(found.get(task, {})) if (task, name) not in superseded
            }
            for task in self.names.values()
        }

    def earlier(self, task: str, column: Column) -> Search | None:
        """A search with failed runs as earlier versions ended it, if there are reported runs of the rate that it chose."""
        flow = look(self.grid, task, column, self.facts[task, column.name].lrs, failed_too=True)
        paths = [self.path(run) for run in next(flow)]
        while all(path.exists() for path in paths):
            try:
                paths = [self.path(run) for run in flow.send([Result.load(path) for path in paths])]
            except StopIteration as stop:
                search, _ = stop.value
                reported = [self.path(run) for run in runs_of(self.grid, task, column, search.lr)]
                rates = [Result.load(path).run_info["lr"] for path in reported if path.exists()]
                return search if search.lr is not None and search.lr in rates else None
        return None

    def failed_again(self, used: list[Run]) -> str:
        """The rates of a search's runs that failed in an earlier call, and in this one for the same reason."""
        paths = {path: run.lr for run in used if (path := self.path(run)) in self.failed}
        same_reason = [
            lr for path, lr in paths.items() if Result.load(path).run_info.get("reason") == self.failed[path]
        ]
        return ", ".join(dict.fromkeys(f"{lr:g}" for lr in same_reason))

    # -- results of another grid -----------------------------------------------------------------------------------

    def supersede(self, pairs: list[tuple[str, Column]] | None = None) -> set[tuple[str, str]]:
        """Move results that the grid does not ask for to RESULTS/superseded, so that no report mixes two grids.

        pairs: the tasks and columns of a part of the grid, which leaves the others alone, because other parts may be running.
        A result that the grid asks for again is moved back by `known`. Returns task and column of each moved result.
        """
        moved = set()
        every = [(task, column) for task in self.grid.tasks for column in self.grid.resolved]
        wanted = {
            (self.names[task], column.name): (task, column) for task, column in (every if pairs is None else pairs)
        }
        for path in sorted((self.grid.out / "cells").glob("*/*/*.json")):
            place = path.parts[-3], path.parts[-2]
            if pairs is not None and place not in wanted:
                continue
            info = Result.load(path).run_info
            if place not in wanted or not self._belongs(info, *wanted[place]):
                self._put_aside(path, info)
                moved.add(place)
        return moved

    def settle(self, task: str, column: Column, search: Search | None, used: list[Run] | None) -> None:
        """Put aside a column's runs that its search did not use, and the reported ones that are not of the rate it chose.

        They go before the column's runs start, so that no mean is over two rates if the comparison is stopped. search: None
        if there is none, so that no reported run is of its rate. used: None if it is not settled, and may still use every run.
        """
        folder, paths = self.grid.out / "cells" / self.names[task] / column.name, {self.path(run) for run in used or ()}
        for path in sorted([*folder.glob("seed-*.json"), *folder.glob("time-*.json")]):
            info = Result.load(path).run_info
            if search is None or info["lr"] != search.lr or not self._belongs(info, task, column):
                self._put_aside(path, info)
        for path in sorted(folder.glob("search-*.json")) if used is not None else ():
            if path not in paths:
                self._put_aside(path, Result.load(path).run_info)

    def settle_longer(self, task: str, asked: list[Run]) -> None:
        """Put aside a task's runs to a time budget that are not among those asked for."""
        keys = {self.path(run): self.job(run).info for run in asked}
        for path in sorted((self.grid.out / "cells" / self.names[task]).glob("*/time-*.json")):
            info = Result.load(path).run_info
            if path not in keys or not same(info, keys[path]):
                self._put_aside(path, info)

    def _belongs(self, info: dict[str, Any], task: str, column: Column) -> bool:
        search = info["kind"] == "search"
        first, count = (SEARCH_SEED, self.grid.search_seeds) if search else (0, self.grid.seeds)
        asked = search_run(self.grid, task, column, 1.0, 0).forwards if search else self.grid.budget_of(column)
        if not 0 <= info["seed"] - first < count or (info["kind"] == "time" and self.grid.time_budget is None):
            return False
        if info["kind"] != "time" and column.trains and info["budget"] != asked:
            return False
        forwards = info["budget"] if column.trains else self.grid.budget_of(column)
        return same(info, self.job(Run(task, column, info["kind"], info["seed"], info["lr"], forwards)).info)

    def _aside(self, path: Path) -> Iterator[Path]:
        """The results that were put aside from a path. Those that earlier versions moved have the file's own name."""
        folder = self._superseded(path)
        yield folder / path.name
        yield from sorted(folder.glob(f"{path.stem}-*.json"))

    def _put_aside(self, path: Path, info: dict[str, Any]) -> None:
        """Move a result and its model aside. Its identity is a part of its new name, so that those of several grids remain."""
        identity = sha256(ascii([info.get(name) for name in ("key", *BESIDE)]).encode()).hexdigest()
        self._move(path, self._superseded(path) / f"{path.stem}-{identity[:16]}.json")

    def _move(self, path: Path, target: Path) -> None:
        """Move a result, and before it its model, so that no result has the model of another run."""
        for old, new in ((self._model(path), self._model(target)), (path, target)):
            if old.exists():
                new.parent.mkdir(parents=True, exist_ok=True)
                if new.is_dir():
                    shutil.rmtree(new)
                os.replace(old, new)

    def _model(self, path: Path) -> Path:
        """The folder of a result's tuned model; beside the result if that was put aside."""
        cells = self.grid.out / "cells"
        folder = self.grid.out / "models" / path.relative_to(cells) if path.is_relative_to(cells) else path
        return folder.with_suffix("")

    def _superseded(self, path: Path) -> Path:
        return self.grid.out / "superseded" / path.parent.relative_to(self.grid.out / "cells")


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a result belongs to the given run. What results of earlier versions do not have beside the key is not checked."""
    return found.get("key") == wanted["key"] and all(found.get(name, wanted[name]) == wanted[name] for name in BESIDE)


def _last_part(name: str) -> str:
    """A model's name without local folders; for a folder called `model`, the name of its parent folder."""
    path = expanded(name)
    if not path.is_dir():
        return name
    whole = Path(os.path.abspath(path))  # symbolic links keep their own name
    return whole.parent.name if whole.name == "model" else whole.name
