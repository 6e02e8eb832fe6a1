"""The records of the trainings that a model went through, which identify rows that are neither dev nor test rows for it.

A row is known by its content: a hash of the columns that the prompt reads (and of the choices), without label and answer.
A record has the hashes of its training rows, so that they are found under another task's name, in another order, among
more rows, and with other labels. Of more than `MOST` rows it has one hash of all, which tells only whether the rows of the
same seed are the same; records of earlier versions have none, and identify rows by the task's name and their number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np

from metazo.io.plain import shown
from metazo.models.describe import EARLIER
from metazo.tasks.rows import Source, checked
from metazo.tasks.task import Row, Task

if TYPE_CHECKING:
    from metazo.tasks.prepared import Prepared

SPLITS = ("train", "dev", "test")
VERSION = 2
MOST = 5000
"""Most training rows of which a record has a hash each, so that it stays below 50 kB."""
TUNER_ROWS = "training rows"
"""Key of `tuner_rows` in the recipe of a tuner."""
DIGITS = 8  # of such a hash; of 300,000 rows, 0.35 are expected to be like one of 5,000 by chance, and are left out

_text = json.JSONEncoder(sort_keys=True, default=str).encode


@dataclass
class Former:
    """What a record says about the rows that are there now."""

    record: dict[str, Any] | None = None
    """The record, if all rows that it is about are there."""
    places: list[int] = field(default_factory=list)
    """The rows that the model was trained on, as places among the usable rows."""
    moved: bool = False
    """Whether the rows are in another order than then."""
    note: str | None = None
    """A sentence, if the model may have been trained on other rows as well."""


def trainings(record: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The records of all trainings of a model, the last one first. They come from a file, which anybody may have written."""
    earlier = record.get(EARLIER) if record else None
    return [one for one in (record, *(earlier if isinstance(earlier, list) else ())) if isinstance(one, Mapping)]


def order_of(number: int, seed: int, purpose: str) -> list[int]:
    """A permutation that depends only on the seed, the purpose and the number of rows."""
    return np.random.default_rng([seed, *purpose.encode()]).permutation(number).tolist()


def read_columns(task: Task) -> list[str]:
    """The columns by which a row is known: those that the prompt reads, and the choices."""
    return sorted(map(str, {*task.read(), *task.choices, *([task.messages] if task.messages else [])}))


def contents(task: Task, rows: Sequence[Row]) -> dict[str, Any]:
    """The part of a record that identifies its training rows by their content."""
    return _packed(json.dumps(read_columns(task)), prints(task, rows))


def prints(task: Task, rows: Sequence[Row]) -> list[str]:
    """The hash of each row's content."""
    columns = read_columns(task)
    return [_print(row, columns) for row in rows]


def _packed(columns: str, found: Sequence[str]) -> dict[str, Any]:
    return {"columns": columns, "contents": "".join(found) if len(found) <= MOST else _digest(found)}


class Recall:
    """Finds the rows of trainings among those of a source.

    few: the first rows of an order, so many of each class; shared: whether dev or test rows are taken from this source, else
    rows that are in another order now are not looked for.
    """

    def __init__(self, task: Task, source: Source, few: Callable[[list[int], int], list[int]], shared: bool):
        self.task, self.source, self.few, self.shared = task, source, few, shared
        self.number = len(source.usable)
        self.scans: dict[tuple[str, ...], list[str]] = {}
        self.trained: list[tuple[list[str], set[str]]] = []

    def __call__(self, record: Mapping[str, Any]) -> Former:
        """What a record says about the rows, also if somebody has changed it."""
        named, hashed = record.get("task") == self.task.name, _hashed(record)
        if not _whole(record) or not (named or hashed):
            return Former(note=self._doubt(record) if named else None)
        if hashed and record["train"] <= MOST:
            return self._by_content(record)
        k = record.get("k_per_class")
        if record["rows"] == self.number and (k is None or (named and self.task.labels)):
            order = order_of(self.number, record["seed"], "train")
            places = self.few(order, k) if k else order[: record["train"]]
            if not hashed or _digest([self._at(i, _columns(record)) for i in places]) == record["contents"]:
                return Former(dict(record), places)
        return Former(note=self._doubt(record) if named or record["rows"] == self.number else None)

    def again(self, rows: Sequence[Row], train: Sequence[Row]) -> int:
        """How many of these rows were trained on, apart from those that are train rows now as well."""
        known = [(columns, prints - {_print(row, columns) for row in train}) for columns, prints in self.trained]
        return sum(any(_print(row, columns) in prints for columns, prints in known) for row in rows)

    def _by_content(self, record: Mapping[str, Any]) -> Former:
        columns, text = _columns(record), record["contents"]
        prints = [text[i : i + DIGITS] for i in range(0, len(text), DIGITS)]
        self.trained.append((columns, set(prints)))
        places = list[int]()
        if record["rows"] == self.number:  # the order is the same, if the rows are: no copy of a row is mistaken for it
            for i in order_of(self.number, record["seed"], "train"):
                if len(places) == len(prints):
                    break
                if self._at(i, columns) == prints[len(places)]:
                    places.append(i)
                elif not record.get("k_per_class"):
                    break
        if len(places) == len(prints):
            return Former(dict(record), places)
        if not self.shared:  # no row is taken out, and the split is that of the training
            named = record.get("task") == self.task.name and record["rows"] == self.number
            return Former(dict(record) if named else None)
        every, wanted = self._scan(columns), set(prints)
        places = [i for i, found in enumerate(every) if found in wanted]
        absent = len(wanted.difference(every))
        if not absent and record["rows"] == self.number:
            return Former(dict(record), places, moved=True)
        note = (
            f"{self.task.name}: {absent} of {len(wanted)} rows that the model was trained on are not there now: if they are "
            "there in other words, some dev or test rows may be training rows"
        )
        return Former(places=places, note=note if absent and (places or record.get("task") == self.task.name) else None)

    def _at(self, place: int, columns: list[str]) -> str:
        index = self.source.usable[place]
        return self._of(self.source.rows[index], index, columns)

    def _of(self, row: Row, index: int, columns: list[str]) -> str:
        return _print(checked(self.task, row, self.source.where(index)) if self.task.adapt else row, columns)

    def _scan(self, columns: list[str]) -> list[str]:
        """The hashes of all usable rows."""
        if (key := tuple(columns)) not in self.scans:
            rows: Any = self.source.rows
            usable = set(self.source.usable)
            if hasattr(rows, "select_columns") and not self.task.adapt:  # of the Hub, slow one after another
                table = rows.select_columns([name for name in columns if name in rows.column_names])
                rows = (dict(zip(part, row)) for part in table.iter(1000) for row in zip(*part.values()))
            self.scans[key] = [self._of(row, i, columns) for i, row in enumerate(rows) if i in usable]
        return self.scans[key]

    def _doubt(self, record: Mapping[str, Any]) -> str | None:
        """A note if the rows of the training cannot be known."""
        if (rows := record.get("rows")) in (None, self.number) and not _hashed(record):
            return None
        now = (
            f" and there are {self.number} now" if rows != self.number else ", and these are others or in another order"
        )
        return (
            f"{self.task.name}: the model was trained on some of {shown(rows)} rows{now}: "
            "some dev or test rows may be training rows"
        )


