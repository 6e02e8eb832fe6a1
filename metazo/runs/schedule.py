"""The length of a run, and its learning rate as a fraction of `lr`: warmup, then a schedule over the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

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


def number_of_steps(config: FinetuneConfig, optimizer: Any, examples: int) -> int:
    """Steps of a run; with `forwards` as many as these pay for. examples: number of training examples.

    Raises UserError if `forwards` does not suffice for one step.
    """
    if config.epochs:
        return math.ceil(config.epochs * examples / (config.batch_size * config.accumulate))
    if not config.forwards:
        return config.steps or 1000
    a_step = optimizer.forwards_per_step(config.accumulate)
    steps, most = int(config.forwards / a_step), config.forwards * (1 + 1e-9)
    while steps and optimizer.forwards_in(steps, config.accumulate) > most:  # the first steps may take more than others
        steps -= 1
    if steps == 0:
        first = optimizer.forwards_in(1, config.accumulate)
        raise UserError(f"`forwards` is {config.forwards} and a step of {config.optimizer} takes {first:g}; give more.")
    return steps
