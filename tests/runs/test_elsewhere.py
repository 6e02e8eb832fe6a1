"""A run whose model, task and data were named by relative paths is resumed, evaluated and replayed from other folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import metazo
from metazo.errors import UserError
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.locate import STARTED, UNSET, located, read_config
from metazo.runs.replay import replay
from metazo.settings import build
from metazo.steplog.format import scan
from metazo.zoo.log import Log

TASK = "kind: classification\nprompt: '{text}. It was {}.'\nlabels: [terrible, great]\nfiles: {train: rows.jsonl}\n"
SETTINGS: dict[str, Any] = {
    "model": "models/base", "task": "tasks/own.yaml", "out": "runs/a", "steps": 3, "batch_size": 2, "train_examples": 8,
    "dev_examples": 4, "test_examples": 4, "lr": 1e-4, "snapshot_every": 0, "keep": "last",
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, tiny, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a task and a run that is complete, the working directory."""
    folder = tmp_path / "project"
    (folder / "tasks").mkdir(parents=True)
    shutil.copytree(tiny("llama"), folder / "models/base")
    (folder / "tasks/own.yaml").write_text(TASK)
    rows = [{"text": f"the soup {n} was {n % 2}", "label": n % 2} for n in range(24)]
    (folder / "tasks/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(folder)
    run_settings(build(FinetuneConfig, SETTINGS))
    return folder


def unfinished(run: Path) -> None:
    for name in ("summary.json", "model"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("moved", [False, True])
def test_from_another_folder(project: Path, moved: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The project stays where it was, or is moved as a whole."""
    before = metazo.evaluate("runs/a")
    log = (project / "runs/a/steps.jsonl").read_bytes()
    if moved:
        project = project.rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = project / "runs/a"
    assert metazo.evaluate(run) == before
    assert replay(run / "steps.jsonl", str(project / "models/base"), Path("again")).identical
    unfinished(run)
    run_settings(build(FinetuneConfig, SETTINGS, {"out": run, "resume": True}))
    assert (run / "steps.jsonl").read_bytes() == log
    assert metazo.evaluate(run) == before


def test_what_is_published_names_no_folder(project: Path) -> None:
    """The working directory is in config.json alone; a relative path is published by its last name."""
    assert read_config(Path("runs/a"))[STARTED] == str(project)
    data = (project / "runs/a/steps.jsonl").read_bytes()
    assert str(project).encode() not in data
    published = Log.from_bytes(data, "log").published("someone/base")
    assert b"tasks/" not in published.data and b"models/" not in published.data
    for path in (project / "runs/a/model").iterdir():
        assert str(project).encode() not in path.read_bytes()


def test_a_file_of_the_same_name_here_is_not_taken(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/own.yaml").write_text(TASK.replace("It was", "It is"))
    monkeypatch.chdir(tmp_path)
    found = located({"task": "tasks/own.yaml", "model": "pico", "tuner": "random:1"}, project / "runs/a")
    assert found == {"task": str(project / "tasks/own.yaml"), "model": "pico", "tuner": "random:1"}


def test_a_task_that_is_gone_is_one_sentence(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (project / "tasks/own.yaml").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="own.yaml"):
        metazo.evaluate(project / "runs/a")


def test_a_run_of_an_earlier_version_has_no_working_directory(project: Path) -> None:
    config = read_config(Path("runs/a"))
    config.pop(STARTED)
    Path("runs/a/config.json").write_text(json.dumps(config))
    unfinished(Path("runs/a"))
    run_settings(build(FinetuneConfig, SETTINGS, {"resume": True}))
    assert scan(Path("runs/a/steps.jsonl")).sound().end is not None


@pytest.mark.parametrize("size", [{"dev_examples": 500}, {}])
def test_a_size_that_equals_the_default_is_set_if_it_was_when_the_run_began(project: Path, size: dict) -> None:
    out = Path("runs/few")
    settings = {name: value for name, value in SETTINGS.items() if name not in ("dev_examples", "train_examples")}
    settings |= {"out": out, "k_per_class": 2} | size
    summary = run_settings(build(FinetuneConfig, settings))
    assert (summary["dev"]["examples"] == 4) == (not size)  # as many as train rows, unless their number is given
    assert read_config(out)["dev_examples"] == 500
    assert metazo.evaluate(out, split="dev") == summary["dev"]
    log = (out / "steps.jsonl").read_bytes()
    unfinished(out)
    plain = {name: value for name, value in read_config(out).items() if name not in (STARTED, UNSET)}
    resumed = build(FinetuneConfig, plain, {"resume": True})  # as the command line does, with all sizes set
    run_settings(resumed)
    assert (out / "steps.jsonl").read_bytes() == log
    unfinished(out)
    (out / "config.json").write_text(json.dumps(plain))  # of an earlier version, in which it was the default
    if size:
        with pytest.raises(UserError, match="belongs to another run"):
            run_settings(resumed)
    else:
        run_settings(resumed)
        assert (out / "steps.jsonl").read_bytes() == log
