"""Tasks by name or from a YAML file, and their rows made ready for a model.

    prepared = prepare("sst2", load_model("pico"), data=Path("data"), train=64)      # or "mine.yaml"
    loss = prepared.loss(model, prepared.collate(prepared.train[:16]))

A task of your own is one YAML file; docs/own-task.md has a commented example. Names that need torch are imported when they are
first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from metazo.tasks.custom import from_yaml
from metazo.tasks.known import TASKS, get, names, resolve
from metazo.tasks.rows import in_memory
from metazo.tasks.task import Task

if TYPE_CHECKING:
    from metazo.tasks.prepared import Batch as Batch
    from metazo.tasks.prepared import Prepared as Prepared
    from metazo.tasks.splits import prepare as prepare

__all__ = ["TASKS", "Batch", "Prepared", "Task", "from_yaml", "get", "in_memory", "names", "prepare", "resolve"]

_HOMES = {"Batch": "prepared", "Prepared": "prepared", "prepare": "splits"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
