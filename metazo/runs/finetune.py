"""Fine-tune a model on a task: the training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from shlex import quote
from typing import Any

import torch
from torch import Tensor, nn

from metazo.errors import UserError
from metazo.integrations.resident import local_parameters
from metazo.io.processes import agreed, from_first, joined, rank, together
from metazo.io.terminal import Console
from metazo.models.parts import divided, forward_only
from metazo.optimizers.guards import as_loss
from metazo.optimizers.ranks import share as share_of_rank
from metazo.runs.batches import padding, reader, step_losses
from metazo.runs.config import INCIDENTAL, FinetuneConfig
from metazo.runs.diagnose import diagnose, dtype_explained, memory_explained
from metazo.runs.ending import Ending, push
from metazo.runs.evaluations import Scores
from metazo.runs.folder import BEST, SNAPSHOTS, RunFolder
from metazo.runs.header import header
from metazo.runs.interrupt import Interrupted, interruptible
from metazo.runs.locate import PATHS, as_begun, from_anywhere
from metazo.runs.method import unused
from metazo.runs.monitor import Diverged, Watch
from metazo.runs.progress import progress
from metazo.runs.resources import require_space
from metazo.runs.schedule import share, snapshot_steps, warmup_steps
from metazo.runs.setup import Setup, set_up
from metazo.runs.shared import SharedFolder, losses_explained, require_same_run, require_same_setup, run_folder, written
from metazo.runs.track import Trackers
from metazo.runs.tuned import WHOLE, Finetuned, Given, Part
from metazo.runs.tuner_choice import auto_tuner
from metazo.runs.unwritten import MemoryFolder, MemoryLog
from metazo.step.record import Step
from metazo.steplog.format import STEPS
from metazo.steplog.writer import StepLog
from metazo.tasks import Prepared
from metazo.tasks.closures import BatchLoss


def run_settings(
    config: FinetuneConfig, console: Console | None = None, *, plot: bool = False, part: Part = WHOLE
) -> dict[str, Any]:
    """`tune` for a run that is described by its settings alone, without objects in memory; by default it draws no picture,
    which costs as much as a tiny run. Returns its summary.
    """
    return tune(config, console=console, plot=plot, part=part).summary


def tune(
    config: FinetuneConfig,
    given: Given | None = None,
    console: Console | None = None,
    *,
    on_step: Callable[[Step], None] | None = None,
    on_evaluation: Callable[[dict[str, Any]], None] | None = None,
    plot: bool = True,
    part: Part = WHOLE,
    push_again: bool = False,
) -> Finetuned:
    """Run or resume the fine-tuning that `config` describes (see FinetuneConfig), or a part of it; `given` objects replace
    those that it names. `metazo.finetune` and the command line both call it.

    The callbacks get the record of each step and of each evaluation. Without `config.out` nothing is written; without `plot`
    there is no curve.png. push_again: upload the model of a complete run even if it was uploaded before. Every process that
    torchrun started calls it: they divide the work, all return the result, and rank 0 alone writes and shows anything.
    Raises UserError for bad input before anything is written, and Interrupted, with the run saved, if a signal stops it.
    """
    given = given or Given()
    given.check(config)
    parts = config.tensor_parallel * config.fsdp > 1
    with (
        joined(config.rank_timeout, tensors=parts),
        losses_explained(config),
        memory_explained(config),
        dtype_explained(config),
    ):
        return _tune(
            config, given, Console.of(None if rank() else console), on_step, on_evaluation, plot, part, push_again
        )


def _tune(
    config: FinetuneConfig,
    given: Given,
    console: Console,
    on_step: Callable[[Step], None] | None,
    on_evaluation: Callable[[dict[str, Any]], None] | None,
    plot: bool,
    part: Part,
    push_again: bool,
) -> Finetuned:
    def say(text: str) -> None:
        console.print(text, style="yellow", soft_wrap=True)

    named, config = config, as_begun(config)
    require_same_run(config)
    with run_folder(config, say) as folder, ExitStack() as stack:
        if (summary := folder.summary()) is not None:
            say(f"The run in {config.out} is complete; this is its result.")
            if push(config, summary, console, push_again):
                folder.complete(summary)
            return Finetuned(summary, config.out)
        here = replace(from_anywhere(config), objective=named.objective)
        setup = agreed(lambda: set_up(here, given))
        if here != config:  # the names in the log stay those of the start
            setup.config = replace(setup.config, **{name: getattr(config, name) for name in PATHS})
            setup.loaded.name = setup.loaded.name.replace(here.model, config.model)
        config = setup.config
        part.apply(setup)
        plan = setup.plan(config)
        require_same_setup(setup)
        if (out := config.out) is not None:
            needed = plan["bytes on disk"] - folder.used()
            from_first(lambda: require_space(out, needed, "The run"))
        if not config.resume:
            agreed(lambda: _first_loss(setup, config))
        named = config.track or () if rank() == 0 else ()
        trackers = stack.enter_context(Trackers(named, config.out, asdict(config), say))
        if not config.resume:
            agreed(trackers.start)
        folder.begin()
        if setup.chosen:
            console.say("method:", setup.chosen)
        if setup.storage:
            console.say("precision:", setup.storage)
        if setup.cost:
            say(setup.cost)
        if config.tuner == "auto" and given.optimizer is None:
            found = auto_tuner(replace(here, optimizer=config.optimizer), setup.loaded.model)
            console.say("tuner:", f"{found.entry.name} in {found.folder}")
        for name in ("trained weights", "effective learning rate", "steps", "memory", "disk"):
            console.say(f"{name}:", plan[name])
        idle = unused(replace(here, optimizer=config.optimizer)) if given.optimizer is None else []
        if isinstance(setup.prepared, Prepared):
            idle += padding(config, setup.prepared.train)
        for note in [*setup.prepared.notes, *idle]:
            console.say("note:", note, once=True)  # not for each run of a demo
        with interruptible() as caught:
            run = _Run(config, setup, folder, console, caught, trackers, on_step, on_evaluation)
            given.begun = True
            try:
                if part.stop is not None:
                    run.scores.due.clear()
                run.catch_up(part.start)
                run.go_on(part.stop)
                summary = run.finish(plot, part.tested) if part.stop is None else {"steps": setup.steps}
            except Diverged as error:
                error.taken = {"steps": setup.optimizer.steps, "forwards": setup.optimizer.forwards}
                raise
            finally:
                setup.optimizer.settle()
                run.log.close()
        history = (run.log.steps, run.scores.records) if config.out is None else None
        return Finetuned(summary, config.out, setup.loaded, history)


def _first_loss(setup: Setup, config: FinetuneConfig) -> None:
    """Raises UserError for a loss that is not finite before the first step, before anything is written."""
    first = step_losses(config, setup, reader(config, setup.prepared.train), 0, _share(setup))[0]
    with forward_only(setup.loaded.model):
        loss = as_loss(first())
    if config.objective is not None and not math.isfinite(loss):
        raise UserError(f"`objective` {config.objective} is {loss} before the first step; it must be a finite number.")
    if not math.isfinite(loss):
        advice = "try float32 (or bfloat16 instead of float16), and " if "16" in config.dtype else ""
        raise UserError(
            f"The loss of {config.model} on {config.task} is {loss} before the first step in {config.dtype}; "
            f"{advice}check the model."
        )


def _share(setup: Setup) -> tuple[int, int]:
    """(index, number) of this process's share of the examples."""
    if not together():
        return 0, 1
    return share_of_rank(setup.optimizer.exchange.probe_ranks * setup.config.tensor_parallel)


