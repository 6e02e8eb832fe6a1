"""Full and read-only disks, on a real small file system."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from metazo.errors import UserError
from metazo.io.lock import NAME as LOCK
from metazo.models.load import load_model
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.folder import RunFolder
from metazo.runs.replay import _save, replay
from metazo.settings import build
from metazo.steplog.format import scan

SETTINGS = {
    "model": "pico", "task": "pico_sentiment", "optimizer": "mezo", "lr": 1e-4, "steps": 40, "batch_size": 2,
    "train_examples": 8, "dev_examples": 4, "test_examples": 4, "eval_every": 10, "snapshot_every": 0, "keep": "last",
}  # fmt: skip


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 40 MB that may be filled and made read-only."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"cannot mount a small file system: {made.stderr.strip()}")
    yield place
    gc.collect()  # errors keep files open
    subprocess.run(["umount", str(place)], check=True)


def tuned(out: Path, **settings):
    return run_settings(build(FinetuneConfig, SETTINGS, {"out": out, **settings}))


def fill(disk: Path, leave: int = 0) -> Path:
    """Fill the disk except for `leave` bytes."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 65536)
    with path.open("r+b") as file:
        file.truncate(max(0, path.stat().st_size - leave))
    return path


def results(out: Path) -> tuple[bytes, bytes, list]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    return (out / "model" / "model.safetensors").read_bytes(), (out / "steps.jsonl").read_bytes(), rows


def test_a_disk_that_is_full_from_the_start_is_said_and_nothing_written(disk):
    fill(disk, leave=100_000)
    with pytest.raises(UserError, match="The run needs .* are free"):
        tuned(disk / "run")
    assert not (disk / "run").exists()


@pytest.mark.parametrize("snapshot_every", [0, 3])
def test_a_disk_that_fills_up_in_mid_run_loses_no_step(disk, tmp_path, snapshot_every):
    """Another process fills the disk during the run; then space is freed and the run is resumed."""
    out, log = disk / "run", disk / "run" / "steps.jsonl"

    def fill_after_some_steps() -> None:
        while not log.exists() or log.read_bytes().count(b"\n") < 8:
            time.sleep(0.002)
        fill(disk)

    thread = threading.Thread(target=fill_after_some_steps)
    thread.start()
    with pytest.raises(UserError, match="No space left on device") as caught:
        tuned(out, snapshot_every=snapshot_every)
    thread.join()
    assert "`resume=True`" in str(caught.value) or "nothing was left" in str(caught.value)
    found = scan(log)
    assert not found.damage and not found.torn and 7 <= len(found.steps) < 40
    (disk / "filler").unlink()
    tuned(out, snapshot_every=snapshot_every, resume=True)
    tuned(tmp_path / "whole")
    assert results(out) == results(tmp_path / "whole")
    assert scan(log).sound().steps[: len(found.steps)] == found.steps


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def test_a_read_only_disk_is_said(disk):
    tuned(disk / "done", steps=2, eval_every=1)
    with pytest.raises(UserError, match="run stopped"):
        tuned(disk / "run", max_loss=1e-3, max_bad_steps=3)  # a run that can be resumed
    remount(disk, "ro")
    before = {path: path.read_bytes() for path in (disk / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="Read-only file system"):
        tuned(disk / "new")
    with pytest.raises(UserError, match="Read-only file system"):
        tuned(disk / "run", max_loss=1e-3, max_bad_steps=3, resume=True)
    assert tuned(disk / "done", steps=2, eval_every=1, resume=True)["steps"] == 2, "a complete run needs no writing"
    assert before == {path: path.read_bytes() for path in (disk / "run").rglob("*") if path.is_file()}
    remount(disk, "rw")


def test_a_replay_to_a_mount_point_is_refused_before_its_first_step(disk, tmp_path):
    tuned(tmp_path / "run", steps=2)
    ticks = []
    with pytest.raises(UserError, match="disk is the working directory or a mount point"):
        replay(tmp_path / "run", "pico", disk, tick=lambda *step: ticks.append(step))
    assert not ticks and not list(disk.iterdir())


def test_a_disk_that_fills_up_while_the_model_is_saved_leaves_nothing_behind(disk, tmp_path):
    """The disk fills up while model and tokenizer are written, by a run and by a replay: one sentence, no partial model."""
    loaded = load_model("pico")
    loaded.model.save_pretrained(tmp_path / "whole")
    loaded.tokenizer.save_pretrained(tmp_path / "whole")
    sizes = [path.stat().st_size for path in (tmp_path / "whole").iterdir()]
    folder = RunFolder(disk / "run", {})
    folder.begin()
    model, everything = max(sizes), sum(sizes)
    for leave in (4096, model // 2, model + 8192, (model + everything) // 2, everything - 20_000):
        filler = fill(disk, leave=leave)
        with pytest.raises(UserError, match="model cannot be written"):
            folder.save_model(loaded.model, loaded.tokenizer)
        with pytest.raises(UserError, match="nothing was left there"):
            _save(loaded, disk / "again", {})
        assert {path.name for path in (disk / "run").iterdir()} == {"config.json", LOCK}, leave
        assert {path.name for path in disk.iterdir()} == {"run", "filler"}, leave
        filler.unlink()
    folder.save_model(loaded.model, loaded.tokenizer)
    assert sorted(path.name for path in (disk / "run/model").iterdir()) == sorted(os.listdir(tmp_path / "whole"))
