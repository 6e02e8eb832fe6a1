"""The length of a run, and its learning rate as a fraction of `lr`: warmup, then a schedule over the rest."""

from __future__ import annotations

import math
from collections.abc import Callable

from metazo.errors import UserError
from metazo.runs.config import FinetuneConfig

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


SNAPSHOT_EVERY = 500


def snapshot_steps(config: FinetuneConfig, replayable: bool) -> int:
    """Steps between snapshots, 0 for none: a log whose steps can be replayed needs none."""
    if config.snapshot_every is not None:
        return config.snapshot_every
    return 0 if replayable else SNAPSHOT_EVERY


def number_of_steps(config: FinetuneConfig, a_step: float, examples: int) -> int:
    """Steps of a run. a_step: forward passes of a step; examples: number of training examples.

    Raises UserError if `forwards` does not suffice for one step.
    """
    if config.epochs:
        return math.ceil(config.epochs * examples / (config.batch_size * config.accumulate))
    steps = int(config.forwards / a_step) if config.forwards else config.steps or 1000
    if steps == 0:
        raise UserError(
            f"`forwards` is {config.forwards} and a step of {config.optimizer} takes {a_step:g}; give more."
        )
    return steps
