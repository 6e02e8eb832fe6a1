"""Loss and metrics of a model on a task, or of a run's model on the run's own rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from torch import nn

from metazo.errors import UserError
from metazo.io.plain import shown
from metazo.models.assemble import as_loaded, load
from metazo.models.checks import not_finite
from metazo.models.describe import describe
from metazo.models.load import MADE, LoadedModel
from metazo.optimizers import METHODS
from metazo.runs.config import FinetuneConfig
from metazo.runs.examples import prepared_task
from metazo.runs.inputs import data_hash, definition
from metazo.runs.locate import MODEL, SUMMARY, located, read_config, run_of, unset_in
from metazo.runs.method import resolve_device, unversioned
from metazo.settings import build, with_role
from metazo.steplog.format import STEPS, change, scan
from metazo.tasks import Prepared, Task, in_memory, resolve
from metazo.tasks import evaluate as scoring
from metazo.tasks.classes import fit_head
from metazo.tasks.data import SPLITS, VERSION

# The settings of a run that decide which rows are scored, and how.
OF_A_RUN = set(with_role(FinetuneConfig, "data", "evaluation", "place", "machine")) | {
    "kind",
    "dtype",
    "quantize",
    "revision",
    "attn_implementation",
}
# The settings that an evaluation reads: of loading, and of the rows.
OF_LOADING = ("kind", "dtype", "quantize", "revision", "attn_implementation", "device")
OF_ROWS = ("train_examples", "dev_examples", "test_examples", "k_per_class", "max_length", "eval_batch_size")
READ = (*OF_LOADING, *OF_ROWS, "head", "seed", "split_seed")


def evaluate(
    model: str | Path | LoadedModel | nn.Module,
    task: str | Path | Task | None = None,
    *,
    data: Any = None,
    tokenizer: Any = None,
    split: Literal["dev", "test"] = "test",
    examples: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    **settings: Any,
) -> dict[str, float]:
    """Loss and metrics of a model on a split of a task.

    Args:
        model: a folder or Hub id of transformers, pico, LoRA adapters, a `LoadedModel`, or a transformers model with its
            `tokenizer`; or the folder of a run, whose kept model is scored on the run's own rows: task, data, sizes and
            lengths are those of the run unless given. A model that metazo trained on these rows keeps the seed of their split.
        task: by name, as a YAML file, or a Task; by default the run's.
        data: a folder with <task>/<split>.jsonl, or rows in memory as for `metazo.finetune`; by default the task's own.
        split: dev or test. Rows that metazo trained the model on are in neither, if they are taken from the train rows: a row
            is known by its text, whatever its order, its label and the task's name are. Notes say so if it cannot be known,
            and how many rows of a dev or test file of its own the model was trained on.
        examples: largest number of rows of the split; by default the run's number, or 500 on dev and 1,000 on test.
        say: takes each note, a sentence; one if the loss is not finite.
        settings: of FinetuneConfig: train_examples, dev_examples, test_examples, k_per_class, max_length, eval_batch_size,
            seed and head, and, unless the model is in memory, kind, dtype, quantize, revision, attn_implementation and device.
            The heads prototype and phrases are made from training rows and label phrases, and need no training.

    Returns: "loss" (nats, mean over examples), the task's metrics (0 to 1; mcc -1 to 1), "examples", and for classification
    and choice "majority", the share of the most frequent answer.
    Raises UserError for other settings, a run without a kept model, a classifier without a trained head, and as `load` and
    `prepare` do.

        metazo.evaluate("runs/a")                                   # the run's own test rows
        metazo.evaluate("pico", "pico_sentiment", split="dev", examples=100)
    """
    if split not in ("dev", "test"):
        raise UserError(f"`split` {split!r}: choose dev or test.")
    if not isinstance(model, str | Path | LoadedModel | nn.Module):
        raise UserError(f"`model` is a name, a folder, a transformers model or a LoadedModel, not {shown(model)}.")
    if not isinstance(task, str | Path | Task | None):
        raise UserError(f"`task` is a name, a YAML file or a Task, not {shown(task)}.")
    if isinstance(model, nn.Module):
        model = as_loaded(model, tokenizer)
    elif tokenizer is not None:
        raise UserError("`tokenizer` needs a transformers model in memory; any other has its own. Leave it out.")
    _check(settings, isinstance(model, LoadedModel))
    run = None if isinstance(model, LoadedModel) else run_of(Path(model))
    began: dict[str, Any] = {}
    if run is not None:
        if not (run / MODEL).is_dir():
            raise _no_model(run)
        model = run / MODEL
        settings_then = located(read_config(run), run)
        left = OF_A_RUN - {"out", "resume"} - unset_in(settings_then).keys()
        if task is not None and (task if isinstance(task, str | Path) else task.name) != settings_then.get("task"):
            left -= {"k_per_class"}  # of the rows of the run's own task
        began = {name: value for name, value in settings_then.items() if name in left}
    called = model.name if isinstance(model, LoadedModel) else str(model)
    if task is None and run is None:
        raise UserError(
            f"{called} is not the folder of a run, whose task could be taken: check the name, or give `task`."
        )
    name = str(task) if isinstance(task, str | Path) else task.name if task else None
    folder = data if isinstance(data, str | Path) else None
    given = settings | {"task": name, "data": folder}
    if isinstance(examples, int) and examples < 1:
        raise UserError(f"`examples` must be at least 1, not {examples}.")
    if examples is not None:
        given[f"{split}_examples"] = examples
    fixed = {"model": called, "out": Path(), "keep": "last", "resume": False}
    if given.get("seed") is not None and given.get("split_seed") is None:
        began.pop("split_seed", None)  # of the run's rows, and others are asked for
    config = build(FinetuneConfig, began, given, fixed)
    chosen = task if isinstance(task, Task) else resolve(config.task)
    if folder is None and chosen.generate is not None:
        config.data = None  # the run's, which was not read, and may be gone
    if settings.get("revision") is not None and (why := unversioned(str(model))):
        say(f"`revision` changes nothing {why}.")
    rows = None
    if data is not None and folder is None:
        chosen, rows = in_memory(chosen, data)
    loaded = model if isinstance(model, LoadedModel) else _load(model, config, chosen)
    trained = _trained(run) if run is not None else None
    if trained:  # adapters have no config of their own, and that of their base knows its own training alone
        describe(loaded.model, trained)
    recorded = [split for split in SPLITS if run is not None and given.get(f"{split}_examples") is None]
    prepared = prepared_task(config, chosen, loaded, rows, recorded)
    if not getattr(prepared, split):
        raise UserError(f"The {split} split of task {chosen.name!r} has no rows here: give their number as `examples`.")
    if config.head in MADE and loaded.new_head:
        fit_head(loaded, prepared, config.eval_batch_size)
    notes = [*prepared.notes, *(_doubts(trained) if run is not None else ())]
    if run is not None and task is None:
        own_rows = data is None and examples is None and not any(value is not None for value in settings.values())
        notes += _changes(run, prepared, loaded.model, own_rows)
    for note in notes:
        say(note)
    found = scoring.evaluate(loaded.model, prepared, split, batch_size=config.eval_batch_size)
    if not math.isfinite(found["loss"]):
        dtype = str(loaded.dtype).removeprefix("torch.")
        where = "".join(f" ({which})" for which in not_finite(loaded.model))
        say(
            f"The loss is not finite ({found['loss']}), so the weights of {called} are damaged or too large for {dtype}{where}."
        )
    return found


def _check(settings: dict[str, Any], given: bool) -> None:
    """Raises UserError for a setting that an evaluation does not read. given: whether the model is in memory."""
    for name in (name for name, value in settings.items() if value is not None):
        if name not in READ:
            raise UserError(f"`{name}` changes nothing in an evaluation, which reads {', '.join(READ)}; leave it out.")
        if given and name in OF_LOADING:
            raise UserError(
                f"`{name}` cannot be combined with a model in memory, which is used unchanged; leave it out."
            )


def _no_model(run: Path) -> UserError:
    """Why a run has no kept model, and how to get one."""
    config, log = read_config(run), run / STEPS
    replay = f"metazo replay {quote(str(log))} --base {quote(str(config.get('model')))} --out FOLDER"
    where = f"{replay} makes it again from the log"
    if (name := config.get("optimizer")) in METHODS and not METHODS[str(name)].replayable:
        where = f"the steps of {name} cannot be replayed, so repeat the run in another folder"
    if config.get("keep") == "none":
        return UserError(f"{run} was run with --keep none, so it has no model; {where}.")
    if (run / SUMMARY).exists():
        return UserError(f"{run} has ended and its folder {MODEL} is gone; {where}.")
    return UserError(
        f"{run} has not ended, or it diverged, so it has no model; metazo finetune --resume {quote(str(run))} continues it, or "
        "says that it diverged."
    )


def _load(model: str | Path, config: FinetuneConfig, task: Task) -> LoadedModel:
    return load(
        model,
        kind=config.kind,
        dtype=config.dtype,
        device=resolve_device(config.device),
        num_labels=task.num_labels,
        seed=config.seed,
        head=config.head,
        quantize=config.quantize,
        revision=config.revision,
        attn_implementation=config.attn_implementation,
        trained_head=config.head not in MADE,
    )


def _trained(run: Path) -> dict[str, Any] | None:
    """The record of the rows that a run was trained on; None if the log has no such record."""
    found = scan(run / STEPS).header.get("trained")
    return found if isinstance(found, dict) else None


def _changes(run: Path, prepared: Prepared, model: nn.Module, own_rows: bool) -> list[str]:
    """A note if the task, or the rows that it has, are not those of the run. own_rows: whether the same rows are wanted."""
    header = scan(run / STEPS).header if (run / STEPS).is_file() else {}
    then = header.get("definition")
    what = change(then, definition(prepared.task, model)) if then else None
    if what is None and own_rows and then and header.get("data") != data_hash(prepared):
        what = "its rows are others, or are encoded in another way"
    if what is None:
        return []
    return [
        f"The task {prepared.task.name} has changed since the run ({what}): figures are not those of the run's task."
    ]


def _doubts(trained: dict[str, Any] | None) -> list[str]:
    """A note if it cannot be known on which rows the model was trained."""
    if trained is None or trained.get("version") != VERSION:
        return [
            "The run was made by a version of metazo that split rows in another way: some of these rows may be training rows."
        ]
    return []
