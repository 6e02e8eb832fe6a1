"""Meta-train a tuner: `meta_train(config)`. The output folder of a tuner of block scales holds

tuner.safetensors  config.json  metrics.jsonl  sigma.png       and, until the run is complete, two snapshots
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import metazo
from metazo.blocks import named_tensors
from metazo.errors import UserError
from metazo.feedback.tuner import FeedbackTuner
from metazo.io.extras import MissingPackage
from metazo.io.lock import FolderLock
from metazo.io.terminal import Console
from metazo.meta import horizon_setup
from metazo.meta.config import MetaConfig
from metazo.meta.dryrun import Plan, make_plan
from metazo.meta.feedback_config import FeedbackConfig
from metazo.meta.horizon import HorizonRun
from metazo.meta.horizon_config import HorizonConfig
from metazo.meta.horizon_setup import HorizonPlan, spec
from metazo.meta.journal import METRICS, Progress, plot, row_of
from metazo.meta.learn_feedback import learn_feedback
from metazo.meta.loop import MetaRun, make_teacher, restarts
from metazo.meta.order import Order, PreparedTask
from metazo.meta.path import Online
from metazo.meta.reset import Start
from metazo.meta.trajectory import Recorded, Trajectory, belongs_to, record
from metazo.models.load import LoadedModel, load_model
from metazo.runs.folder import RunFolder
from metazo.runs.inputs import belongs
from metazo.runs.interrupt import Interrupted, interruptible
from metazo.runs.monitor import Diverged
from metazo.runs.resources import refuse_ranks, require_space
from metazo.tasks import prepare, resolve
from metazo.tuner.file import Tuner, TunerInfo
from metazo.tuner.networks import PertNN

TUNER, CONFIG, _START = "tuner.safetensors", "config.json", "start.safetensors"


def meta_train(
    config: MetaConfig | HorizonConfig | FeedbackConfig, *, console: Console | None = None
) -> Tuner | FeedbackTuner:
    """Meta-train a tuner and write it to `config.out`.

    Args: config: of a tuner of block scales that is trained along a first-order path or over whole runs, or of feedback
    (`learn_feedback`); console: shows progress; None: no output.
    Returns: the tuner, as written to tuner.safetensors.
    Raises UserError for bad settings, a folder that holds another run, a loss that is not finite at the first step, or
    a full disk; Interrupted after SIGINT or SIGTERM, once the state is saved.
    """
    refuse_ranks("meta-train")
    console = None if console is None else Console.of(console)
    if isinstance(config, FeedbackConfig):
        return learn_feedback(config, console=console)
    if config.resume and (config.out / TUNER).exists():
        say(console, f"The run in {config.out} is complete; this is its tuner.")
        with suppress(UserError, OSError), FolderLock(config.out):  # a disk that may only be read; another at work
            _take_away(config.out)
        return Tuner.load(config.out / TUNER)
    loaded, tasks, plan, make = _prepared(config)
    settings = {key: value for key, value in asdict(config).items() if key not in ("out", "resume", "device")}
    origin = belongs(loaded.model, [task.prepared for task in tasks])
    with RunFolder(config.out, settings, config.resume, belongs=origin, say=partial(say, console)) as folder:
        require_space(config.out, plan.disk_bytes - folder.used(), "This run")
        folder.begin()
        say(console, plan.sentence())
        for task in tasks:
            for note in task.prepared.notes:
                say(console, note)
        with interruptible() as caught:
            run = None
            try:
                run = make(caught, console, origin)
                if config.resume and (snapshot := folder.load_snapshot(len(folder.records()))) is not None:
                    run.load(snapshot[1])
                    say(console, f"Going on after meta-step {run.steps} of {plan.steps}.")
                train(run, folder, plan.steps, caught, console)
            except UserError:
                if not config.resume and (run is None or run.steps == 0):
                    _clear(config.out)
                raise
        return finish(run, folder, loaded, console)


def _prepared(config: MetaConfig | HorizonConfig):
    """Model, tasks, plan, and a function that makes the run from the signals caught, the console and the hashes of inputs."""
    if isinstance(config, HorizonConfig):
        loaded, tasks = horizon_setup.load_tasks(config)
        plan = horizon_setup.make_plan(config, loaded.model, tasks)
        return loaded, tasks, plan, lambda caught, console, origin: HorizonRun(tasks, config, caught)
    loaded, tasks, order = load(config)
    return loaded, tasks, make_plan(config, loaded.model, tasks, order), partial(build, config, loaded, tasks, order)


def dry(config: MetaConfig | HorizonConfig) -> Plan | HorizonPlan:
    """The plan of a run; nothing is run or written. Raises UserError as `meta_train` does before its first step."""
    if config.out.exists() and not config.resume and (not config.out.is_dir() or any(config.out.iterdir())):
        raise UserError(f"`out` {config.out} is not an empty folder; choose another, or continue with `resume=True`.")
    return _prepared(config)[2]


def _clear(out: Path) -> None:
    """Remove the files of a run that never took a step."""
    for name in (CONFIG, METRICS, _START):
        (out / name).unlink(missing_ok=True)
    with suppress(OSError):  # not empty
        out.rmdir()


def _take_away(out: Path) -> None:
    """Remove files that only a resumed run needs."""
    for path in (*out.glob("snapshot-*.safetensors"), *out.glob(".*.tmp"), out / _START):
        path.unlink(missing_ok=True)


def load(config: MetaConfig) -> tuple[LoadedModel, list[PreparedTask], Order]:
    """Model, training sets and order of batches. Raises UserError."""
    resolved = [resolve(name) for name in config.task]
    heads = {task.num_labels for task in resolved if task.kind == "classification"}
    loaded = load_model(
        config.model,
        dtype=config.dtype,
        device=config.device,
        seed=config.seed,
        num_labels=heads.pop() if len(heads) == 1 else None,
    )
    tasks = [
        PreparedTask(
            prepare(
                task,
                loaded,
                data=config.data,
                train=config.train_examples,
                dev=1,
                test=1,
                seed=config.seed,
                max_length=config.max_length,
            ),
            config.device,
        )
        for task in resolved
    ]
    for task in tasks:
        if len(task) < config.batch_size:
            raise UserError(
                f"`batch_size` {config.batch_size} is more than the {len(task)} training examples of {task.name!r}."
            )
    return loaded, tasks, Order([len(task) for task in tasks], config.batch_size, config.seed)


def build(
    config: MetaConfig,
    loaded: LoadedModel,
    tasks: list[PreparedTask],
    order: Order,
    caught: list[str] | None = None,
    console: Console | None = None,
    origin: dict[str, Any] | None = None,
) -> MetaRun:
    """Make the run from its settings; records the teacher's path first if the settings ask for it.

    origin: hashes of the inputs (`runs.inputs.belongs`), which must equal those of a recorded path.
    """
    tensors = named_tensors(loaded.model)
    if config.record is None and config.trajectory is None:
        start = Start(tensors, config.out / _START)
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
    path = Recorded(Trajectory.open(folder, identity, say=partial(say, console)), tensors, tasks)
    return MetaRun(loaded.model, tensors, tasks, config, order=order, path=path)


def train(run: MetaRun | HorizonRun, folder: RunFolder, steps: int, caught: list[str], console: Console | None) -> None:
    """The loop, with metrics, progress and snapshots."""
    folder.keep_records(folder.records()[: run.steps])
    with Progress(console, steps, run.steps) as progress:
        while run.steps < steps:
            step = run.step()
            if step is not None:  # None: a signal was caught within the step, which is taken again on resuming
                row = row_of(step, run.scale.blocks)
                folder.record(**row)
                progress.show(row, run.skipped)
            if caught:
                folder.save_snapshot(run.steps, run.state())
                raise Interrupted(
                    f"{caught[0]} after meta-step {run.steps} of {steps}; the state is saved, "
                    "continue with the same command and `resume=True`.",
                    caught[0],
                )
            if run.steps % run.config.save_every == 0 and run.steps < steps:
                folder.save_snapshot(run.steps, run.state())


def finish(run: MetaRun | HorizonRun, folder: RunFolder, loaded: LoadedModel, console: Console | None) -> Tuner:
    """Write tuner and plot, and remove files that only a resumed run needs. Raises Diverged if the tuner is unusable."""
    (horizon_setup.judge if isinstance(run, HorizonRun) else _judge)(run)  # type: ignore[operator]
    try:
        picture = str(plot(folder.path))
    except MissingPackage as missing:  # the tuner is complete without its picture
        picture = f"no picture of sigma ({missing})"
    tuner = horizon_setup.make_tuner(run, loaded) if isinstance(run, HorizonRun) else make_tuner(run, loaded)
    tuner.save(folder.path / TUNER)
    _take_away(folder.path)
    if run.skipped:
        say(console, f"{run.skipped} meta-steps had a loss that was not finite.")
    say(console, f"Wrote {folder.path / TUNER}, {folder.metrics} and {picture}.")
    return tuner


def _judge(run: MetaRun) -> None:
    assert run.pertnn is not None
    kept = f"the log and the last snapshot in {run.config.out} are kept; choose another `out`."
    if not all(bool(weight.isfinite().all()) for weight in run.pertnn.parameters()):
        raise Diverged(
            f"Meta-training diverged: the networks are not finite after {run.steps} meta-steps; lower `lr_meta` (now "
            f"{run.config.lr_meta:g}); {kept}"
        )
    if 2 * run.skipped > run.steps:
        raise Diverged(
            f"Meta-training diverged: the loss was not finite in {run.skipped} of {run.steps} meta-steps; lower `teacher_lr` "
            f"(now {run.config.teacher_lr:g}) or, with the published objective, `lr_update` and `eps`; {kept}"
        )


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
    info = TunerInfo(
        base_model=loaded.name,
        blocks=[spec(block) for block in run.scale.blocks],
        by=config.blocks,
        features=config.features,
        parametrisation=config.parametrisation,
        bound=config.bound,
        normalise=config.normalise,
        embedding_count=config.embedding_count,
        recipe=recipe,
        metazo_version=metazo.__version__,
    )
    return Tuner(PertNN.from_stacked(**weights), info)


def say(console: Console | None, text: str) -> None:
    if console is not None:
        console.print(text, soft_wrap=True)
