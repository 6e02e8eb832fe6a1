"""Fit a feedback tuner from text alone: `metazo meta-train --learn feedback`, or `meta_train(FeedbackConfig(...))`.

The texts are the passages that metazo carries (task books), a file of unlabelled prompts, or the training texts of tasks.
What is fitted, at the positions that contribute to the loss, is described in metazo/feedback/jacobian.py. For a causal model
this is the end of the prompt, where a label word of one token is scored and an answer begins; a row of a choice task gives
its first choice that is not blank. An encoder has its own positions (the mask, or those that its head reads). The file does not
depend on labels or answers. One seed gives one file.

Where not to use: to gain over `skip-feedback` without a measurement of your own; see docs/feedback.md. For label phrases of
several tokens the later positions are not fitted.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from metazo.errors import UserError
from metazo.feedback.jacobian import HELD_OUT, fit_jacobian, stream_width
from metazo.feedback.surrogates import MeanJacobian
from metazo.feedback.tuner import FeedbackInfo, FeedbackTuner, describe
from metazo.io.files import is_file, opened, write_whole
from metazo.io.lock import NAME as LOCK
from metazo.io.lock import FolderLock
from metazo.io.plain import read_json
from metazo.io.terminal import Console
from metazo.meta.feedback_config import FeedbackConfig
from metazo.meta.loading import resolve_tasks
from metazo.meta.trial import check_file, check_name
from metazo.models.identity import BASE, block_weights
from metazo.models.load import LoadedModel, load_model
from metazo.runs.interrupt import ends_at_once
from metazo.runs.locate import CONFIG
from metazo.runs.method import resolve_device
from metazo.tasks import Prepared, Task, books, in_memory, prepare
from metazo.tasks.prepared import last_logits, wide
from metazo.tasks.rows import checked, load
from metazo.tasks.task import Row
from metazo.tasks.text import META_TRAIN, of_families
from metazo.tuner.limits import TUNER


def learn_feedback(config: FeedbackConfig, *, console: Console | None = None) -> FeedbackTuner:
    """Fit a feedback tuner and write it to `config.out`/tuner.safetensors.

    Returns: the tuner as written. Its scores have, per block from the lowest up, the cosine of the exact errors of held-out
    texts with the skip rule's and with the fitted map's.
    Raises UserError for bad settings, too few texts, a model without a residual stream, or a folder that is not empty or in
    use; Interrupted after SIGINT or SIGTERM, with nothing written.
    """
    if -(-config.texts // config.batch_size) < HELD_OUT:
        raise UserError(
            f"`texts` {config.texts} makes fewer than {HELD_OUT} batches of `batch_size` {config.batch_size}; give more texts, "
            f"at least {(HELD_OUT - 1) * config.batch_size + 1}."
        )
    lock = FolderLock(config.out)
    lock.check()
    with lock:
        _clear(config.out)
        lock.check_empty()
        try:
            with ends_at_once("in the middle of the fit, of which nothing is written; start it again."):
                return _fit(config, console)
        finally:
            _clear(config.out)


def _clear(out: Path) -> None:
    """Remove what a fit leaves that ended before its tuner was written, if there is nothing else in the folder."""
    with suppress(OSError):  # what stays is refused at the next start
        left = [path for path in out.iterdir() if path.name != LOCK]
        if all(path.is_file() and (path.match(".*.tmp") or _settings_of_a_fit(path)) for path in left):
            for path in left:
                path.unlink()


def _settings_of_a_fit(path: Path) -> bool:
    with suppress(UserError):  # a file of others that is not JSON
        content = read_json(path, "settings") if path.name == CONFIG else None
        return isinstance(content, dict) and content.get("learn") == "feedback"
    return False


def _fit(config: FeedbackConfig, console: Console | None) -> FeedbackTuner:
    device = resolve_device(config.device)
    loaded = load_model(config.model, dtype=config.dtype, device=device, seed=config.seed, num_labels=2)
    check_name(loaded.name)
    info = describe(loaded.model, loaded.name)
    losses, source, count = _losses(config, loaded, device, console)
    info.recipe = {"learn": "feedback", **config.recipe(), "texts": count, "source": source}
    if (weights := block_weights(loaded.model)) is not None:
        info.recipe[BASE] = weights
    _check_file(config, info, stream_width(loaded.model.eval(), losses[0]))
    if console is not None:
        console.print(f"Fitting maps of {len(info.blocks) - 1} blocks on {count:,} texts of {source}.", soft_wrap=True)
    cosines: dict[int, tuple[float, float]] = {}
    maps = fit_jacobian(
        loaded.model.eval(), losses, rank=config.rank, ridge=config.ridge, draws=config.draws, seed=config.seed, cosines=cosines
    )  # fmt: skip
    kinds = ("skip rule", "feedback")
    info.scores = {
        f"cosine of held-out errors with the {kind}, from the lowest block up": [
            round(cosines[index][place], 4) for index in sorted(cosines)
        ]
        for place, kind in enumerate(kinds)
    }
    tuner = FeedbackTuner(maps, info)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    write_whole(config.out / CONFIG, (json.dumps({"learn": "feedback", **settings}, indent=1) + "\n").encode())
    tuner.save(config.out / TUNER)  # last, so that a folder with a tuner is complete
    if console is not None:
        console.print(f"Wrote {config.out / TUNER}.", soft_wrap=True)
    return FeedbackTuner.load(config.out / TUNER)


def _check_file(config: FeedbackConfig, info: FeedbackInfo, width: int) -> None:
    """Raises UserError if the tuner's file would be refused by its reader."""
    if below := range(len(info.blocks) - 1):  # a single block is refused by the fit
        down, up = dict.fromkeys(below, torch.zeros(width, 0)), dict.fromkeys(below, torch.zeros(0, width))
        empty = FeedbackTuner(MeanJacobian(down, up, dict.fromkeys(below, 0.0)), info)
        check_file(empty, "rank", config.rank, 0, 8 * width * len(below))


