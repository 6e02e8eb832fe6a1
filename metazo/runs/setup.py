"""Set up a run: model, data, optimizer and length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from metazo.errors import UserError
from metazo.integrations.resident import local_parameters
from metazo.io.extras import needs
from metazo.io.processes import world
from metazo.models.assemble import assemble
from metazo.models.describe import describe, parts_of
from metazo.models.load import LoadedModel
from metazo.models.parts import check as check_processes
from metazo.models.parts import divided
from metazo.models.sentence import SentenceClassifier
from metazo.optimizers.ranks import share
from metazo.optimizers.registry import method
from metazo.runs.choose import choose
from metazo.runs.config import AUTO, FinetuneConfig
from metazo.runs.examples import longest_batch, longest_input, prepared_task
from metazo.runs.fit_precision import fit_precision
from metazo.runs.locate import log_to_continue
from metazo.runs.method import arguments, resolve_device
from metazo.runs.own import OwnLoss, StateFile
from metazo.runs.plan import plan, rows_of
from metazo.runs.preconditions import check_gradient, check_saved, check_settings
from metazo.runs.resources import free_memory
from metazo.runs.schedule import keep_cost, number_of_steps
from metazo.runs.tuned import Given
from metazo.steplog.format import scan
from metazo.tasks import Prepared, resolve
from metazo.tasks.classes import fit_head
from metazo.tasks.closures import BatchLoss, Data, FullLoss
from metazo.tasks.evaluate import evaluate
from metazo.tasks.objectives import Minimised, Objective
from metazo.tasks.trainings import tuner_note
from metazo.tuner.scale import TunerScale

with needs("llm"):
    from transformers.utils import logging as transformers_logging


@dataclass
class Setup:
    """A run before its first step: model, data, optimizer, and length."""

    config: FinetuneConfig
    loaded: LoadedModel
    prepared: Prepared | OwnLoss
    optimizer: Any
    trained: int
    steps: int
    forwards: int
    device: torch.device
    limit: int
    objective: Objective | None = None
    """What is minimised in place of the task's loss."""
    chosen: str | None = None
    """What `optimizer='auto'` took, and why, in a sentence."""
    storage: str | None = None
    """What `precision='auto'` took for weights narrower than float32, and why, in a sentence."""
    cost: str | None = None
    """That a step costs another number of forward passes here than where the run began, in a sentence."""
    raced: int = 0
    """Steps that the race with which the run began took at other rates."""

    @property
    def rows(self) -> Prepared:
        """The data of a run on a task."""
        assert isinstance(self.prepared, Prepared)
        return self.prepared

    @property
    def data(self) -> Data:
        """What the losses of steps are computed on."""
        return data(self.prepared, self.objective)

    def evaluate(self, split: Literal["dev", "test"]) -> dict[str, float]:
        """Loss and metrics on a split, and "objective", the value that is minimised, if there is one."""
        if isinstance(self.prepared, OwnLoss):
            return self.prepared.evaluate(self.loaded.model, split, self.device)
        model, size, objective = self.loaded.model, self.config.eval_batch_size, self.objective
        more = [objective.metric] if objective and objective.metric else []
        found = evaluate(model, self.rows, split, batch_size=size, metrics=more, divided=True)
        if objective is None:
            return found
        return {"objective": objective.over(model, self.rows, split, found, size), **found}

    def parts(self) -> list[Any]:
        """The objects to save, each with a save_pretrained."""
        if isinstance(self.prepared, OwnLoss):
            return [StateFile(self.loaded.model)]
        record = self.prepared.record | ({"quantize": self.loaded.quantize} if self.loaded.quantize else {})
        describe(self.loaded.model, record)
        return parts_of(self.loaded, record, self.config.revision)

    def plan(self, config: FinetuneConfig) -> dict[str, Any]:
        """A description of the run and estimates of its memory and disk space, before it starts."""
        rows = rows_of(config, self.prepared, self.limit)
        return plan(config, self.loaded, self.optimizer, rows, self.steps, self.forwards)


def set_up(config: FinetuneConfig, given: Given | None = None) -> Setup:
    """Load and check everything that a run needs and that is not `given`; writes nothing."""
    transformers_logging.disable_progress_bar()
    given, device, chosen = given or Given(), resolve_device(config.device), None
    check_processes(config.tensor_parallel, config.fsdp)
    objective = check_settings(config, given)
    if given.own:
        loaded, trained = assemble(config, labels=None, device=device, given=given.loaded)
        prepared: Any = given.own
    else:
        loaded, trained, prepared = _task(config, given, device)
    minimised = data(prepared, objective)
    if config.optimizer == AUTO:
        config, chosen = _chosen(config, loaded, minimised, device)
    storage = None
    if given.optimizer is None and world() == 1:  # processes on machines of different memory would choose differently
        loss = BatchLoss(loaded.model, prepared, longest_batch(config, prepared.train), device)
        config, storage = fit_precision(config, loaded.model, loss, free_memory(device))
    if given.optimizer is None:
        config, optimizer = make_optimizer(config, loaded, minimised, device)
    else:
        optimizer, trained = _given_optimizer(given.optimizer, loaded, minimised, config, device)
    scale = getattr(optimizer, "scale", None)
    if isinstance(scale, TunerScale) and isinstance(prepared, Prepared):
        prepared.notes += filter(None, [tuner_note(scale.recipe, prepared)])
    log = log_to_continue(config) if getattr(optimizer, "measured_cost", None) else None
    cost = keep_cost(optimizer, scan(log).header) if log else None
    steps = number_of_steps(config, optimizer, len(prepared.train))
    return Setup(
        config,
        loaded,
        prepared,
        optimizer,
        trained,
        steps,
        round(optimizer.forwards_in(steps, config.accumulate)),
        device,
        longest_input(config, loaded),
        objective,
        chosen,
        storage,
        cost,
    )


