"""Recipes: YAML settings of runs, by name. A recipe's comment says what it is and the command that runs it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from metazo.errors import UserError


def names() -> list[str]:
    return sorted(item.name.removesuffix(".yaml") for item in files(__name__).iterdir() if item.name.endswith(".yaml"))


def text(name: str) -> str:
    """A recipe's YAML. Raises UserError for an unknown name."""
    if name not in names():
        raise UserError(f"{name!r} is not a recipe; the recipes are {', '.join(names())}.")
    return (files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")


def locate(name_or_path: str) -> Path:
    """The file of a recipe that comes with metazo, or the path itself."""
    if name_or_path in names():
        return Path(str(files(__name__) / f"{name_or_path}.yaml"))
    return Path(name_or_path)
