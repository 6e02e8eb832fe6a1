"""The results of a comparison: one JSON file per run, in a folder that can be read without metazo.

    RESULTS/grid.yaml                                   the grid as it was resolved, all defaults written out
    RESULTS/search.json                                 results of the learning-rate searches: {task: {column: Search}}
    RESULTS/cells/<task>/<column>/search-<lr>-<seed>.json    a run of the search
    RESULTS/cells/<task>/<column>/seed-<seed>.json           a run that is reported, at the budget of forward passes
    RESULTS/cells/<task>/<column>/time-<seed>.json           a run of the same seed that is as long as the time budget, with a
                                                             schedule of that length (methods that are faster than the
                                                             reference; others are read off seed-*)

A finished comparison may be packed into two files (metazo/comparisons/packed.py). Each run's file holds exactly three
objects, `run_info`, `train_info` and `metrics`; see `Result`. It is written completely or not at all. Numbers that are
not finite are null.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from metazo.errors import UserError
from metazo.io.files import write_whole
from metazo.io.plain import finite, read_json, shown
from metazo.tasks.metrics import METRICS

SECTIONS = ("run_info", "train_info", "metrics")
SEARCH, COMPARISON, RUNS = "search.json", "comparison.json", "runs.jsonl.xz"
KINDS = ("search", "seed", "time")


@dataclass
class Result:
    """One run of a comparison.

    run_info: task, column, kind ("search", "seed", "time"), seed, lr, model, optimizer, label (the column in words),
        metric (name of the task's first metric, None for a pure language-model loss), budget (forward passes asked for),
        cost (of a step on a batch, see metazo.runs.cost; absent in older results, None without training),
        configuration (the FinetuneConfig of the run), hashes {model, data, tuner; objective and method if
        their files are the user's own} (sha256, or what the Hub calls the version; data: of the encoded rows that seed 0
        draws), key (hash of configuration and hashes: the run is not repeated while it, `inputs`, `use` and `rows` are the
        same), inputs (hash of the model's configuration and the task's definition; absent in older results), rows (hash of
        all rows from which the splits are drawn; absent in older results, None if they are generated or of the Hub), use
        (how the tuner is used: JSON texts of its networks' settings, or the
        hash of the trust in feedback maps; absent in older results, empty without a tuner), versions,
        machine {cores, threads, system, cpu, gpu, vectors, core; older results lack the last two}, workers, started (UTC),
        status ("finished", "failed" or "diverged": losses or weights that are not finite at the end),
        reason (a sentence if it did not finish).
    train_info: curve, a list of {step, forwards, seconds, train_loss, lr, dev {loss, metric..., majority, examples}}
        from step 0 (before training) on; `seconds` is the time of training without evaluation; steps, forwards, seconds
        (of the whole run, without evaluation and without the time for which the process was suspended), evaluation_seconds (of
        all else), cpu_seconds (of all of it, over all threads: seconds far above it tell of a machine that was busy with other
        things), wall_seconds, trained_weights, peak_memory_bytes (most that was resident above what the worker held before it
        loaded the model; on a GPU the peak of its allocator),
        sigma: None, or {"blocks": [name...], "steps": [...], "values": [[sigma of each block] for each step]},
        notes: the sentences of the run's summary; absent in older results and without training.
        A run that failed or diverged keeps what it has; values it has not reached are None and the curve ends early.
    metrics: before, dev, test: {loss, metric..., examples}, and objective if the run has one; before is dev before
        training; majority {dev, test}: accuracy of the commonest answer. All None for a run that failed or diverged.
    """

    run_info: dict[str, Any]
    train_info: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.run_info["status"] == "finished"

    @property
    def minimised(self) -> float:
        """The objective on dev at the end, or the loss if the run has no objective; inf if it diverged."""
        if not self.finished:
            return math.inf
        dev = self.metrics["dev"]
        return dev["objective"] if "objective" in dev else dev["loss"]

    @property
    def diverged(self) -> bool:
        """Whether losses or weights were not finite. Earlier versions wrote failed, and a reason that begins in one way."""
        info = self.run_info
        early = info["status"] == "failed" and str(info.get("reason")).startswith("The run stopped at step ")
        return early or info["status"] == "diverged"

    def to_bytes(self) -> bytes:
        return (json.dumps(finite(asdict(self)), indent=1, allow_nan=False, default=str) + "\n").encode()

    def save(self, path: Path) -> None:
        write_whole(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Result:
        """Raises UserError for a file that is not a result."""
        found = result_of(read_json(path, "result"), path)
        if isinstance(found, UserError):
            raise found
        return found


_NUMBER, _TEXT = (int, float), (str, type(None))
_INFO: dict[str, Any] = {
    "task": str, "column": str, "kind": str, "seed": int, "lr": (*_NUMBER, type(None)), "model": str, "optimizer": str,
    "label": str, "metric": _TEXT, "budget": _NUMBER, "configuration": dict, "hashes": dict, "key": str, "status": str,
    "reason": _TEXT,
}  # fmt: skip
"""Types of the fields of run_info that tables and messages show."""
_ROUNDING = 1e-9  # of a Matthews correlation


def result_of(content: Any, path: Path) -> Result | UserError:
    """The result in a JSON value, or an error that says what is wrong with it; fields that nothing shows are not checked."""
    if not isinstance(content, dict) or tuple(sorted(content)) != tuple(sorted(SECTIONS)):
        return UserError(f"{path} is no result of a comparison: it must hold exactly {', '.join(SECTIONS)}.")
    if not all(isinstance(content[name], dict) for name in SECTIONS):
        return UserError(f"{path} is no result of a comparison: {', '.join(SECTIONS)} must be objects.")
    info, metrics = content["run_info"], content["metrics"]
    if "status" not in info:
        return UserError(f"{path} is no result of a comparison: its run_info has no status.")
    for name, kinds in _INFO.items():
        value = info.get(name)
        wrong = name in info and (isinstance(value, bool) or not isinstance(value, kinds))
        if wrong or (isinstance(value, str) and len(value) > 10_000):
            return UserError(f"{path} is no result of a comparison: its {name} is {shown(value)}.")
    if not 0 <= info.get("seed", 0) < 1 << 64:
        return UserError(f"{path} is no result of a comparison: its seed is {shown(info['seed'])}.")
    for name, scores in metrics.items():
        if not isinstance(scores, dict | None) or not all(
            value is None or (isinstance(value, _NUMBER) and not isinstance(value, bool))
            for value in (scores or {}).values()
        ):
            return UserError(f"{path} is no result of a comparison: its {shown(name)} is {shown(scores)}.")
        for metric, value in (scores or {}).items():
            low = -1 if metric == "mcc" else 0
            if metric in METRICS and value is not None and not low - _ROUNDING <= value <= 1 + _ROUNDING:
                return UserError(
                    f"{path} is no result of a comparison: its {metric} on {shown(name)} is {shown(value)}, not {low} to 1."
                )
    return Result(**content)


LARGEST_LOSS = 1e39  # above float32's largest number; pictures cannot have axes of any length


@dataclass
class Search:
    """The result of the search for a column's learning rate on a task.

    lr: the chosen rate, None if every rate diverged; losses: mean dev loss by learning rate ("%g"), or mean objective on dev
    if the runs have one, None if a run diverged (in results of earlier versions, or failed); at_boundary: the search ended
    before the chosen rate had neighbours, so that a better one may have been missed (see doubt); seeds: of the search; runs,
    forwards: its cost; budget: forward passes of each of its runs.
    """

    lr: float | None
    losses: dict[str, float | None]
    at_boundary: bool
    seeds: list[int]
    runs: int
    forwards: int
    budget: int

    @property
    def doubt(self) -> Literal["edge", "gap"] | None:
        """Where a better rate may have been missed. edge: the chosen rate is the smallest or largest tried; gap: the next
        larger one diverged and is far away. None if there is no chosen rate.
        """
        if self.lr is None or not self.at_boundary:
            return None
        tried = sorted(map(float, self.losses))
        return "gap" if tried and tried[0] < float(f"{self.lr:g}") < tried[-1] else "edge"


def cell_path(results: Path, task: str, column: str, kind: str, seed: int, lr: float | None = None) -> Path:
    """The path of a run's file."""
    name = f"search-{lr:g}-{seed}" if kind == "search" else f"{kind}-{seed}"
    return results / "cells" / task / column / f"{name}.json"


def is_packed(results: Path) -> bool:
    """Whether the runs are there in one file. comparison.json alone is left by a process that was killed as it packed."""
    return (results / RUNS).exists()


def write_search(results: Path, found: dict[str, dict[str, Search]]) -> None:
    plain = {task: {column: asdict(search) for column, search in columns.items()} for task, columns in found.items()}
    write_whole(results / SEARCH, (json.dumps(finite(plain), indent=1) + "\n").encode())


def read_search(results: Path) -> dict[str, dict[str, Search]]:
    """The results of the searches; empty if there are none yet. Raises UserError if the file holds anything else."""
    path = results / SEARCH
    if path.exists():
        content = read_json(path, "search results")
    elif is_packed(results):
        path = results / COMPARISON
        about = read_json(path, "comparison")
        content: Any = about.get("search") if isinstance(about, dict) else None
    else:
        return {}
    try:
        return {task: {name: _search(s) for name, s in columns.items()} for task, columns in content.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} does not hold results of searches: {error}") from error


def _search(content: Any) -> Search:
    """Raises TypeError or ValueError if the value is not a Search."""
    found = Search(**content)
    numbers: list[Any] = [found.lr, *dict(found.losses).values(), found.runs, found.forwards, found.budget]
    for value in (*numbers, *map(float, found.losses), *found.seeds):
        if value is not None and (isinstance(value, bool) or not isinstance(value, _NUMBER)):
            raise ValueError(f"{shown(value)} is not a number")
    for loss in found.losses.values():
        if loss is not None and abs(loss) > LARGEST_LOSS:
            raise ValueError(f"{shown(loss)} is larger than a loss can be")
    if None in (found.runs, found.forwards, found.budget) or (found.lr is not None and not 0 < found.lr < math.inf):
        raise ValueError(f"the learning rate, runs or forwards of a search are not valid ({shown(content)})")
    return found