class _Run(Ending):
    """The state of the loop."""

    def __init__(
        self,
        config: FinetuneConfig,
        setup: Setup,
        folder: RunFolder | SharedFolder | MemoryFolder,
        console: Console,
        caught: list[str],
        trackers: Trackers,
        on_step: Callable[[Step], None] | None,
        on_evaluation: Callable[[dict[str, Any]], None] | None,
    ):
        self.config, self.setup, self.folder, self.console, self.caught = config, setup, folder, console, caught
        self.trackers, self.on_step, self.on_evaluation = trackers, on_step, on_evaluation
        self.model: nn.Module = setup.loaded.model
        self.optimizer, self.prepared = setup.optimizer, setup.prepared
        self.read, self.share = reader(config, setup.prepared.train), _share(setup)
        self.optimizer.max_loss = config.max_loss
        self.optimizer.defer = on_step is None  # who is called after a step may read the weights
        self.snapshot_every = snapshot_steps(config, self.optimizer.replayable)
        self.warmup = warmup_steps(config.warmup, setup.steps)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.log = self._log()
        self.watch = Watch(config, setup.steps, folder.say)
        self.scores = Scores(config, setup, folder)

    def _log(self) -> StepLog | MemoryLog:
        """The step log: in the folder on rank 0, and a copy of it in memory on the others."""
        log: StepLog | MemoryLog = MemoryLog()
        if self.config.out is None:
            return log
        decisive = {key: value for key, value in asdict(self.config).items() if key not in INCIDENTAL}
        first = header(decisive, self.setup)

        def opened() -> list[Step]:
            nonlocal log
            folder = written(self.folder)
            assert folder is not None
            every = {"flush_every": self.config.flush_every, "fsync_every": self.config.fsync_every}
            log = StepLog(folder.path / STEPS, first, **every, say=folder.say)
            return log.steps

        log.steps = from_first(opened)
        return log

    # -- resuming --------------------------------------------------------------------------------------------------

    def catch_up(self, start: Sequence[Step] = ()) -> None:
        """Load a snapshot and replay the log after it; forward passes are needed only for evaluations that were lost.
        start: steps with which a new log begins.
        """
        steps = [*self.log.steps, *start]
        latest = self.scores.take_up(self.folder.records(), len(steps), self.folder.step_of(BEST))
        snapshot = self.folder.load_snapshot(latest)
        done = self._load(*snapshot) if snapshot else 0
        written = len(steps)
        if not self.optimizer.replayable:  # steps that need a gradient, for example, are computed again
            self.log.cut(done)
            steps = steps[:done]
        self.scores.settle(len(steps))
        agreed(partial(self.trackers.start, len(steps)))
        if written:
            what, again = "Going on" if start else "Resuming", written - len(steps)
            self.folder.say(
                f"{what} after step {len(steps)}: snapshot of step {done}, {len(steps) - done} steps replayed"
                f"{f', {again} computed again' if again else ''}."
            )
        for record in steps[:done]:
            self.watch.see(record)
        self._evaluate_if_due(done)
        for record in steps[done:]:
            if record.step >= self.log.count:  # of `start`
                if self.scores.stalled():
                    return
                self.log.append(record)
            self._set_rates(record.step)
            self._after(record, self.optimizer.step(self._closures(record.step), replay=record))
            self._stop_if_asked(record.step + 1)

    def _load(self, step: int, tensors: dict[str, Tensor]) -> int:
        """Load a snapshot."""
        self._load_weights(tensors)
        state = {k.removeprefix("optimizer/"): v for k, v in tensors.items() if k.startswith("optimizer/")}
        self.optimizer.load_tensors_state(state)
        self.scores.losses = tensors["run/losses"].tolist()
        return step

    def _snapshot(self, step: int) -> None:
        state = {f"optimizer/{name}": tensor for name, tensor in self.optimizer.tensors_state().items()}
        losses = {"run/losses": torch.tensor(self.scores.losses, dtype=torch.float64)}
        self.log.sync()  # a snapshot is never ahead of the log
        if self.optimizer.replayable:
            self.folder.remove(SNAPSHOTS)
        self.folder.save_snapshot(step, self._weights() | state | losses)

    def _weights(self) -> dict[str, Tensor]:
        """The trained weights by name; all others are those of the base model."""
        self.optimizer.settle()
        return {f"weights/{name}": p for name, p in self._held() if p.requires_grad}

    def _held(self) -> Iterable[tuple[str, Tensor]]:
        """The parameters that this process holds; of a divided model the parts."""
        return local_parameters(self.model) if divided(self.model) else self.model.named_parameters()

    def _load_weights(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._held():
            if (saved := tensors.get(f"weights/{name}")) is not None:
                parameter.data.copy_(saved)

    def _keep_best(self, step: int) -> None:
        if self.config.keep == "best":
            if self.optimizer.replayable:
                self.log.sync()
                self.folder.remove(BEST)
            self.folder.save_tensors(BEST, step, self._weights())

    # -- training --------------------------------------------------------------------------------------------------

    def go_on(self, stop: int | None = None) -> None:
        """Take the steps that are left, or those up to `stop`."""
        optimizer, total = self.optimizer, self.setup.steps if stop is None else stop
        optimizer.recorder = self.log.append
        with progress(self.console, total, optimizer.steps) as show:
            for step in range(optimizer.steps, total):
                if self.scores.stalled():
                    break
                self._set_rates(step)
                closures = self._closures(step)
                if together():
                    optimizer.exchange.stop = bool(self.caught)
                loss = optimizer.step(closures)
                record = optimizer.last_step
                assert record is not None
                self._after(record, loss, closures)
                self.trackers.step(record)
                if self.on_step:
                    self.on_step(record)
                if self.snapshot_every and (step + 1) % self.snapshot_every == 0:
                    self._snapshot(step + 1)
                what = f"{self.scores.minimised} {loss:.4f}"
                show(step + 1, f"{what}  lr {optimizer.param_groups[0]['lr']:.2g}  {self.scores.latest()}")
                self._stop_if_asked(step + 1)

    def _evaluate_if_due(self, step: int) -> None:
        self.scores.evaluate_if_due(step, self._keep_best, self._evaluated)

    def _evaluated(self, record: dict[str, Any]) -> None:
        self.trackers.evaluation(record)
        if self.on_evaluation:
            self.on_evaluation(record)

    def _set_rates(self, step: int) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * share(self.config.schedule, step, self.setup.steps, self.warmup)

    def _closures(self, step: int) -> list[BatchLoss]:
        return step_losses(self.config, self.setup, self.read, step, self.share)

    def _after(self, step: Step, loss: float, closures: list[BatchLoss] | None = None) -> None:
        """Check a step that was taken (closures) or replayed, and evaluate if that is due."""
        if step.coefficients:
            self.scores.losses.append(loss)
        self.watch.see(step, partial(self._diagnosis, closures) if closures else None)
        self.scores.stepped()
        self._evaluate_if_due(step.step + 1)

    def _diagnosis(self, closures: list[BatchLoss]) -> str:
        self.optimizer.settle()
        return diagnose(self.model, closures, self.setup.loaded.dtype, self.config.max_loss)

    def _stop_if_asked(self, step: int) -> None:
        """Stop if a signal asked for it; several processes stop after the step in whose exchange one of them said so."""
        if self.optimizer.exchange.stopped if together() else self.caught:
            if step == self.optimizer.steps == self.log.count and self.snapshot_every:
                self._snapshot(step)
            saved = f"which is saved; continue with metazo finetune --resume {quote(str(self.config.out))}"
            if self.config.out is None:
                saved = "whose weights are in the model in memory; nothing is written, because the run has no `out`"
            name = self.caught[0] if self.caught else "SIGTERM"
            raise Interrupted(f"{name} after step {step} of {self.setup.steps}, {saved}", name)
