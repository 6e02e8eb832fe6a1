"""A user's own task from one YAML file; docs/own-task.md has a commented example."""

from __future__ import annotations

import re
from pathlib import Path

from metazo.errors import UserError
from metazo.io.plain import Loader, read_yaml, shown
from metazo.tasks.task import Task


class _Loader(Loader):
    """YAML in which Yes, No, On and Off are words, as in YAML 1.2: label words are written without quotes."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
    for first, resolvers in Loader.yaml_implicit_resolvers.items()
}


def from_yaml(path: str | Path) -> Task:
    """Read a task. Raises UserError, naming file and key, for a missing file, bad YAML, or an unknown or wrong key."""
    path = Path(path)
    content = read_yaml(path, "task file", _Loader)
    for key in {"adapt", "generate"} & content.keys():
        raise UserError(f"task file {path}: unknown key {key!r}")
    content.setdefault("name", path.stem)
    if not re.fullmatch(r"\w[\w .+-]{0,95}", str(content["name"])):  # folders are named after it
        raise UserError(f"task file {path}: {shown(content['name'])} is not a name of letters, digits and '._+-'")
    if re.fullmatch(r"(\\[nrt])+", str(content.get("stop"))):
        raise UserError(
            f"task file {path}: stop is the text {content['stop']}, a backslash and a letter; write it in double quotes"
        )
    try:
        task = Task(**content)
    except UserError as error:
        raise UserError(f"task file {path}: {error}") from error
    except TypeError as error:
        raise UserError(f"task file {path}: every key must be a text ({error})") from error
    if task.files:
        if "train" not in task.files:
            raise UserError(f"task file {path}: files must name the train file")
        return task.model_copy(update={"files": {k: str(path.parent / name) for k, name in task.files.items()}})
    return task
