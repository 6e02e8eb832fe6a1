"""Settings as dataclasses: documented field by field, read from YAML, checked, and overridden by flags."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import field, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from metazo.errors import UserError
from metazo.io.plain import read_yaml, shown

Config = TypeVar("Config")


def setting(*, role: str, hashed: bool = False, **options: Any) -> Any:
    """A field of a settings dataclass.

    role: what a change of the setting touches. hashed: the result is known by the content that this names, not by the name.
    options: default or default_factory, as of `dataclasses.field`.
    """
    return field(metadata={"role": role, "hashed": hashed}, **options)


def with_role(config: type, *roles: str) -> tuple[str, ...]:
    """Names of the fields of these roles."""
    return tuple(item.name for item in fields(config) if item.metadata["role"] in roles)


@cache
def help_of(config: type) -> dict[str, str]:
    """The string under each field of a dataclass, by field name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0].body  # type: ignore[attr-defined]
    texts = {}
    for statement, following in zip(body, body[1:]):
        text = getattr(getattr(following, "value", None), "value", None)
        if isinstance(statement, ast.AnnAssign) and isinstance(text, str):
            texts[statement.target.id] = " ".join(text.split())  # type: ignore[union-attr]
    return texts


def read_recipe(path: Path) -> dict[str, Any]:
    """A YAML recipe: a mapping of field names to values. Raises UserError that names the file."""
    return {key.replace("-", "_"): value for key, value in read_yaml(path, "recipe").items()}


def build(config: type[Config], *layers: Mapping[str, Any]) -> Config:
    """A config from layers of settings, later ones first in rank (recipe, then flags); None counts as not given.

    Raises UserError that names the field, what was found, and what it may be.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, Mapping) and isinstance(values.get(key), Mapping):
                values[key] = {**values[key], **value}
            elif value is not None:
                values[key] = value
    known = [item.name for item in fields(config)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise UserError(f"{shown(key)} is not a setting; the settings are {', '.join(known)}.")
    try:
        strict = with_config(ConfigDict(arbitrary_types_allowed=True))(config)
        return TypeAdapter(strict).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        if first["type"] in ("missing", "missing_argument"):
            raise UserError(f"`{name}` is required.") from error
        raise UserError(
            f"`{name}` is {shown(first['input'])}: {first['msg'].removeprefix('Value error, ')}."
        ) from error
