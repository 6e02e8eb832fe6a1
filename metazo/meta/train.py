"""Meta-train a tuner: `meta_train(config)`. The output folder of a tuner of block scales holds

tuner.safetensors  config.json  metrics.jsonl  sigma.png       and, until the run is complete, two snapshots
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from metazo.errors import UserError
from metazo.feedback.tuner import FeedbackTuner
from metazo.io.extras import NO_PICTURE
from metazo.io.lock import FolderLock
from metazo.io.terminal import Console
from metazo.meta import horizon_setup, path_setup
from metazo.meta.config import MetaConfig
from metazo.meta.dryrun import Plan
from metazo.meta.feedback_config import FeedbackConfig
from metazo.meta.horizon import HorizonRun
from metazo.meta.horizon_config import HorizonConfig
from metazo.meta.journal import Progress, plot, row_of, say
from metazo.meta.learn_feedback import learn_feedback
from metazo.meta.loop import MetaRun
from metazo.meta.path_setup import START
from metazo.meta.trajectory import content_hash
from metazo.models.load import LoadedModel
from metazo.runs.folder import METRICS, RunFolder
from metazo.runs.header import environment
from metazo.runs.inputs import belongs
from metazo.runs.interrupt import Interrupted, interruptible
from metazo.runs.locate import CONFIG, read_config
from metazo.runs.resources import refuse_ranks, require_space, used
from metazo.steplog.writer import report_environment
from metazo.tuner.file import Tuner
from metazo.tuner.limits import TUNER

ENVIRONMENT = "environment"  # key of versions, threads and device in config.json


def meta_train(
    config: MetaConfig | HorizonConfig | FeedbackConfig, *, console: Console | None = None, plot: bool = True
) -> Tuner | FeedbackTuner:
    """Meta-train a tuner and write it to `config.out`.

    Args: config: of a tuner of block scales that is trained along a first-order path or over whole runs, or of feedback
    (`learn_feedback`); console: shows progress; None: no output; plot: whether block scales are drawn in sigma.png.
    Returns: the tuner, as written to tuner.safetensors.
    Raises UserError for bad settings, a folder that holds another run, a loss that is not finite at the first step, or
    a full disk; Interrupted after SIGINT or SIGTERM, once the state is saved.
    """
    refuse_ranks("meta-train")
    console = None if console is None else Console.of(console)
    if isinstance(config, FeedbackConfig):
        return learn_feedback(config, console=console)
    settings = {key: value for key, value in asdict(config).items() if key not in ("out", "resume", "device")}
    # the content of data and recording is compared, wherever they are by now; that of `record` by the recording itself
    places = {"record": None, "trajectory": "recording"}
    may_change: dict[str, Any] = {"incidental": (ENVIRONMENT, "data"), "places": places}
    if config.resume and (config.out / TUNER).exists():
        recording = _recording(config)
        # raises UserError if the settings or the recording are others; the model and the rows are not loaded
        RunFolder(config.out, settings, resume=True, look=True, belongs=recording, **may_change)
        say(console, f"The run in {config.out} is complete; this is its tuner.")
        with suppress(UserError, OSError), FolderLock(config.out):  # a disk that may only be read; another at work
            _take_away(config.out)
        return Tuner.load(config.out / TUNER)
    setup = _setup(config)
    loaded, tasks = setup.load(config)
    plan = setup.make_plan(config, loaded.model, tasks)
    origin = belongs(loaded.model, [task.prepared for task in tasks])
    now, tell = environment(next(loaded.model.parameters()).device), partial(say, console)
    settings |= {ENVIRONMENT: now}
    record, trajectory = (getattr(config, name, None) for name in places)
    content = origin if trajectory is None else origin | {places["trajectory"]: content_hash(trajectory)}
    with RunFolder(config.out, settings, config.resume, belongs=content, say=tell, **may_change) as folder:
        if config.resume:
            report_environment(read_config(config.out).get(ENVIRONMENT), now, tell)
        require_space(config.out, plan.disk_bytes - used(*filter(None, (config.out, record))), "This run")
        folder.begin()
        say(console, plan.sentence())
        for task in tasks:
            for note in task.prepared.notes:
                say(console, note)
        with interruptible() as caught:
            run = None
            try:
                run = setup.build(config, loaded, tasks, caught, console, origin)
                if config.resume and (snapshot := folder.load_snapshot(len(folder.records()))) is not None:
                    run.load(snapshot[1])
                    say(console, f"Going on after meta-step {run.steps} of {plan.steps}.")
                train(run, folder, plan.steps, caught, console)
            except UserError:
                if not config.resume and (run is None or run.steps == 0):
                    _clear(config.out)
                raise
        return finish(run, folder, loaded, console, plot)


def _recording(config: MetaConfig | HorizonConfig) -> dict[str, str] | None:
    """The hash of the recording that a complete run is given, as in `belongs`; None if it has none, or if the one with which
    it began is gone from its place. Raises UserError for another one that is not there."""
    trajectory = getattr(config, "trajectory", None)
    if trajectory is None or (str(trajectory) == read_config(config.out).get("trajectory") and not trajectory.exists()):
        return None
    return {"recording": content_hash(trajectory)}


def _setup(config: MetaConfig | HorizonConfig) -> ModuleType:
    """The module with the beginning and the end of such a run: load, make_plan, build, judge, notes, make_tuner."""
    return horizon_setup if isinstance(config, HorizonConfig) else path_setup


def dry(config: MetaConfig | HorizonConfig) -> Plan:
    """The plan of a run; nothing is run or written. Raises UserError as `meta_train` does before its first step."""
    if config.out.exists() and not config.resume and (not config.out.is_dir() or any(config.out.iterdir())):
        raise UserError(f"`out` {config.out} is not an empty folder; choose another, or continue with `resume=True`.")
    setup = _setup(config)
    loaded, tasks = setup.load(config)
    return setup.make_plan(config, loaded.model, tasks)


def _clear(out: Path) -> None:
    """Remove the files of a run that never took a step."""
    for name in (CONFIG, METRICS, START):
        (out / name).unlink(missing_ok=True)
    with suppress(OSError):  # not empty
        out.rmdir()


def _take_away(out: Path) -> None:
    """Remove files that only a resumed run needs."""
    for path in (*out.glob("snapshot-*.safetensors"), *out.glob(".*.tmp"), out / START):
        path.unlink(missing_ok=True)


def train(run: MetaRun | HorizonRun, folder: RunFolder, steps: int, caught: list[str], console: Console | None) -> None:
    """The loop, with metrics, progress and snapshots."""
    folder.keep_records(folder.read_records(folder.path)[: run.steps])
    with Progress(console, run.config, steps, run.steps) as progress:
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


def finish(
    run: MetaRun | HorizonRun, folder: RunFolder, loaded: LoadedModel, console: Console | None, drawn: bool
) -> Tuner:
    """Write tuner and plot, and remove files that only a resumed run needs. Raises Diverged if the tuner is unusable."""
    setup = _setup(run.config)
    setup.judge(run)
    folder.lock.check_held()
    picture = "no picture of sigma (`plot` is false)"
    if drawn:
        try:
            picture = str(plot(folder.path, run.config.normalise))
        except NO_PICTURE as missing:  # the tuner is complete without its picture
            picture = f"no picture of sigma ({str(missing) or 'no memory is left'})"
    tuner = setup.make_tuner(run, loaded)
    tuner.save(folder.path / TUNER)
    _take_away(folder.path)
    for note in setup.notes(run):
        say(console, note)
    say(console, f"Wrote {folder.path / TUNER}, {folder.metrics} and {picture}.")
    return tuner
