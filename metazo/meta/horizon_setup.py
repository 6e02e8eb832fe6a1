"""What a run over the horizon begins and ends with: model and tasks, the plan, and the tuner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

import metazo
from metazo.blocks import Block, every_tensor, named_tensors, partition
from metazo.errors import UserError
from metazo.io.terminal import Console
from metazo.meta.dryrun import Plan
from metazo.meta.horizon import EVAL_BATCH, HorizonRun, HorizonTask
from metazo.meta.horizon_config import HorizonConfig
from metazo.meta.journal import STILL, still
from metazo.meta.loading import load_base, prepare_task, resolve_tasks, rows_of
from metazo.meta.trial import check_file
from metazo.models.heads import Prototypes
from metazo.models.identity import BASE
from metazo.models.load import LoadedModel
from metazo.models.select import select_trainable
from metazo.models.sentence import SentenceClassifier
from metazo.runs.method import resolve_device
from metazo.runs.monitor import Diverged
from metazo.runs.resources import size
from metazo.tasks.classes import fit_head
from metazo.tasks.evaluate import batches
from metazo.tuner.file import Tuner, TunerInfo
from metazo.tuner.match import BlockSpec
from metazo.tuner.networks import NUMBERS_PER_UNIT, PertNN


def load(config: HorizonConfig) -> tuple[LoadedModel, list[HorizonTask]]:
    """The model with its trained tensors selected, and the tasks on it. Raises UserError."""
    device, resolved = resolve_device(config.device), resolve_tasks(config.task)
    loaded = load_base(config, resolved, device, config.head)
    select_trainable(loaded.model, config.train, config.freeze)
    blocks = _blocks(loaded, config)
    smallest = Tuner(PertNN(len(blocks), hidden=1), _info(config, loaded, blocks, config.recipe()))
    check_file(smallest, "networks", config.networks, 1, 4 * len(blocks) * NUMBERS_PER_UNIT)
    tasks = []
    for task in resolved:
        own, model = loaded, loaded.model
        if isinstance(model, SentenceClassifier) and isinstance(model.head, Prototypes) and task.num_labels:
            own = replace(loaded, model=model.with_new_head(task.num_labels))
        prepared = prepare_task(config, task, own, config.eval_examples)
        if not prepared.dev:
            raise UserError(f"Task {task.name!r} has no held-out examples by which a run could be judged.")
        if isinstance(own.model, SentenceClassifier):
            own.model.cache_frozen()
            fit_head(own, prepared, EVAL_BATCH)
        tasks.append(HorizonTask(own.model, prepared, device))
    return loaded, tasks


@dataclass(frozen=True, kw_only=True)
class HorizonPlan(Plan):
    """The plan of a run over the horizon. Its forward passes count all runs, those that compare learning rates and the
    held-out losses included; its memory has the weights, their base values, and those of the members of truncated runs."""

    updates: int
    horizon: int

    def sentence(self) -> str:
        return (
            f"{self.steps} pairs of runs of {self.horizon} steps on {', '.join(self.tasks)}, {self.updates} updates of "
            f"{self.blocks} scales for {self.weights:,} weights, about {self.forwards:,} forward passes; about "
            f"{size(self.memory_bytes)} of memory and activations, {size(self.disk_bytes)} of disk."
        )


def make_plan(config: HorizonConfig, model: nn.Module, tasks: Sequence[HorizonTask]) -> HorizonPlan:
    """The plan of a run."""
    tensors = named_tensors(model)
    weights = sum(tensor.param.numel() for tensor in tensors)
    held = sum(len([*batches(task.prepared.dev, EVAL_BATCH, task.prepared)]) for task in tasks) / len(tasks)
    runs = config.pairs * -(-config.updates * config.window // config.horizon)  # each of the pairs begins its own
    begun = min(runs, len(tasks))  # tasks whose loss at the start is computed, and whose rates are compared
    tried = begun * len(config.rates) if len(config.rates) > 1 else 0
    forwards = 2 * config.steps * (2 * config.window + held) + tried * (2 * config.horizon + held) + begun * held
    members = 2 * config.pairs if config.window < config.horizon else 0
    every = sum(parameter.numel() for parameter in model.parameters())
    item = tensors[0].param.itemsize
    return HorizonPlan(
        model=config.model,
        tasks=[task.name for task in tasks],
        steps=config.steps,
        updates=config.updates,
        horizon=config.horizon,
        blocks=len(partition(tensors, config.blocks)),
        weights=weights,
        forwards=round(forwards),
        memory_bytes=(every + (1 + members) * weights) * item,
        disk_bytes=3 * members * weights * item + 2**20,
    )


def build(
    config: HorizonConfig,
    loaded: LoadedModel,
    tasks: list[HorizonTask],
    caught: Sequence[str] = (),
    console: Console | None = None,
    origin: dict[str, Any] | None = None,
) -> HorizonRun:
    """Make the run; it says nothing and reads no recording."""
    return HorizonRun(tasks, config, caught)


def judge(run: HorizonRun) -> None:
    """Raises Diverged if the scales mean nothing."""
    if 2 * run.skipped > run.steps or not bool(run.centre.isfinite().all()):
        raise Diverged(
            f"Meta-training diverged: the loss was not finite, or the weights exploded, in {run.skipped} of {run.steps} pairs "
            f"of runs; lower `rates`, `spread` or `lr_sigma`; the log and the last snapshot in {run.config.out} are kept; "
            "choose another `out`."
        )


def notes(run: HorizonRun) -> list[str]:
    """What is to be said of the run at its end."""
    found = [f"{run.skipped} pairs of runs exploded, or had a loss that was not finite."] if run.skipped else []
    return found if run.moved else [*found, still(run.steps, "the scales", run.config)]


def make_tuner(run: HorizonRun, loaded: LoadedModel) -> Tuner:
    """The tuner of the centre of the search, with networks for the blocks of the whole model in float32."""
    config, trained = run.config, run.networks(run.centre)
    blocks = _blocks(loaded, config)
    place = {block.name: index for index, block in enumerate(blocks)}
    whole = PertNN(len(blocks), hidden=trained.hidden, seed=config.seed, zero_init=True)
    rows = [place[block.name] for block in run.scale.blocks]
    for name, value in trained.named_parameters():
        getattr(whole, name).data[rows] = value.detach().float()
    rates = {task.name: float(rate) for task, rate in zip(run.tasks, run.rates) if not math.isnan(rate)}
    recipe = (
        config.recipe()
        | {
            "tasks": [task.name for task in run.tasks],
            "skipped": run.skipped,
            "rates of the tasks": rates,
            "factor of the rates": math.exp(float(run.centre[-1])),
        }
        | rows_of(run.tasks, ["train", "dev"])
        | ({} if run.moved else STILL)
    )
    return Tuner(whole, _info(config, loaded, blocks, recipe))


def _blocks(loaded: LoadedModel, config: HorizonConfig) -> list[Block]:
    """The blocks of the whole model. The frozen tensors of a layer that is trained in part are a block of their own, because
    a network is used only if all tensors of its block are trained, and no others.
    """
    trained = {tensor.name for tensor in named_tensors(loaded.model)}
    blocks = []
    for block in partition(every_tensor(loaded.model), config.blocks):
        frozen = tuple(tensor for tensor in block.tensors if tensor.name not in trained)
        if 0 < len(frozen) < len(block.tensors):
            own = tuple(tensor for tensor in block.tensors if tensor.name in trained)
            blocks += [Block(block.name, own), Block(f"{block.name}.frozen", frozen)]
        else:
            blocks.append(block)
    return blocks


def _info(config: HorizonConfig, loaded: LoadedModel, blocks: list[Block], recipe: dict[str, Any]) -> TunerInfo:
    return TunerInfo(
        base_model=loaded.name,
        blocks=[BlockSpec.of(block) for block in blocks],
        by=config.blocks,
        features="log",
        parametrisation="rms_exp",
        bound=config.bound,
        normalise=config.normalise,
        recipe=recipe | ({BASE: loaded.base_weights} if loaded.base_weights else {}),
        metazo_version=metazo.__version__,
    )
