"""What a run along a teacher's path begins and ends with: model and tasks, the run itself, and the tuner."""

from __future__ import annotations

from functools import partial
from typing import Any

import metazo
from metazo.blocks import named_tensors, partition
from metazo.io.lock import FolderLock
from metazo.io.terminal import Console
from metazo.meta.config import MetaConfig
from metazo.meta.dryrun import make_plan as make_plan
from metazo.meta.explosion import exploded_rows
from metazo.meta.journal import STILL, say, still
from metazo.meta.loading import load_base, prepare_task, resolve_tasks, rows_of
from metazo.meta.loop import MetaRun, make_teacher, order_of, restarts
from metazo.meta.order import PreparedTask
from metazo.meta.path import Online
from metazo.meta.reset import Start
from metazo.meta.trajectory import Recorded, Trajectory, belongs_to, record
from metazo.meta.trial import check_file
from metazo.models.identity import BASE
from metazo.models.load import LoadedModel
from metazo.runs.inputs import belongs
from metazo.runs.interrupt import Interrupted
from metazo.runs.method import resolve_device
from metazo.runs.monitor import Diverged
from metazo.tuner.file import Tuner, TunerInfo
from metazo.tuner.match import BlockSpec
from metazo.tuner.networks import NUMBERS_PER_UNIT, PertNN

START = "start.safetensors"


def load(config: MetaConfig) -> tuple[LoadedModel, list[PreparedTask]]:
    """The model and the training sets. Raises UserError."""
    resolved = resolve_tasks(config.task)
    device = resolve_device(config.device)
    loaded = load_base(config, resolved, device)
    blocks = [BlockSpec.of(block) for block in partition(named_tensors(loaded.model), config.blocks)]
    smallest = Tuner(PertNN(len(blocks), hidden=1), _info(config, loaded, blocks, config.recipe()))
    check_file(smallest, "hidden", config.hidden, 1, 4 * len(blocks) * NUMBERS_PER_UNIT)
    tasks = [PreparedTask(prepare_task(config, task, loaded), device) for task in resolved]
    for task in tasks if config.objective == "ratio" or config.separate_batch else ():
        if len(task) < 2 * config.batch_size:
            task.prepared.notes.append(
                f"Task {task.name!r} has {len(task)} training rows, fewer than two batches of {config.batch_size}: the second "
                "batch of a step shares rows with the first, so that they agree more than independent ones; lower `batch_size`."
            )
    return loaded, tasks


def build(
    config: MetaConfig,
    loaded: LoadedModel,
    tasks: list[PreparedTask],
    caught: list[str] | None = None,
    console: Console | None = None,
    origin: dict[str, Any] | None = None,
) -> MetaRun:
    """Make the run from its settings; records the teacher's path first if the settings ask for it.

    origin: hashes of the inputs (`runs.inputs.belongs`), which must equal those of a recorded path.
    """
    tensors, order = named_tensors(loaded.model), order_of(config, tasks)
    if config.record is None and config.trajectory is None:
        start = Start(tensors, config.out / START)
        path = Online(start, make_teacher(config, tensors, order), order, restarts(config, order), config.restart_model)
        return MetaRun(loaded.model, tensors, tasks, config, order=order, path=path)
    shared = ("seed", "batch_size", "train_examples", "max_length", "dtype")
    settings = {name: getattr(config, name) for name in shared}
    settings |= {name: getattr(config, name) for name in ("teacher", "teacher_lr", "momentum", "clip")}
    origin = origin or belongs(loaded.model, [task.prepared for task in tasks])
    identity = belongs_to(config.model, tasks, tensors, settings, origin)
    folder = config.trajectory
    if config.record is not None:
        folder = config.record
        teacher = make_teacher(config, tensors, order)

        def report(step: int, loss: float) -> None:
            if console is not None and (step + 1) % 100 == 0:
                say(console, f"Teacher's step {step + 1} of {teacher.steps}, loss {loss:.4f}.")
            if caught:
                raise Interrupted(
                    f"stopped after the teacher's step {step + 1}; continue with the same command and `resume=True`.",
                    caught[0],
                )

        steps, every = teacher.steps, config.record_every
        with FolderLock(folder, "record"):
            record(
                folder, loaded.model, tensors, tasks, teacher, order, identity, steps=steps, every=every, report=report
            )
    assert folder is not None
    trajectory = Trajectory.open(folder, identity, say=partial(say, console))
    bad, steps = exploded_rows(trajectory.log), len(trajectory.log)
    if 2 * bad > steps:
        raise Diverged(
            f"The teacher in {folder} diverged: in {bad} of {steps} steps its loss was not finite or far above the first one; "
            f"lower `teacher_lr` (now {config.teacher_lr:g}), and record again in another folder."
        )
    path = Recorded(trajectory, tensors, tasks)
    return MetaRun(loaded.model, tensors, tasks, config, order=order, path=path)


