"""Parameter groups in torch's form, of named tensors; one or many closures."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor, nn

from metazo.errors import UserError
from metazo.optimizers.guards import described

Closure = Callable[[], Tensor | float]
ROUNDING = 1e-12
"""How far a schedule that ends at 0 may be below it."""


def listed(closure: Closure | Sequence[Closure] | None) -> Sequence[Closure]:
    """One or several closures as a list. Raises UserError for anything else, such as a loss."""
    if closure is None or callable(closure):
        return [] if closure is None else [closure]
    if isinstance(closure, Sequence) and all(map(callable, closure)):
        return list(closure)
    raise UserError(
        f"`step` takes a function that returns the loss, or a list of such functions, and was given {described(closure)}: call "
        "step(lambda: model(**batch).loss)."
    )


OWN = ("params", "lr", "weight_decay")
"""What a parameter group may have of its own; torch and its schedulers add the others."""
COMMON = ("momentum", "betas", "maximize")
"""Settings of torch's optimizers that scripts write into groups."""
ADDED = ("param_names", "initial_lr", "name", "own_lr", "own_decay")


def check_group(group: Mapping[str, Any]) -> None:
    """Raises UserError for a setting that a group cannot have of its own, and that would change nothing."""
    other = next((key for key in group if key not in (*OWN, *ADDED)), None)
    if other is not None:
        raise UserError(
            f"A parameter group has {other!r}; of their own, groups have {', '.join(OWN)}, and all else is the optimizer's."
        )


def check_members(
    groups: Sequence[Mapping[str, Any]], before: Sequence[Sequence[Tensor]], common: Iterable[str]
) -> None:
    """Raises UserError for groups whose tensors are not those with which the optimizer took up its tensors, and for a setting
    of the optimizer in a group. before: the tensors of each group then; common: settings of the optimizer.
    """
    now = [group["params"] for group in groups]
    same = len(now) == len(before) and all(
        len(one) == len(other) and all(map(is_, one, other)) for one, other in zip(now, before)
    )
    if not same:
        raise UserError(
            "`param_groups` has other tensors, or another order, than when the optimizer took up its tensors, and would be "
            "ignored: make a new optimizer."
        )
    for group in groups:
        if odd := next((key for key in (*common, *COMMON) if key in group), None):
            raise UserError(
                f"A parameter group has {odd!r} now, which changes nothing: of their own, groups have {', '.join(OWN)}; set an "
                f"attribute of the optimizer, such as `optimizer.eps`, or make a new one."
            )


def check_rates(groups: Iterable[Mapping[str, Any]], eps: float = 1.0) -> None:
    """Raises UserError for a learning rate or weight decay that a schedule or a script made no number, or negative, and for a
    length of the probe, `eps`, that it made no number above 0.
    """
    settings = [
        (f"`{name}` of parameter group {index + 1}", group[name], -ROUNDING, "of at least 0")
        for index, group in enumerate(groups)
        for name in ("lr", "weight_decay")
    ]
    for name, value, above, words in (*settings, ("`eps`", eps, 0.0, "above 0")):
        try:
            fits = math.isfinite(value) and value > above and not isinstance(value, bool)
        except TypeError:
            fits = False
        if not fits:
            raise UserError(f"{name} is {value!r} now; it must be a finite number {words}. The weights were not moved.")


def named_members(members: Tensor | Iterable, start: int) -> list[tuple[str, Tensor]]:
    """The tensors of a group with their names; those without one are named by their position, counted from `start`.

    Raises UserError for a set: noise and state belong to a tensor by its name.
    """
    if isinstance(members, set | frozenset):
        raise UserError(
            "The parameters are in a set, which has another order in every process, and noise depends on it: pass "
            "`model.named_parameters()`, or a list."
        )
    members = [members] if isinstance(members, Tensor) else members
    return [member if isinstance(member, tuple) else (f"param.{start + i}", member) for i, member in enumerate(members)]


def named_groups(params: Iterable) -> list[dict[str, Any]]:
    """Parameter groups of (name, parameter) pairs in which each tensor occurs once, under its first name (tied weights).

    Raises UserError if there is no tensor, for one name in two groups, whose settings a tensor cannot both have, and for an
    empty group beside others.
    """
    if isinstance(params, Tensor | Mapping):
        kind = "one tensor" if isinstance(params, Tensor) else "a dict"
        raise UserError(
            f"`params` is {kind}: pass `model.named_parameters()`, or a list of pairs of a name and a tensor."
        )
    entries = [] if isinstance(params, nn.Module) else params if isinstance(params, set | frozenset) else list(params)
    if not entries:
        raise UserError("`params` has no tensor: pass `model.named_parameters()`, or a part of it.")
    whole = isinstance(entries, set | frozenset) or not isinstance(entries[0], dict)
    groups = [{"params": entries}] if whole else [dict(entry) for entry in entries]
    seen: dict[int, tuple[str, int]] = {}
    position = 0
    for index, group in enumerate(groups):
        named = []
        for name, param in named_members(group["params"], position):
            position += 1
            if id(param) not in seen:
                seen[id(param)] = name, index
                named.append((name, param))
            elif (first := seen[id(param)])[1] != index and (first[0] == name or name == f"param.{position - 1}"):
                raise UserError(f"{first[0]} is in two parameter groups: leave it out of one.")
            elif first[1] != index:
                warnings.warn(f"{name} is tied to {first[0]}, whose parameter group holds for both.", stacklevel=4)
        if not named and len(groups) > 1:
            raise UserError(f"Parameter group {index + 1} has no tensor of its own: leave it out.")
        group["params"] = named
    return groups
