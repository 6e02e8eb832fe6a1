"""Run a grid: for every task and column a search, then the reported runs. Finished runs are not repeated."""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from metazo import recipes
from metazo.comparisons.cell import NO_SPACE
from metazo.comparisons.cluster import RayPool, ray_module
from metazo.comparisons.columns import Column
from metazo.comparisons.examine import Facts, examine
from metazo.comparisons.grid import FASTER, PARTS, Grid, Run, longer, pairs_of, parts_in, runs_of
from metazo.comparisons.key import cores
from metazo.comparisons.live import Progress
from metazo.comparisons.packed import is_packed, unpack
from metazo.comparisons.pool import Pool
from metazo.comparisons.rates import look
from metazo.comparisons.results import SEARCH, Result, Search, write_search
from metazo.comparisons.script import needs_script
from metazo.comparisons.store import Store
from metazo.errors import UserError
from metazo.io.lock import FolderLock
from metazo.io.plain import shown
from metazo.io.terminal import Console
from metazo.runs.interrupt import Interrupted, interruptible
from metazo.runs.method import resolve_device
from metazo.runs.resources import refuse_ranks
from metazo.settings import build, read_recipe

Flow = Generator[list[Run], list[Result], None]


@dataclass
class _Batch:
    """Runs that a flow waits for, and their results."""

    flow: Flow
    runs: list[Run]
    results: dict[Path, Result] = field(default_factory=dict)


def compare(
    grid: Grid | str | Path, console: Console | None = None, *, retry_failed: bool = False, part: str | None = None
) -> dict[str, int]:
    """Do the runs of the grid that are not finished. Returns numbers of runs: done, of them kept, failed and diverged, and
    not_run; and the number of searches that are unsettled.

    grid: a Grid, its YAML file, or the name of one that metazo recipes lists; it writes into `out` of the grid.
    part: "INDEX/COUNT", such as 0/16: only every COUNT-th pair of a task and a column, from INDEX on. Several processes, on
    any machines that share the folder, may do different parts at the same time; a call without `part` afterwards does what
    is left, and what needs all of them: search.json and the time budget.

    kept: runs that an earlier call had finished; not_run: reported runs of columns whose search gave no finite loss at any
    rate. unsettled: a run has failed, not diverged, so that the search may not choose a rate, and the reported runs of its
    column are not done; the next call repeats the run. Raises UserError for bad input, before anything is written, and if a
    disk has no space for a run or a result; Interrupted if a signal asked it to stop. In both cases finished runs are kept,
    and the same call continues.
    """
    console = Console.of(console)
    refuse_ranks("compare")
    if isinstance(grid, str | Path):
        grid = build(Grid, read_recipe(recipes.locate(str(grid))))
    if not isinstance(grid, Grid):
        raise UserError(f"`grid` is a metazo.Grid, its YAML file or the name of one, not {shown(grid)}.")
    if grid.engine == "ray":
        ray_module()
    else:
        needs_script(grid)  # refused before anything is written
    chosen, own = pairs_of(grid, part)
    folder = grid.out / own
    for lock in (folder, *_others(grid.out, folder)):
        FolderLock(lock).check()
    if part is not None and is_packed(grid.out):
        raise UserError(f"`out` {grid.out} is packed: call metazo compare without `part` first.")
    facts = examine(grid)
    with FolderLock(folder):
        for lock in _others(grid.out, folder):  # a call that began at the same time
            FolderLock(lock).check()
        try:
            return _Comparison(grid, facts, console, retry_failed, chosen, None if part is None else folder).run()
        except OSError as error:
            raise UserError(f"`out` {grid.out} cannot be used: {error.strerror or error}.") from error


