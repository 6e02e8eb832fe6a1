"""Where the rows of a task's splits come from."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from metazo.tasks.rows import Rows, load
from metazo.tasks.task import Task


def sources_of(task: Task) -> dict[str, str]:
    """The source of each split. If there is a test source, the user's validation rows are dev."""
    if not task.files:
        return {"train": task.train_split, "dev": task.dev_split or task.train_split, "test": task.test_split}
    files = task.files
    dev = "validation" if {"validation", "test"} <= files.keys() else "train"
    return {"train": "train", "dev": dev, "test": next((n for n in ("test", "validation") if n in files), "train")}


def shares_test_rows(task: Task) -> bool:
    """Whether test rows are taken from the source of the train or the dev rows, so that the split decides which they are."""
    names = sources_of(task)
    return task.generate is None and names["test"] in (names["train"], names["dev"])


def rows_hash(task: Task, data: Path | Rows | None) -> str | None:
    """sha256 over all rows from which the splits are drawn; None if they are generated, or of the Hub, which has versions."""
    if task.generate is not None or (task.hub is not None and data is None and not task.files):
        return None
    found = sha256()
    for name in dict.fromkeys(sources_of(task).values()):
        for row in load(task, name, data).rows:
            found.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()
