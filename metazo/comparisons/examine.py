"""Checks a grid before it runs: every task is prepared and every method built once, so that bad input is found early."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

import metazo
from metazo.comparisons.columns import Column
from metazo.comparisons.grid import Grid, Run, pairs_of, search_run
from metazo.comparisons.rates import start
from metazo.errors import UserError
from metazo.io.tensorfile import weights_hash
from metazo.optimizers.registry import Method
from metazo.runs.batches import order_of, reader
from metazo.runs.config import FinetuneConfig
from metazo.runs.cost import measure
from metazo.runs.inputs import data_hash, inputs
from metazo.runs.plan import tokenizer_bytes, written
from metazo.runs.setup import Setup, make_optimizer, set_up
from metazo.runs.tuner_record import networks_record, trust_hash, tuner_hash
from metazo.settings import with_role
from metazo.tasks import resolve
from metazo.tasks.closures import BatchLoss
from metazo.tasks.origins import rows_hash
from metazo.tasks.prepared import Prepared

# Settings of the optimizer alone; if any other setting differs, model and data are loaded anew.
OPTIMIZING = with_role(FinetuneConfig, "method", "loop", "service", "limit")

Scored = dict[str, tuple[int, list[str]]]


@dataclass
class Facts:
    """Facts about a column on a task before it runs.

    lrs: learning rates from which its search starts (empty for zero-shot); number of trained
    weights; hashes of model, data, tuner and the user's own files; inputs: hash of the model's configuration and the task's
    definition; metric of the task; seconds per forward pass over a training batch; bytes_on_disk: of a run while it is in
    progress; bytes_kept: of the model that stays of a reported run; cost: see metazo.runs.cost, None for zero-shot; use: how
    the tuner is used (`of_tuner`); rows: hash of all rows from which the task's splits are drawn
    (`metazo.tasks.origins.rows_hash`); scored: by split, dev and test, what `_scored` tells of its rows.
    """

    lrs: list[float]
    trained: int
    hashes: dict[str, str | None]
    inputs: str
    metric: str | None
    forward_seconds: float
    bytes_on_disk: int
    bytes_kept: int
    cost: dict[str, int] | None
    use: dict[str, str] = field(default_factory=dict)
    rows: str | None = None
    scored: Scored = field(default_factory=dict)


def examine(grid: Grid) -> dict[tuple[str, str], Facts]:
    """Facts by task and column. Raises UserError, with the name of the column, for a run that is not possible."""
    found: dict[tuple[str, str], Facts] = {}
    names = [resolve(task).name for task in grid.tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"The task {name!r} is given twice in `tasks`; give each its own name.")
    for task in grid.tasks:
        loaded: dict[str, _Loaded] = {}
        for column in grid.resolved:
            where = f"Column {column.name!r} on {task}"
            config = Run(task, column, "seed", 0, None, grid.budget_of(column)).config(grid, grid.out / "running")
            config = replace(config, steps=1, forwards=None)  # the length is checked below
            with _naming(where):
                fact = found[task, column.name] = _facts(grid, column, config, loaded)
                first = grid.resolved[0].name
                _check_scored(fact.scored, found[task, first].scored, first)
            if grid.search_config and len(fact.lrs) > 1:
                run = search_run(grid, task, column, fact.lrs[0], config.seed)
                config = replace(
                    run.config(grid, grid.out / "running"),
                    steps=1,
                    forwards=None,
                    test_examples=config.test_examples,  # not 0, so that model and data are shared if nothing else differs
                )
                with _naming(f"{where}, with `search_config`"):
                    _check_length(run.forwards, _made(config, loaded)[3])
    return found


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Puts what is examined before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


@dataclass
class _Loaded:
    setup: Setup
    model: str
    data: str
    inputs: str
    rows: str | None
    seconds: float
    loss: BatchLoss


def _made(config: FinetuneConfig, loaded: dict[str, _Loaded]) -> tuple[_Loaded, FinetuneConfig, Any, float]:
    """Model and data of a run, which are loaded once for all runs that share them; its settings with what was chosen for
    model and data; its optimizer; and the forward passes of a step.
    """
    loading = {name: value for name, value in asdict(config).items() if name not in OPTIMIZING}
    mark = json.dumps(loading, default=str)
    if mark not in loaded:
        first = next(iter(loaded.values()), None)  # of the same task, whose rows are read once
        loaded[mark] = _load(config, first.rows if first else rows_hash(resolve(config.task), config.data))
    base = loaded[mark]
    setup = base.setup
    if not setup.prepared.dev:
        raise UserError("there are no dev examples to choose learning rates on; raise dev_examples.")
    config, optimizer = make_optimizer(config, setup.loaded, setup.data, setup.device)
    return base, config, optimizer, optimizer.forwards_per_step(config.accumulate)


def _check_length(forwards: int, a_step: float) -> None:
    if forwards < a_step:
        raise UserError(f"{forwards} forward passes do not pay for one step ({a_step:g}); raise the budget.")


def _check_scored(own: Scored, first: Scored, of_first: str) -> None:
    """Raises UserError for a column that is scored on other rows than the first one."""
    for split, rows in own.items():
        if rows != first[split]:
            raise UserError(
                f"its {rows[0]} {split} rows are not the {first[split][0]} of column {of_first!r}, and scores on different "
                "rows are not compared: set what they depend on, such as dev_examples, test_examples, max_length and the "
                "model, in `config` for all columns."
            )


def _scored(prepared: Prepared, split: str) -> tuple[int, list[str]]:
    """The number of the rows of a split that are scored, and hashes of all that were drawn, of which some may be too long.
    Generated rows have none; those of one seed differ by their number alone.
    """
    return len(getattr(prepared, split)), prepared.prints.get(split, [])


def _facts(grid: Grid, column: Column, config: FinetuneConfig, loaded: dict[str, _Loaded]) -> Facts:
    base, config, optimizer, a_step = _made(config, loaded)
    setup = base.setup
    if column.trains:
        _check_length(round(grid.budget_of(column) * grid.search_budget), a_step)
    tuner = tuner_hash(optimizer)
    lrs: list[float] = []
    if column.trains:
        lrs = column.lrs or grid.lrs or start(config.optimizer, setup.trained, optimizer.energy)
    metric = setup.prepared.task.metric
    cost = measure(setup.loaded.model, optimizer, base.loss, config.accumulate).to_dict() if column.trains else None
    disk = written(config, setup.loaded, optimizer, config.steps or 1)  # after the first step, which makes the state
    keeps = column.trains and grid.keep_models
    return Facts(
        lrs=lrs,
        trained=setup.trained if column.trains else 0,
        hashes={"model": base.model, "data": base.data, "tuner": tuner}
        | _objective(setup)
        | of_order(setup)
        | of_decay(config)
        | of_masters(optimizer)
        | of_method(type(optimizer)),
        inputs=base.inputs,
        metric=metric[0] if metric else None,
        forward_seconds=base.seconds,
        bytes_on_disk=disk["most"],
        bytes_kept=disk["model"] + tokenizer_bytes(setup.loaded.tokenizer) if keeps else 0,
        cost=cost,
        use=of_tuner(optimizer),
        rows=base.rows,
        scored={split: _scored(setup.rows, split) for split in ("dev", "test")},
    )


def of_tuner(optimizer: Method) -> dict[str, str]:
    """How a tuner is used, which the hash of its networks or maps does not tell; of a method without one there is nothing.

    It is no part of the key, so that results of earlier versions, which do not have it, are still found.
    """
    use = {"trust": trust_hash(optimizer), "networks": networks_record(optimizer)}
    return {name: json.dumps(value, sort_keys=True) for name, value in use.items() if value is not None}


def of_order(setup: Setup) -> dict[str, str | None]:
    """So that runs with batches in another order are not continued."""
    return {name: str(version) for name, version in order_of(setup.config, len(setup.prepared.train)).items()}


def of_decay(config: FinetuneConfig) -> dict[str, str | None]:
    """So that runs of SGD whose weight decay was a part of the momentum, as in earlier versions, are not used again."""
    return {"decay": "decoupled"} if config.optimizer == "first-order-sgd" and config.weight_decay else {}


def of_masters(optimizer: Method) -> dict[str, str | None]:
    """So that first-order runs of earlier versions, which had neither masters of narrow weights nor autocast, are not used
    again."""
    if getattr(optimizer, "masters", None):
        return {"masters": "float32"}
    policy = getattr(optimizer, "precision", None) if optimizer.precisions else None
    return {"autocast": "bfloat16"} if policy == "autocast" else {}


def _objective(setup: Setup) -> dict[str, str | None]:
    """The hash of the objective's source, if it has one."""
    source = setup.objective.source if setup.objective else None
    return {"objective": source} if source else {}


