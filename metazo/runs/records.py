"""The records of a run's evaluations, and what follows from them: the best, and whether the run has stalled or diverged."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from metazo.runs.config import FinetuneConfig

GROWN = 100.0
"""A run has diverged if the norm of the trained weights is above this multiple of their first norm, even if the loss is finite,
because a normalisation layer hides the size of the weights before it. Fine-tuning changes the norm by a few percent."""
WORSE, NATS = 10.0, 5.0
"""A run has diverged if the loss on dev is above this multiple of that before the first step and this many nats above it.
Overfitting does not reach such a loss."""


def far_above(loss: float, first: float) -> bool:
    """Whether a loss is so far above the first one that the run has diverged."""
    return loss > max(WORSE * abs(first), first + NATS)


class Records:
    """What the evaluations of a run say: which were taken, which was the best, and whether the run has stalled or diverged.

    Args: metric: of the task, by which the best is chosen; None for the loss. steps: of the whole run.
    Attributes: due, the steps after which an evaluation is due; records, one per line of metrics.jsonl; lost, the step of best
    weights whose file is missing, which a replay passes again.
    """

    def __init__(self, config: FinetuneConfig, metric: str | None, steps: int):
        self.config = config
        every = config.eval_every or max(1, steps // 10)
        self.due = [*range(0, steps, every), steps]
        self.minimised = "objective" if config.objective else "loss"
        self.metric = None if config.objective else metric
        self.records = []
        self.lost: int | None = None

    @property
    def records(self) -> list[dict[str, Any]]:
        return self._records

    @records.setter
    def records(self, records: list[dict[str, Any]]) -> None:
        self._records = records
        self._seen = self._best = self._lowest = 0

    def _see(self) -> None:
        """Compare the records that were appended since the last call: the place of the best, and of the lowest loss."""
        for place in range(self._seen, len(self.records)):
            record = self.records[place]
            if self._merit(record) > self._merit(self.records[self._best]):
                self._best = place
            if self._minimum(record) < self._minimum(self.records[self._lowest]):
                self._lowest = place
        self._seen = len(self.records)

    def _minimum(self, record: dict[str, Any]) -> float:
        return record["dev"].get(self.minimised, math.inf) if self.usable(record) else math.inf

    def take_up(self, found: Iterable[dict[str, Any]], steps: int, kept: int | None) -> int:
        """Take the records of a run whose log holds so many steps. kept: the step of the best weights that are on disk.

        Returns: the last step whose snapshot may be used to resume: it is not past an evaluation whose record was lost, nor
        past best weights that were lost, because the run died between two of them or while it saved the model.
        """
        for record, step in zip(found, self.due):
            if not (_sound(record) and record["step"] == step <= steps):
                break
            self.records.append(record)
        latest = min([steps, *(due - 1 for due in self.due[len(self.records) :])])
        if self.config.keep == "best" and self.records and (best := self.best()["step"]) != kept:
            self.lost, latest = best, min(latest, best)
        return latest

    def best(self) -> dict[str, Any]:
        """The record with the best metric on dev (or the lowest objective, if there is one); ties are broken by the lowest
        loss, then by the earliest step."""
        self._see()
        return self.records[self._best]

    def better(self, record: dict[str, Any]) -> bool:
        """Whether an evaluation is usable and better than all records."""
        return self.usable(record) and (not self.records or self._merit(record) > self._merit(self.best()))

    def usable(self, record: dict[str, Any]) -> bool:
        """Whether an evaluation may be the best: its weights and loss are finite, the weights have not grown beyond `GROWN`
        times their start, and the loss is not above `max_loss` (unless it was before the first step) or far above the start's.
        """
        loss, first = (each["dev"].get(self.minimised, 0.0) for each in (record, (self.records or [record])[0]))
        limit = self.config.max_loss if abs(first) <= self.config.max_loss else math.inf
        sound = record.get("weights_finite", True) and "weights_grown" not in record
        return sound and math.isfinite(loss) and abs(loss) <= limit and not self._worse(record)

    def _worse(self, record: dict[str, Any]) -> bool:
        if self.minimised != "loss":  # an objective may have any unit
            return False
        loss, first = (each["dev"].get("loss", 0.0) for each in (record, (self.records or [record])[0]))
        return far_above(loss, first)

    def stalled(self) -> bool:
        """Whether `patience` evaluations in a row had no lower loss on dev. It depends on the records alone."""
        patience = self.config.patience
        if patience is None or not self.records:
            return False
        self._see()
        return len(self.records) - 1 - self._lowest >= patience

    def diverged(self) -> str | None:
        """The fault of the last evaluation in words; None if it has none."""
        last = self.records[-1]
        if self.usable(last):
            return None
        if "weights_finite" in last:
            return "the weights are not finite"
        if "weights_grown" in last:
            return f"the norm of the trained weights is {last['weights_grown']:.3g} times that before the first step"
        before = f" and was {self.records[0]['dev']['loss']:.4g} before the first step" if self._worse(last) else ""
        return f"the {self.minimised} on dev is {last['dev'][self.minimised]:.4g}{before}"

    def _merit(self, record: dict[str, Any]) -> tuple[float, ...]:
        if not self.usable(record):
            return (-math.inf,)
        loss = record["dev"].get("loss", math.inf)
        if self.minimised != "loss":
            return (-record["dev"].get(self.minimised, math.inf), -loss)
        return (record["dev"].get(self.metric, 0.0), -loss) if self.metric else (-loss,)


def _sound(record: dict[str, Any]) -> bool:
    """Whether this has the form of a record of `evaluate_if_due`."""
    dev = record.get("dev")
    numbers = [record.get("step"), record.get("forwards"), record.get("seconds")]
    numbers += list(dev.values()) if isinstance(dev, dict) else [None]
    return all(type(number) in (int, float) for number in numbers)
