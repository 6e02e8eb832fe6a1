"""Read the rows of a split: JSON lines, a JSON list, CSV, TSV or Parquet from a folder, or a data set of the Hub.

Every row is checked, so that a bad one is named whether or not it would have been drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.io.files import expanded, is_file
from metazo.io.plain import parse_json, shown
from metazo.tasks.delimited import MAX_ROW, table
from metazo.tasks.task import Row, Task, same_value

MAX_CHOICES = 256
"""Choices of one row."""
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
FORMS = {
    ".jsonl": "one JSON object per line",
    ".json": "a list of JSON objects",
    ".csv": "one line per row after that of the columns",
    ".tsv": "one line per row after that of the columns",
    ".parquet": "at least one row",
}
_SIMPLE = str | int | float


@dataclass
class Source:
    """Rows of one split, and their name in error messages."""

    name: str
    rows: Sequence[Row]
    usable: list[int]
    """Positions of the labelled rows."""

    def where(self, index: int) -> str:
        return f"{self.name}, row {index + 1}"


Rows = Mapping[str, Sequence[Row]]
"""Rows in memory by split: train, and validation and test if there are any."""


def in_memory(task: Task, data: Any) -> tuple[Task, Rows]:
    """The task with rows in memory as its own: a list of dicts or a datasets.Dataset (train), or a mapping of splits.

    Give both to `prepare`, the rows as ``data``. Without a validation and a test split, dev and test rows are taken from
    the others, as with files. Raises UserError for another type, an unknown split, and a split without rows.
    """
    splits = dict(data) if isinstance(data, Mapping) else {"train": data}
    if "dev" in splits and "validation" not in splits:
        splits["validation"] = splits.pop("dev")
    for name, rows in splits.items():
        if name not in ("train", "validation", "test"):
            raise UserError(f"`data` has the split {shown(name)}; the splits are train, validation and test")
        if not hasattr(rows, "__len__") or not (hasattr(rows, "column_names") or isinstance(rows, list | tuple)):
            hint = ': give `.to_dict("records")` of it' if hasattr(rows, "to_dict") and hasattr(rows, "columns") else ""
            raise UserError(
                f"`data` has {name} rows of the type {type(rows).__name__}; rows are a list of dicts or a Dataset{hint}"
            )
        if not len(rows):
            raise UserError(f"`data` has no {name} rows")
    if "train" not in splits:
        raise UserError(f"`data` has no train split, only {', '.join(splits) or 'nothing'}")
    files = {name: f"the {name} rows in memory" for name in splits}
    return task.model_copy(update={"files": files, "generate": None}), splits


def load(task: Task, split: str, data: Path | Rows | None) -> Source:
    """The rows of ``split``, from memory, the task's own files, ``data/<task>/``, or the Hub, in this order."""
    if isinstance(data, Mapping):
        rows = [_object(_plain(row), f"{split}, row {number}") for number, row in enumerate(data[split], 1)]
        return _whole(task, f"the {split} rows in memory", rows)
    if task.files:
        return _read(task, Path(task.files[split]))  # type: ignore[index]
    if data is not None:
        return _read(task, find(task, split, Path(data)))
    if task.hub is None:
        raise UserError(f"task {task.name!r} names neither files nor a Hub data set; give its rows with `data=DIR`")
    return _from_hub(task, split)


def find(task: Task, split: str, data: Path) -> Path:
    """``DIR/<task>/<split>.jsonl``; a split with a longer Hub name (validation_matched) may be called validation."""
    data = expanded(data)
    if not data.is_dir():
        found = "is a file" if data.is_file() else "does not exist"
        raise UserError(f"data folder {data} {found}; `data` names a folder that holds {task.name}/train.jsonl")
    folder = data / task.name
    if not folder.is_dir():
        found = ", ".join(sorted(entry.parent.name for entry in data.glob("*/train.jsonl"))) or "none"
        raise UserError(f"data folder {data} has no folder {task.name!r}; tasks found there: {found}")
    names = list(dict.fromkeys((split, "validation") if split != "train" else ("train",)))
    for name in names:
        for ending in ENDINGS:
            if (folder / f"{name}{ending}").is_file():
                return folder / f"{name}{ending}"
    raise UserError(f"task {task.name!r} needs {' or '.join(f'{n}.jsonl' for n in names)} in {folder}")


