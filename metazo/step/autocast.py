"""The caller's `torch.autocast` is for closures: the optimizer's own arithmetic is done without it.

Autocast keeps narrow copies of weights until its outermost context ends, and so does `parametrize.cached()` with parametrized
weights. They would be evaluated again after the weights have changed, and are not used here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch
from torch.nn.utils import parametrize

KINDS = "cpu", "cuda", "mps", "xpu"

Autocast = tuple[torch.dtype | None, ...]
"""The dtype of autocast for each of KINDS; None where it is off."""

OFF: Autocast = (None,) * len(KINDS)
_caller: ContextVar[Autocast | None] = ContextVar("the caller's autocast, within a step", default=None)


def present() -> Autocast:
    """What is on in this thread."""
    return tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in KINDS)


@contextmanager
def under(wanted: Autocast) -> Iterator[None]:
    """Compute under this autocast, whatever is on outside."""
    with ExitStack() as stack:
        for kind, now, then in zip(KINDS, present(), wanted):
            if now is not None or then is not None:
                stack.enter_context(torch.autocast(kind, then, enabled=then is not None, cache_enabled=False))
        yield


@contextmanager
def own_arithmetic() -> Iterator[None]:
    """A step: without gradients, without autocast, except for what is evaluated `as_called`, and outside of the caller's
    `parametrize.cached()`. A closure may open one of its own, which ends with the evaluation."""
    found = present()
    token = _caller.set(found)
    cached, parametrize._cache_enabled = parametrize._cache_enabled, 0
    parametrize._cache.clear()
    try:
        with torch.no_grad(), under(OFF):
            yield
    finally:
        parametrize._cache_enabled = cached
        _caller.reset(token)
        if found != OFF:
            torch.clear_autocast_cache()  # of evaluations by the caller, who has other weights now


@contextmanager
def as_called() -> Iterator[None]:
    """Evaluate a closure within a step under the autocast in which `step` was called."""
    found = _caller.get()
    with under(present() if found is None else found):
        yield
