"""The length of a run, and its learning rate as a fraction of `lr`: warmup, then a schedule over the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from metazo.errors import UserError
from metazo.io.plain import shown
from metazo.runs.config import FinetuneConfig
from metazo.runs.locate import log_to_continue
from metazo.steplog.format import STEPS, scan

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
    return min(total, up(warmup * total) if warmup < 1 else round(warmup))


def up(number: float) -> int:
    """The next whole number; what is above one by rounding alone is that one, as 0.07 * 100, which is 7.000000000000001."""
    return math.ceil(number * (1 - 1e-12))


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


COUNTING = 2
"""Version of how steps are counted, in the header of a step log. Logs without it were begun by a version that counted as
`_counted_before`."""


def keep_cost(optimizer: Any, header: dict[str, Any]) -> str | None:
    """Give the optimizer the cost of a step that the header of a log has, on which the number of steps, the schedule and the
    count of forward passes depend. Returns a sentence if it differs by over 5% from what was measured now.

    Raises UserError if the header's cost cannot be one.
    """
    if "cost" not in header:
        return None
    now, then = optimizer.measured_cost, header["cost"]
    if type(then) not in (int, float) or not 0.01 <= then <= 1e6:
        raise UserError(
            f"The header of {STEPS} says that a step costs {shown(then)} forward passes (`cost`), which is no number from "
            "0.01 to 1,000,000; start the run again."
        )
    optimizer.measured_cost = then
    if now is None or abs(now - then) <= 0.05 * then:
        return None
    return (
        f"A step costs {now:g} forward passes here and cost {then:g} when the run began: steps, schedule and forward passes "
        f"are still counted at {then:g}."
    )


def number_of_steps(config: FinetuneConfig, optimizer: Any, examples: int) -> int:
    """Steps of a run; with `forwards` as many as these pay for. examples: number of training examples.

    Raises UserError if `forwards` does not suffice for one step, or if the run in `out` was begun by a version of metazo that
    counted otherwise.
    """
    steps, size = config.steps or 1000, config.batch_size * config.accumulate
    if config.epochs:
        steps = up(config.epochs * examples / size)
    elif config.forwards:
        steps = _paid(config, optimizer)
    now, before = (steps, warmup_steps(config.warmup, steps)), _counted_before(config, optimizer, examples)
    log = log_to_continue(config)
    if now != before and log is not None and "counting" not in scan(log).header:
        raise UserError(
            f"The run in {config.out} was begun by an earlier version of metazo, which counted {before[0]} steps, {before[1]} "
            f"of them warmup, in place of {now[0]} and {now[1]}; resume it with that version, or start again."
        )
    return steps


def _paid(config: FinetuneConfig, optimizer: Any) -> int:
    """The most steps that `forwards` pays for."""

    def cost(steps: int) -> float:
        return optimizer.forwards_in(steps, config.accumulate)

    steps, most = _about(config, optimizer), config.forwards * (1 + 1e-9)  # type: ignore[operator]
    while steps and cost(steps) > most:  # the first steps may take more than others
        steps -= 1
    while cost(steps + 1) <= most:  # or less
        steps += 1
    if steps == 0:
        raise UserError(
            f"`forwards` is {config.forwards} and a step of {config.optimizer} takes {cost(1):g}; give more."
        )
    return steps


def _about(config: FinetuneConfig, optimizer: Any) -> int:
    return int(config.forwards / optimizer.forwards_per_step(config.accumulate))  # type: ignore[operator]


def _counted_before(config: FinetuneConfig, optimizer: Any, examples: int) -> tuple[int, int]:
    """Steps and steps of warmup as counted by versions of metazo that did not allow for rounding and for a cheap first step."""
    steps = config.steps or 1000
    if config.epochs:
        steps = math.ceil(config.epochs * examples / (config.batch_size * config.accumulate))
    elif config.forwards:
        steps = _about(config, optimizer)
        while steps and optimizer.forwards_in(steps, config.accumulate) > config.forwards * (1 + 1e-9):
            steps -= 1
    warmup = config.warmup or 0
    return steps, min(steps, math.ceil(warmup * steps) if warmup < 1 else round(warmup))
