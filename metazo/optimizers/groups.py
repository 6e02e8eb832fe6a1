"""Parameter groups in torch's form, of named tensors; one or many closures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from metazo.errors import UserError

Closure = Callable[[], Tensor | float]


def listed(closure: Closure | Sequence[Closure] | None) -> Sequence[Closure]:
    return [closure] if callable(closure) else list(closure or ())


OWN = ("params", "lr", "weight_decay")
"""What a parameter group may have of its own; torch and its schedulers add the others."""
ADDED = ("param_names", "initial_lr", "name")


def check_group(group: Mapping[str, Any]) -> None:
    """Raises UserError for a setting that a group cannot have of its own, and that would change nothing."""
    other = next((key for key in group if key not in (*OWN, *ADDED)), None)
    if other is not None:
        raise UserError(
            f"A parameter group has {other!r}; of their own, groups have {', '.join(OWN)}, and all else is the optimizer's."
        )


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
