"""Tells when the weights of runs or of a teacher have exploded, so that what is learned from them means nothing.

The bounds are those of metazo finetune (metazo/runs/records.py), which no sound run reaches for long: a loss far above the
first one, or a norm of the weights far above that at the start.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from metazo.blocks import NamedTensor
from metazo.runs.evaluations import norm_of
from metazo.runs.records import GROWN, far_above


def norm(tensors: Sequence[NamedTensor]) -> float:
    """Euclidean norm of the weights."""
    return norm_of(tensor.param.detach() for tensor in tensors)


def exploded(loss: float, first: float, tensors: Sequence[NamedTensor], start: float) -> bool:
    """Whether these weights have exploded. loss, first: now and at the start; start: the norm of the weights there."""
    return not math.isfinite(loss) or far_above(loss, first) or norm(tensors) > GROWN * start


def exploded_rows(rows: Iterable[dict[str, Any]]) -> int:
    """How many steps of a recording had a loss that was not finite or far above the first one of its task."""
    first: dict[str, float] = {}
    count = 0
    for row in rows:
        loss = row.get("loss")
        if isinstance(loss, int | float) and math.isfinite(loss):
            count += far_above(loss, first.setdefault(row["task"], loss))
        else:
            count += 1
    return count


class TeacherWatch:
    """Counts the meta-steps at which a teacher's weights had exploded, except skipped ones; it changes nothing.

    Weights and loss are those of the meta-step, before the teacher moves them: what it reaches by the last step before it
    restarts is read by no meta-step.

    A single loss above the bound may be an odd batch of a sound teacher, so such steps are not skipped.
    Attributes: state, float64: count, count in a row, norm at the start, and the first loss of each task; NaN: not known yet.
    """

    def __init__(self, tensors: Sequence[NamedTensor], tasks: int):
        self.tensors = tensors
        self.state = torch.full((3 + tasks,), math.nan, dtype=torch.float64)
        self.state[:2] = 0
        self.norm = math.nan  # of the weights of this step

    @property
    def count(self) -> int:
        return int(self.state[0])

    @property
    def in_a_row(self) -> int:
        return int(self.state[1])

    def begin(self) -> None:
        """The weights of a step are in place, before the teacher moves them."""
        self.norm = norm(self.tensors)
        if math.isnan(self.state[2]):
            self.state[2] = self.norm or 1.0

    def see(self, task: int, loss: float | None, skipped: bool = False) -> None:
        """The teacher has taken a step. loss: before it, on this task, if it is known; skipped: whether the run has counted
        this meta-step already, as one without an update."""
        first = float(self.state[3 + task])
        if loss is None or not math.isfinite(loss):
            loss = first = 0.0
        elif math.isnan(first) and not self.in_a_row:
            self.state[3 + task] = first = loss
        found = far_above(loss, first) or self.norm > GROWN * float(self.state[2])  # no loss is far above NaN
        self.state[0] += found and not skipped
        if found or not math.isnan(first):  # else the step does not tell whether the weights are sound again
            self.state[1] = self.state[1] + 1 if found else 0
