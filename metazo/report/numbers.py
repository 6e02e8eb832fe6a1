"""One run of a comparison as the report reads it, with each number checked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from metazo.comparisons.results import Result


@dataclass(frozen=True)
class Point:
    """One evaluation on dev; seconds without evaluations; metric: the task's first, None if it has none; minimised: the
    objective of a run that has one, else the loss.
    """

    forwards: float
    seconds: float
    loss: float
    metric: float | None
    minimised: float | None


@dataclass(frozen=True)
class Run:
    """A finished run.

    loss, metric, accuracy: of the kept weights on `split` (test, or dev if nothing was tested); majority: of the same split;
    accuracy: None if the task has none; before: loss on dev before training; start: of what is minimised, the same; wall,
    cpu: seconds with loading and evaluation, by the clock and of the processor.
    """

    seed: int
    loss: float
    metric: float | None
    accuracy: float | None
    before: float | None
    start: float | None
    majority: float | None
    examples: int
    split: str
    curve: tuple[Point, ...]
    forwards: float
    seconds: float
    wall: float | None
    cpu: float | None
    memory: float | None
    trained: float | None
    steps: float | None
    info: dict[str, Any] = field(repr=False)
    sigma: dict[str, Any] | None = field(default=None, repr=False)
    notes: tuple[str, ...] | None = None

    def value(self, measure: str) -> float | None:
        return self.loss if measure == "loss" else self.metric


@dataclass(frozen=True)
class Failure:
    """A cell that failed, is missing, or cannot be read."""

    task: str
    column: str
    kind: str
    seed: str
    reason: str
    readable: bool = True
    status: str = "failed"
    """failed, or diverged: the run itself ended so"""


def number(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def part(content: Any, *keys: str) -> dict[str, Any]:
    """A mapping within mappings; empty if it is missing."""
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return dict(content) if isinstance(content, Mapping) else {}


def _minimised(scores: Mapping[str, Any]) -> float | None:
    return number(scores.get("objective", scores.get("loss")))


def _points(curve: Any, metric: str | None) -> Iterator[Point]:
    """The points of a curve up to the first whose numbers are not finite."""
    for entry in curve if isinstance(curve, list) else ():
        dev = part(entry, "dev")
        forwards, seconds, loss = number(entry.get("forwards")), number(entry.get("seconds")), number(dev.get("loss"))
        if forwards is None or seconds is None or loss is None:
            return
        yield Point(forwards, seconds, loss, number(dev.get(metric)) if metric else None, _minimised(dev))


def run_of(result: Result) -> Run:
    """Raises ValueError, with the reason in words, if the run has no final loss."""
    info, train, metrics = result.run_info, result.train_info, result.metrics
    if info.get("status") != "finished":
        raise ValueError(str(info.get("reason") or "failed without a reason"))
    split = "test" if part(metrics, "test") else "dev"
    scores, metric = part(metrics, split), info.get("metric")
    loss, seed = number(scores.get("loss")), number(info.get("seed"))
    if loss is None or seed is None:
        raise ValueError(f"finished, but its {'loss on ' + split if seed is not None else 'seed'} is not a number")
    value = number(scores.get(metric)) if metric else None
    if metric and value is None:
        raise ValueError(f"finished, but its {metric} on {split} is not a number")
    curve = tuple(_points(train.get("curve"), metric))
    return Run(
        seed=int(seed),
        loss=loss,
        metric=value,
        accuracy=number(scores.get("accuracy")),
        before=number(part(metrics, "before").get("loss")),
        start=_minimised(part(metrics, "before")),
        majority=share if (share := number(part(metrics, "majority").get(split))) is None or 0 <= share <= 1 else None,
        examples=max(0, int(number(scores.get("examples")) or 0)),
        split=split,
        curve=curve,
        forwards=number(train.get("forwards")) or 0.0,
        seconds=number(train.get("seconds")) or 0.0,
        wall=number(train.get("wall_seconds")),
        cpu=number(train.get("cpu_seconds")),
        memory=number(train.get("peak_memory_bytes")),
        trained=number(train.get("trained_weights", info.get("trained_weights"))),
        steps=number(train.get("steps")),
        info=info,
        sigma=part(train, "sigma") or None,
        notes=tuple(map(str, notes)) if isinstance(notes := train.get("notes"), list) else None,
    )
