"""Rows that trained a tuner are known to the runs that use it."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path

import pytest

from metazo.io.terminal import Console
from metazo.meta import train
from metazo.meta.horizon_config import HorizonConfig
from metazo.runs.config import FinetuneConfig
from metazo.runs.setup import set_up
from metazo.tasks.trainings import MOST, TUNER_ROWS, tuner_note
from metazo.tuner.file import Tuner

meta_train = partial(train.meta_train, plot=False)


@pytest.fixture
def task(tmp_path: Path) -> str:
    """A task of 100 rows in one file."""
    rows = [{"text": f"row number {n} of the list", "label": n % 2} for n in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.yaml").write_text(
        "name: rows\nkind: classification\nprompt: '{text} {}'\nlabels: [food, city]\nfiles: {train: rows.jsonl}\n"
    )
    return str(tmp_path / "rows.yaml")


def notes(model: str, task: str, tuner: Path, out: Path) -> list[str]:
    sizes = {"train_examples": 40, "dev_examples": 20, "test_examples": 40, "batch_size": 4}
    config = FinetuneConfig(
        model=model, task=task, optimizer="mezo", lr=1e-4, tuner=str(tuner), forwards=4, out=out, **sizes
    )
    return [note for note in set_up(config).rows.notes if "tuner was" in note]


@pytest.mark.parametrize("examples", [98, 40])
def test_a_run_says_which_dev_and_test_rows_trained_its_tuner(settings, task, tmp_path: Path, examples: int) -> None:
    config = settings(task=[task], train_examples=examples, steps=1)
    said = io.StringIO()
    meta_train(config, console=Console(file=said, width=1000))
    warned = said.getvalue().count("`train_examples` of at most 40 leaves those of the default sizes")
    assert warned == (examples > 40)
    tuner = Tuner.load(config.out)
    assert f"| training rows.rows | {examples} |" in tuner.card("x", "0")
    found = notes(config.model, task, config.out, tmp_path / "run")
    assert found == (
        []
        if examples == 40
        else [
            "rows: the tuner was trained with 20 of 20 dev rows and 38 of 40 test rows, whose scores may be too good: take "
            "other rows, or meta-train with a smaller `train_examples`"
        ]
    )


def test_rows_that_judge_a_search_over_whole_runs_count_as_well(settings, task, tmp_path: Path) -> None:
    few = {"steps": 2, "pairs": 1, "horizon": 1, "batch_size": 4, "rates": [1e-4]}
    config = HorizonConfig(
        model=settings().model, task=[task], out=tmp_path / "tuner", train_examples=40, eval_examples=10, **few
    )
    meta_train(config)
    (note,) = notes(config.model, task, config.out, tmp_path / "run")
    assert "trained with 10 of 20 dev rows, whose" in note


def test_rows_of_a_stranger_s_recipe_and_more_than_a_file_lists(settings, task, tmp_path: Path) -> None:
    sizes = {"train_examples": 4, "dev_examples": 2, "test_examples": 4, "batch_size": 4}
    prepared = set_up(
        FinetuneConfig(model=settings().model, task=task, optimizer="mezo", lr=1e-4, forwards=4, **sizes)
    ).rows
    columns = prepared.record["columns"]
    for odd in (3, {"rows": 3}, {"rows": {"columns": columns, "contents": 4, "train": 1}}, {"rows": {"columns": [1]}}):
        assert tuner_note({TUNER_ROWS: odd}, prepared) is None
    many = {"columns": columns, "contents": "0" * 64, "train": MOST + 1}
    assert "more than its file lists" in (tuner_note({TUNER_ROWS: {"rows": many}}, prepared) or "")
    assert tuner_note({TUNER_ROWS: {"others": many}}, prepared) is None
