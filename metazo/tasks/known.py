"""The tasks that metazo knows, by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from metazo.errors import UserError
from metazo.io.plain import shown
from metazo.tasks import answers, books, generated, glue, superglue, text
from metazo.tasks.custom import from_yaml
from metazo.tasks.task import Task

_ALL = (*glue.TASKS, *superglue.TASKS, *answers.TASKS, *generated.TASKS, *text.TASKS, books.TASK)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


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
    if not isinstance(name_or_yaml, str | Path):
        raise UserError(f"`task` is a name, a YAML file or a Task, not {shown(name_or_yaml)}.")
    if Path(name_or_yaml).suffix in (".yaml", ".yml"):
        return from_yaml(name_or_yaml)
    return get(str(name_or_yaml))
