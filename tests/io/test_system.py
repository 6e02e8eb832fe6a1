"""Windows is refused by commands and by whatever writes a folder, and not by optimizers in a loop of one's own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

import metazo
from metazo import zoo
from metazo.errors import UserError
from metazo.io import forked
from metazo.meta.config import MetaConfig
from metazo.meta.train import meta_train
from metazo.steplog.writer import StepLog
from metazo_cli.main import main
from tests.zoo.conftest import make_tuner


@pytest.fixture(autouse=True)
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metazo.io.system.WINDOWS", True)


@pytest.mark.parametrize(
    "words", ["finetune --model pico --task pico_sentiment --lr 1e-4 --out a", "zoo list", "--help"]
)
def test_a_command_is_one_sentence(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["metazo", *words.split()])
    with pytest.raises(SystemExit) as end:
        main()
    said = " ".join(capsys.readouterr().err.split())
    assert end.value.code == 2 and said.startswith("error: metazo's commands and whatever writes a folder run on Linux")
    assert not any(tmp_path.iterdir())


def test_what_writes_a_folder_is_refused_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAZO_ZOO", str(tmp_path / "zoo"))
    grid = metazo.Grid("pico", ["pico_sentiment"], ["mezo"], 8, tmp_path / "grid", seeds=1, lrs=[1e-3])
    log = tmp_path / "steps.jsonl"
    calls = (
        lambda: metazo.finetune("pico", "pico_sentiment", lr=1e-4, steps=1, out=tmp_path / "run"),
        lambda: metazo.compare(grid),
        lambda: meta_train(MetaConfig(model="pico", task=["pico_sentiment"], out=tmp_path / "tuner")),
        lambda: zoo.push(make_tuner()),
        lambda: StepLog(log, {"weights": "0"}),
    )
    for call in calls:
        with pytest.raises(UserError, match="this is Windows: use WSL 2"):
            call()
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match="this is Windows"):
        importlib.reload(forked)


def test_a_loop_of_ones_own_runs() -> None:
    model = torch.nn.Linear(4, 2)
    optimizer = metazo.MeZO(model.named_parameters(), lr=1e-3)
    before = model.weight.detach().clone()
    optimizer.step(lambda: model(torch.ones(1, 4)).square().sum())
    assert not torch.equal(before, model.weight)