def _whole(record: Mapping[str, Any]) -> bool:
    """Whether a record has all numbers of this version of the split."""
    numbers, k = (record.get(name) for name in ("seed", "rows", *SPLITS)), record.get("k_per_class")
    return (
        record.get("version") == VERSION
        and all(type(value) is int and value >= 0 for value in numbers)
        and (k is None or (type(k) is int and k > 0))
    )


def _hashed(record: Mapping[str, Any]) -> bool:
    """Whether a record identifies its rows by their content."""
    text, train = record.get("contents"), record.get("train")
    if not _columns(record) or type(train) is not int:
        return False
    return isinstance(text, str) and train > 0 and len(text) == (DIGITS * train if train <= MOST else 64)


def _columns(record: Mapping[str, Any]) -> list[str]:
    """The columns by which a record knows its rows; they are kept as JSON, which is plain text whatever their names are."""
    try:
        found = json.loads(record.get("columns", ""))
    except (TypeError, ValueError):
        return []
    return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else []


def content(row: Row, columns: Sequence[str]) -> str:
    """The text of these columns of a row."""
    values = (row.get(name) for name in columns)
    return "\0".join(value if type(value) is str else _text(value) for value in values)  # 3 of JSON is "3" of CSV


def _print(row: Row, columns: Sequence[str]) -> str:
    return sha256(content(row, columns).encode()).hexdigest()[:DIGITS]


def _digest(prints: Sequence[str]) -> str:
    return sha256("".join(prints).encode()).hexdigest()


def tuner_rows(tasks: Iterable[Prepared], splits: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For a tuner's recipe: the rows of these splits of each task, by their content; without tasks of generated rows."""
    found = {}
    for prepared in tasks:
        if "columns" in prepared.record:
            own = [one for split in splits for one in prepared.prints[split]]
            found[prepared.task.name] = {"train": len(own), **_packed(prepared.record["columns"], own)}
    return found


def tuner_note(recipe: Mapping[str, Any], prepared: Prepared) -> str | None:
    """A sentence if dev or test rows are among those of `tuner_rows` in a recipe, which may be a stranger's, or may be."""
    known, name, seen = recipe.get(TUNER_ROWS), prepared.task.name, set[str]()
    for task, record in known.items() if isinstance(known, dict) and "columns" in prepared.record else ():
        if not isinstance(record, dict) or not _hashed(record) or record["columns"] != prepared.record["columns"]:
            continue
        if record["train"] <= MOST:
            seen |= {record["contents"][i : i + DIGITS] for i in range(0, DIGITS * record["train"], DIGITS)}
        elif task == name:
            return (
                f"{name}: the tuner was trained with {record['train']} rows, more than its file lists: some dev or test rows "
                "may be among them"
            )
    rows = {split: prepared.prints[split] for split in ("dev", "test")} if seen else {}
    counts = {split: sum(one in seen for one in found) for split, found in rows.items()}
    if not any(counts.values()):
        return None
    listed = " and ".join(f"{count} of {len(rows[split])} {split} rows" for split, count in counts.items() if count)
    return (
        f"{name}: the tuner was trained with {listed}, whose scores may be too good: take other rows, or meta-train with a "
        "smaller `train_examples`"
    )
