"""Settings as dataclasses: documented field by field, read from YAML, checked, and overridden by flags."""

from __future__ import annotations

import ast
import inspect
import math
import sys
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from metazo.errors import UserError
from metazo.io.plain import read_yaml, shown

Config = TypeVar("Config")
MOST = 10**9  # the largest whole number of a setting that has no bound of its own
LONGEST_NAME, LONGEST_PATH = 255, 4000  # bytes, as on Linux


class Unset(int):
    """The default of a number that gives way to what is there. The same number, if somebody sets it, is a plain int."""


def setting(
    *,
    role: str,
    hashed: bool = False,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    **options: Any,
) -> Any:
    """A field of a settings dataclass.

    role: the part of a run that a change of the setting affects. hashed: the result is identified by the content that the
    setting names, not by the name.
    least, above, most: bounds of a number, for `check_values`. options: default or default_factory, as of
    `dataclasses.field`.
    """
    metadata = {"role": role, "hashed": hashed, "least": least, "above": above, "most": most}
    return field(metadata=metadata, **options)


def check_values(config: Any) -> None:
    """Raises UserError for a number of a settings dataclass that is not finite or out of its bounds, and for a text or path
    that is not UTF-8 or has a component longer than a file name may be, and for True or False as a number.
    """
    types = _types(type(config))
    for item in fields(config):
        value, bounds = getattr(config, item.name), item.metadata
        check_flag(item.name, value, types[item.name])
        if isinstance(value, int | float) and not isinstance(value, bool):
            most = bounds.get("most") or (MOST if isinstance(value, int) else None)
            check_number(item.name, value, least=bounds.get("least"), above=bounds.get("above"), most=most)
        elif isinstance(value, str | Path):
            check_path(item.name, value)


def check_number(
    name: str, value: float, *, least: float | None = None, above: float | None = None, most: float | None = None
) -> None:
    """Raises UserError for a number that is not finite or out of these bounds (None: none)."""
    wanted = None
    if not math.isfinite(value):
        wanted = "a finite number"
    elif least is not None and value < least:
        wanted = f"at least {least:g}"
    elif above is not None and value <= above:
        wanted = f"above {above:g}"
    elif most is not None and value > most:
        wanted = f"at most {most:,}" if isinstance(most, int) else f"at most {most:g}"
    if wanted is not None:
        raise UserError(f"`{name}` must be {wanted}, not {shown(value)}.")