def _pool(grid: Grid, console: Console) -> Pool | RayPool:
    """What does the runs. Both engines give a run the same number of threads, on which its last bits may depend."""
    threads = grid.cpus_per_run or int(os.environ.get("OMP_NUM_THREADS") or max(1, cores() // grid.workers))
    if grid.engine == "processes":
        return Pool(grid.workers, threads, needs_script(grid))
    gpus = grid.gpus_per_run
    if gpus is None:
        gpus = float(resolve_device(grid.config.get("device", "auto")).type == "cuda")
    return RayPool(grid.workers, threads, gpus, lambda note: console.say("note:", note))


def _others(out: Path, own: Path) -> list[Path]:
    """The folders that no other call may hold while one holds its own: a whole call excludes every part, a part the whole."""
    return [out] if own != out else parts_in(out)


class _Comparison:
    """The state of a running comparison.

    pairs: the tasks and columns to run; part: the folder of a part of the grid, which leaves alone what parts share.
    """

    def __init__(
        self,
        grid: Grid,
        facts: dict[tuple[str, str], Facts],
        console: Console,
        retry_failed: bool,
        pairs: list[tuple[str, Column]],
        part: Path | None,
    ):
        self.grid, self.facts, self.console, self.pairs, self.part = grid, facts, console, pairs, part
        self.store = Store(grid, facts, retry_failed, (part or grid.out) / "running")
        self.names = self.store.names
        self.searches: dict[str, dict[str, Search]] = {name: {} for name in self.names.values()}
        self.results: dict[Path, Result] = {}
        self.waiting = 0  # flows whose runs are not all done
        self.unsettled = 0  # searches

    def run(self) -> dict[str, int]:
        grid = self.grid
        self.store.clear()
        changed = grid.write()
        if self.part is None:
            unpack(grid.out)
        moved = self.store.supersede(None if self.part is None else self.pairs)
        self.searches |= self.store.remembered(moved)
        if self.part is not None and (changed or moved):  # of another grid; the call that does the rest writes it again
            (grid.out / SEARCH).unlink(missing_ok=True)
        with (
            _pool(grid, self.console) as pool,
            interruptible() as caught,
            Progress(self.console, *self._size()) as shown,
        ):
            self._drive((self._flow(task, column) for task, column in self.pairs), pool, caught, shown)
            if grid.time_budget is not None and self.part is None:
                extra = [runs for task in grid.tasks for runs in self._extra(task)]
                shown.extend(sum(map(len, extra)), sum(run.forwards for runs in extra for run in runs))
                self._drive((_only(runs) for runs in extra), pool, caught, shown)
        self.store.clear()
        if self.part is None:
            shutil.rmtree(grid.out / PARTS, ignore_errors=True)
        count = {"runs": shown.done, "kept": shown.kept, "failed": shown.failed, "diverged": shown.diverged}
        return count | {"not_run": shown.not_run, "unsettled": self.unsettled}

    def _size(self) -> tuple[int, float]:
        """Runs and forward passes, without extensions of the searches."""
        runs, forwards = 0, 0.0
        for task, column in self.pairs:
            fact, budget = self.facts[task, column.name], self.grid.budget_of(column) if column.trains else 0
            searches = len(fact.lrs) * self.grid.search_seeds if len(fact.lrs) > 1 else 0
            runs += searches + self.grid.seeds
            forwards += (searches * self.grid.search_budget + self.grid.seeds) * budget
        return runs, forwards

    # -- the runs to do, column by column --------------------------------------------------------------------------

    def _flow(self, task: str, column: Column) -> Flow:
        """Yields the runs of a column on a task in batches; each batch depends on the results of the batches before."""
        if not column.trains:
            yield runs_of(self.grid, task, column, None)
            return
        found, used = yield from look(self.grid, task, column, self.facts[task, column.name].lrs)
        search = found or self.store.earlier(task, column)
        self._note(task, column, search, used, found is not None)
        runs = runs_of(self.grid, task, column, search.lr) if search else []
        runs = runs if found else [run for run in runs if self.store.path(run).exists()]
        if runs:
            yield runs

    def _note(self, task: str, column: Column, search: Search | None, used: list[Run], settled: bool) -> None:
        """Keep the result of a search, and put aside what is not of it."""
        name, text = self.names[task], ""
        if not settled:
            self.unsettled += 1
            text = "a run of the search failed, so no rate is chosen and no reported run is done; the same command tries again"
            if search is not None:
                text += f". Reported runs of earlier calls, at rate {search.lr:g}, stay"
            if again := self.store.failed_again(used):
                text += f". At rate {again} it failed as before, for the same reason; if it always does, give `lrs` without it"
        elif search is not None and search.lr is None:
            text = f"{self.grid.seeds} not run: no learning rate of the search gave a finite loss"
        if text:
            self.console.say("not run:" if settled else "incomplete:", f"{name}, {column.name}: {text}.", "yellow")
        self.store.settle(task, column, search, used if settled else None)
        before = self.searches[name].pop(column.name, None)
        if search is not None:
            self.searches[name][column.name] = search
        if self.part is None:
            write_search(self.grid.out, self.searches)
        elif search != before:
            (self.grid.out / SEARCH).unlink(missing_ok=True)

    def _extra(self, task: str) -> list[list[Run]]:
        """The longer runs of methods that finish before the time budget of a task is used up.

        Longer runs of an earlier call, with another time budget, are put aside: equal times are read off what is there.
        """
        extra = self._longer(task)
        self.store.settle_longer(task, [run for runs in extra for run in runs])
        return extra

    def _longer(self, task: str) -> list[list[Run]]:
        grid = self.grid
        times = {column.name: self._seconds(task, column) for column in grid.resolved if column.trains}
        limit = times.get(grid.reference) if grid.time_budget == "reference" else grid.time_budget
        if limit is None:
            self.console.print(f"note: no {grid.reference} finished on {task}, so there is no time budget", style="dim")
            return []
        assert isinstance(limit, float)
        extra = []
        for column in grid.resolved:
            taken = times.get(column.name)
            if taken and taken < FASTER * limit:
                lr = self.searches[self.names[task]][column.name].lr
                forwards = int(grid.budget_of(column) * limit / taken)
                extra.append([longer(run, forwards) for run in runs_of(grid, task, column, lr)])
        return extra

    def _seconds(self, task: str, column: Column) -> float | None:
        """Median training time of a column's reported runs."""
        paths = [self.store.path(run) for run in runs_of(self.grid, task, column, None)]
        done = [self.results[path] for path in paths if path in self.results and self.results[path].finished]
        return median(result.train_info["seconds"] for result in done) if done else None

    # -- running them ----------------------------------------------------------------------------------------------

    def _drive(self, flows, pool: Pool | RayPool, caught: list[str], shown: Progress) -> None:
        """Keep the workers busy with the runs of the flows, in their order, until no run is left."""
        queue: deque[tuple[Run, _Batch]] = deque()
        out: dict[Path, tuple[Run, _Batch]] = {}
        while True:
            while pool.idle and not caught:
                if queue:
                    run, batch = queue.popleft()
                    job = self.store.job(run)
                    known = self.store.known(run, job)
                    if known is not None:
                        self._done(run, batch, known, False, queue, shown)
                    else:
                        out[job.out] = run, batch
                        pool.submit(job)
                elif (flow := next(flows, None)) is not None:
                    self._go_on(flow, None, queue, shown)
                else:
                    break
            shown.show(pool.running)
            if caught:
                raise Interrupted(
                    f"{caught[0]} after {shown.done} of {shown.runs} runs; the same command continues with the rest.",
                    caught[0].split()[0],
                )
            if not pool.running:
                if self.waiting:
                    raise RuntimeError(
                        f"Columns that wait for a result that no run gives: {self.waiting}. Two of their runs have one path."
                    )
                return
            for job, result in pool.collect(0.25):
                run, batch = out.pop(job.out)
                if result is None:  # unfinished: no search may use it, and the next call repeats it
                    caught = caught or ["SIGTERM to a worker"]
                    continue
                if result.run_info["status"] == NO_SPACE:
                    what = str(result.run_info["reason"]).partition(";")[0]
                    raise UserError(
                        f"`out` {self.grid.out}: a disk has too little space for a run ({run}: {what}); make room, and the "
                        "same command continues with the rest."
                    )
                self.store.save(run, result)
                self._done(run, batch, result, True, queue, shown)

    def _go_on(self, flow: Flow, results: list[Result] | None, queue: deque, shown: Progress) -> None:
        """Ask a flow for its next runs and put them before those of other flows, so that columns finish one by one."""
        try:
            runs = flow.send(results) if results is not None else next(flow)
        except StopIteration:
            return
        if results is not None and runs[0].kind == "search":
            shown.extend(len(runs), sum(run.forwards for run in runs))
        batch = _Batch(flow, runs)
        self.waiting += 1
        queue.extendleft((run, batch) for run in reversed(runs))

    def _done(self, run: Run, batch: _Batch, result: Result, ran: bool, queue: deque, shown: Progress) -> None:
        path = self.store.path(run)
        self.results[path] = batch.results[path] = result
        shown.add(result, ran)
        if len(batch.results) == len(batch.runs):
            self.waiting -= 1
            self._go_on(batch.flow, [batch.results[self.store.path(each)] for each in batch.runs], queue, shown)


def _only(runs: list[Run]) -> Flow:
    yield runs