def data(prepared: Prepared | OwnLoss, objective: Objective | None) -> Data:
    """What the losses of steps are computed on."""
    return prepared if objective is None or isinstance(prepared, OwnLoss) else Minimised(prepared, objective)


def _chosen(
    config: FinetuneConfig, loaded: LoadedModel, prepared: Any, device: torch.device
) -> tuple[FinetuneConfig, str]:
    """The settings with a method in the place of auto: that of the log if the run goes on, and why."""
    if log := log_to_continue(config):
        began = scan(log).header["settings"]
        taken = {name: began[name] for name in ("optimizer", "scale", "lr", "schedule")}
        return replace(config, **taken), f"auto took {taken['optimizer']} when the run began."
    loss = BatchLoss(loaded.model, prepared, longest_batch(config, prepared.train), device)
    return choose(config, loaded.model, loss, device)


def _given_optimizer(
    optimizer: Any, loaded: LoadedModel, prepared: Any, config: FinetuneConfig, device: torch.device
) -> tuple[Any, int]:
    """An optimizer in memory and the number of weights that it trains. Raises UserError if they are not the model's."""
    own = {id(parameter) for parameter in loaded.model.parameters()}
    trained = optimizer.trained()
    if not trained or any(id(parameter) not in own for parameter in trained):
        raise UserError("`optimizer` has tensors that are not the model's; make it from model.named_parameters().")
    if optimizer.wants_full_closure and optimizer.full_closure is None:
        own = share(optimizer.exchange.probe_ranks)
        optimizer.full_closure = FullLoss(loaded.model, prepared, config.batch_size, device, own)
    return optimizer, sum(parameter.numel() for parameter in trained)


def _task(config: FinetuneConfig, given: Given, device: torch.device) -> tuple[LoadedModel, int, Prepared]:
    """A language model, the number of its trained weights, and the rows of a task."""
    task = given.task or resolve(config.task)
    labels = task.num_labels
    loaded, trained = assemble(config, labels=labels, device=device, given=given.loaded)
    check_saved(config, loaded)
    check_gradient(config, loaded, given.optimizer)
    if given.loaded and loaded.kind == "classifier" and labels != loaded.model.config.num_labels:
        raise UserError(
            f"`model` has a head of {loaded.model.config.num_labels} classes, and task {task.name!r} has {labels or 'none'}."
        )
    prepared = prepared_task(config, task, loaded, given.rows)
    if isinstance(loaded.model, SentenceClassifier):
        loaded.model.cache_frozen()
        examples = [*prepared.dev, *prepared.test, *prepared.train]
        loaded.model.learn_frozen(prepared.batches(examples, config.eval_batch_size))
        log = log_to_continue(config)
        fit_head(loaded, prepared, config.eval_batch_size, scan(log).header.get("head") if log else None)
    return loaded, trained, prepared


def make_optimizer(
    config: FinetuneConfig, loaded: LoadedModel, prepared: Any, device: torch.device
) -> tuple[FinetuneConfig, Any]:
    """The optimizer of a run, and the settings with the values that depend on model and data (`Method.resolve`: the
    dominant layer, the evaluation of probes), so that a replay needs neither.
    """
    cls, given = method(config.optimizer), arguments(config, loaded.model)
    own = share(config.probe_ranks * config.tensor_parallel)
    batch = BatchLoss(loaded.model, prepared, prepared.train[: -(-config.batch_size // own[1])], device)
    found = cls.resolve(given, loaded.model, batch)
    changed = {key: value for key, value in found.items() if key not in given or value is not given[key]}
    shared = {key: changed.pop(key) for key in list(changed) if key in FinetuneConfig.__dataclass_fields__}
    apart = divided(loaded.model)
    optimizer: Any = cls(local_parameters(loaded.model) if apart else loaded.model.named_parameters(), **found)
    optimizer.measure_cost(batch)
    if (
        optimizer.wants_full_closure
    ):  # processes that gather weights from each other make the same number of forward passes
        full = (0, 1) if apart else own
        optimizer.full_closure = FullLoss(loaded.model, prepared, config.batch_size, device, full)
    return replace(config, **shared, method=config.method | changed), optimizer
