"""Tasks by name or from a YAML file, and their rows made ready for a model.

    task = resolve("sst2")                      # or resolve("mine.yaml")
    prepared = prepare(task, load_model("pico"), data=Path("data"), train=64)
    loss = prepared.loss(model, prepared.collate(prepared.train[:16]))

A task of your own is one YAML file; docs/own-task.md has a commented example. Names that need torch are imported when they are
first used.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metazo.errors import UserError
from metazo.tasks import answers, books, generated, glue, superglue, text
from metazo.tasks.custom import from_yaml
from metazo.tasks.rows import in_memory
from metazo.tasks.task import Task

if TYPE_CHECKING:
    from metazo.tasks.prepared import Batch as Batch
    from metazo.tasks.prepared import Prepared as Prepared
    from metazo.tasks.splits import prepare as prepare

__all__ = ["TASKS", "Batch", "Prepared", "Task", "from_yaml", "get", "in_memory", "names", "prepare", "resolve"]

_HOMES = {"Batch": "prepared", "Prepared": "prepared", "prepare": "splits"}
_ALL = (*glue.TASKS, *superglue.TASKS, *answers.TASKS, *generated.TASKS, *text.TASKS, books.TASK)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def names() -> list[str]:
    """Names of the tasks that metazo knows."""
    return list(TASKS)


def get(name: str) -> Task:
    """The task of that name ("SST-2" is "sst2"). Raises UserError with the nearest names for an unknown one."""
    known = TASKS.get(name) or TASKS.get(name.lower().replace("-", ""))
    if known is not None:
        return known
    near = difflib.get_close_matches(name.lower(), TASKS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the tasks are {', '.join(TASKS)}"
    raise UserError(f"unknown task {name!r}; {hint}")


def resolve(name_or_yaml: str | Path) -> Task:
    """A known task by name, or a task read from a path that ends in .yaml or .yml."""
    if Path(name_or_yaml).suffix in (".yaml", ".yml"):
        return from_yaml(name_or_yaml)
    return get(str(name_or_yaml))
