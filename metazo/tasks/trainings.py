"""The records of the trainings that a model went through, which identify rows that are neither dev nor test rows for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metazo.io.plain import shown
from metazo.models.describe import EARLIER
from metazo.tasks.rows import Source
from metazo.tasks.task import Task

SPLITS = ("train", "dev", "test")
VERSION = 2


def trainings(record: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The records of all trainings of a model, the last one first. They come from a file, which anybody may have written."""
    earlier = record.get(EARLIER) if record else None
    return [one for one in (record, *(earlier if isinstance(earlier, list) else ())) if isinstance(one, Mapping)]


def doubt(task: Task, source: Source, record: Mapping[str, Any]) -> str | None:
    """A note if the model may have been trained on dev or test rows; rows are identified by their task and their number."""
    if record.get("task") != task.name or record.get("rows") in (None, len(source.usable)):
        return None
    return (
        f"{task.name}: the model was trained on some of {shown(record['rows'])} rows and there are {len(source.usable)} now: "
        "some dev or test rows may be training rows"
    )


def same_rows(task: Task, source: Source, record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The record, if it is of these rows, else None."""
    numbers = ("seed", "rows", *SPLITS)
    if not record or record.get("version") != VERSION or record.get("task") != task.name:
        return None
    if not all(type(record.get(name)) is int and record[name] >= 0 for name in numbers):
        return None
    k = record.get("k_per_class")
    if record["rows"] != len(source.usable) or not (k is None or (type(k) is int and k > 0 and task.labels)):
        return None
    return dict(record)
