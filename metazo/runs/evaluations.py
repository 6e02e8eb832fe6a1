"""The evaluations of a run: when they are due, what each records, and which weights are the best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from metazo.models.load import LoadedModel
from metazo.runs.config import FinetuneConfig
from metazo.runs.folder import RunFolder
from metazo.runs.setup import Setup
from metazo.runs.shared import SharedFolder
from metazo.runs.unwritten import MemoryFolder

GROWN = 100.0
"""A run has diverged if the norm of the trained weights is above this multiple of their first norm, even if the loss is finite,
because a normalisation layer hides the size of the weights before it. Fine-tuning changes the norm by a few percent."""
WORSE, NATS = 10.0, 5.0
"""A run has diverged if the loss on dev is above this multiple of that before the first step and this many nats above it.
Overfitting does not reach such a loss."""


class Scores:
    """Evaluates on dev, and keeps the records in metrics.jsonl.

    Args: keep_best: called with the step if the weights are the best so far, before the record is written; on_record: called
    with each record.
    Attributes: records, one per line of metrics.jsonl; losses of the training steps since the last evaluation.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        setup: Setup,
        folder: RunFolder | SharedFolder | MemoryFolder,
        keep_best: Callable[[int], None],
        on_record: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.config, self.setup, self.folder, self.keep_best = config, setup, folder, keep_best
        self.on_record = on_record
        every = config.eval_every or max(1, setup.steps // 10)
        self.due = [*range(0, setup.steps, every), setup.steps]
        self.minimised = "objective" if config.objective else "loss"
        self.metric = None if config.objective else next(iter(setup.prepared.task.metric), None)
        self.records: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.most = GROWN * _start(setup.loaded)
        self.lost: int | None = None  # the step of best weights whose file is missing, which a replay passes again
        self.evaluating = 0.0  # seconds, in this process
        self.started = time.monotonic()

    def take_up(self, steps: int) -> int:
        """Read the records of a run whose log holds so many steps.

        Returns: the last step whose snapshot may be used to resume: it is not past an evaluation whose record was lost.
        """
        for record, step in zip(self.folder.records(), self.due):
            if not (_sound(record) and record["step"] == step <= steps):
                break
            self.records.append(record)
        return min([steps, *(due - 1 for due in self.due[len(self.records) :])])

    def settle(self, steps: int) -> None:
        """Continue from that step: drop the records of later steps, which are made again."""
        self.records = [record for record in self.records if record["step"] <= steps]
        self.folder.keep_records(self.records)
        if self.records:
            self.started -= self.records[-1]["seconds"]

    def evaluate_if_due(self, step: int) -> None:
        """Record mean training loss, metrics on dev, and block scales, if an evaluation is due and has no record."""
        if step not in self.due:
            return
        if self.records and self.records[-1]["step"] >= step:
            self.losses = []
            if step == self.lost:
                self.keep_best(step)
            return
        optimizer, paused = self.setup.optimizer, time.monotonic()
        optimizer.settle()
        record = {
            "step": step,
            "forwards": optimizer.forwards,
            "seconds": round(paused - self.started - self.evaluating, 3),  # time of training alone
            "train_loss": sum(self.losses) / len(self.losses) if self.losses else None,
            "lr": optimizer.param_groups[0]["lr"],
            "dev": self.on("dev") if self.config.dev_examples else {},
            **self._sigma(),
        }
        if not _all_finite(self.setup.loaded.model):
            record["weights_finite"] = False
        elif (norm := _norm(self.setup.loaded.model)) > self.most:
            record["weights_grown"] = float(f"{GROWN * norm / self.most:.3g}")
        self.losses = []
        if self.usable(record) and all(self._merit(record) > self._merit(other) for other in self.records):
            self.keep_best(step)
        self.folder.record(**record)
        self.records.append(record)
        if self.on_record:
            self.on_record(record)
        self.evaluating += time.monotonic() - paused

    def on(self, split: Literal["dev", "test"]) -> dict[str, float]:
        return self.setup.evaluate(split)

    def best(self) -> dict[str, Any]:
        """The record with the best metric on dev (or the lowest objective, if there is one); ties are broken by the lowest
        loss, then by the earliest step."""
        return max(self.records, key=self._merit)

    def latest(self) -> str:
        """The last evaluation as text."""
        dev = self.records[-1]["dev"] if self.records else {}
        names = dict.fromkeys((self.minimised, "loss", *self.setup.prepared.task.metric))
        return "dev " + "  ".join(f"{name} {dev[name]:.3f}" for name in names if name in dev)

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
        return loss > max(WORSE * abs(first), first + NATS)

    def stalled(self) -> bool:
        """Whether `patience` evaluations in a row had no lower loss on dev. It depends on the records alone."""
        patience = self.config.patience
        if patience is None or not self.records:
            return False
        losses = [record["dev"][self.minimised] if self.usable(record) else math.inf for record in self.records]
        return len(losses) - 1 - losses.index(min(losses)) >= patience

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

    def _sigma(self) -> dict[str, Any]:
        """The block scales of the previous step, by block, if there are any."""
        optimizer = self.setup.optimizer
        if optimizer.scale is None or not optimizer.steps:
            return {}
        names = (block.name for block in optimizer.scale.blocks)
        return {"sigma": dict(zip(names, optimizer.zo_state["scale/sigma"].tolist()))}


def _all_finite(model: nn.Module) -> bool:
    """Whether every trained weight is finite."""
    return all(bool(p.detach().isfinite().all()) for p in model.parameters() if p.requires_grad)


def _norm(model: nn.Module) -> float:
    """Euclidean norm of all trained weights."""
    norms = []
    for weights in (p.detach() for p in model.parameters() if p.requires_grad and p.numel()):
        norm = torch.linalg.vector_norm(weights, dtype=torch.promote_types(weights.dtype, torch.float32))
        if norm.isinf():  # weights above 1e19, whose squares overflow float32
            norm = torch.linalg.vector_norm(weights, dtype=torch.float64)
        norms.append(float(norm))
    return math.hypot(*norms)


def _start(loaded: LoadedModel) -> float:
    """The norm relative to which growth is measured: that of the trained weights before the first step. The weights of the
    user's own module may be 0 at first and have any unit, so that they count as at least 1e4 each."""
    norm = _norm(loaded.model)
    if loaded.kind != "own":
        return norm or 1.0
    return max(norm, 1e4 * math.sqrt(sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)))


def _sound(record: dict[str, Any]) -> bool:
    """Whether this has the form of a record of `evaluate_if_due`."""
    dev = record.get("dev")
    numbers = [record.get("step"), record.get("forwards"), record.get("seconds")]
    numbers += list(dev.values()) if isinstance(dev, dict) else [None]
    return all(type(number) in (int, float) for number in numbers)
