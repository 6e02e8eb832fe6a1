"""Watches the numbers of a run: skips steps whose loss is not finite, and warns of divergence and plateaus.

If a loss is nan, inf or above `max_loss`, the step is skipped and recorded, and the weights do not change. The first of
several in a row is explained (`diagnose`), and `max_bad_steps` in a row end the run.
Warnings, each once, with the measured figures: divergence, plateau, and an eps too small for the precision.
Everything except the explanation follows from the step log, so a resumed run continues with the same state.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from itertools import islice
from statistics import fmean, variance

import torch

from metazo.errors import UserError
from metazo.runs.config import FinetuneConfig
from metazo.step.record import Step

WINDOW = 100  # least number of steps on which a warning is based
FIRST = 20  # first steps, with whose mean loss later losses are compared
EXPLODED = 3.0  # a loss of this multiple of the start's, and at least half a nat above it, is divergence
# Error of a difference of losses by rounding, in units of the loss's last place: measured on pico, 5 to 10 in float32
# and 1.1 to 1.4 in bfloat16 and float16; a probe whose differences are no larger correlates by less than 0.7 with the truth.
WIDE_ERROR, NARROW_ERROR = 8, 1


def risen(first: float, now: float) -> bool:
    """Whether a loss has risen by so much that its run diverges."""
    return now > max(EXPLODED * first, first + 0.5)


class Diverged(UserError):
    """A run whose losses or weights are no longer finite. Its step log is intact.

    what: what happened, without the advice for the run's folder, which a comparison removes; by default the message.
    taken: the steps and forward passes until then, if they are known.
    """

    taken: dict[str, float] | None = None

    def __init__(self, message: str, what: str | None = None):
        super().__init__(message)
        self.what = what or message


class Watch:
    """Checks each step of a run. Args: total: steps of the run; say: called with each sentence for the user."""

    def __init__(self, config: FinetuneConfig, total: int, say: Callable[[str], None]):
        self.config, self.say = config, say
        dtype: torch.dtype = getattr(torch, config.dtype)
        self.unit = torch.finfo(dtype).eps * (NARROW_ERROR if dtype.itemsize < 4 else WIDE_ERROR)
        self.stretch = max(WINDOW, total // 5)
        self.losses: deque[float] = deque(maxlen=2 * self.stretch)
        self.hidden: deque[bool] = deque(maxlen=WINDOW)  # whether rounding hides the difference of losses
        self.first: list[float] = []
        self.bad = self.skipped = self.vanished = (
            0  # in a row; and of all, by a loss or by a gradient that is not finite
        )
        self.probed = self.still = 0  # steps with several losses, and those of them whose losses were exactly equal
        self.said: set[str] = set()

    def see(self, step: Step, explain: Callable[[], str] | None = None) -> None:
        """Check a step; without `explain` nothing is reported. Raises Diverged after `max_bad_steps` bad steps in a row."""
        if not step.coefficients:
            self._bad(step, explain)
            return
        self.bad = 0
        loss = fmean(step.losses)
        self.losses.append(loss)
        if len(self.first) < FIRST:
            self.first.append(loss)
        if len(step.losses) > 1:
            self.probed += 1
            self.still += len(set(step.losses)) == 1
            self.hidden.append(max(step.losses) - min(step.losses) <= self.rounding(loss))
        warnings = [] if explain is None else [self._divergence(), self._eps(), self._plateau(step.step + 1)]
        for name, text in filter(None, warnings):
            if name not in self.said:
                self.said.add(name)
                self.say(f"Step {step.step + 1}: {text}")

    @property
    def notes(self) -> list[str]:
        """Sentences for the summary if steps were skipped, and if most steps did not move the weights."""
        notes = []
        if self.skipped:
            notes.append(
                f"Steps that were skipped because a loss was not finite or above `max_loss` {self.config.max_loss:g}: "
                f"{self.skipped}."
            )
        if self.vanished:
            notes.append(f"Steps that were skipped because the gradient was not finite: {self.vanished}.")
        if 2 * self.still > self.probed:
            notes.append(
                f"In {self.still} of {self.probed} steps the losses of all probes were exactly equal, so that the weights did "
                "not move: `eps` is too small, or what is minimised changes in leaps."
            )
        return notes

    def rounding(self, loss: float) -> float:
        """The error that rounding in the forward pass may cause in a difference between two losses of this size."""
        return self.unit * 2.0 ** math.floor(math.log2(abs(loss))) if loss else 0.0

    def _bad(self, step: Step, explain: Callable[[], str] | None) -> None:
        self.bad += 1
        found = ", ".join(f"{loss:.4g}" for loss in step.losses if not abs(loss) <= self.config.max_loss)
        self.skipped += bool(found)
        self.vanished += not found
        if explain is None:
            return
        if self.bad == 1:
            why = f"a loss was {found}" if found else "the gradient was not finite"
            self.say(f"Step {step.step + 1} was skipped because {why}: {explain()}")
        if self.bad >= self.config.max_bad_steps:
            last = f"the last {found}" if found else "or their gradients were not finite"
            what = (
                f"The run stopped at step {step.step + 1}: the losses of {self.bad} steps in a row were not finite or above "
                f"`max_loss` {self.config.max_loss:g}, {last}; {explain()}"
            )
            raise Diverged(
                f"{what} The weights are those before these steps, and the log is intact: metazo replay --to STEP gives the "
                "weights of any step.",
                what,
            )

    def _divergence(self) -> tuple[str, str] | None:
        if self.config.objective is not None:  # it may have any unit
            return None
        start, now = fmean(self.first), fmean(islice(reversed(self.losses), WINDOW // 2))
        if len(self.losses) < FIRST + WINDOW // 2 or not risen(start, now):
            return None
        return "divergence", (
            f"the loss diverges, from {start:.4g} (mean of the first {FIRST} steps) to {now:.4g} (of the last "
            f"{WINDOW // 2}): lower `lr`, now {self.config.lr or 'the published one'}."
        )

    def _eps(self) -> tuple[str, str] | None:
        if len(self.hidden) < WINDOW or sum(self.hidden) <= WINDOW // 2:
            return None
        if self.config.objective is not None:
            return "eps", (
                f"in {sum(self.hidden)} of the last {WINDOW} steps `objective` {self.config.objective} was equal at all "
                f"probes, so that the weights did not move: raise `batch_size` (now {self.config.batch_size}) or `eps` (now "
                f"{self.config.eps:g})."
            )
        return "eps", (
            f"in {sum(self.hidden)} of the last {WINDOW} steps the losses of a step differed by no more than rounding, "
            f"{self.rounding(self.losses[-1]):.1e} at a loss of {self.losses[-1]:.4g} in {self.config.dtype}: `eps` "
            f"{self.config.eps:g} is too small for this precision; raise it, or take `dtype='float32'`."
        )

    def _plateau(self, step: int) -> tuple[str, str] | None:
        if step % self.stretch or len(self.losses) < 2 * self.stretch:
            return None
        values = list(self.losses)
        before, after = values[: self.stretch], values[self.stretch :]
        error = math.sqrt((variance(before) + variance(after)) / self.stretch)
        if fmean(before) - fmean(after) > 2 * error:
            return None
        return "plateau", (
            f"no progress beyond noise in {2 * self.stretch} steps: mean training loss {fmean(before):.4g} in the first half "
            f"and {fmean(after):.4g} in the second, standard error of the difference {error:.2g}; try another `lr`."
        )
