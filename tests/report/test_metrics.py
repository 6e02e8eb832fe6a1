"""Tasks with different metrics, and tasks without any: what is averaged over which, and what the report says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from metazo.comparisons.results import cell_path
from metazo.report import rivals, tables
from metazo.report.analysis import Analysis
from metazo.report.build import build
from metazo.report.comparison import Comparison
from metazo.tasks.metrics import mcc
from tests.report import synthetic
from tests.report.test_tables import row

COSTS = {"forward_flops": 10, "step_flops": 20, "inference_bytes": 1000, "step_bytes": 1010}


def write(folder: Path, metrics: dict[str, str | None]) -> Path:
    """Two columns that learn each task; the commonest class is half of its examples."""
    for task, metric in metrics.items():
        for column in (synthetic.COLUMNS[0], synthetic.COLUMNS[7]):
            for seed in range(3):
                result = synthetic.result(column, task, seed, metric=metric, cost=COSTS)
                for scores in (result.metrics["test"], *(point["dev"] for point in result.train_info["curve"])):
                    scores |= {metric: scores["accuracy"]} if metric else {}
                result.save(cell_path(folder, task, column.name, "seed", seed))
    return folder


def commonest(folder: Path) -> list[str]:
    return row(tables.scores(Analysis(Comparison(folder), "metric")), "commonest class")[1:]


def term(folder: Path) -> str:
    return dict(build(Comparison(folder)).story.terms).get("Accuracy", "")


def test_the_commonest_answer_is_scored_by_the_tasks_own_metric(tmp_path: Path):
    """Its share is its accuracy. Its Matthews correlation is 0, and its F1 depends on the number of classes."""
    assert mcc([1, 1, 1, 1], [[1], [1], [1], [0]]) == 0
    assert commonest(write(tmp_path / "one", {"cola": "mcc"})) == ["0.0", "0.0"]
    both = write(tmp_path / "two", {"cola": "mcc", "sst2": "accuracy"})
    assert commonest(both) == ["0.0", "50.5", "25.2"]
    assert commonest(write(tmp_path / "three", {"news": "macro_f1", "sst2": "accuracy"})) == ["–", "50.5", "–"]


def test_the_term_accuracy_is_of_tasks_that_have_it(tmp_path: Path):
    folder = write(tmp_path, {"sst2": "accuracy", "cola": "mcc"})
    for seed in range(3):
        for column in (synthetic.COLUMNS[0], synthetic.COLUMNS[7]):
            result = synthetic.result(column, "cola", seed, metric="mcc")
            result.metrics["test"] |= {"mcc": 0.4}
            result.metrics["majority"]["test"] = 0.3
            result.save(cell_path(folder, "cola", column.name, "seed", seed))
    assert term(folder).endswith("Always giving the commonest answer would score 50.5.")  # not the mean with 30


@pytest.mark.parametrize("measure", ["loss", "accuracy"])
def test_averages_over_different_tasks_are_named(tmp_path: Path, measure):
    folder = write(tmp_path, {"sst2": "accuracy", "books": None})
    report = build(Comparison(folder), measure)
    by_name = {table.name: table for table in report.tables}
    note = "Averages of accuracy (%) are over 1 of these tasks (sst2), because the others have no metric."
    assert "Averages over the tasks that count (2 of 2), on test" in by_name["summary"].note
    assert note in by_name["summary"].note and note in by_name["rivals"].note
    assert ("on the 1 of 2 tasks that count and have a metric (sst2)" in report.story.won) is (measure == "accuracy")
    same = build(Comparison(write(tmp_path / "same", {"sst2": "accuracy", "cola": "mcc"})), measure)
    assert not any("have no metric" in table.note for table in same.tables)
    assert "have no metric" not in rivals.table(Analysis(same.data, "loss")).note


def test_a_report_by_accuracy_of_tasks_without_a_metric_says_so(tmp_path: Path):
    folder = write(tmp_path, {"books": None})
    told = build(Comparison(folder), "accuracy").story.won
    assert told == "No task that counts has a metric, so no method won by it; the tables show the loss."
    assert "an average loss of" in build(Comparison(folder)).story.won