def of_method(method: type[Method]) -> dict[str, str | None]:
    """The hash of the files of a method's class and its bases that are not metazo's own, if there are any, so that results
    of another version of the user's method are not used again.
    """
    own: dict[Path, bytes] = {}
    for cls in method.__mro__:
        with suppress(TypeError, OSError):  # a class that no file defines
            path = Path(inspect.getfile(cls)).resolve()
            if issubclass(cls, Method) and not path.is_relative_to(Path(metazo.__file__).resolve().parent):
                own[path] = path.read_bytes()
    return {"method": sha256(b"".join(own.values())).hexdigest()} if own else {}


def _load(config: FinetuneConfig, rows: str | None) -> _Loaded:
    setup = set_up(config)
    prepared, model = setup.rows, setup.loaded.model
    loss = BatchLoss(model, setup.data, reader(config, prepared.train)(0), setup.device)
    with torch.inference_mode():
        loss()
        taken = []
        for _ in range(3):
            started = time.perf_counter()
            float(loss())
            taken.append(time.perf_counter() - started)
    found = inputs(prepared, model)
    if found["architecture"].get("pooling") == "mean":  # as results of earlier versions had it
        del found["architecture"]["pooling"]
    text = sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    return _Loaded(setup, weights_hash(model.named_parameters()), data_hash(prepared), text, rows, min(taken), loss)


