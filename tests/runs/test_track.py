"""Trackers get the run's own figures: TensorBoard's files read back, W&B offline; an absent one is one sentence."""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import metazo
from metazo.errors import UserError
from metazo.io.terminal import Console
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.track import Trackers
from metazo.steplog.writer import StepLog

SMALL = {
    "task": "pico_sentiment", "lr": 1e-4, "steps": 4, "batch_size": 4, "train_examples": 16,
    "dev_examples": 4, "test_examples": 4, "eval_every": 2, "snapshot_every": 0, "keep": "last",
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def base(tiny: Callable[[str], Path]) -> None:
    """The runs are of a model of two layers."""
    SMALL["model"] = str(tiny("llama"))


def test_tensorboard_has_the_figures_of_the_log_and_the_evaluations(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = {key: value for key, value in SMALL.items() if key not in ("model", "task")}
    tuned = metazo.finetune(SMALL["model"], "pico_sentiment", out=tmp_path / "run", track=["tensorboard"], **settings)
    found = accumulator.EventAccumulator(str(tmp_path / "run" / "trackers" / "run")).Reload()
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert losses == [(n + 1, pytest.approx(loss, rel=1e-6)) for n, loss in enumerate(tuned.losses)]
    dev = [(event.step, event.value) for event in found.Scalars("dev/loss")]
    assert dev == [(r["step"], pytest.approx(r["dev"]["loss"], rel=1e-6)) for r in tuned.evaluations]
    plain = metazo.finetune(SMALL["model"], "pico_sentiment", **settings)
    assert plain.summary["test"] == tuned.summary["test"], "a tracker changes no number"


def test_a_tracker_needs_the_folder_of_the_run(tmp_path: Path, monkeypatch) -> None:
    """Files in the working folder would be shared by all runs that start there."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="`track` tensorboard keeps its files in `out`, which is not given"):
        FinetuneConfig(**SMALL, track=["tensorboard"])
    assert not list(tmp_path.iterdir())


def test_mlflow_in_the_folder_of_the_run(tmp_path: Path, monkeypatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    settings = {key: value for key, value in SMALL.items() if key not in ("model", "task")}
    tuned = metazo.finetune(SMALL["model"], "pico_sentiment", out=tmp_path / "run", track=["mlflow"], **settings)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/run/trackers/mlflow.db")
    (experiment,) = (found for found in client.search_experiments() if found.name == "metazo")
    (run,) = client.search_runs([experiment.experiment_id])
    sent = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sent == [(n + 1, pytest.approx(loss)) for n, loss in enumerate(tuned.losses)]
    assert run.data.params["optimizer"] == "mezo" and run.info.status == "FINISHED"
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "nothing is written into the working folder"


def test_wandb_offline(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    run_settings(FinetuneConfig(**SMALL, out=tmp_path / "run", track=["wandb"]))
    (log,) = (tmp_path / "run" / "trackers").glob("wandb/offline-run-*/run-*.wandb")
    data = log.read_bytes()
    assert b"train/loss" in data and b"dev/accuracy" in data


def test_an_absent_tracker_is_one_sentence_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("metazo.runs.track.find_spec", lambda name: None)
    with pytest.raises(UserError, match="`track` mlflow needs the package mlflow, .*: pip install mlflow"):
        run_settings(FinetuneConfig(**SMALL, out=tmp_path / "run", track=["mlflow"]))
    assert not (tmp_path / "run").exists()


def test_the_settings_of_a_tracker_are_plain_yaml() -> None:
    trackers = Trackers((), None, asdict(FinetuneConfig(SMALL["model"], "pico_sentiment")), print)
    assert yaml.safe_load(yaml.safe_dump(trackers.settings))["train_examples"] == 1000


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A tracker of accelerate's kind in the place of W&B's, whose package tests do not need: what it was given and sent."""
    tracking = pytest.importorskip("accelerate.tracking")
    seen: dict[str, Any] = {"starts": [], "folders": [], "sent": [], "refuses": None, "fails at": None, "begins": None}

    class Plain(tracking.GeneralTracker):
        name, requires_logging_directory, main_process_only = "wandb", False, False
        tracker = None

        def __init__(self, run_name: str, **given: Any):
            super().__init__()
            seen["starts"].append(given)
            seen["folders"].append(os.environ.get("WANDB_DIR"))

        def start(self) -> None:
            if seen["begins"]:
                seen["begins"].write_text("{}")
            if seen["refuses"]:
                raise ConnectionError(seen["refuses"])

        def log(self, values: dict, step: int | None = None, **more: Any) -> None:
            if step == seen["fails at"]:
                raise ConnectionError("no route to the server")
            if "train/loss" in values:
                seen["sent"].append(step)

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Plain)
    monkeypatch.setattr("metazo.runs.track.find_spec", lambda name: SimpleNamespace(origin="here"))
    yield seen


def test_a_tracker_that_does_not_start_leaves_nothing_behind(tmp_path: Path, tracker: dict[str, Any]) -> None:
    tracker["refuses"] = "no API key"
    with pytest.raises(UserError, match=r"`track` wandb does not start \(ConnectionError: no API key\): set it up"):
        run_settings(FinetuneConfig(**SMALL, out=tmp_path / "run", track=["wandb"]))
    assert not (tmp_path / "run").exists()
    tracker["begins"] = tmp_path / "run" / "config.json"  # another process begins a run there meanwhile
    with pytest.raises(UserError, match="does not start"):
        run_settings(FinetuneConfig(**SMALL, out=tmp_path / "run", track=["wandb"]))
    assert (tmp_path / "run" / "config.json").exists() and (tmp_path / "run" / "trackers").exists()


def test_a_skipped_step_whose_losses_have_no_mean_is_sent_too(tmp_path: Path, tracker: dict[str, Any]) -> None:
    """inf and -inf, whose sum statistics.fmean refuses, as it does one beyond the largest float."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    settings = {"data": [1], "steps": 2, "lr": 1e-3, "keep": "last", "out": tmp_path / "run", "track": ["wandb"]}
    tuned = metazo.finetune(model, loss=lambda m, batch: m.weight.double().sum() * 1e200 * 1e200, **settings)
    assert tracker["sent"] == [1, 2] and all(map(math.isnan, tuned.losses))
    tuned.steps[0] = replace(tuned.steps[0], losses=(1e308, 1e308))
    assert tuned.losses[0] == 1e308


def test_a_tracker_that_fails_on_the_way_is_left_out(tmp_path: Path, tracker: dict[str, Any]) -> None:
    tracker["fails at"] = 3
    summary = run_settings(FinetuneConfig(**SMALL, out=tmp_path / "run", track=["wandb"]))
    assert tracker["sent"] == [1, 2]
    assert "`track` wandb failed at step 3 (ConnectionError: no route to the server)" in "".join(summary["notes"])
    assert summary["test"] == run_settings(FinetuneConfig(**SMALL))["test"]


@pytest.mark.parametrize("optimizer", ["mezo", "first-order-adamw"])
def test_a_resumed_run_goes_on_in_the_same_run_of_the_tracker(
    tmp_path: Path, tracker: dict[str, Any], monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    class Death(BaseException):
        pass

    def dies(log: StepLog, step: Any) -> None:
        if step.step == 2:
            raise Death
        append(log, step)

    append = StepLog.append
    config = FinetuneConfig(**{**SMALL, "optimizer": optimizer}, out=tmp_path / "run", track=["wandb"])
    with monkeypatch.context() as patched:
        patched.setattr(StepLog, "append", dies)
        with pytest.raises(Death):
            run_settings(config)
    console = Console(file=io.StringIO(), width=400)
    config.resume = True
    run_settings(config, console)
    first, second = tracker["starts"]
    assert first == second and first["resume"] == "allow" and len(first["id"]) == 8
    replayed = optimizer == "mezo"
    assert tracker["sent"] == [1, 2, 3, 4] if replayed else [1, 2, 1, 2, 3, 4]  # W&B keeps one value for each step
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("Trackers go on after step 2; steps that a kill kept them from sending" in shown) == replayed


def test_each_run_has_its_own_folder_and_leaves_none_in_the_environment(tmp_path: Path, tracker, monkeypatch) -> None:
    """W&B, Trackio and MLflow read it; what the user set stays."""
    names = "WANDB_DIR", "TRACKIO_DIR", "MLFLOW_TRACKING_URI"
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", "mine")
    for out in tmp_path / "one", tmp_path / "two":
        run_settings(FinetuneConfig(**SMALL, out=out, track=["wandb"]))
        assert tracker["folders"].pop() == tracker["starts"].pop()["dir"] == str(out / "trackers")  # W&B reads both
        assert [os.environ.get(name) for name in names] == [None, "mine", None]
    monkeypatch.setenv("WANDB_DIR", "mine")
    run_settings(FinetuneConfig(**SMALL, out=tmp_path / "three", track=["wandb"]))
    assert tracker["folders"].pop() == "mine" and "dir" not in tracker["starts"].pop()


def test_a_run_says_if_trackio_has_the_folder_of_another(tmp_path: Path, tracker, monkeypatch) -> None:
    """Trackio reads TRACKIO_DIR when it is imported."""
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    tracking = pytest.importorskip("accelerate.tracking")
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", tracking.LOGGER_TYPE_TO_CLASS["wandb"])
    first = tmp_path / "one" / "trackers"
    monkeypatch.setitem(sys.modules, "trackio.utils", SimpleNamespace(TRACKIO_DIR=first))
    notes = [
        run_settings(FinetuneConfig(**SMALL, out=tmp_path / n, track=["trackio"]))["notes"] for n in ("one", "two")
    ]
    assert notes == [[], [f"`track` trackio keeps this run's files in {first}: it takes a folder once per process."]]


def test_a_folder_of_its_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B makes a folder `wandb` where it runs."""
    if find_spec("mlflow") is not None:
        pytest.skip("mlflow is installed")
    (tmp_path / "mlflow").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="`track` mlflow needs the package mlflow"):
        run_settings(FinetuneConfig(**SMALL, out=tmp_path / "run", track=["mlflow"]))
