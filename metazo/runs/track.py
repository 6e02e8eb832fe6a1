"""Experiment trackers through accelerate: TensorBoard, Weights & Biases, Trackio, MLflow.

Every step's mean loss and learning rate, and every evaluation, are sent as they happen. A resumed run goes on in the same run
of the tracker; replayed steps are not sent again, so that those which a tracker had not sent when the process was killed are
missing there. The step log and metrics.jsonl are written in any case, and no number of a run depends on a tracker: one that
fails on the way is left out from then on.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from metazo.errors import UserError
from metazo.io.extras import MissingPackage, needs
from metazo.runs.locate import CONFIG
from metazo.settings import Unset
from metazo.step.record import Step
from metazo.steplog.inspect import mean

FOLDER, RUNS = "trackers", "runs.json"


class Trackers:
    """The trackers of a run; without names nothing is done.

    Args: names: of `track`; out: the run's folder, in which local files are written; settings: of the run, kept by the
    trackers; say: shows a sentence. Raises MissingPackage for a tracker that is not installed.
    Attributes: notes: what failed, and files that are elsewhere, one sentence each.
    """

    def __init__(self, names: Sequence[str], out: Path | None, settings: Mapping[str, Any], say: Callable[[str], None]):
        check(names)
        self.names, self.run, self.say = names, out.name if out else "metazo", say
        self.folder = (out or Path()).absolute() / FOLDER
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()}
        plain |= {key: int(value) for key, value in plain.items() if isinstance(value, Unset)}  # for files of YAML
        self.settings = {key: value for key, value in plain.items() if value is not None}
        self.started: dict[str, Any] = {}
        self.own: dict[str, str] = {}  # variables of the environment that a run sets, and its end takes back
        self.notes: list[str] = []

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()

    def start(self, after: int = 0) -> None:
        """Start all trackers; after: number of steps that an earlier process has taken.

        Raises UserError, and leaves nothing behind of a run that has not begun, if one does not start.
        """
        if not self.names or self.started:
            return
        with needs("track"):
            from accelerate import PartialState
        PartialState()  # accelerate's trackers ask it which process is the first
        folder = str(self.folder)
        wanted = {"WANDB_DIR": folder, "TRACKIO_DIR": folder, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        self.own = {name: value for name, value in wanted.items() if name not in os.environ}
        os.environ.update(self.own)
        new, made = not self.folder.exists(), not self.folder.parent.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            known = self._known()
            for name in self.names:
                try:
                    self.started[name] = self._open(name, known, after)
                except Exception as error:
                    raise UserError(
                        f"`track` {name} does not start ({_short(error)}): set it up, or leave it out."
                    ) from error
            (self.folder / RUNS).write_text(json.dumps(known), encoding="utf-8")
        except BaseException:
            self.finish()
            if (
                new and not (self.folder.parent / CONFIG).exists()
            ):  # not of a run that another process has begun meanwhile
                shutil.rmtree(self.folder, ignore_errors=True)
            if made:
                with suppress(OSError):  # not empty
                    self.folder.parent.rmdir()
            raise
        if after:
            self.say(
                f"Trackers go on after step {after}; steps that a kill kept them from sending are in the step log alone."
            )

    def _known(self) -> dict[str, str]:
        """The names under which the trackers know this run, of an earlier process if there was one."""
        with suppress(OSError, ValueError):
            found = json.loads((self.folder / RUNS).read_text(encoding="utf-8"))
            return {str(key): str(value) for key, value in found.items()}
        return {"id": uuid4().hex[:8]}

    def _open(self, name: str, known: dict[str, str], after: int) -> Any:
        with needs("track"):
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS
        same: dict[str, Any] = {"resume": "allow"}
        here = {"dir": own} if (own := self.own.get("WANDB_DIR")) else {}  # which W&B reads once per process
        where: dict[str, dict[str, Any]] = {
            "tensorboard": {"logging_dir": self.folder, "purge_step": after + 1 if after else None},
            "wandb": {"id": known["id"], **same, **here},
            "trackio": {"name": f"{self.run}-{known['id']}", **same},
            # its experiment has no name by default, and artifacts would be in the working folder
            "mlflow": {"experiment_name": "metazo", "logging_dir": str(self.folder), "run_id": known.get("mlflow")},
        }
        tracker = LOGGER_TYPE_TO_CLASS[name](run_name=self.run, **where[name])
        if hasattr(tracker, "start"):
            tracker.start()
        if name == "trackio" and (used := _trackio_folder(self.folder)) != self.folder and "TRACKIO_DIR" in self.own:
            self._note(f"`track` trackio keeps this run's files in {used}: it takes a folder once per process.")
        if name == "mlflow":
            known["mlflow"] = tracker.tracker.info.run_id
        if not after:
            tracker.store_init_configuration(self.settings)
        return tracker

    def step(self, step: Step) -> None:
        if self.started:
            self._log({"train/loss": mean(step.losses), "train/lr": step.lr[0]}, step.step + 1)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        self._log({f"dev/{name}": value for name, value in record["dev"].items()}, record["step"])

    def finish(self) -> None:
        for name, tracker in self.started.items():
            try:
                tracker.finish()
            except Exception as error:  # the run's own files are whole
                self.say(f"`track` {name} was not closed ({_short(error)}); it may lack the last steps.")
        for name, value in self.own.items():
            if os.environ.get(name) == value:
                del os.environ[name]
        self.started, self.own = {}, {}

    def _log(self, values: dict[str, float], step: int) -> None:
        for name, tracker in list(self.started.items()) if values else ():
            try:
                tracker.log(values, step=step)
            except Exception as error:
                del self.started[name]
                self._note(f"`track` {name} failed at step {step} ({_short(error)}); the run goes on without it.")

    def _note(self, sentence: str) -> None:
        self.notes.append(sentence)
        self.say(sentence)


def _trackio_folder(default: Path) -> Path:
    """The folder that trackio writes into, a constant of its modules since it was imported."""
    return Path(getattr(sys.modules.get("trackio.utils"), "TRACKIO_DIR", default))


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def check(names: Sequence[str]) -> None:
    """Raises MissingPackage, a UserError, for a tracker that is not installed."""
    for name in names:
        found = find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, as W&B itself makes, is no package
            raise MissingPackage(
                f"`track` {name} needs the package {name}, which is not installed: pip install {name}."
            )
    if names:
        with needs("track"):
            import accelerate  # noqa: F401
