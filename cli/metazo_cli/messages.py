"""Turns the library's messages into those of the command line: a setting in backticks becomes the command's flag.

The library names Python arguments: `dev_examples`, `keep='last'`, `resume=True`. Here they become --dev-examples,
--keep last and --resume if the command that runs has such a flag, and stay as they are if it has none.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import metazo
from metazo.io.terminal import Console

_SETTING = re.compile(r"`([a-z]\w*)(?:=(['\"]?)([^`'\"]*)\2)?`")
_flags: dict[str, tuple[str, str | None]] = {}
"""The flags of the running command: argument -> its flag, and the flag that turns it off."""


def know(command: Any, words: Sequence[str]) -> None:
    """Set the flags of the command that these words of a command line call, and name them in its help."""
    for word in words:
        if word not in getattr(command, "commands", {}):
            break
        command = command.commands[word]
    _flags.clear()
    for parameter in command.params:
        if parameter.param_type_name == "option":
            _flags[parameter.name] = (parameter.opts[0], next(iter(parameter.secondary_opts), None))
    for parameter in command.params:
        if getattr(parameter, "help", None):  # an argument of click has none
            parameter.help = in_flags(parameter.help)


def plain_warnings() -> None:
    """From here on, show what metazo warns of as a sentence with flags, and other warnings as Python does."""
    usual, own = warnings.formatwarning, os.path.join(Path(metazo.__file__).parent, "")

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if filename.startswith(own):
            return f"warning: {in_flags(str(message))}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = formatted


def in_flags(text: str) -> str:
    """The text with flags in place of settings in backticks."""

    def flag(found: re.Match[str]) -> str:
        name, _, value = found.groups()
        if name not in _flags:
            return found[0]
        on, off = _flags[name]
        if value in (None, "True"):
            return on
        return off if value == "False" and off else f"{on} {value}"

    return _SETTING.sub(flag, text)


class Terminal(Console):
    """A console that says what the library says in flags."""

    def worded(self, text: str) -> str:
        return in_flags(text)
