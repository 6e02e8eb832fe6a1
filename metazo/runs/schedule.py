"""The learning rate over a run, as a share of `lr`: warmup, then a schedule over the rest."""

from __future__ import annotations

import math
from collections.abc import Callable

# The share by the part of the run after warmup that is done, 0 to 1.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


def warmup_steps(warmup: float | None, total: int) -> int:
    """Steps of warmup: below 1 `warmup` is a share of the run, from 1 on a number of steps (at most the whole run)."""
    if not warmup:
        return 0
    return min(total, math.ceil(warmup * total) if warmup < 1 else round(warmup))


def share(schedule: str, step: int, total: int, warmup: int = 0) -> float:
    """The share at a step: (step + 1) / (warmup + 1) within warmup, so that no step has the rate 0; then the schedule."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[schedule]((step - warmup) / max(1, total - warmup))
