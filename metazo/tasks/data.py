"""Where rows come from (a task's own files, the folder `data`, the grammar, the Hub) and how they are split.

train and dev are drawn from the train split, disjoint; test from the validation split (as MeZO and its successors do).
The same seed draws the same rows in the same order, whatever the model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.io.files import is_file
from metazo.tasks.task import Row, Task

SPLITS = ("train", "dev", "test")
MAX_LINE = 2**24
"""Characters of one row."""


@dataclass
class Source:
    """Rows of one split, and what to call them in an error."""

    name: str
    rows: Sequence[Row]
    usable: list[int]
    """Positions of the labelled rows."""

    def where(self, index: int) -> str:
        return f"{self.name}, row {index + 1}"


def draw(
    task: Task, data: Path | None, *, train: int, dev: int, test: int, seed: int
) -> tuple[dict[str, list[tuple[str, Row]]], list[str]]:
    """Draw the splits: split -> [(place, row)], and sentences about sizes that differ from those asked for."""
    if min(train, dev, test) < 0:
        raise UserError(f"the split sizes must not be negative, found train {train}, dev {dev}, test {test}")
    dev = min(dev, task.dev_rows or dev)
    if task.generate is not None:
        drawn = task.generate("train", train + dev, seed)
        held_out = task.generate("test", test, seed)
        places = {"train": drawn[:train], "dev": drawn[train:], "test": held_out}
        return {s: [(f"{task.name}, {s} row {i + 1}", r) for i, r in enumerate(places[s])] for s in SPLITS}, []
    own = task.files
    test_split = ("validation" if "validation" in own else "train") if own else task.test_split
    source = _load(task, "train" if own else task.train_split, data)
    shared = test_split == ("train" if own else task.train_split)
    held_out = source if shared else _load(task, test_split, data)
    notes: list[str] = []
    sizes = _shares(len(source.usable), train, dev, test if shared else 0, task, notes)
    order = _order(len(source.usable), seed, "train")
    parts = {"train": order[: sizes[0]], "dev": order[sizes[0] : sizes[0] + sizes[1]]}
    if shared:
        parts["test"] = order[sizes[0] + sizes[1] : sum(sizes)]
    else:
        parts["test"] = _order(len(held_out.usable), seed, "test")[:test]
        if len(parts["test"]) < test:
            notes.append(
                f"{task.name}: test has {len(parts['test'])} rows instead of {test}, all that {held_out.name} holds"
            )
    chosen = {}
    for split in SPLITS:
        origin = held_out if split == "test" else source
        rows = [(origin.where(origin.usable[i]), origin.rows[origin.usable[i]]) for i in parts[split]]
        chosen[split] = [(where, _checked(task, row, where)) for where, row in rows]
    return chosen, notes


def _order(number: int, seed: int, purpose: str) -> list[int]:
    """A permutation that depends on nothing but the seed, the purpose and the number of rows."""
    return np.random.default_rng([seed, *purpose.encode()]).permutation(number).tolist()


def _shares(available: int, train: int, dev: int, test: int, task: Task, notes: list[str]) -> tuple[int, int, int]:
    """Sizes that fit into ``available`` rows: in proportion, but the papers' own dev size is kept where it can be."""
    wanted = train + dev + test
    if wanted <= available:
        return train, dev, test
    if task.dev_rows == dev and test == 0 and 2 * dev <= available:
        sizes = (available - dev, dev, 0)
    else:
        small = [max(1, size * available // wanted) if size else 0 for size in (dev, test)]
        sizes = (available - sum(small) if train else 0, small[0], small[1])
    if min(sizes) < 0 or (train and sizes[0] < 1):
        raise UserError(
            f"task {task.name!r} has {available} labelled train rows, too few for train and dev; give more rows"
        )
    said = f"{sizes[0]} train and {sizes[1]} dev" + (f" and {sizes[2]} test" if test else "")
    asked = f"{train} and {dev}" + (f" and {test}" if test else "")
    notes.append(f"{task.name}: {available} rows give {said} rows instead of {asked}")
    return sizes


# -- reading ----------------------------------------------------------------------------------------------------------


def _load(task: Task, split: str, data: Path | None) -> Source:
    if task.files:
        path = Path(task.files["train" if split == "train" else "validation"])
        return _read(task, path)
    if data is not None:
        return _read(task, _find(task, split, Path(data)))
    if task.hub is None:
        raise UserError(f"task {task.name!r} names neither files nor a Hub data set; give its rows with `data=DIR`")
    return _from_hub(task, split)


def _find(task: Task, split: str, data: Path) -> Path:
    """``DIR/<task>/<split>.jsonl``; a split with a longer Hub name (validation_matched) may be called validation."""
    if not data.is_dir():
        raise UserError(f"data folder {data} does not exist; `data` names a folder that holds {task.name}/train.jsonl")
    folder = data / task.name
    if not folder.is_dir():
        found = ", ".join(sorted(entry.parent.name for entry in data.glob("*/train.jsonl"))) or "none"
        raise UserError(f"data folder {data} has no folder {task.name!r}; tasks found there: {found}")
    names = [split, "validation"] if split != "train" else ["train"]
    for name in names:
        if (folder / f"{name}.jsonl").is_file():
            return folder / f"{name}.jsonl"
    raise UserError(f"task {task.name!r} needs {' or '.join(f'{n}.jsonl' for n in dict.fromkeys(names))} in {folder}")


def _read(task: Task, path: Path) -> Source:
    """All rows of a JSONL file, each checked, so that a bad one is named whether or not it would have been drawn."""
    rows: list[Row] = []
    if not is_file(path):
        raise UserError(f"data file {path} is not a file; task {task.name!r} needs one JSON object per line")
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), ""), 1):
                if line.strip():
                    rows.append(_parse(line, f"{path}, line {number}"))
    except OSError as error:
        raise UserError(f"data file {path} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"data file {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not rows:
        raise UserError(f"data file {path} is empty; task {task.name!r} needs one JSON object per line")
    source = Source(str(path), rows, _labelled(task, rows))
    for index in source.usable:
        _checked(task, rows[index], source.where(index))
    return source


def _parse(line: str, where: str) -> Row:
    if len(line) == MAX_LINE:
        raise UserError(f"{where} is longer than {MAX_LINE:,} characters; is this a file of one JSON object per line?")
    try:
        row = json.loads(line)
        if "\\ud" in line.lower():  # halves of a character that no tokenizer takes
            json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not a JSON object ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: a number, a character or the nesting in it is beyond what can be read") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: one JSON object with named columns was expected, found {line.strip()[:60]!r}")
    return row


def _from_hub(task: Task, split: str) -> Source:
    with needs("llm"):
        from datasets import load_dataset  # a second of import that no other path needs

    name = "/".join(part for part in (task.hub, task.config) if part)
    try:
        rows: Any = load_dataset(str(task.hub), task.config, split=split, revision=task.revision)
    except Exception as error:  # the library raises a dozen kinds: no network, no such id, no such split, a broken file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"data set {name!r}, split {split!r}, cannot be loaded from the Hub ({reason}); "
            f"check the network, or give the rows with `data=DIR`, in DIR/{task.name}/"
        ) from None  # what a server answered may repeat the token
    if len(rows) == 0:
        raise UserError(f"data set {name!r}, split {split!r}, is empty")
    return Source(f"{name} {split}", rows, _labelled(task, rows))


def _labelled(task: Task, rows: Any) -> list[int]:
    if not task.unlabelled:
        return list(range(len(rows)))
    values = rows[task.label] if hasattr(rows, "column_names") else [row.get(task.label) for row in rows]
    return [index for index, value in enumerate(values) if value not in task.unlabelled]


def _checked(task: Task, row: Row, where: str) -> Row:
    """The row as the prompt needs it. Raises UserError for a missing column or a label outside the set."""
    try:
        adapted = task.adapt(row) if task.adapt else row
    except KeyError as error:
        raise _missing(task, {str(error.args[0])}, row, where) from error
    except (TypeError, AttributeError) as error:
        raise UserError(f"{where}: a column of task {task.name!r} has the wrong type ({error})") from error
    absent = {name for name in task.required() if adapted.get(name) is None}
    if absent:
        raise _missing(task, absent, row, where)
    if task.kind == "classification":
        task.label_index(adapted[task.label], where)
    return adapted


def _missing(task: Task, absent: set[str], row: Row, where: str) -> UserError:
    names = ", ".join(repr(name) for name in sorted(absent))
    found = ", ".join(repr(name) for name in row) or "none"
    return UserError(f"{where}: task {task.name!r} needs the column {names}; columns found: {found}")
