"""The evaluations of a run: when they are due, what each records, and which weights are the best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metazo.blocks import chunks
from metazo.io.processes import total
from metazo.models.load import LoadedModel
from metazo.models.parts import divided, held, whole
from metazo.runs.config import FinetuneConfig
from metazo.runs.folder import RunFolder
from metazo.runs.interrupt import times_continued
from metazo.runs.records import GROWN, Records
from metazo.runs.setup import Setup
from metazo.runs.shared import SharedFolder
from metazo.runs.unwritten import MemoryFolder


class Scores(Records):
    """Evaluates on dev, and keeps the records in metrics.jsonl.

    Attributes: losses, of the training steps since the last evaluation.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        setup: Setup,
        folder: RunFolder | SharedFolder | MemoryFolder,
    ):
        super().__init__(config, next(iter(setup.prepared.task.metric), None), setup.steps)
        self.setup, self.folder = setup, folder
        self.losses: list[float] = []
        self.most = GROWN * _start(setup.loaded)
        self.evaluating = 0.0  # seconds, in this process
        self.started = self.since = time.monotonic()
        self.usual, self.continued, self.computed = 0.0, times_continued(), time.thread_time()

    def settle(self, steps: int) -> None:
        """Continue from that step: drop the records of later steps, which are made again."""
        self.records = [record for record in self.records if record["step"] <= steps]
        self.folder.keep_records(self.records)
        if self.records:
            self.started -= self.records[-1]["seconds"]

    def stepped(self) -> None:
        """Note the end of a step. One in which the process was suspended counts as long as the one before, because a process
        learns that it goes on, but not since when it had been suspended; and at least as long as its thread computed: cpulimit
        suspends a process many times per second, in every step. A frozen control group gives no signal, and counts.
        """
        now, computed = time.monotonic(), time.thread_time()
        taken, again = now - self.since, times_continued()
        if again == self.continued:
            self.usual = taken
        elif (lost := taken - max(self.usual, computed - self.computed)) > 0:
            self.started += lost
            if lost >= 1:
                self.folder.say(
                    f"The process was suspended for about {lost:.1f} s, which do not count as time of training."
                )
        self.since, self.continued, self.computed = now, again, computed

    def evaluate_if_due(
        self, step: int, keep_best: Callable[[int], None], on_record: Callable[[dict[str, Any]], None]
    ) -> None:
        """Record mean training loss, metrics on dev, and block scales, if an evaluation is due and has no record.

        Args: keep_best: called with the step if the weights are the best so far, before the record is written; on_record:
        called with the record. They are not kept: a run that its scores refer to would hold the model after its end.
        """
        if step not in self.due:
            return
        if self.records and self.records[-1]["step"] >= step:
            self.losses = []
            if step == self.lost:
                keep_best(step)
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
        norm = _norm(self.setup.loaded.model)
        if not (math.isfinite(norm) or _all_finite(self.setup.loaded.model)):
            record["weights_finite"] = False
        elif norm > self.most:
            record["weights_grown"] = float(f"{GROWN * norm / self.most:.3g}")
        self.losses = []
        if self.better(record):
            keep_best(step)
        self.folder.record(**record)
        self.records.append(record)
        on_record(record)
        self.since, self.continued, self.computed = time.monotonic(), times_continued(), time.thread_time()
        self.evaluating += self.since - paused

    def on(self, split: Literal["dev", "test"]) -> dict[str, float]:
        return self.setup.evaluate(split)

    def latest(self) -> str:
        """The last evaluation as text."""
        dev = self.records[-1]["dev"] if self.records else {}
        names = dict.fromkeys((self.minimised, "loss", *self.setup.prepared.task.metric))
        return "dev " + "  ".join(f"{name} {dev[name]:.3f}" for name in names if name in dev)

    def _sigma(self) -> dict[str, Any]:
        """The block scales of the previous step, by block, if there are any."""
        optimizer = self.setup.optimizer
        if optimizer.scale is None or not optimizer.steps:
            return {}
        names = (block.name for block in optimizer.scale.blocks)
        return {"sigma": dict(zip(names, optimizer.zo_state["scale/sigma"].tolist()))}


def _all_finite(model: nn.Module) -> bool:
    """Whether every trained weight is finite; of a divided model in all processes, none of which waits for another."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = (part for name, values, _ in held(model) if name in trained for part in _flat(values))
    wrong = sum(not bool(part.isfinite().all()) for part in parts)
    return not (total([wrong])[0] if divided(model) else wrong)


def _trained(model: nn.Module) -> Iterator[Tensor]:
    """The values of the trained weights, in chunks, so that what is made of them is small; all processes go through them."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, values in whole(model):
        if name in trained:
            yield from _flat(values.detach())


def _flat(values: Tensor) -> Iterator[Tensor]:
    flat = values.reshape(-1)
    return (flat[start:stop] for start, stop in chunks(values))


def _norm(model: nn.Module) -> float:
    """Euclidean norm of the trained weights; of a divided model from the norms of its parts, without gathering them."""
    if not divided(model):
        return norm_of(_trained(model))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    norms = [(norm_of(_flat(part)), copies) for name, part, copies in held(model) if name in trained]
    return math.sqrt(total([sum(norm * norm / copies for norm, copies in norms)])[0])


def norm_of(parts: Iterable[Tensor]) -> float:
    """Euclidean norm of weights that are given in parts."""
    norms = []
    for weights in parts:
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
