"""The result of a run, and the objects in memory with which a run may start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from metazo.errors import UserError
from metazo.models.assemble import load
from metazo.models.load import LoadedModel
from metazo.runs.config import FinetuneConfig
from metazo.runs.folder import RunFolder
from metazo.runs.locate import log_to_continue
from metazo.runs.own import OwnLoss
from metazo.step.record import Step
from metazo.steplog.format import STEPS, scan
from metazo.steplog.inspect import mean
from metazo.tasks import Task

MEMORY = "memory:"
"""Prefix of the name of an object in memory in the settings."""


@dataclass
class Given:
    """Objects in memory that replace those that the settings name."""

    loaded: LoadedModel | None = None
    task: Task | None = None
    rows: Mapping[str, Sequence[Any]] | None = None
    own: OwnLoss | None = None
    optimizer: Any = None
    objective: Callable[..., Any] | None = None
    unnamed: bool = False
    """Whether the settings of a resumed run are from its folder, so that nobody named the code of an objective."""
    begun: bool = False
    """Whether the run has come to its steps: before, a refusal leaves the model as it was given."""

    def check(self, config: FinetuneConfig) -> None:
        """Raises UserError if a setting is the name of an object in memory that is not given, or the model is sharded."""
        named = self.loaded.model.named_parameters() if self.loaded else ()
        if (name := next((name for name, parameter in named if hasattr(parameter, "placements")), None)) is not None:
            raise UserError(
                f"`model` is sharded over processes ({name} is a DTensor): give its name with `tensor_parallel` or `fsdp`, or "
                "take the steps in a loop of your own, with an optimizer over metazo.integrations.local_parameters(model)."
            )
        there = {"model": self.loaded, "task": self.task or self.own, "optimizer": self.optimizer}
        there["objective"] = self.objective
        for name, value in there.items():
            if value is None and str(getattr(config, name)).startswith(MEMORY):
                raise UserError(
                    f"`{name}` of this run was an object in memory ({getattr(config, name)}), which is in no file: resume from "
                    "Python, with metazo.finetune(..., resume=True) and the same object as it was at the start."
                )


class AsGiven:
    """A model in memory as the caller gave it, to be restored after a refusal: adapters are put between its layers, its
    tensors are selected for training, and it is put into eval mode, before everything is known to be right.
    """

    def __init__(self, model: nn.Module):
        self.modules = [
            (module, set(vars(module)), dict(module._modules), module.training) for module in model.modules()
        ]
        self.trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        for module, names, parts, training in self.modules:
            for name in set(vars(module)) - names:  # peft's own settings
                delattr(module, name)
            module._modules.clear()
            module._modules.update(parts)
            module.training = training
        for parameter, wanted in self.trained:
            if parameter.requires_grad != wanted:  # a parameter without a shape refuses the call
                parameter.requires_grad_(wanted)


@dataclass(frozen=True)
class Part:
    """Part of a run. start: the steps that were taken, which are replayed; stop: the step to stop at, without evaluations and
    an end; spent: how many steps fewer than its settings say the run has; least: how many it must have; others: the steps
    that a race took at other rates, which the run does not count; tested: whether the end has a test (a run that only serves
    to choose has none, though its test rows are set apart).
    """

    start: Sequence[Step] = ()
    stop: int | None = None
    spent: int = 0
    least: int = 0
    others: int = 0
    tested: bool = True

    def apply(self, setup: Any) -> None:
        """Raises UserError if no step is left, or if steps of the method cannot be replayed."""
        if self.stop is not None and not setup.optimizer.replayable:
            raise UserError(
                f"A race replays steps from their records, and those of {setup.config.optimizer} cannot be: give `lr`."
            )
        if setup.steps < self.spent + self.least:
            raise UserError(
                f"The race takes {self.spent + self.least} steps before one rate is left, and the run has {setup.steps}: give "
                "more steps, fewer rates, or shorter rounds."
            )
        setup.steps -= self.spent
        setup.raced = self.others or _raced(setup.config)
        if setup.raced:
            passes = round(setup.raced * setup.optimizer.forwards_per_step(setup.config.accumulate))
            setup.prepared.notes += [
                f"The race took {setup.raced:,} steps ({passes:,} forward passes) at other rates, which the steps and forward "
                "passes of this run do not contain."
            ]


WHOLE = Part()


def _raced(config: FinetuneConfig) -> int:
    """The steps at other rates in the race with which a run that goes on began, as its log says."""
    log = log_to_continue(config)
    found = scan(log).header.get("race") if log else None
    return found if type(found) is int and found > 0 else 0


@dataclass
class Finetuned:
    """The result of `metazo.finetune`."""

    summary: dict[str, Any]
    """Steps, forward passes, seconds, and the loss and metrics before, at the kept step (dev) and on test; as in
    summary.json."""
    out: Path | None
    """The folder of the run; None if nothing was written."""
    loaded: LoadedModel | None = None
    history: tuple[list[Step], list[dict[str, Any]]] | None = None

    @cached_property
    def model(self) -> nn.Module:
        """The tuned model: the given object if there was one, or the kept model of a run that was already complete."""
        return self._loaded.model

    @property
    def tokenizer(self) -> Any:
        return self._loaded.tokenizer

    @cached_property
    def _loaded(self) -> LoadedModel:
        return self.loaded or load(self.out or "")

    @cached_property
    def steps(self) -> list[Step]:
        """The record of every step: seeds, losses, coefficients, learning rates."""
        return self.history[0] if self.history else scan((self.out or Path()) / STEPS).steps

    @property
    def losses(self) -> list[float]:
        """The mean of the losses of each step's probes, nats; not finite for a step that was skipped because of it."""
        return [mean(step.losses) for step in self.steps]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """One record per evaluation: step, forwards, seconds, train_loss, lr, dev; as in metrics.jsonl."""
        return self.history[1] if self.history else RunFolder.read_records(self.out or Path())