def as_rate(value: Any) -> float | None:
    """A learning rate, also of numpy or in text (YAML makes one of 1e-3); None for what is no finite number above 0."""
    if isinstance(value, Real | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            number = float(value)
            return number if 0 < number < math.inf else None
    return None


def check_flag(name: str, value: Any, wanted: Any) -> None:
    """Raises UserError for True or False, also within a list or mapping, if `wanted`, a type, has numbers and no flags: both
    are ints in Python, and 1 and 0 to pydantic.
    """
    kinds = _kinds(wanted)
    if kinds & {int, float} and not kinds & {bool, Any, object} and (flag := _flag(value)) is not None:
        raise UserError(f"`{name}` must be a number, not {flag}; YAML reads yes, on, no and off as True and False too.")


@cache
def _kinds(wanted: Any) -> frozenset[Any]:
    """The types that a type is made of."""
    parts = get_args(wanted)
    if get_origin(wanted) is Literal or not parts:
        return frozenset(map(type, parts)) or frozenset({wanted})
    parts = [part for part in parts if not isinstance(part, list)]  # of a function's arguments
    return frozenset[Any]().union(*map(_kinds, parts))


def _flag(value: Any) -> bool | None:
    """The first True or False in a value, if there is one."""
    if isinstance(value, bool):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((flag for part in parts if (flag := _flag(part)) is not None), None)


_types = cache(get_type_hints)


def check_path(name: str, value: str | Path) -> None:
    """Raises UserError for a text or path that cannot be the name of a file."""
    try:
        parts = [len(part.encode()) for part in str(value).split("/")]
    except UnicodeEncodeError:
        if (locale := sys.getfilesystemencoding()) != "utf-8":
            raise UserError(
                f"`{name}` {str(value)!a} has characters that the encoding of this locale, {locale}, does not have; set LC_ALL "
                "to C.UTF-8 or another locale of UTF-8, or rename the folder or file."
            ) from None
        raise UserError(f"`{name}` {str(value)!a} is not UTF-8 text; rename the folder or file.") from None
    if max(parts) > LONGEST_NAME or sum(parts) > LONGEST_PATH:
        raise UserError(
            f"`{name}` has a name of {max(parts)} bytes, and a file's name has at most {LONGEST_NAME}; shorten it."
        )


def as_path(name: str, value: Any, what: str = "folder") -> Path:
    """The name or path of a file or folder as a path. Raises UserError for another type, and as `check_path` does."""
    if not isinstance(value, str | Path):
        raise UserError(f"`{name}` is a {what}'s name or path, not {shown(value)}.")
    check_path(name, value)
    return Path(value)


def with_role(config: type, *roles: str) -> tuple[str, ...]:
    """Names of the fields with these roles."""
    return tuple(item.name for item in fields(config) if item.metadata["role"] in roles)


@cache
def help_of(config: type) -> dict[str, str]:
    """The string under each field of a dataclass, by field name; a field without one takes that of the class it extends."""
    texts = {}
    for cls in reversed([cls for cls in config.__mro__ if is_dataclass(cls)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
        for statement, following in zip(body, body[1:]):
            text = getattr(getattr(following, "value", None), "value", None)
            if isinstance(statement, ast.AnnAssign) and isinstance(text, str):
                texts[statement.target.id] = " ".join(text.split())  # type: ignore[union-attr]
    return texts


def read_recipe(path: Path) -> dict[str, Any]:
    """A YAML recipe: a mapping of field names, in which - is _, to values. Raises UserError that names the file."""
    found: dict[str, Any] = {}
    for key, value in read_yaml(path, "recipe").items():
        name = key.replace("-", "_")
        if name in found:
            raise UserError(f"recipe {path} has {shown(name)} twice, with - and with _; leave one of them out.")
        found[name] = value
    return found


@cache
def _checker(config: type) -> TypeAdapter[Any]:
    """pydantic's validator of a dataclass; made once, because that takes 10 ms or more."""
    return TypeAdapter(with_config(ConfigDict(arbitrary_types_allowed=True))(config))


def build(config: type[Config], *layers: Mapping[str, Any]) -> Config:
    """A config from layers of settings, of which later ones override earlier ones (recipe, then flags); None means not given.

    Raises UserError that names the field, its value, and the allowed values.
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
        check_flag(key, values[key], _types(config)[key])
    try:
        return _checker(config).validate_python(values)
    except ValidationError as error:
        raise _refusal(error) from error


def _refusal(error: ValidationError) -> UserError:
    """What pydantic found first, as a sentence."""
    first = error.errors()[0]
    name = ".".join(part for part in first["loc"] if isinstance(part, str)) or "settings"  # without places in a list
    if first["type"] in ("missing", "missing_argument"):
        return UserError(f"`{name}` is required.")
    return UserError(f"`{name}` is {shown(first['input'])}: {first['msg'].removeprefix('Value error, ')}.")


@cache
def _bare_checker(config: type) -> TypeAdapter[Any]:
    """pydantic's validator of the types of a dataclass's fields, without the checks of its `__post_init__`."""
    bare = dataclass(type(config.__name__, (config,), {"__post_init__": lambda self: None}))
    return TypeAdapter(with_config(ConfigDict(arbitrary_types_allowed=True))(bare))


def check_types(config: Any) -> None:
    """Give each field of a settings dataclass the value that `build` would: Path("x") for "x". For its `__post_init__`.

    Raises UserError as `build` does; a path is a text as well.
    """
    given = {
        item.name: _text(value)
        for item in fields(config)
        if (value := getattr(config, item.name)) is not item.default and not isinstance(value, Unset)
    }
    for name, value in given.items():
        check_flag(name, value, _types(type(config))[name])
    try:
        made = _bare_checker(type(config)).validate_python(given)
    except ValidationError as error:
        raise _refusal(error) from error
    for name in given:
        setattr(config, name, getattr(made, name))


def _text(value: Any) -> Any:
    """The value with paths as text."""
    if isinstance(value, list | tuple):
        return [_text(member) for member in value]
    return str(value) if isinstance(value, Path) else value
