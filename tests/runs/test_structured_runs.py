"""Feedback methods and the fused first-order step in the run loop: from settings to a tuned model, and resumed after a stop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from metazo.errors import UserError
from metazo.io.terminal import Console
from metazo.optimizers import METHODS
from metazo.runs.config import FinetuneConfig
from metazo.runs.dryrun import dry_run
from metazo.runs.finetune import run_settings, tune
from metazo.runs.replay import replay
from metazo.steplog.format import encode, line, scan

COMMON = {
    "model": "pico", "task": "pico_topic", "lr": 0.02, "batch_size": 4, "train_examples": 40, "dev_examples": 16,
    "test_examples": 16, "eval_every": 4, "snapshot_every": 4, "schedule": "linear", "max_length": 64,
}  # fmt: skip


def run(out: Path, **settings):
    return run_settings(FinetuneConfig(**{**COMMON, "out": out} | settings), Console(quiet=True))


def test_a_run_learns_and_refuses_a_replay(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", optimizer="answer-column", steps=8)
    assert summary["dev"]["loss"] < 0.8 * summary["before"]["loss"]
    assert 8 < summary["forwards"] < 8 * 2  # label words: the last position contributes alone
    with pytest.raises(UserError, match="cannot be replayed: its method is 'answer-column'"):
        replay(tmp_path / "run" / "steps.jsonl", base="pico", out=tmp_path / "again")


@pytest.mark.parametrize("optimizer", ["skip-feedback", "answer-column", "first-order-fused"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    optimizer: str, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch
) -> None:
    settings = {"model": str(tiny("llama")), "optimizer": optimizer, "steps": 8, "keep": "last"}
    fused = optimizer == "first-order-fused"
    method = {"normalise": True} if fused else {"momentum": 0.5, "momentum_rank": 4}
    run(tmp_path / "whole", **settings, method=method)

    real, count = METHODS[optimizer].step, [0]

    def stops(self, *args, **named):
        count[0] += 1
        if count[0] == 7:
            raise KeyboardInterrupt
        return real(self, *args, **named)

    monkeypatch.setattr(METHODS[optimizer], "step", stops)
    with suppress(BaseException):  # the loop may end with any exception
        run(tmp_path / "cut", **settings, method=method)
    assert count[0] == 7 and not (tmp_path / "cut" / "summary.json").exists()
    monkeypatch.setattr(METHODS[optimizer], "step", real)
    run(tmp_path / "cut", **settings, method=method, resume=True)
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert one.keys() == two.keys() and all(bool((one[key] == two[key]).all()) for key in one)
    first, second = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "cut"))
    assert first["dev"] == second["dev"] and first["notes"] == second["notes"]


class Stop(Exception):
    pass


def stopped(out: Path, **settings) -> FinetuneConfig:
    """The settings with which a run that was stopped after 5 steps is resumed."""

    def stop(step) -> None:
        if step.step == 4:
            raise Stop

    with pytest.raises(Stop):
        tune(FinetuneConfig(**{**COMMON, "out": out} | settings), on_step=stop, plot=False)
    return FinetuneConfig(**{**COMMON, "out": out, "resume": True} | settings)


def begun_with(log: Path, cost: object) -> None:
    """Write another cost of a step into the header of a log; None removes it."""
    found, data, chain = scan(log), b"", 0
    header = {name: value for name, value in found.header.items() if name != "cost"}
    for record in (header | ({} if cost is None else {"cost": cost}), *map(encode, found.steps)):
        written, chain = line(record, chain)
        data += written
    log.write_bytes(data)


@pytest.mark.parametrize("snapshots", [0, 4])
def test_a_resumed_run_keeps_the_measured_cost_with_which_it_began(snapshots: int, tmp_path: Path, capsys) -> None:
    """Library versions count other operations: the length, the rates and the count of passes stay those of the start."""
    few = {"dev_examples": 4, "test_examples": 4}
    settings = {"optimizer": "skip-feedback", "forwards": 24, "snapshot_every": snapshots, **few}
    whole = run(tmp_path / "whole", **settings)
    log = (tmp_path / "whole/steps.jsonl").read_bytes()
    measured = scan(tmp_path / "whole/steps.jsonl").header["cost"]
    steps = int(24 / measured)
    assert 1 < measured < 2 and (whole["steps"], whole["forwards"]) == (steps, round(steps * measured))

    same = stopped(tmp_path / "same", **settings)
    shutil.copytree(tmp_path / "same", tmp_path / "other")
    run_settings(same, Console(width=400))
    assert (tmp_path / "same/steps.jsonl").read_bytes() == log and "A step costs" not in capsys.readouterr().out
    other = replace(same, out=tmp_path / "other")
    begun_with(tmp_path / "other/steps.jsonl", 3)
    assert dry_run(other)["steps left"] == (4 if snapshots else 8)
    summary = run_settings(other, Console(width=400))
    assert (summary["steps"], summary["forwards"]) == (
        8,
        12 + (round(4 * measured) if snapshots else 12),
    )  # as the snapshot has it
    rates = [step.lr[0] for step in scan(tmp_path / "other/steps.jsonl").steps]
    assert rates[5:] == pytest.approx([0.02 * (1 - step / 8) for step in range(5, 8)])
    said = " ".join(capsys.readouterr().out.split())
    assert f"A step costs {measured:g} forward passes here and cost 3 when the run began: steps, schedule and" in said


def test_a_cost_that_is_no_number_is_refused_and_one_that_is_missing_is_measured(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    config = stopped(tmp_path / "run", model=str(tiny("llama")), optimizer="skip-feedback", forwards=30)
    for cost in (0, -1.5, 1e300, "2", True):
        begun_with(tmp_path / "run/steps.jsonl", cost)
        with pytest.raises(
            UserError, match="says that a step costs .* forward passes .`cost`., which is no number from"
        ):
            run_settings(config)
    begun_with(tmp_path / "run/steps.jsonl", None)  # as earlier versions began it
    summary = run_settings(config)
    assert (summary["steps"], summary["forwards"]) == (7, 28)


def test_only_a_measured_cost_is_in_the_log(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    for name, method in (("mezo", {}), ("skip-feedback", {"recompute": False})):
        run(tmp_path / name, model=str(tiny("llama")), optimizer=name, method=method, steps=1, lr=1e-4)
        assert "cost" not in scan(tmp_path / name / "steps.jsonl").header