def judge(run: MetaRun) -> None:
    """Raises Diverged if the networks mean nothing."""
    assert run.pertnn is not None
    kept = f"the log and the last snapshot in {run.config.out} are kept; choose another `out`."
    if not all(bool(weight.isfinite().all()) for weight in run.pertnn.parameters()):
        raise Diverged(
            f"Meta-training diverged: the networks are not finite after {run.steps} meta-steps; lower `lr_meta` (now "
            f"{run.config.lr_meta:g}); {kept}"
        )
    if 2 * (run.skipped + run.watch.count) > run.steps:
        raise Diverged(
            f"Meta-training diverged: the loss was not finite in {run.skipped} of {run.steps} meta-steps, and the teacher's "
            f"weights had exploded in {run.watch.count} others (its loss was far above the first one, or their norm above 100 "
            f"times that at the start); lower `teacher_lr` (now {run.config.teacher_lr:g}) or, with the published objective, "
            f"`lr_update` and `eps`; {kept}"
        )


def notes(run: MetaRun) -> list[str]:
    """What is to be said of the run at its end."""
    about = {
        "meta-steps had a loss that was not finite": run.skipped,
        "meta-steps with a finite loss were at weights of a teacher that exploded": run.watch.count,
    }
    found = [f"{count} {what}." for what, count in about.items() if count]
    return found if run.moved else [*found, still(run.steps, "the networks", run.config)]


def make_tuner(run: MetaRun, loaded: LoadedModel) -> Tuner:
    """The current tuner of a run, with its networks in float32."""
    config = run.config
    assert run.pertnn is not None
    weights = {name: value.detach().float().cpu() for name, value in run.pertnn.named_parameters()}
    recipe = config.recipe() | {
        "tasks": [task.name for task in run.tasks],
        "steps": run.steps,
        "skipped": run.skipped,
        "teacher_path": "online" if isinstance(run.path, Online) else "recorded",
    }
    recipe |= rows_of(run.tasks, ["train"]) | ({} if run.moved else STILL)
    if isinstance(run.path, Recorded):
        recipe["teacher_steps"] = len(run.path.trajectory.log)
    info = _info(config, loaded, [BlockSpec.of(block) for block in run.scale.blocks], recipe)
    return Tuner(PertNN.from_stacked(**weights), info)


def _info(config: MetaConfig, loaded: LoadedModel, blocks: list[BlockSpec], recipe: dict[str, Any]) -> TunerInfo:
    return TunerInfo(
        base_model=loaded.name,
        blocks=blocks,
        by=config.blocks,
        features=config.features,
        parametrisation=config.parametrisation,
        bound=config.bound,
        normalise=config.normalise,
        embedding_count=config.embedding_count,
        recipe=recipe | ({BASE: loaded.base_weights} if loaded.base_weights else {}),
        metazo_version=metazo.__version__,
    )