def plan(grid: Grid, facts: dict[tuple[str, str], Facts], part: str | None = None) -> dict[str, Any]:
    """The work and resources of a grid, or of a part of it, of which nothing is done yet: runs, forward passes, time, disk.

    The searches are counted without their extensions. The time is that of the forward passes, including evaluation (ten
    times on dev, once on test), plus a tenth for the steps, divided by the number of workers.
    """
    mine = {(task, column.name) for task, column in pairs_of(grid, part)[0]}
    facts = {pair: fact for pair, fact in facts.items() if pair in mine}
    runs = {"search": 0, "seed": 0}
    forwards = seconds = 0.0
    for (_, name), fact in facts.items():
        column, budget = grid.column(name), grid.budget_of(grid.column(name))
        config = Run(grid.tasks[0], column, "seed", 0, None, budget).config(grid, Path())
        searches = 0 if len(fact.lrs) < 2 else len(fact.lrs) * grid.search_seeds
        runs["search"] += searches
        runs["seed"] += grid.seeds
        trained = (searches * grid.search_budget + grid.seeds) * budget if fact.lrs else 0
        looks = (10 * (searches + grid.seeds) if fact.lrs else grid.seeds) * config.dev_examples
        looks += grid.seeds * config.test_examples
        forwards += trained
        seconds += (1.1 * trained + looks / config.batch_size) * fact.forward_seconds
    return {
        "columns": ", ".join(dict.fromkeys(name for _, name in facts)),
        "tasks": ", ".join(dict.fromkeys(task for task, _ in facts)),
        "runs": f"{runs['search']} of the searches (and up to {grid.extensions} more for each), {runs['seed']} reported",
        "forward passes": f"{forwards:,.0f} over a batch",
        "time": f"about {seconds / grid.workers / 60:.0f} min with `workers` {grid.workers}, from a forward pass measured here",
        "learning rates": {f"{task}, {name}": fact.lrs for (task, name), fact in facts.items() if fact.lrs},
        "seconds": seconds / grid.workers,
        "bytes on disk": 12_000 * sum(runs.values())
        + grid.seeds * sum(fact.bytes_kept for fact in facts.values())
        + grid.workers * max((fact.bytes_on_disk for fact in facts.values()), default=0),
    }
