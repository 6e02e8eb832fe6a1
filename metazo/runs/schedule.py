"""The learning rate over a run, as a fraction of `lr`: warmup, then a schedule over the rest."""

from __future__ import annotations

import math
from collections.abc import Callable

# The fraction of `lr` as a function of progress after warmup, 0 to 1.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


def warmup_steps(warmup: float | None, total: int) -> int:
    """Steps of warmup: `warmup` below 1 is a fraction of the run, from 1 on a number of steps (at most the whole run)."""
    if not warmup:
        return 0
    return min(total, math.ceil(warmup * total) if warmup < 1 else round(warmup))


def share(schedule: str, step: int, total: int, warmup: int = 0) -> float:
    """The fraction at a step: (step + 1) / (warmup + 1) in warmup, so that no step has rate 0; then the schedule."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[schedule]((step - warmup) / max(1, total - warmup))