def _losses(
    config: FeedbackConfig, loaded: LoadedModel, device: torch.device, console: Console | None
) -> tuple[list[Callable[[], Tensor]], str, int]:
    """The loss of each batch of the sources' texts, what the sources are called that gave any, and the number of texts."""
    tasks, data, names = _sources(config)
    losses: list[Callable[[], Tensor]] = []
    count, used = 0, []
    each, left = divmod(config.texts, len(tasks))
    for place, (task, name) in enumerate(zip(tasks, names)):
        if (number := each + (place < left)) == 0:
            break
        prepared = _prepared(task, config, data, loaded, number)
        for note in prepared.notes:
            if console is not None:
                console.print(f"note: {note}", soft_wrap=True)
        examples = sorted(prepared.train, key=len)
        count += len(examples)
        used += [name] if examples else []
        for start in range(0, len(examples), config.batch_size):
            losses.append(_loss(config, prepared, loaded, examples[start : start + config.batch_size], device))
    if len(losses) < HELD_OUT:
        raise UserError(
            f"`data` gives {count} texts, fewer than {HELD_OUT} batches of {config.batch_size}; give more texts, or a smaller "
            "`batch_size`."
        )
    random.Random(config.seed).shuffle(losses)
    return losses, ", ".join(used), count


def _sources(config: FeedbackConfig) -> tuple[list[Task], Path | list[Row] | None, list[str]]:
    """The tasks whose texts are read, the `data` to read them from, and what each is called."""
    if config.task:
        if config.data is not None and is_file(config.data):
            raise UserError(
                f"`data` {config.data} is a file of prompts, which goes without `task`; leave one of them out, or give the "
                "folder with <task>/<split>.jsonl."
            )
        tasks = resolve_tasks(config.task)
        return tasks, config.data, [task.name for task in tasks]  # not the place of a task's file
    if config.data is None:
        return [books.TASK], None, ["books"]
    if config.data.is_dir():
        found = [name for name in of_families(META_TRAIN) if (config.data / name).is_dir()]
        if not found:
            raise UserError(
                f"`data` {config.data} holds no text task for meta-training, such as {of_families(META_TRAIN)[0]}; name `task`."
            )
        return resolve_tasks(found), config.data, found
    if not is_file(config.data):
        raise UserError(f"`data` {config.data} is neither a file of prompts nor a folder.")
    task = Task(name="prompts", kind="classification", prompt="{text} {}", labels={0: "yes", 1: "no"})
    found = _prompts(config.data)
    texts = list(dict.fromkeys(found))  # a repeated one would be fitted and held out
    left = len(found) - len(texts)
    name = f"prompts of the user ({left:,} repeated ones left out)" if left else "prompts of the user"
    return [task], [{"text": text} for text in texts], [name]


