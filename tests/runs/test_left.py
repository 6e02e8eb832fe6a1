"""`--dry-run --resume`: what it says is what a resumed run then does, and the folder stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metazo.errors import UserError
from metazo.io.lock import NAME as LOCK
from metazo.io.lock import FolderLock
from metazo.runs.config import FinetuneConfig
from metazo.runs.dryrun import dry_run
from metazo.runs.finetune import tune
from metazo.steplog.format import STEPS
from tests.io.test_lock import NAMED

STOPPED = 5  # steps before the interruption
METHODS = {
    "mezo": {"snapshot_every": 2},
    "mezo, from the log alone": {"snapshot_every": 0},
    "fzoo": {"method": {"queries": 2}},
    "first-order-sgd": {"snapshot_every": 2},
}


MODEL = ["pico"]


@pytest.fixture(scope="module", autouse=True)
def model(tiny: Callable[[str], Path]) -> None:
    """These runs are of a model of two layers."""
    MODEL[0] = str(tiny("llama"))


class Stop(Exception):
    pass


def _config(name: str, out: Path) -> FinetuneConfig:
    options: dict[str, Any] = {"steps": 8, "eval_every": 4, "batch_size": 2} | METHODS[name]
    rows = {"train_examples": 8, "dev_examples": 4, "test_examples": 4}
    return FinetuneConfig(MODEL[0], "pico_sentiment", out, optimizer=name.partition(",")[0], lr=1e-5, **rows, **options)


def _interrupted(name: str, out: Path) -> FinetuneConfig:
    """The settings with which an interrupted run is resumed."""
    config = _config(name, out)

    def stop(step) -> None:
        if step.step == STOPPED - 1:
            raise Stop

    with pytest.raises(Stop):
        tune(config, on_step=stop, plot=False)
    (out / ".lock").write_text("{}")  # as a killed process leaves it
    return replace(config, resume=True)


def _content(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.name: (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (path.name != LOCK or NAMED)
    }


@pytest.fixture(scope="module")
def folder(model: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("left")


@pytest.fixture(scope="module", params=METHODS)
def interrupted(request: pytest.FixtureRequest, folder: Path) -> FinetuneConfig:
    return _interrupted(request.param, folder / request.param.replace(", ", "-"))


def test_the_plan_is_what_a_resumed_run_does(interrupted):
    assert interrupted.out is not None
    before = _content(interrupted.out)
    found = dry_run(interrupted)
    assert _content(interrupted.out) == before
    taken, forwards = [], []
    done = tune(interrupted, on_step=lambda step: taken.append(step.step), plot=False, on_evaluation=forwards.append)
    assert len(taken) == found["steps left"] and taken[0] == found["steps done"]
    assert found["steps done"] == (4 if interrupted.optimizer == "first-order-sgd" else STOPPED)
    a_step = done.summary["forwards"] / 8
    assert found["forwards left"] == round(a_step * found["steps left"]) > 0
    assert found["left"].startswith(
        f"{len(taken)} of 8 steps, {found['forwards left']} forward passes and 1 evaluation on dev"
    )
    assert len(forwards) == 1 and found["seconds left"] == pytest.approx(found["seconds per step"] * len(taken))
    assert found["bytes left on disk"] == max(found["bytes on disk"] - sum(len(data) for _, data in before.values()), 0)
    after = dry_run(interrupted)
    assert (after["left"], after["steps left"], after["steps done"]) == ("nothing: the run is complete", 0, 8)
    assert after["bytes left on disk"] == 0


def test_replayed_steps_are_named(folder):
    config = _interrupted("mezo", folder / "replayed")
    found = dry_run(config)
    assert "after 5 steps that are done; of these, 1 are replayed from the log" in found["left"]
    assert "the run took" in found["time"]
    (folder / "replayed" / "snapshot-00000004.safetensors").unlink()
    assert "of these, 5 are replayed from the log" in dry_run(config)["left"]


def test_patience_that_has_ended_training_leaves_no_step(folder):
    config = replace(_config("mezo", folder / "patient"), eval_every=1, patience=1, lr=0.0, precision="master")
    with pytest.raises(Stop):
        tune(
            config,
            on_evaluation=lambda record: (_ for _ in ()).throw(Stop) if record["step"] == 1 else None,
            plot=False,
        )
    found = dry_run(replace(config, resume=True))
    assert (found["left"], found["steps left"]) == ("no step: `patience` ends training at step 1", 0)


def test_a_folder_that_cannot_be_resumed_is_refused_and_left_as_it_is(folder):
    config = _interrupted("mezo", folder / "refused")
    out = folder / "refused"
    with pytest.raises(UserError, match="holds no run"):
        dry_run(replace(config, out=folder / "nothing"))
    with pytest.raises(UserError, match="`resume=True` needs the folder"):
        dry_run(replace(config, out=None))
    with pytest.raises(UserError, match="`lr` was 1e-05 when the run"):
        dry_run(replace(config, lr=2e-5))
    (out / ".lock").unlink()
    with FolderLock(out), pytest.raises(UserError, match="is in use by (another )?process"):
        dry_run(config)
    lines = (out / STEPS).read_bytes().splitlines(keepends=True)
    before = _content(out)
    for wrong, words in (
        ([*lines[:2], b"{}\n", *lines[3:]], "is damaged: line 3 is bad"),
        ([_other_data(lines[0])], "its data is"),
    ):
        (out / STEPS).write_bytes(b"".join(wrong))
        content = _content(out)
        with pytest.raises(UserError, match=words):
            dry_run(config)
        assert _content(out) == content
    assert content.keys() == before.keys()


def _other_data(line: bytes) -> bytes:
    """The header of a log with other examples."""
    from metazo.steplog.format import line as encoded

    header = json.loads(line)
    del header["crc"]
    return encoded(header | {"data": "0" * 64}, 0)[0]
