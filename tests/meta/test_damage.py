"""Files of meta-training that have changed since they were written: initial weights and recordings."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from metazo.blocks import named_tensors
from metazo.errors import UserError
from metazo.meta import train
from metazo.meta.path_setup import START, build, load
from metazo.meta.reset import Start
from metazo.meta.trajectory import Trajectory, snapshot_name
from metazo.models.load import load_model
from metazo.runs.interrupt import Interrupted
from tests.meta.test_train import StopsAt, weights

meta_train = partial(train.meta_train, plot=False)


def flipped(path: Path) -> None:
    """Turn the signs of all float32 weights of a file."""
    data = bytearray(path.read_bytes())
    for place in range(8 + int.from_bytes(data[:8], "little") + 3, len(data), 4):
        data[place] ^= 0x80
    path.write_bytes(data)


def test_a_resumed_run_does_not_trust_its_file_of_initial_weights(settings, monkeypatch):
    whole = meta_train(settings("whole"))
    with monkeypatch.context() as patched:
        StopsAt(patched, 2)
        with pytest.raises(Interrupted):
            meta_train(settings("parts"))  # the restart is before step 3
    config = settings("parts", resume=True)
    flipped(config.out / START)
    for a, b in zip(weights(whole), weights(meta_train(config))):
        assert torch.equal(a, b)


def test_initial_weights_that_are_cut_during_the_run_end_it_with_a_sentence(tiny, tmp_path: Path):
    path = tmp_path / "start"
    start = Start(named_tensors(load_model(tiny("llama")).model), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="start cannot be read .*; continue with `resume=True`, which writes it again"):
        start.restore()


def edit_manifest(**changes):
    def edit(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / "manifest.json").write_text(json.dumps(kept))

    return edit


def edit_row(row):
    def edit(folder: Path) -> None:
        lines = (folder / "log.jsonl").read_text().splitlines()
        lines[1] = json.dumps({**json.loads(lines[1]), **row} if isinstance(row, dict) else row)
        (folder / "log.jsonl").write_text("\n".join(lines))

    return edit


DAMAGE = [
    (edit_manifest(snapshots=None), "manifest.json is not that of a recording"),
    (edit_manifest(snapshots=[]), "manifest.json is not that of a recording"),
    (edit_manifest(snapshots=[0, 99]), "manifest.json is not that of a recording"),
    (edit_manifest(steps=None), "manifest.json is not that of a recording"),
    (edit_manifest(tasks=["pico_topic"]), "manifest.json is not that of a recording"),
    (edit_manifest(origin=["x"]), "manifest.json is not that of a recording"),
    (edit_row([1]), "line 2 of log.jsonl is not a batch of that step"),
    (edit_row({"examples": [10**6]}), "line 2 of log.jsonl is not a batch of that step"),
    (edit_row({"examples": []}), "line 2 of log.jsonl is not a batch of that step"),
    (edit_row({"task": "zzz"}), "line 2 of log.jsonl is not a batch of that step"),
    (edit_row({"step": 0}), "line 2 of log.jsonl is not a batch of that step"),
    (lambda folder: (folder / "log.jsonl").write_text("{}"), "log.jsonl has 1 lines and not 3"),
    (lambda folder: flipped(folder / snapshot_name(2)), "step00000002.* content has changed since it was written"),
    (lambda folder: (folder / snapshot_name(2)).write_bytes(b"x" * 9), "step00000002.safetensors cannot be read"),
    (lambda folder: (folder / snapshot_name(2)).unlink(), "step00000002.safetensors cannot be read"),
]


def test_a_damaged_recording_is_refused(settings, tmp_path: Path):
    meta_train(settings(record=tmp_path / "path", record_every=2))
    for number, (edit, said) in enumerate(DAMAGE):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "path", folder)
        edit(folder)
        with pytest.raises(
            UserError, match=f"The recording in .* is damaged: {said}.*; remove the folder and record again"
        ):
            Trajectory.open(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("teacher00000002.safetensors", "cannot be read"),
        ("step00000002.safetensors", "cannot be read"),
        ("log.jsonl", "has 0 lines and not 2"),
    ],
)
def test_a_damaged_recording_is_not_gone_on_with(settings, tmp_path: Path, name: str, said: str):
    config = settings(record=tmp_path / "path", record_every=2)
    meta_train(config)
    edit_manifest(complete=False)(tmp_path / "path")
    (tmp_path / "path" / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"The recording in .* is damaged: {name} {said}"):
        build(config, *load(config))
