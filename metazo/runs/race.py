"""A race of learning rates at the start of a run: successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943).

Every rate has an arm: the first steps of the run at that rate, with the same weights, noise and batches as the other arms. In
a round each arm takes some steps, and its score is the mean loss of their probes; the better half goes on, until one is left.
Its steps are the first steps of the run, so the log is that of a run at the rate that won.

A step follows from its record without a forward pass: an arm is kept as its records, and nothing is copied. The steps of the
others are taken from the run, which has the forward passes of its settings in all; its summary counts its own alone.

Differences from the paper: an arm goes on where it stopped, and every round has the same number of steps. Do not use it for
methods whose steps cannot be replayed, or where loading the model takes longer than the steps of a round: every arm loads it
again in every round. A rate that looks best in a few steps may be too high for the whole run, so take rates a factor of 4
apart. docs/meta-learning.md has what it found on 14 tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from metazo.errors import UserError
from metazo.io.plain import shown
from metazo.io.processes import launched
from metazo.io.terminal import Console
from metazo.optimizers import METHODS
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import tune
from metazo.runs.interrupt import Interrupted
from metazo.runs.monitor import Diverged
from metazo.runs.shared import run_folder
from metazo.runs.tuned import Finetuned, Given, Part
from metazo.settings import as_rate
from metazo.step.record import Step

ROUND = 12
"""Steps of a round."""


@dataclass
class Arm:
    """A learning rate, its steps so far, and its score in the last round."""

    rate: float
    steps: list[Step] = field(default_factory=list)
    score: float = math.inf


def half(count: int) -> int:
    return -(-count // 2)


def lengths(arms: int, length: int) -> tuple[int, int]:
    """(steps that the arm which wins takes in the race, steps of all others), with rounds of `length` steps."""
    won = others = 0
    while arms > 1:
        won, others, arms = won + length, others + (arms - 1) * length, half(arms)
    return won, others


def race(
    config: FinetuneConfig,
    rates: Iterable[float | str],
    length: int = ROUND,
    console: Console | None = None,
    given: Given | None = None,
    **callbacks: Any,
) -> Finetuned:
    """Run the fine-tuning that `config` describes at the rate that wins.

    rates: at least two, as numbers or text; length: steps of a round; console, given, callbacks: as for `tune`. The callbacks
    get the steps that come after the race.
    Raises UserError for bad input, or if no rate has finite losses, with nothing written; Interrupted if a signal stops it: in
    the race nothing is written, later the run is saved and is continued with `resume`.
    """
    given = given or Given()
    rates = _check(config, rates, given)
    say = Console.of(console).say
    arms, (least, spent), total = [Arm(rate) for rate in rates], lengths(len(rates), length), 0
    while len(arms) > 1:
        for arm in arms:
            part = Part(arm.steps, len(arm.steps) + length, spent, least)
            total = max(total, _go_on(config, arm, part, given))
            say("race:", f"rate {arm.rate:g}, loss {arm.score:.4f} in steps {len(part.start) + 1} to {part.stop}")
        ranked, number = sorted(arms, key=lambda arm: arm.score), half(len(arms))
        arms = ranked[:number]
        if equal := [f"{arm.rate:g}" for arm in ranked[number:] if arm.score == arms[-1].score < math.inf]:
            say("race:", f"rate {', '.join(equal)} ties with {arms[-1].rate:g}, which was named first and goes on")
    won = arms[0]
    if not math.isfinite(won.score):
        raise UserError("No rate of the race has finite losses; give lower ones.")
    say("learning rate:", f"{won.rate:g}, which won the race; steps of the others: {spent}")
    run = replace(config, lr=won.rate, steps=total, forwards=None, epochs=None)
    return tune(run, given, console, part=Part(won.steps, others=spent), **callbacks)


def _check(config: FinetuneConfig, rates: Iterable[float | str], given: Given) -> list[float]:
    """The rates as numbers. Raises UserError for what is no race."""
    if given.loaded is not None or given.optimizer is not None:
        raise UserError(
            "A race loads the model for every rate: give model and optimizer by name, or `lr` for objects in memory."
        )
    values: Any = getattr(rates, "tolist", lambda: rates)()  # of an array or a tensor
    found = (
        [as_rate(rate) for rate in values]
        if isinstance(values, Iterable) and not isinstance(values, str | bytes)
        else []
    )
    if None in found or len(set(found)) < max(len(found), 2):
        raise UserError(f"A race needs a list of at least two different learning rates above 0, not {shown(rates)}.")
    if config.lr is not None:
        raise UserError("`lr` is what the race finds; leave it out.")
    if config.resume:
        raise UserError("A run that is resumed has its learning rate already; leave the race out.")
    if config.forwards is not None and getattr(METHODS.get(config.optimizer), "wants_full_closure", False):
        raise UserError(
            f"`forwards` cannot be kept in a race with {config.optimizer}, which passes over all training examples again in "
            "every round: give `steps`, or `lr` in place of the race."
        )
    if launched() > 1:
        raise UserError("A race runs in one process; under torchrun give `lr`.")
    with run_folder(config, lambda text: None):  # raises UserError for a folder that is in use, before the race
        pass
    return [rate for rate in found if rate is not None]


def _go_on(config: FinetuneConfig, arm: Arm, part: Part, given: Given) -> int:
    """Take the steps of a round. Returns: the steps of the run, 0 if the arm has diverged."""
    quiet = replace(config, lr=arm.rate, out=None, track=None, push=None, keep="last")
    try:
        found = tune(quiet, given, plot=False, part=part)
    except Diverged:
        arm.score = math.inf
        return 0
    except Interrupted as stopped:
        by = str(stopped).split()[0]
        raise Interrupted(f"{by} in the race, of which nothing is written: start it again.", by) from stopped
    assert found.history is not None
    arm.steps = found.history[0]
    taken = arm.steps[len(part.start) :]
    arm.score = fmean(fmean(step.losses) if step.coefficients else math.inf for step in taken)
    return found.summary["steps"]
