"""Experiment trackers through accelerate: TensorBoard, Weights & Biases, Trackio, MLflow.

Every step's mean loss and learning rate, and every evaluation, are sent as they happen; steps that are replayed are not sent
again. The step log and metrics.jsonl are written in any case, and no number of a run depends on a tracker.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from metazo.io.extras import MissingPackage, needs
from metazo.step.record import Step

FOLDER = "trackers"


class Trackers:
    """The trackers of a run; without names nothing is done.

    Args: names: of `track`; out: the run's folder, in which local files are written; settings: of the run, kept by the
    trackers. Raises MissingPackage for a tracker that is not installed.
    """

    def __init__(self, names: Sequence[str], out: Path | None, settings: Mapping[str, Any]):
        self.started: list[Any] = []
        if not names:
            return
        check(names)
        with needs("track"):
            from accelerate import PartialState
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS
        PartialState()  # accelerate's trackers ask it which process is the first
        folder = (out or Path()).absolute() / FOLDER
        os.environ.setdefault("WANDB_DIR", str(folder))
        os.environ.setdefault("TRACKIO_DIR", str(folder))
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        folder.mkdir(parents=True, exist_ok=True)
        run = out.name if out else "metazo"
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()}
        for name in names:
            cls = LOGGER_TYPE_TO_CLASS[name]
            where: dict[str, Any] = {"logging_dir": folder} if cls.requires_logging_directory else {}
            if name == "mlflow":  # its experiment has no name by default, and artifacts would be in the working folder
                where = {"experiment_name": "metazo", "logging_dir": str(folder)}
            tracker = cls(run_name=run, **where)
            if hasattr(tracker, "start"):
                tracker.start()
            tracker.store_init_configuration({key: value for key, value in plain.items() if value is not None})
            self.started.append(tracker)

    def step(self, step: Step) -> None:
        if self.started:
            self._log({"train/loss": fmean(step.losses), "train/lr": step.lr[0]}, step.step + 1)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        self._log({f"dev/{name}": value for name, value in record["dev"].items()}, record["step"])

    def finish(self) -> None:
        for tracker in self.started:
            tracker.finish()
        self.started = []

    def _log(self, values: dict[str, float], step: int) -> None:
        for tracker in self.started if values else ():
            tracker.log(values, step=step)


def check(names: Sequence[str]) -> None:
    """Raises MissingPackage, a UserError, for a tracker that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise MissingPackage(
                f"`track` {name} needs the package {name}, which is not installed: pip install {name}."
            )
    with needs("track"):
        import accelerate  # noqa: F401
