"""Makes flags from a settings dataclass: one flag per field, with the string under it as help, above a YAML recipe."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any, Literal, TypeVar

import typer

from metazo.errors import UserError
from metazo.recipes import locate
from metazo.settings import build, help_of, read_recipe

Config = TypeVar("Config")
_LENGTHS = ("steps", "forwards", "epochs")  # settings of which one gives the length of a run


def flags(
    config: type, skip: tuple[str, ...] = (), extra: Mapping[str, str] | None = None, panel: str | None = None
) -> list[inspect.Parameter]:
    """A keyword parameter with a typer option for each field; an unset flag is None, so that the recipe's value is used.

    extra: additional help by field name. Choices are listed if the help does not explain each by its name. Help has no square
    brackets, because they are markup to rich, and settings in backticks (`messages.know` makes flags of them).
    """
    hints, helps = typing.get_type_hints(config), help_of(config)
    made = []
    for item in fields(config):
        if item.name not in skip:
            name, hint = item.name, hints[item.name]
            text = helps.get(name, "") + (extra or {}).get(name, "")
            made.append(parameter(name, hint, text + _choices(hint, text) + _default(item), panel))
    return made


def parameter(name: str, hint: Any, text: str, panel: str | None = None) -> inspect.Parameter:
    kind, repeated = _plain(hint)
    flag = "--" + name.replace("_", "-")
    names = (f"{flag}/--no-{name.replace('_', '-')}",) if kind is bool else (flag,)
    option = typer.Option(*names, help=text, show_default=False, rich_help_panel=panel)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[(list[kind] if repeated else kind) | None, option],  # type: ignore[valid-type]
    )


def _default(item: Field) -> str:
    if item.default is MISSING and item.default_factory is MISSING:
        return " (required)"
    if item.default is MISSING or item.default is None or item.default is False:
        return ""
    return f" (default {item.default})"


def _choices(hint: Any, text: str) -> str:
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    explained = all(f"{choice}: " in text for choice in choices)
    return "" if explained else f": {', '.join(choices)}"


def _plain(hint: Any) -> tuple[Any, bool]:
    """The type for typer to parse, and whether the flag may be repeated. Choices, and what may be a number or text, are parsed
    as text and checked later."""
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        hint = str if str in kinds else kinds[0]
    if typing.get_origin(hint) in (list, tuple):
        return _plain(typing.get_args(hint)[0])[0], True
    if typing.get_origin(hint) is Literal:
        return str, False
    return (hint, False) if hint in (int, float, bool, Path) else (str, False)


def with_flags(function: Callable[..., None], made: list[inspect.Parameter]) -> Callable[..., None]:
    """`function(**values)` with a signature for typer: these parameters and its own fixed ones."""
    signature = inspect.signature(function, eval_str=True)
    own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]

    def command(**values: Any) -> None:
        function(**values)

    command.__signature__ = inspect.Signature([*made, *own])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [*made, *own]}
    command.__doc__, command.__name__ = function.__doc__, function.__name__
    return command


def check_plot(plot: Path) -> None:
    """Raises UserError for a picture that could not be written: of another kind, or not in a folder that exists."""
    if plot.suffix not in (".png", ".svg"):
        raise UserError(f"`plot` {str(plot)!r} must end in .png or .svg.")
    if plot.is_dir() or not plot.parent.is_dir():
        raise UserError(f"`plot` {str(plot)!r} is no file in a folder that exists; name another, or make the folder.")
    try:
        TemporaryFile(dir=plot.parent).close()  # /proc exists, and permission there means nothing
    except OSError as error:
        raise UserError(
            f"`plot` {str(plot)!r} cannot be written ({error.strerror or error}); name a file in another folder."
        ) from error


def without_length(recipe: Mapping[str, Any], flagged: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without its length of the run if a flag gives the length, perhaps as another setting."""
    dropped = _LENGTHS if any(name in flagged for name in _LENGTHS) else ()
    return {key: value for key, value in recipe.items() if key not in dropped}


def settings(
    config: type[Config], recipe: Path | None, values: Mapping[str, Any], began: Mapping[str, Any] | None = None
) -> Config:
    """The config from a recipe and flags. A flag overrides the recipe, and both override the settings of a resumed run."""
    flagged = {key: value for key, value in values.items() if value is not None and value != []}
    path = locate(str(recipe)) if recipe else None
    return build_from(config, path, without_length(read_recipe(path) if path else {}, flagged), flagged, began or {})


def build_from(
    config: type[Config],
    path: Path | None,
    recipe: Mapping[str, Any],
    flagged: Mapping[str, Any],
    *before: Mapping[str, Any],
) -> Config:
    """`build`; a setting of the recipe is called by its name there and not by its flag."""
    try:
        return build(config, *before, recipe, flagged)
    except UserError as error:
        found = re.match(r"[`'](\w+)(?:\.\w+)*[`']", str(error))
        if found is None or found[1] not in recipe or found[1] in flagged:
            raise
        raise UserError(f"recipe {path}: {found[1]}{str(error)[found.end() :]}") from error
