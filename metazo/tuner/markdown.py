"""What the cards of published files are made of: tables, and texts that stay in their cell."""

from __future__ import annotations

import re
from typing import Any


def front_matter(base_model: str, stated: str | None) -> str:
    """The YAML metadata at the head of a tuner's card on the Hub."""
    line = f"license: {_yaml(stated.lower())}\n" if stated else ""
    return f"---\nlibrary_name: metazo\nbase_model: {_yaml(base_model)}\n{line}tags: [metazo, tuner]\n---\n"


def _yaml(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def table(values: dict[str, Any]) -> str:
    rows = "".join(f"| {text(key)} | {text(value)} |\n" for key, value in _flat(values))
    return f"\n| | |\n|---|---|\n{rows}" if rows else "\nNot recorded.\n"


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested tables and lists with the path to each."""
    if isinstance(value, dict):
        return [leaf for key, part in value.items() for leaf in _flat(part, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list) and any(isinstance(part, dict | list) for part in value):
        return [leaf for number, part in enumerate(value) for leaf in _flat(part, f"{path}.{number}")]
    return [(path, ", ".join(map(figure, value)) if isinstance(value, list) else figure(value))]


def figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def licence(stated: str | None) -> str:
    return text(stated) if stated else "none stated: it may not be republished"


_MARKUP = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "`": "&#96;"} | {c: f"\\{c}" for c in "\\[]()!*~#"}


def text(value: Any) -> str:
    """Escape text so that it stays in its cell and is not markup. A bare address is left, which leads to what it shows."""
    line = " ".join(str(value).split()).translate(str.maketrans(_MARKUP))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)  # within a word it is not markup


def word(value: Any, instead: str) -> str:
    """A name for a command of a card, where nothing can be escaped; `instead` if it is more than a name."""
    return str(value) if re.fullmatch(r"[A-Za-z0-9/][A-Za-z0-9._+@:/-]*", str(value)) else instead
