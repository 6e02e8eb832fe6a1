"""The grid of a comparison: its settings, from YAML and flags, and the settings of each of its runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from metazo.comparisons.columns import Column, check_settings, read_rates, resolve
from metazo.errors import UserError
from metazo.io.files import write_whole
from metazo.io.plain import read_yaml, shown
from metazo.runs.config import FinetuneConfig
from metazo.settings import build, check_number, check_values

MOST_EXTENSIONS, MOST_WORKERS = 100, 1024
SEARCH_SEED = 1000  # searches count from here, reported runs from 0
REFERENCE = "mezo"
GRID = "grid.yaml"
PARTS = "parts"  # folder with the locks and the unfinished runs of parts of a grid
FASTER = 0.95  # a column whose runs take less than this fraction of the time budget gets longer ones
# The grid sets the budgets; a run's result is the only thing that is kept of it.
OF_A_RUN: dict[str, Any] = {"keep": "none", "snapshot_every": 0}


@dataclass
class Grid:
    """Everything that decides a comparison."""

    model: str
    """Folder or Hub id of the model; pico is the small one that metazo carries"""
    tasks: list[Any]
    """Tasks by name, or YAML files of your own; or mappings with name and file, as grid.yaml has them"""
    columns: list[Any]
    """Methods: names, or mappings with name, optimizer, options, lrs and budget; all means every method"""
    budget: int
    """Forward passes per run"""
    out: Path = Path("runs/compare")
    """Folder of the results"""
    data: Path | None = None
    """Folder with <task>/<split>.jsonl; by default the Hub"""
    seeds: int = 5
    """Runs of each method on each task, with the seeds 0, 1, ..."""
    lrs: list[float] | None = None
    """Learning rates from which every search starts; by default three around each method's own"""
    search_seeds: int = 1
    """Number of seeds of a search: 1000, 1001, ...; their runs are not reported"""
    search_budget: float = 1.0
    """Forward passes per run of the search, as a fraction of the budget"""
    search_config: dict[str, Any] = field(default_factory=dict)
    """Settings of the search's runs alone, as for metazo finetune, such as eval_every"""
    extensions: int = 5
    """Most additional rates if the best rate of a search is its smallest or largest"""
    time_budget: float | str | None = None
    """Seconds of training that fast methods get in additional, longer runs; or the word reference: the time of the reference"""
    reference: str = REFERENCE
    """Column with which the others are compared"""
    tuner: str | None = None
    """Tuner of the columns that need one; by default one from the zoo"""
    workers: int = 1
    """Number of parallel runs; the cores are divided among them"""
    engine: Literal["processes", "ray"] = "processes"
    """Parallel runs are processes of this machine, or tasks of ray, which repeats those of a worker that dies"""
    cpus_per_run: int | None = None
    """Cores and threads of each run; by default this machine's cores divided by `workers`"""
    gpus_per_run: float | None = None
    """GPUs of each task of ray, a whole number or a fraction below 1; by default 1 if the device is a GPU"""
    keep_models: bool = False
    """Keep the tuned model of each reported run, under RESULTS/models"""
    config: dict[str, Any] = field(default_factory=dict)
    """Settings of every run, as for metazo finetune"""

    def __post_init__(self):
        check_values(self)
        for name in ("out", "data"):
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, Path(value))
        for name in ("budget", "seeds", "search_seeds", "workers"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` must be at least 1, not {getattr(self, name)}.")
        check_number("extensions", self.extensions, least=0, most=MOST_EXTENSIONS)
        check_number("search_seeds", self.search_seeds, most=SEARCH_SEED)
        check_number("workers", self.workers, most=MOST_WORKERS)
        if self.cpus_per_run is not None:
            check_number("cpus_per_run", self.cpus_per_run, least=1, most=MOST_WORKERS)
        self._check_gpus()
        if not 0 < self.search_budget <= 1:
            raise UserError(
                f"`search_budget` is a fraction of the budget above 0 and up to 1, not {self.search_budget}."
            )
        if self.seeds > SEARCH_SEED:
            raise UserError(f"`seeds` is at most {SEARCH_SEED}, because searches use the seeds from {SEARCH_SEED} on.")
        if self.time_budget not in (None, "reference"):
            self.time_budget = _seconds(self.time_budget)
        if not self.tasks:
            raise UserError("`tasks` is empty, and a comparison needs at least one; metazo tasks lists them.")
        self.tasks = [_task(entry) for entry in self.tasks]
        if self.lrs is not None:
            self.lrs = read_rates("`lrs`", self.lrs)
        for name in ("config", "search_config"):
            settings = {key.replace("-", "_"): value for key, value in getattr(self, name).items()}
            check_settings(name, settings)
            setattr(self, name, settings)
        self.resolved = resolve(self.columns, self.tuner)
        self._check_reference()

    def _check_gpus(self) -> None:
        gpus = self.gpus_per_run
        if gpus is None:
            return
        if self.engine != "ray":
            raise UserError(
                "`gpus_per_run` is for `engine` ray; with processes, all runs share the device that they name."
            )
        if not 0 <= gpus < math.inf or (gpus > 1 and gpus != int(gpus)):
            raise UserError(f"`gpus_per_run` is a whole number, or a fraction from 0 to 1, not {gpus:g}.")

    def _check_reference(self) -> None:
        """The default may be no column: then nothing is tested against it."""
        named = [column.name for column in self.resolved]
        if self.reference not in named and (self.reference != REFERENCE or self.time_budget == "reference"):
            taken = ", and `time_budget` takes its time" if self.time_budget == "reference" else ""
            raise UserError(
                f"`reference` is {shown(self.reference)}, which is no column{taken}; name one of {', '.join(named)}."
            )
        trained = [column.name for column in self.resolved if column.trains]
        if self.reference in named and self.reference not in trained:
            raise UserError(
                f"`reference` is {shown(self.reference)}, which does not train, so that no task would count; "
                f"name {'one of ' + ', '.join(trained) if trained else 'a column that trains'}."
            )

    def column(self, name: str) -> Column:
        return next(column for column in self.resolved if column.name == name)

    def budget_of(self, column: Column) -> int:
        """Forward passes per run of a column."""
        return column.budget or self.budget

    def write(self) -> bool:
        """grid.yaml: the grid with every column written out; a comparison can be run from it again. Returns: whether it was
        another one, or none.

        A task of a file is written with its name, so that the report needs no file that may be elsewhere by then.
        """
        from metazo.tasks import resolve as task_of  # the command line shows its flags without numpy

        plain = asdict(self) | {"columns": [asdict(column) for column in self.resolved]}
        named = [(task_of(task).name, task) for task in self.tasks]
        plain["tasks"] = [task if name == task else {"name": name, "file": task} for name, task in named]
        plain |= {name: str(plain[name]) for name in ("out", "data") if plain[name] is not None}
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110).encode()
        path = self.out / GRID
        changed = not path.exists() or path.read_bytes() != text
        write_whole(path, text)
        return changed


def _task(entry: Any) -> str:
    """The name or file of an entry of `tasks`."""
    if isinstance(entry, Mapping) and set(entry) == {"name", "file"}:
        entry = entry["file"]
    if not isinstance(entry, str | Path):
        raise UserError(f"`tasks`: {shown(entry)} is neither a name or a file nor a mapping with name and file.")
    return str(entry)


def task_name(entry: Any) -> str:
    """The name of a task in a grid, whose entry has it, or may be a YAML file in grids of earlier versions."""
    if isinstance(entry, Mapping) and "name" in entry:
        return str(entry["name"])
    entry = str(entry)
    if not entry.endswith((".yaml", ".yml")):
        return entry
    try:
        return str(read_yaml(Path(entry), "task file")["name"])
    except (UserError, KeyError):
        return Path(entry).stem


def _seconds(text: Any) -> float:
    with suppress(ValueError, TypeError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise UserError(f"`time_budget` is a number of seconds above 0, or the word reference, not {text!r}.")


@dataclass(frozen=True)
class Run:
    """One run of a comparison: its position in the grid."""

    task: str
    column: Column
    kind: Literal["search", "seed", "time"]
    seed: int
    lr: float | None
    forwards: int

    def config(self, grid: Grid, out: Path) -> FinetuneConfig:
        """The settings of the run. Raises UserError for settings that contradict each other.

        If test rows are taken from the train or dev file, all runs have one split, so that the rows on which the search
        chooses are no test rows.
        """
        from metazo.tasks import resolve as task_of  # the command line shows its flags without numpy
        from metazo.tasks.origins import shares_test_rows

        own: dict[str, Any] = {
            "lr": self.lr,
            "seed": self.seed,
            "forwards": self.forwards,
            "task": self.task,
            "out": out,
        }
        if self.column.trains:
            own["optimizer"] = self.column.optimizer
        shared = shares_test_rows(task_of(self.task))
        if self.kind == "search" and not shared:  # else its rows must not be those of the test
            own["test_examples"] = 0
        elif grid.keep_models:
            own["keep"] = "last"
        own["split_seed"] = 0 if shared else None
        layers: list[Mapping[str, Any]] = [{"model": grid.model, "data": grid.data}, OF_A_RUN, grid.config]
        layers.append(self._own_precision(grid))
        last = [grid.search_config] if self.kind == "search" else []
        try:
            return build(FinetuneConfig, *layers, self.column.settings(), *last, own)
        except UserError as error:
            where = ", with `search_config`" if last and grid.search_config else ""
            raise UserError(f"Column {self.column.name!r}{where}: {error}") from error

    def _own_precision(self, grid: Grid) -> dict[str, str]:
        """auto, if the column's method has not the precision that all columns share, as first-order methods have no compensated
        weights. What the column itself says comes after it."""
        from metazo.optimizers.registry import method
        from metazo.step.precision import PRECISIONS

        wanted = grid.config.get("precision", "auto")
        known = method(self.column.optimizer).precisions if self.column.trains else ()
        # what is no precision of any method is refused as any wrong value is
        return {"precision": "auto"} if known and wanted not in known and wanted in PRECISIONS else {}

    def __str__(self) -> str:
        rate = "" if self.lr is None else f", lr {self.lr:g}"
        return f"{self.task}, {self.column.name}{rate}, {self.kind} {self.seed}"


def pairs_of(grid: Grid, part: str | None) -> tuple[list[tuple[str, Column]], str]:
    """The pairs of a task and a column that a part of the grid has, and the part's folder within that of the results.

    Raises UserError for a part that does not exist.
    """
    pairs = [(task, column) for task in grid.tasks for column in grid.resolved]
    if part is None:
        return pairs, ""
    index, _, count = part.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"`part` is {part!r}; give INDEX/COUNT with an index from 0 to COUNT - 1, such as 0/16.")
    return pairs[int(index) :: int(count)], f"{PARTS}/{int(index)}-of-{int(count)}"


def parts_in(out: Path) -> list[Path]:
    """The folders of the parts of a grid that were begun and not yet taken over by a whole call."""
    return sorted((out / PARTS).iterdir()) if (out / PARTS).is_dir() else []


def runs_of(grid: Grid, task: str, column: Column, lr: float | None) -> list[Run]:
    """The reported runs of a column on a task at the learning rate that was chosen."""
    return [Run(task, column, "seed", seed, lr, grid.budget_of(column)) for seed in range(grid.seeds)]


def search_run(grid: Grid, task: str, column: Column, lr: float, seed: int) -> Run:
    return Run(task, column, "search", seed, lr, max(1, round(grid.budget_of(column) * grid.search_budget)))


def longer(run: Run, forwards: int) -> Run:
    """The same run with more forward passes, over which the schedule of the learning rate is stretched."""
    return replace(run, kind="time", forwards=forwards)
