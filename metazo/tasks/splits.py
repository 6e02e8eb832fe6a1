"""Draw and encode the splits of a task for a loaded model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metazo.errors import UserError
from metazo.io.plain import shown
from metazo.tasks.classes import class_names, head_order
from metazo.tasks.data import DEFAULTS, SPLITS, draw
from metazo.tasks.encode import Encoder
from metazo.tasks.known import resolve
from metazo.tasks.prepared import Prepared
from metazo.tasks.rows import Rows, generated
from metazo.tasks.task import Row, Task
from metazo.tasks.words import beginnings, spoken_words

if TYPE_CHECKING:
    from metazo.models.load import LoadedModel


def prepare(
    task: str | Path | Task,
    loaded: LoadedModel,
    *,
    data: str | Path | Rows | None = None,
    train: int = DEFAULTS["train"],
    dev: int = DEFAULTS["dev"],
    test: int = DEFAULTS["test"],
    seed: int = 0,
    max_length: int | None = None,
    k_per_class: int | None = None,
    recorded: Collection[str] = (),
) -> Prepared:
    """Draw and encode the splits of ``task``, a Task, a name or a YAML file, for ``loaded``, which `load_model` gives.

    ``data`` is a folder with <task>/<split>.jsonl, or rows in memory, with the task that reads them (`in_memory`); without it
    rows come from the task's own files, the grammar, or the Hub; a task of the grammar reads no folder, and a note says so.
    Sizes default to the papers' 1,000 / 500 / 1,000. If there are fewer rows, sizes left at these defaults are reduced and
    sizes that the caller sets are kept, and ``notes`` says so.
    ``k_per_class`` draws that many train rows of every class (as LM-BFF, arXiv 2012.15723), and, if ``dev`` is not given and
    the task has no dev rows of its own, as many dev rows without regard to the class. ``max_length`` limits an input, in
    tokens; the model's context is the default. A model that was fine-tuned on the same rows by metazo gets the split of that
    run, and no row that it was trained on is a dev or test row; ``recorded`` names splits that have the size of that run
    although one is set.
    Raises UserError for data that is missing, malformed or does not fit, and for a task that the model cannot do.
    """
    task = task if isinstance(task, Task) else resolve(task)
    if not hasattr(loaded, "tokenizer"):
        raise UserError(f"`loaded` is a model as metazo.load_model gives it, not {shown(loaded)}.")
    if loaded.tokenizer is None:
        raise UserError("`tokenizer` is missing: give the one with which the model in memory was trained.")
    unread = None
    if isinstance(data, str | Path):
        data = Path(data)
        unread = generated(task, data) if task.generate is not None else None
    elif data is not None and (task.generate is not None or not isinstance(data, Mapping)):
        raise UserError(
            f"`data` is of the type {type(data).__name__}, and task {task.name!r} reads no rows from it; give a folder's name "
            "or path, or what metazo.tasks.in_memory(TASK, ROWS) returns: a Task, for `task`, and its rows."
        )
    encoder = Encoder(task, loaded, max_length)
    known = getattr(loaded.model.config, "metazo", None)
    record = known if isinstance(known, dict) else None
    drawn = draw(
        task, data, train=train, dev=dev, test=test, seed=seed, k_per_class=k_per_class, record=record, recorded=recorded
    )  # fmt: skip
    notes = [*loaded.notes, *([unread] if unread else []), *drawn.notes]
    if task.kind == "generation" and encoder.room < task.max_new_tokens:
        notes.append(
            f"{task.name}: answers have at most {encoder.room} tokens instead of {task.max_new_tokens} (max_new_tokens), "
            f"because inputs and answers together have at most {encoder.limit} (`max_length`)"
        )
    order = None
    if loaded.kind == "classifier" and not loaded.new_head:
        order, note = head_order(loaded.model.config, task)
        notes += [note] if note else []
    out = Prepared(
        task,
        loaded.kind,
        loaded.tokenizer,
        encoder.room,
        encoder.words,
        encoder.at_position,
        notes=notes,
        order=order,
        start=encoder.start,
    )
    for split in SPLITS:
        _encode(out, split, encoder, drawn.rows[split])
    if loaded.kind == "causal" and spoken_words(task, encoder.joint) != list(task.labels.values()):
        notes.append(
            f"{task.name}: label words lose the space that they begin with, because the prompt has one before its answer"
        )
    if task.kind == "generation":
        notes += _ends(out, encoder)
    for short, long in beginnings(task, encoder.words):
        notes.append(
            f"{task.name}: label word {short!r} begins {long!r} for {loaded.name}, which can never be the likelier one; "
            "choose words of which none begins another"
        )
    lengths = [len(example) for split in SPLITS for example in getattr(out, split)]
    if (turn := _longrope(loaded.model.config)) and min(lengths, default=turn) <= turn < max(lengths, default=0):
        notes.append(
            f"{task.name}: {sum(length > turn for length in lengths)} inputs are longer than {turn} tokens, from where on "
            f"{loaded.name} scales positions otherwise (longrope), for all rows of a batch: scores of shorter inputs depend on "
            f"the batch; `max_length` {turn} avoids it"
        )
    if encoder.alike:
        notes.append(f"{task.name}: {encoder.alike} rows have two choices that are the same tokens for {loaded.name}")
    out.record, out.prints = {"task": task.name, **drawn.record}, drawn.prints
    if loaded.kind == "classifier":
        out.record["labels"] = class_names(task, order)
    end, to_end = loaded.tokenizer.eos_token_id, encoder.stop is None or loaded.kind == "seq2seq"
    if task.kind == "generation" and to_end and end is not None:
        out.record["eos"] = end
    return out


def _ends(out: Prepared, encoder: Encoder) -> list[str]:
    """Notes on answers that cannot be generated whole, and on answers whose end nothing teaches."""
    task, tokenizer, stop, notes = out.task, encoder.tokenizer, encoder.stop or "", list[str]()
    examples = [example for split in SPLITS for example in getattr(out, split)]
    after = encoder.decoder.after if encoder.decoder else []
    ended = bool(after) or (not stop and tokenizer.eos_token_id is not None)  # by a token
    last = len(after) or int(ended) or len(tokenizer(stop, add_special_tokens=False)["input_ids"])
    if held := sum(bool(stop) and stop in example.references[0].strip() for example in examples):
        notes.append(
            f"{task.name}: {held} of {len(examples)} answers hold the stop text {stop!r}, which ends what is generated"
        )
    if long := sum(len(example.options[0]) - last > encoder.room for example in examples):
        notes.append(
            f"{task.name}: {long} of {len(examples)} answers have more than {encoder.room} tokens, the most that are generated "
            "(max_new_tokens)"
        )
    if (
        examples
        and not ended
        and not (stop and any(stop in tokenizer.decode(example.options[0]) for example in examples[:8]))
    ):
        found = f"leaves out the stop text {stop!r}" if stop else "has no end-of-text token, and the task no `stop`"
        notes.append(
            f"{task.name}: the tokenizer of {encoder.name} {found}: the model does not learn to end an answer; give a "
            "`stop` that the tokenizer keeps"
        )
    return notes


def _longrope(config: Any) -> int | None:
    """Longest batch that a model with longrope (Phi-3) computes with its factors for short inputs; None for other models."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # in some models by type of layer
    return next(
        (kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"), None
    )


def _encode(out: Prepared, split: str, encoder: Encoder, rows: list[tuple[str, Row]]) -> None:
    """Encode the rows of a split, and add notes on shortened and omitted rows."""
    task, limit = out.task, encoder.limit
    encoder.cut.clear()
    encoded = encoder.all(rows)
    kept = [example for example in encoded if example is not None]
    setattr(out, split, kept)
    for name in dict.fromkeys(encoder.columns):
        if blank := sum(not str(row.get(name, "-")).strip() for _, row in rows):
            out.notes.append(f"{task.name}: {name!r} is blank in {blank} of {len(rows)} {split} rows")
    out.shortened[split] = sum(example.shortened for example in kept)
    out.dropped[split] = len(encoded) - len(kept)
    if out.shortened[split]:
        where = ", ".join(f"{name!r} of {count}" for name, count in encoder.cut.most_common())
        hint = "" if task.context or len(encoder.columns) < 2 else "; `context` in the task names the column to shorten"
        out.notes.append(
            f"{task.name}: {out.shortened[split]} of {len(kept)} {split} inputs shortened to {limit} tokens ({where}{hint})"
        )
    if out.dropped[split]:
        out.notes.append(
            f"{task.name}: {out.dropped[split]} of {len(encoded)} {split} rows left out, over {limit} tokens"
        )
    if encoded and not kept:
        column = f" even without {task.context!r}" if task.context else " even without its longest column"
        raise UserError(
            f"no {split} row of task {task.name!r} fits into {limit} tokens{'' if task.messages else column}; "
            "raise `max_length`, or name the long column as the task's context"
        )
