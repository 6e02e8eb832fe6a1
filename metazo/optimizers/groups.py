"""Parameter groups in torch's form, of named tensors; one or many closures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

Closure = Callable[[], Tensor | float]


def listed(closure: Closure | Sequence[Closure] | None) -> Sequence[Closure]:
    return [closure] if callable(closure) else list(closure or ())


def named_groups(params: Iterable) -> list[dict[str, Any]]:
    """Parameter groups of (name, parameter) pairs in which each tensor occurs once."""
    entries = list(params)
    groups = [dict(entry) for entry in entries] if entries and isinstance(entries[0], dict) else [{"params": entries}]
    seen: set[int] = set()
    position = 0
    for group in groups:
        members = group["params"]
        named = []
        for member in [members] if isinstance(members, Tensor) else list(members):
            name, param = member if isinstance(member, tuple) else (f"param.{position}", member)
            position += 1
            if id(param) not in seen:
                seen.add(id(param))
                named.append((name, param))
        group["params"] = named
    return groups
