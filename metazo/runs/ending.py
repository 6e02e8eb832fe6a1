"""The end of a run: which weights are kept, the test, the saved model, the summary and the picture."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from shlex import quote
from typing import Any

from torch import Tensor, nn

from metazo.errors import UserError
from metazo.io.extras import NO_PICTURE
from metazo.io.processes import rank
from metazo.io.terminal import Console
from metazo.models.adapters import merge_adapters
from metazo.models.parts import hash_of
from metazo.runs.config import FinetuneConfig
from metazo.runs.evaluations import Scores
from metazo.runs.folder import BEST, SNAPSHOTS, RunFolder
from metazo.runs.locate import MODEL, SUMMARY
from metazo.runs.model_card import ModelCard
from metazo.runs.monitor import Diverged, Watch
from metazo.runs.resources import peak_memory
from metazo.runs.setup import Setup
from metazo.runs.shared import SharedFolder, written
from metazo.runs.track import Trackers
from metazo.runs.unwritten import MemoryFolder, MemoryLog
from metazo.steplog.writer import StepLog
from metazo.tuner.hub import push_folder


class Ending(ABC):
    """The part of the loop's state (metazo/runs/finetune.py) that ends a run."""

    config: FinetuneConfig
    setup: Setup
    folder: RunFolder | SharedFolder | MemoryFolder
    console: Console
    model: nn.Module
    optimizer: Any
    prepared: Any
    rates: list[float]
    log: StepLog | MemoryLog
    scores: Scores
    watch: Watch
    trackers: Trackers

    @abstractmethod
    def _load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Take up saved weights."""

    def finish(self, plot: bool, tested: bool = True) -> dict[str, Any]:
        """Test, save the model, and write the summary; it is written last, so that a run with a summary is complete."""
        config, loaded, records = self.config, self.setup.loaded, self.scores.records
        self.optimizer.settle()
        best = self.scores.best()
        kept = best["step"] if config.keep == "best" else self.optimizer.steps
        notes = [
            *self.prepared.notes,
            *self.optimizer.notes,
            *self.watch.notes,
            *self.trackers.notes,
            *self._divergence(kept),
            *self._stopped_early(),
            *self._over_budget(),
        ]
        if kept != self.optimizer.steps:
            self._load_best(kept)
        weights = hash_of(self.model)
        if config.merge:  # before the test, which is of the model that is saved: the sums are rounded to its dtype
            loaded.model = merge_adapters(loaded.model)
        test = self.scores.on("test") if config.test_examples and tested else {}
        summary = {
            "task": config.task,
            "optimizer": config.optimizer,
            "objective": config.objective,
            "tuner": config.tuner,
            "lr": self.rates[0],
            "steps": self.optimizer.steps,
            "forwards": self.optimizer.forwards,
            "seconds": round(time.monotonic() - self.scores.started, 1),
            "peak_memory_bytes": peak_memory(),
            "before": records[0]["dev"],
            "dev": best["dev"] if config.keep == "best" else records[-1]["dev"],
            "kept_step": kept,
            "test": test,
            "notes": notes,
        }
        if self.optimizer.replayable:  # a kill from here on is made good from the log
            self.log.sync()
            self.folder.remove(BEST, SNAPSHOTS)
        if config.keep != "none":
            card = ModelCard(config, summary, self.setup.trained, self.setup.loaded.quantize)
            self.folder.save_model(*self.setup.parts(), card)
        self.log.finish(kept, weights)
        if plot:
            self._plot(records)
        self.folder.complete(summary)
        if push(self.config, summary, self.console):
            self.folder.complete(summary)
        return summary

    def _plot(self, records: list[dict[str, Any]]) -> None:
        folder = written(self.folder)
        if folder is None:
            return
        title = f"{self.config.task}, {self.config.optimizer}"
        try:
            from metazo.plots.curves import plot_run

            plot_run(records, folder.path / "curve.png", title, self.prepared.task.metric, self.scores.minimised)
        except NO_PICTURE as missing:  # the run is complete without its picture
            self.console.print(f"No curve.png: {str(missing) or 'no memory is left'}", style="yellow", soft_wrap=True)

    def _divergence(self, kept: int) -> list[str]:
        """A note if the run diverged after the evaluation that is kept. Raises Diverged if no evaluation can be kept."""
        wrong = self.scores.diverged()
        if wrong is None:
            return []
        config, last = self.config, self.optimizer.steps
        advice = f"lower `lr` (now {self.rates[0]:g})"
        if 0 < kept < last:
            note = f"The run diverged: after step {last} {wrong}. The weights of step {kept} are kept; {advice}."
            self.folder.say(note)
            return [note]
        self.log.sync()
        sound = [record["step"] for record in self.scores.records if self.scores.usable(record)]
        where = f"the last sound evaluation is that of step {sound[-1]}" if sound else "no evaluation is sound"
        replay = f"metazo replay {quote(str(self.log.path))} --base {quote(config.model)} --to STEP --out FOLDER"
        what = f"The run diverged: after step {last} {wrong}"
        raise Diverged(
            f"{what}; {advice} and choose another `out`. The step log is complete and {where}"
            f"{f': {replay} gives the weights of any step' if self.optimizer.replayable and config.out else ''}.",
            f"{what}; {advice}.",
        )

    def _stopped_early(self) -> list[str]:
        taken, total = self.optimizer.steps, self.setup.steps
        if taken == total:
            return []
        note = (
            f"Stopped early after step {taken} of {total}: {self.config.patience} evaluations without a lower "
            f"{self.scores.minimised} on dev."
        )
        self.folder.say(note)
        return [note]

    def _over_budget(self) -> list[str]:
        """A note if the steps took more than `forwards`, by which their number was chosen."""
        taken, most = self.optimizer.forwards, self.config.forwards
        if most is None or taken <= most:
            return []
        note = (
            f"The run took {taken:,} forward passes, and `forwards` is {most:,}: the steps of {self.optimizer.name} took more "
            "than its forwards_per_step gave before the first one; let it return the mean of a step, or give `steps`."
        )
        self.folder.say(note)
        return [note]

    def _load_best(self, step: int) -> None:
        found = self.folder.load_tensors(BEST)
        if found is None or found[0] != step:
            self.folder.remove(BEST)
            raise UserError(
                f"{self.config.out}/{BEST} is damaged; continue with `resume=True`, which makes the best weights (step {step}) "
                "again from the log."
            )
        self._load_weights(found[1])


def push(config: FinetuneConfig, summary: dict[str, Any], console: Console, again: bool = False) -> bool:
    """Upload the saved model to the repository of the settings, and say so in the summary. Returns whether the summary has
    changed. again: also if it was uploaded there before, which replaces what was changed there since; the Hub makes no commit
    for equal files.

    Raises UserError, with everything saved, if that fails: a resumed run tries it again.
    """
    there = summary.get("pushed", [])
    if config.push is None or config.out is None or (config.push in there and not again):
        return False
    if rank() == 0:
        if not (config.out / MODEL).is_dir():
            raise UserError(f"`push`: the run in {config.out} has kept no model; rebuild it with metazo replay.")
        try:
            address = push_folder(config.push, config.out / MODEL)
        except UserError as error:
            raise UserError(
                f"{error}. The run is complete ({config.out / SUMMARY}); continue with `resume=True` to push it again."
            ) from error
        console.say("pushed:", address)
    summary["pushed"] = list(dict.fromkeys([*there, config.push]))
    return summary["pushed"] != there
