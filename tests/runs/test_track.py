"""Trackers get the run's own figures: TensorBoard's files read back, W&B offline; an absent one is one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

import metazo
from metazo.errors import UserError
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings

SMALL = {
    "model": "pico", "task": "pico_sentiment", "lr": 1e-4, "steps": 4, "batch_size": 4, "train_examples": 16,
    "dev_examples": 4, "test_examples": 4, "eval_every": 2, "snapshot_every": 0, "keep": "last",
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore")


def test_tensorboard_has_the_figures_of_the_log_and_the_evaluations(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = {key: value for key, value in SMALL.items() if key not in ("model", "task")}
    tuned = metazo.finetune("pico", "pico_sentiment", out=tmp_path / "run", track=["tensorboard"], **settings)
    found = accumulator.EventAccumulator(str(tmp_path / "run" / "trackers" / "run")).Reload()
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert losses == [(n + 1, pytest.approx(loss, rel=1e-6)) for n, loss in enumerate(tuned.losses)]
    dev = [(event.step, event.value) for event in found.Scalars("dev/loss")]
    assert dev == [(r["step"], pytest.approx(r["dev"]["loss"], rel=1e-6)) for r in tuned.evaluations]
    plain = metazo.finetune("pico", "pico_sentiment", **settings)
    assert plain.summary["test"] == tuned.summary["test"], "a tracker changes no number"


def test_mlflow_in_the_folder_of_the_run(tmp_path: Path, monkeypatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    settings = {key: value for key, value in SMALL.items() if key not in ("model", "task")}
    tuned = metazo.finetune("pico", "pico_sentiment", out=tmp_path / "run", track=["mlflow"], **settings)
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