def generated(task: Task, data: Path) -> str:
    """A note that a task which generates its rows reads none from ``data``, which may be there for other tasks.

    Raises UserError if there is no such folder, and if it has rows under the task's name.
    """
    data = expanded(data)
    if not data.is_dir():
        found = "is a file" if data.is_file() else "does not exist"
        raise UserError(f"data folder {data} {found}; task {task.name!r} generates its rows: leave `data` out")
    if (data / task.name).exists():
        raise UserError(
            f"task {task.name!r} generates its rows and does not read {data / task.name}; describe these rows as a task of "
            "your own, or give another folder as `data`"
        )
    return f"{task.name}: its rows are generated, and none are read from {data}"


def _read(task: Task, path: Path) -> Source:
    if not is_file(path):
        found = "is not a file" if path.exists() else "does not exist"
        raise UserError(f"data file {path} {found}; task {task.name!r} needs it: correct the path, or add the file")
    try:
        rows = list(_parquet(path) if path.suffix == ".parquet" else _text_rows(task, path))
    except OSError as error:
        raise UserError(f"data file {path} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"data file {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not rows:
        found = "is empty" if path.suffix == ".jsonl" else "has no rows"
        raise UserError(f"data file {path} {found}; task {task.name!r} needs {FORMS.get(path.suffix, FORMS['.jsonl'])}")
    return _whole(task, str(path), rows)


def _whole(task: Task, name: str, rows: list[Row]) -> Source:
    """A source whose rows are all checked."""
    source = Source(name, rows, _labelled(task, rows, name))
    for index in source.usable:
        checked(task, rows[index], source.where(index))
    return source


def _text_rows(task: Task, path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:  # a byte-order mark does not belong to the first row
        if path.suffix in (".csv", ".tsv"):
            yield from table(task, path, file)
            return
        number = 0
        while line := file.readline(MAX_ROW):
            number += 1
            if number == 1 and path.suffix == ".json" and line.lstrip().startswith("["):
                yield from _json_list(path, line + file.read())
                return
            if line.strip():
                yield _parse(line, f"{path}, line {number}")


def _json_list(path: Path, text: str) -> Iterator[Row]:
    try:
        rows = parse_json(text)
    except json.JSONDecodeError as error:
        raise UserError(f"data file {path}: not a JSON list ({error.msg} at line {error.lineno})") from error
    except ValueError as error:
        raise UserError(f"data file {path} is beyond what can be read: {error}") from error
    for number, row in enumerate(rows, 1):
        yield _object(row, f"{path}, row {number}")


def _parse(line: str, where: str) -> Row:
    if len(line) == MAX_ROW:
        raise UserError(
            f"{where} is longer than {MAX_ROW:,} characters; write one JSON object per line, and shorter ones"
        )
    try:
        return _object(parse_json(line), where)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not a JSON object ({error.msg} at column {error.colno})") from error
    except ValueError as error:
        raise UserError(f"{where} is beyond what can be read: {error}") from error


def _object(row: Any, where: str) -> Row:
    if isinstance(row, list):
        raise UserError(f"{where}: one JSON object with named columns was expected, found a list; name a file with one "
                        "JSON list *.json, or write one object per line (jq -c '.[]')")  # fmt: skip
    if not isinstance(row, dict):
        raise UserError(f"{where}: one JSON object with named columns was expected, found {shown(row, 60)}")
    try:
        size = len(
            json.dumps(row, ensure_ascii=False, default=str).encode()
        )  # refuses lone surrogates, as tokenizers do
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: a number, a character or the nesting in it is beyond what can be read") from error
    if size > 4 * MAX_ROW:
        raise UserError(f"{where} is longer than {MAX_ROW:,} characters; split it into shorter rows")
    return row


def _plain(row: Any, deep: int = 8) -> Any:
    """Numbers and arrays of numpy and torch in a row as Python's, ``deep`` levels of it. Dates and the like stay, and are
    refused where a prompt needs them."""
    if isinstance(row, Mapping) and deep:
        return {str(name): _plain(value, deep - 1) for name, value in row.items()}
    if isinstance(row, list) and deep:
        return [_plain(value, deep - 1) for value in row]
    return row.tolist() if hasattr(row, "tolist") and hasattr(row, "dtype") else row  # type: ignore[union-attr]


def _parquet(path: Path) -> list[Row]:
    with needs("llm"):  # it is installed with datasets
        import pyarrow
        import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"data file {path} cannot be read as Parquet ({error})") from error


def _from_hub(task: Task, split: str) -> Source:
    with needs("llm"):
        from datasets import load_dataset  # the import takes a second, and only this branch needs it

    name = "/".join(part for part in (task.hub, task.config) if part)
    try:
        rows: Any = load_dataset(str(task.hub), task.config, split=split, revision=task.revision)
    except Exception as error:  # the library raises a dozen kinds: no network, no such id, no such split, a broken file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"data set {name!r}, split {split!r}, cannot be loaded from the Hub ({reason}); "
            f"check the network, or give the rows with `data=DIR`, in DIR/{task.name}/"
        ) from None  # a server's answer may repeat the token
    if len(rows) == 0:
        raise UserError(f"data set {name!r}, split {split!r}, is empty")
    return Source(f"{name} {split}", rows, _labelled(task, rows, f"{name} {split}"))


def _labelled(task: Task, rows: Any, where: str) -> list[int]:
    """Positions of the rows whose label, or answer of a generation task (of a chat its last turn), is not among the
    `unlabelled` ones.
    """
    if not task.unlabelled:
        return list(range(len(rows)))
    answered = task.kind == "generation" and "label" not in task.model_fields_set
    chat = task.messages if answered else None
    name, _, inner = task.answer.partition(".") if answered else (task.label, "", "")
    name, inner = (chat, "content") if chat else (name, inner)
    if hasattr(rows, "column_names") and name not in rows.column_names:
        raise _missing(task, {name}, dict.fromkeys(rows.column_names), where)
    values = rows[name] if hasattr(rows, "column_names") else [row.get(name) for row in rows]
    if chat:
        values = [turns[-1] if isinstance(turns, list) and turns else None for turns in values]
    values = [value.get(inner) if inner and isinstance(value, dict) else value for value in values]
    return [i for i, value in enumerate(values) if not any(same_value(value, known) for known in task.unlabelled)]


def checked(task: Task, row: Row, where: str) -> Row:
    """The row with the columns that the prompt needs. Raises UserError for a column that is missing, null or neither text
    nor number, and for a label outside the set.
    """
    try:
        adapted = task.adapt(row) if task.adapt else row
    except KeyError as error:
        raise _missing(task, {str(error.args[0])}, row, where) from error
    except (TypeError, AttributeError) as error:
        raise UserError(f"{where}: a column of task {task.name!r} has the wrong type ({error})") from error
    required = task.required()
    absent = {name for name in required if name not in adapted}
    if absent:
        raise _missing(task, absent, row, where)
    for name in sorted(required):
        if adapted[name] is None:
            hint = "; list null under `unlabelled` to leave such rows out" if name == task.label else ""
            raise UserError(f"{where}: {name!r} is null, and task {task.name!r} needs it{hint}")
    for name in task.read():
        if not isinstance(adapted[name], _SIMPLE):
            kind = type(adapted[name]).__name__
            hint = "; a chat is named by `messages`" if kind == "list" else ""
            raise UserError(f"{where}: {name!r} holds a {kind}, and a prompt takes text or numbers{hint}")
        if isinstance(adapted[name], float) and not math.isfinite(adapted[name]):
            raise UserError(f"{where}: {name!r} is {adapted[name]}, which is how some programs write an empty cell")
    if task.kind == "classification":
        task.label_index(adapted[task.label], where)
    if task.kind == "choice" and len(task.choices) == 1:
        number = len(adapted[task.choices[0]]) if isinstance(adapted[task.choices[0]], list) else 0
        if number > MAX_CHOICES:
            raise UserError(
                f"{where}: {task.choices[0]!r} holds {number:,} choices; at most {MAX_CHOICES} are compared"
            )
    return adapted


def _missing(task: Task, absent: set[str], row: Row, where: str) -> UserError:
    names = ", ".join(repr(name) for name in sorted(absent))
    found = ", ".join(repr(name) for name in row) or "none"
    return UserError(f"{where}: task {task.name!r} needs the column {names}; columns found: {found}")
