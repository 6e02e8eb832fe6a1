"""Feedback methods and the fused first-order step in the run loop: from settings to a tuned model, and resumed after a stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from metazo.errors import UserError
from metazo.optimizers import METHODS
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.replay import replay

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
