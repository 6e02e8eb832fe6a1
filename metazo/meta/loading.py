"""The model and the tasks of a meta-training run of block scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from metazo.errors import UserError
from metazo.meta.config import ScaleConfig
from metazo.meta.trial import check_name
from metazo.models.identity import block_weights
from metazo.models.load import MADE, LoadedModel, load_model
from metazo.tasks import Prepared, Task, prepare, resolve
from metazo.tasks.data import DEFAULTS
from metazo.tasks.origins import sources_of
from metazo.tasks.trainings import TUNER_ROWS, tuner_rows


def load_base(config: ScaleConfig, tasks: Sequence[Task], device: torch.device, head: str = "auto") -> LoadedModel:
    """The base model; a classifier has a head for the tasks' classes, which must be as many for all, unless the head is made
    anew for each task. Raises UserError."""
    classes = {task.num_labels: task.name for task in tasks if task.kind == "classification"}
    count = next(iter(classes)) if len(classes) == 1 or (classes and head in MADE) else None
    loaded = load_model(config.model, dtype=config.dtype, device=device, seed=config.seed, num_labels=count, head=head)
    if loaded.kind == "classifier" and len(classes) > 1 and head not in MADE:
        listed = " and ".join(f"{name!r} has {number}" for number, name in classes.items())
        raise UserError(
            f"`task` has tasks of different numbers of classes ({listed}), and {loaded.name} has one head for all of them: "
            "choose tasks of the same number, or train over whole runs with a head that has no weights "
            "(`objective='horizon'` with `head='phrases'`)."
        )
    check_name(loaded.name)
    loaded.base_weights = block_weights(loaded.model)  # before a teacher or a run moves them
    return loaded


def resolve_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks that `task` names. Raises UserError for two of one name, by which recordings, hashes and records tell them
    apart."""
    resolved = [resolve(name) for name in names]
    for place, task in enumerate(resolved):
        if task.name in [other.name for other in resolved[:place]]:
            raise UserError(f"`task` has two tasks of the name {task.name!r}; rename one of them, or leave it out.")
    return resolved


def prepare_task(config: ScaleConfig, task: Task, loaded: LoadedModel, held_out: int = 1) -> Prepared:
    """The examples of a task, `held_out` of them in its split dev. Raises UserError if they do not fill a batch."""
    folder = None if config.resume and task.generate else config.data  # not read, and it may be gone
    prepared = prepare(
        task,
        loaded,
        data=folder,
        train=config.train_examples,
        dev=held_out,
        test=1,
        seed=config.seed,
        max_length=config.max_length,
    )
    prepared.notes += _leaves_none(prepared, task)
    if len(prepared.train) < config.batch_size:
        raise UserError(
            f"`batch_size` {config.batch_size} is more than the {len(prepared.train)} training examples of {task.name!r}."
        )
    return prepared


def _leaves_none(prepared: Prepared, task: Task) -> list[str]:
    """A note if a run on the same rows, with the same seed and the default sizes, has dev or test rows that train the tuner."""
    names, rows = sources_of(task), prepared.record["rows"]
    splits = [split for split in ("dev", "test") if names[split] == names["train"]]
    if task.generate is not None or not splits:
        return []
    total = sum(DEFAULTS[split] for split in ("train", *splits))
    others = sum(max(1, DEFAULTS[split] * min(rows, total) // total) for split in splits)
    used, most = prepared.record["train"], rows - others
    if used <= most:
        return []
    return [
        f"{task.name}: the tuner is trained on {used} of the {rows} rows from which a run takes {' and '.join(splits)} rows as "
        f"well; `train_examples` of at most {most} leaves those of the default sizes and the same seed apart"
    ]


def rows_of(tasks: Sequence[Any], splits: Sequence[str]) -> dict[str, Any]:
    """The part of a recipe that tells which rows made the tuner; empty if all were generated."""
    found = tuner_rows([task.prepared for task in tasks if hasattr(task, "prepared")], splits)
    return {TUNER_ROWS: found} if found else {}
