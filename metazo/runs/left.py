"""What is left of a run that was begun, read from its folder; nothing in the folder is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from metazo.errors import UserError
from metazo.runs.batches import order_of
from metazo.runs.config import INCIDENTAL, FinetuneConfig
from metazo.runs.folder import BEST, RunFolder
from metazo.runs.inputs import data_hash
from metazo.runs.records import Records
from metazo.runs.resources import require_space, size
from metazo.steplog.format import STEPS, Scan, scan
from metazo.steplog.writer import compare
from metazo.tasks import Prepared, Task
from metazo.tasks.data import VERSION


class Begun:
    """The folder of a run that was begun.

    Args: config: settings of the run, with `resume`; say: called with each sentence for the user.
    Attributes: log: the content of the step log, None if the run was stopped before it began.
    Raises UserError if the run cannot be resumed: there is none, its settings are others, it is in use, or its log is damaged.
    """

    def __init__(self, config: FinetuneConfig, say: Callable[[str], None]):
        if config.out is None:
            raise UserError("`resume=True` needs the folder of the run: give it as `out`.")
        self.config, self.say = config, say
        self.folder = RunFolder(config.out, asdict(config), True, incidental=INCIDENTAL, say=say, look=True)
        path = config.out / STEPS
        self.log: Scan | None = scan(path).sound() if path.exists() else None

    def check_data(self, prepared: Prepared) -> None:
        """Raises UserError if the examples are not those with which the run began."""
        if self.log is not None and self.log.header.get("data") is not None:
            now = {"data": data_hash(prepared), "split": VERSION, **order_of(self.config, len(prepared.train))}
            compare(self.log, self.log.header | now, self.say)

    def begin_at(self, records: Records, replayable: bool) -> tuple[int, int]:
        """The step after which the run goes on, and that of the snapshot from which it is resumed. Takes up the records."""
        written = len(self.log.steps) if self.log else 0
        latest = records.take_up(self.folder.records(), written, self.folder.step_of(BEST))
        found = (self.folder.step_of(path.name) for path in self.folder.snapshots())
        snapshot = next((step for step in found if step is not None and step <= latest), 0)
        done = written if replayable else snapshot
        records.records = [record for record in records.records if record["step"] <= done]
        return done, snapshot

    def left(
        self,
        task: Task,
        replayable: bool,
        steps: int,
        a_step: float,
        seconds: float,
        disk: int,
        shown: Callable[[float], str],
    ) -> dict[str, Any]:
        """Entries of the plan: "left", "time" and "disk" in words, and the same in numbers.

        Args: replayable: whether the method's steps are replayed from the log; steps: of the whole run; a_step: forward passes
        per step; seconds: estimate per step; disk: bytes of the whole run; shown: a time in words.
        """
        complete, used = self.folder.summary() is not None, self.folder.used()
        records = Records(self.config, next(iter(task.metric), None), steps)
        done, snapshot = self.begin_at(records, replayable)
        if complete and self.log is not None:  # its snapshots are removed
            done = snapshot = len(self.log.steps)
        stalled = records.stalled()
        left = 0 if complete or stalled else steps - done
        forwards, more = round(left * a_step), 0 if complete else max(disk - used, 0)
        evaluations = len(records.due) - len(records.records)
        words = f"{left:,} of {steps:,} steps, {forwards:,} forward passes and {evaluations:,} "
        words += f"evaluation{'s' * (evaluations != 1)} on dev, after {done:,} steps that are done"
        if done > snapshot:
            words += f"; of these, {done - snapshot:,} are replayed from the log, without forward passes"
        if complete or stalled:
            words = (
                "nothing: the run is complete" if complete else f"no step: `patience` ends training at step {done:,}"
            )
        elif not left:
            words = f"no step of {steps:,}: the evaluation on test, and the model is saved"
        time = (
            f"estimated at least {shown(seconds * left)} for the steps that are left, at {shown(seconds)} per step here"
        )
        last = records.records[-1] if records.records else {"step": 0}
        if last["step"]:
            measured = last["seconds"] / last["step"]
            time += f"; the run took {shown(measured)} per step so far, which gives {shown(measured * left)}"
        if more:
            try:
                require_space(self.folder.path, more, "The rest of the run")
            except UserError as error:
                self.say(str(error))
        return {
            "left": words,
            "time": time,
            "disk": f"at most {size(more)} more; {self.folder.path} has {size(used)} now",
            "steps done": done,
            "steps left": left,
            "forwards left": forwards,
            "seconds left": seconds * left,
            "bytes left on disk": more,
        }