def _prompts(path: Path) -> list[str]:
    """The lines of a .txt file that are not blank, or the column `text` of a table."""
    if path.suffix == ".txt":
        with opened(path, "file of prompts") as file:
            content = file.read()
        try:
            found = [line.strip() for line in content.decode("utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            raise UserError(f"`data` {path} is not text in UTF-8 (line {line}); save it as UTF-8.") from error
        if not found:
            raise UserError(f"`data` {path} has no line with text; give a file of prompts, one per line.")
        return found
    table = Task(name="prompts", kind="generation", prompt="{text}", answer="text", files={"train": str(path)})
    source = load(table, "train", None)
    return [str(source.rows[index]["text"]) for index in source.usable]


def _prepared(task: Task, config: FeedbackConfig, data: Any, loaded: LoadedModel, number: int) -> Prepared:
    """Up to `number` training texts, encoded. Every row of a classification task gets the same label, as does a prompt of a
    generation task, and every row of a choice task its first choice."""
    rows = _rows(task, data, number, config.seed)
    changes: dict[str, Any] = {"label": "_label", "adapt": None, "unlabelled": ()}
    if task.kind == "classification" or (task.kind == "generation" and loaded.kind == "causal"):  # others are refused
        task = task.model_copy(
            update=changes | {"kind": "classification", "labels": {0: "yes", 1: "no"}, "metric": ("accuracy",)}
        )
        rows = [{**row, "_label": 0} for row in rows]
    elif task.kind == "choice":
        rows = [{**row, "_label": _first(task, row)} for row in rows]
        task = task.model_copy(update=changes)
    task, held = in_memory(task, rows)
    limit = min(config.max_length or loaded.context_length, loaded.context_length)
    found = prepare(task, loaded, data=held, train=len(rows), dev=0, test=0, seed=config.seed, max_length=limit)
    found.notes[:] = [
        note for note in found.notes if "no train row has the class" not in note
    ]  # the label is not theirs
    return found


def _first(task: Task, row: Row) -> int:
    """The number of the row's first choice that is not blank."""
    texts = row[task.choices[0]] if len(task.choices) == 1 else [row[name] for name in task.choices]
    if not isinstance(texts, list):
        return 0  # refused when the row is encoded
    return next((place for place, text in enumerate(texts) if text is not None and str(text).strip()), 0)


def _rows(task: Task, data: Any, number: int, seed: int) -> list[Row]:
    """`number` of the task's training rows, or all if it has fewer."""
    if isinstance(data, list):
        rows = data
    elif task.generate is not None:
        return task.generate("train", number, seed)
    else:
        source = load(task, "train" if task.files else task.train_split, data)
        rows = [checked(task, source.rows[index], source.where(index)) for index in source.usable]
    return random.Random(seed).sample(rows, min(number, len(rows)))


def _loss(
    config: FeedbackConfig, prepared: Prepared, loaded: LoadedModel, examples: list, device: torch.device
) -> Callable[[], Tensor]:
    model: Any = loaded.model

    def at_end() -> Tensor:
        logits = last_logits(model, prepared.prompts(examples).to(device), 1)[:, -1]
        return cross_entropy(wide(logits), logits.new_zeros(len(logits), dtype=torch.long))  # any token is a target

    if config.positions == "answer":
        if loaded.kind == "causal" and prepared.task.kind == "classification":
            return at_end
        return lambda: prepared.loss(model, prepared.collate(examples).to(device))
    if loaded.kind != "causal":
        raise UserError(f"`positions` all is next-token loss, which a {loaded.kind} model does not have; use answer.")

    def next_token() -> Tensor:
        batch = prepared.prompts(examples).to(device)
        targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
        logits = last_logits(model, batch, batch["input_ids"].shape[1])[:, :-1]
        return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    return next_token
