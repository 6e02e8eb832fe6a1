"""Checks of what a method and a rule return: their update, and their state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metazo.errors import UserError
from metazo.optimizers.guards import described
from metazo.step.record import Update
from metazo.step.rules import State

RESERVED = {"counters", "probing", "shards"}
"""Names of the optimizer's own among the tensors of its saved state, beside those that begin with master/ or compensation/."""


def joined(parts: Mapping[str, State]) -> State:
    """The state of these parts of an optimizer. Raises UserError for a name of two parts, or of the optimizer's own."""
    owners: dict[str, str] = {}
    for part, state in parts.items():
        for name, value in state.items():
            other = owners.setdefault(name, part)
            if name in RESERVED or name.startswith(("master/", "compensation/")):
                other = "the optimizer itself"
            if other != part:
                raise UserError(
                    f"`init` of {part} names a tensor {name}, and {other} has one of that name: choose another."
                )
            if not isinstance(value, Tensor):
                raise UserError(f"`init` of {part} gives {name} as {described(value)}: all state must be tensors.")
    return {name: value for state in parts.values() for name, value in state.items()}


def check_form(state: Mapping[str, Any], form: Mapping[str, Tensor]) -> None:
    """Raises UserError if the state has other names, shapes or dtypes than `init` gave it, with which it is loaded.

    form: tensors of the device meta.
    """
    for name in sorted({*state, *form}):
        now, then = state.get(name), form.get(name)
        if isinstance(now, Tensor) and then is not None and (now.shape, now.dtype) == (then.shape, then.dtype):
            continue
        found = described(now) if name in state else "gone"
        raise UserError(
            f"The state {name} is {found} after a step, and `init` gave {described(then) if then is not None else 'none'}: "
            "names, shapes and dtypes must remain, so that a saved state can be loaded; change tensors in place."
        )


def versions(state: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """What differs if a tensor of the state was changed or exchanged in between, without a copy of it."""
    return {
        name: (id(value), 0 if not isinstance(value, Tensor) or value.is_inference() else value._version)
        for name, value in state.items()
    }


@contextmanager
def put_back(state: dict[str, Tensor], names: Iterable[str]) -> Iterator[None]:
    """These tensors, which are small, are as before after an exception."""
    kept = [(name, state[name], state[name].clone()) for name in names]
    try:
        yield
    except BaseException:
        state.update((name, tensor.copy_(before)) for name, tensor, before in kept)
        raise


def check_whole(optimizer: Any) -> None:
    """Raises UserError if a step has failed after `update` or `begin` had changed the state."""
    if optimizer._torn:
        raise UserError(
            f"Step {optimizer.steps} of {optimizer.name} failed after it had changed the state, which now belongs to no step: "
            "load a saved state (load_state_dict), or make a new optimizer."
        )


def check_reached(amounts: Iterable[float]) -> None:
    """Raises OverflowError for the coefficient of an estimate that is beyond float32.

    A method that changes its state in `update` calls it before, so that a step which is refused leaves the state as it was.
    """
    if not all(abs(amount) < torch.finfo(torch.float32).max for amount in amounts):
        raise OverflowError


def checked_update(name: str, losses: Sequence[float], queries: int, update: Any) -> Update:
    """An update with Python's numbers. Raises UserError for what is no update, and OverflowError for one beyond float32."""
    try:
        coefficients = [float(value) for value in update.coefficients]
        terms = None if update.terms is None else [replace(term, amount=float(term.amount)) for term in update.terms]
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"`update` of {name} must return an Update of numbers, not {described(update)} ({error})."
        ) from error
    if terms is None and len(coefficients) != queries:
        raise UserError(
            f"`update` of {name} returned {len(coefficients)} coefficients, and a step has {queries} directions: return one "
            "for each, or the terms of the update."
        )
    amounts = coefficients if terms is None else [term.amount for term in terms]
    odd = [value for value in (*coefficients, *amounts) if not math.isfinite(value)]
    if odd:
        raise UserError(
            f"`update` of {name} returned the coefficient {odd[0]}, from losses of {min(losses):.3g} to {max(losses):.3g}: it "
            "must be finite. If the losses are too large for it, divide the loss, or set the optimizer's `max_loss`, above "
            "which a step is skipped."
        )
    check_reached(amounts)
    return Update(coefficients, terms)
