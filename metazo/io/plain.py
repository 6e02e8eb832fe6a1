"""Reads JSON and YAML as plain data from files that anybody may have written. All such files are read here.

It refuses content that readers interpret differently or that grows when it is read: keys given twice, more than MAX_DEPTH
levels of nesting, whole numbers beyond 256 bits, and in YAML anchors (a few lines of which can expand to billions of
values), tags that name Python objects, and numbers with a leading 0 (0100 is 64 in YAML 1.1 and 100 in YAML 1.2). What YAML 1.1
reads as a number to the base of 60 (1:30) is text. Files are regular files of limited size: a pipe or a device is refused at
once. A document within these limits takes at most 6 s and 250 MB.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from metazo.errors import UserError
from metazo.io.files import read_capped

MAX_YAML_BYTES = 2**17
MAX_JSON_BYTES = 2**22
MAX_DEPTH = 64
MAX_BITS = 256
"""Most bits of a whole number. Any such number fits into a float."""


def parse_json(text: str | bytes, finite: bool = False) -> Any:
    """The value of a JSON text, within the limits of this module. Raises ValueError for anything else.

    finite: refuse NaN, Infinity and numbers that are too large for a float, which Python's json accepts.
    """
    try:
        found = json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from error
    _check(found, finite)
    return found


def read_json(path: Path, what: str, limit: int = MAX_JSON_BYTES) -> Any:
    """The value of a JSON file whose numbers are all finite. Raises UserError, which calls the file `what`."""
    data = read_capped(path, limit, what)
    try:
        return parse_json(data, finite=True)
    except ValueError as error:
        raise UserError(f"{what} {path} cannot be read as JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} is given twice")
        found[key] = value
    return found


def _check(value: Any, finite: bool) -> None:
    """Raises ValueError for nesting and numbers beyond the limits. It goes level by level, without recursion."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                inner += part.values()
            elif isinstance(part, list):
                inner += part
            elif isinstance(part, int):
                if part.bit_length() > MAX_BITS:
                    raise ValueError(f"a whole number has more than {MAX_BITS} bits")
            elif finite and isinstance(part, float) and not math.isfinite(part):
                raise ValueError(f"a number is {part}")
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_NUMBERS = {
    _INT: re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$"),
    _FLOAT: re.compile(r"([-+]?[0-9][0-9_]*\.[0-9_]*([eE][-+][0-9]+)?|\.[0-9][0-9_]*([eE][-+][0-9]+)?"
                       r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
}  # fmt: skip
"""What is a number: as in PyYAML, without the forms to the base of 60."""


class Loader(yaml.SafeLoader):
    """Plain YAML: no tags of Python, no anchors, no key twice, no number that some readers take for octal."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """Refuse deep lists here: PyYAML looks a thousand characters ahead, and at each of them goes through all open ones."""
        super().fetch_flow_collection_start(TokenClass)
        if self.flow_level > MAX_DEPTH + 1:
            raise yaml.MarkedYAMLError(
                problem=f"it is nested more than {MAX_DEPTH} levels deep", problem_mark=self.get_mark()
            )

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(
                problem="it has an anchor or alias; write the value out", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        found = super().construct_scalar(node)
        if not str(found).isascii() and any("\ud800" <= c <= "\udfff" for c in found):
            raise yaml.MarkedYAMLError(problem="it has half of a character", problem_mark=node.start_mark)
        return found

    def construct_yaml_int(self, node: Any) -> int:
        digits = self.construct_scalar(node).replace("_", "")
        if re.fullmatch("[-+]?0[0-7]+", digits) and int(digits, 8) != int(digits):
            raise yaml.MarkedYAMLError(
                problem=f"{shown(node.value)} is octal to some readers of YAML and decimal to others: leave out the leading 0, "
                "or put it in quotes if it is text",
                problem_mark=node.start_mark,
            )
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            place = next(place for place, key in enumerate(keys) if key in keys[:place])
            raise yaml.MarkedYAMLError(
                problem=f"the key {shown(keys[place])} is given twice", problem_mark=node.value[place][0].start_mark
            )
        return found


Loader.yaml_implicit_resolvers = {
    first: [(tag, _NUMBERS.get(tag, pattern)) for tag, pattern in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_constructor(_INT, Loader.construct_yaml_int)


def read_yaml(path: Path, what: str, loader: type[Loader] = Loader) -> dict[str, Any]:
    """A YAML file that is a mapping of names to values. Raises UserError, which calls the file `what`."""
    data = read_capped(path, MAX_YAML_BYTES, what)
    try:
        content = yaml.load(data.decode(), Loader=loader)
        _check(content, finite=False)
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise UserError(f"{what} {path} is not usable: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        # PyYAML's own constructors raise the latter for an impossible date, number or tagged value
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{what} {path}{line} is not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{what} {path} must be a mapping of names to values, not {shown(content)}")
    odd = [key for key in content if not isinstance(key, str)]  # null among them
    if odd:
        raise UserError(f"{what} {path} has the key {shown(odd[0])}, which is not a name")
    return content


def shown(value: object, longest: int = 80) -> str:
    """A value for a message, shortened."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists in lists
        return f"a huge {type(value).__name__}"
    return text if len(text) <= longest else f"{text[: longest - 5]} [...]"


def cut(table: dict[str, Any], longest: int = 80) -> dict[str, Any]:
    """A table for the terminal, whose long texts are shortened."""
    return {
        key: f"{value[: longest - 5]} [...]" if isinstance(value, str) and len(value) > longest else value
        for key, value in table.items()
    }


def finite(value: Any) -> Any:
    """JSON values with null for numbers that are NaN or infinite."""
    if isinstance(value, dict):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_name(value: object) -> bool:
    """Whether this is a line of text of at most 512 characters that can be shown."""
    return isinstance(value, str) and 0 < len(value) <= 512 and value.isprintable()


def is_plain(value: object, depth: int = 6) -> bool:
    """Numbers, and text without control characters that could write on a terminal, `depth` levels at most."""
    if isinstance(value, dict):
        return depth > 0 and all(is_name(key) and is_plain(part, depth - 1) for key, part in value.items())
    if isinstance(value, list):
        return depth > 0 and all(is_plain(part, depth - 1) for part in value)
    return not isinstance(value, str) or value.replace("\n", "").replace("\t", "").isprintable()
