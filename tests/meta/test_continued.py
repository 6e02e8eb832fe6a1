"""What an unfinished meta-training needs in order to go on: space on the disk, and the same content in any place."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metazo.blocks import named_tensors
from metazo.errors import UserError
from metazo.meta import train
from metazo.meta.config import MetaConfig
from metazo.meta.loop import MetaRun
from metazo.meta.path_setup import build, load
from metazo.meta.teacher import Teacher
from metazo.meta.train import dry
from metazo.meta.trajectory import Trajectory, disk_use
from metazo.runs.interrupt import Interrupted, interruptible
from metazo.runs.resources import used

meta_train = partial(train.meta_train, plot=False)


def stops_in(method: str, cls: type, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Press Ctrl-C in a call of a method."""
    original, seen = getattr(cls, method), []

    def counted(self: Any, *given: Any) -> Any:
        seen.append(1)
        if len(seen) == calls:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *given)

    monkeypatch.setattr(cls, method, counted)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("teacher", ["sgd", "adamw"])
def test_a_recording_is_continued_on_a_disk_that_has_space_for_all_of_it(
    settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: str, alone: bool
) -> None:
    """The disk holds what the plan of the recording alone, or of the whole run, says, and no more."""
    config = settings(record=tmp_path / "path", record_every=1, teacher=teacher)
    model = load(config)[0].model
    full = disk_use(named_tensors(model), teacher, 3, 1) if alone else dry(config).disk_bytes
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=full - used(tmp_path)))

    def go_on(config: MetaConfig) -> None:
        with interruptible() as caught:
            build(config, *load(config), caught) if alone else meta_train(config)

    with monkeypatch.context() as patched, pytest.raises(Interrupted, match="after the teacher's step 3"):
        stops_in("step", Teacher, patched, 3)
        go_on(config)
    assert '"complete": false' in (tmp_path / "path" / "manifest.json").read_text()
    go_on(replace(config, resume=True))
    assert Trajectory.open(tmp_path / "path").manifest["complete"]


@pytest.mark.parametrize("at", [("step", Teacher, 2), ("step", MetaRun, 3)], ids=["recording", "training"])
def test_a_run_is_continued_after_it_was_moved_with_its_recording_and_data(
    settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: tuple
) -> None:
    def parts(place: str) -> dict[str, Any]:
        folder = tmp_path / place
        return {"out": folder / "out", "record": folder / "path", "data": folder / "data"}

    (tmp_path / "a" / "data").mkdir(parents=True)
    shutil.copytree(tmp_path / "a", tmp_path / "whole")
    config = replace(settings(record_every=2, record=tmp_path / "x"), **parts("a"))
    whole = meta_train(replace(config, **parts("whole")))
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        stops_in(*at[:2], patched, at[2])
        meta_train(config)
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path / "b")
    there = replace(config, resume=True, out=Path("out"), record=Path("path"), data=Path("data"))
    with pytest.raises(UserError, match="`record` was .* and is None now"):
        meta_train(replace(there, record=None, record_every=10))
    for a, b in zip(whole.pertnn.parameters(), meta_train(there).pertnn.parameters()):
        assert torch.equal(a, b)
    assert used(Path("path")) == used(tmp_path / "whole" / "path")
    meta_train(replace(there, record=tmp_path / "elsewhere"))  # complete: nothing is recorded again
    assert not (tmp_path / "elsewhere").exists()


def test_a_run_is_not_continued_along_another_recording(
    settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, every in (("one", 2), ("two", 3)):
        meta_train(settings(name, record=tmp_path / f"path-{name}", record_every=every))
    config = settings(trajectory=tmp_path / "path-one")
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        stops_in("step", MetaRun, patched, 3)
        meta_train(config)
    with pytest.raises(UserError, match="cannot continue: the recording changed since it began"):
        meta_train(replace(config, resume=True, trajectory=tmp_path / "path-two"))
    begun = config.out / "config.json"
    text = begun.read_bytes()
    kept = json.loads(text)
    kept["belongs"].pop("recording")
    begun.write_text(json.dumps(kept))
    with pytest.raises(UserError, match="`trajectory` was .* when the run in .* began and is .* now"):
        meta_train(replace(config, resume=True, trajectory=tmp_path / "path-two"))
    begun.write_bytes(text)
    (tmp_path / "path-one").rename(tmp_path / "moved")
    meta_train(replace(config, resume=True, trajectory=tmp_path / "moved"))
    with pytest.raises(UserError, match="cannot continue: the recording changed since it began"):  # complete
        meta_train(replace(config, resume=True, trajectory=tmp_path / "path-two"))
    with pytest.raises(UserError, match="path-three holds no recording of a teacher"):
        meta_train(replace(config, resume=True, trajectory=tmp_path / "path-three"))
    for there in ("moved", "path-one"):  # a recording may be deleted when it has served
        meta_train(replace(config, resume=True, trajectory=tmp_path / there))
