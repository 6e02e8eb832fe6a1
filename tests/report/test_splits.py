"""Scores on dev are called so, and are not compared with scores on test."""

from __future__ import annotations

import json
from pathlib import Path

from metazo.comparisons.results import cell_path
from metazo.report import tables
from metazo.report.analysis import Analysis
from metazo.report.build import Report, build
from metazo.report.comparison import Comparison
from metazo.report.write import markdown
from tests.report.test_rivals import FINALS, save
from tests.report.test_tables import row


def reported(folder: Path, untested: set[str]) -> Report:
    """The report of three columns; those that are named have no scores on test."""
    for name, finals in FINALS.items():
        for seed in range(len(finals)):
            result = save(folder, name, seed)
            if name in untested:
                result.metrics |= {"test": {}, "majority": {"dev": 0.52, "test": None}}
                result.save(cell_path(folder, "sst2", name, "seed", seed))
    return build(Comparison(folder))


def test_a_column_that_was_not_tested_is_marked_and_not_compared(tmp_path: Path):
    report = reported(tmp_path, {"first-order-adamw"})
    by_name = {table.name: table for table in report.tables}
    dev, average = row(by_name["loss"], "first-order-adamw")[1:]
    assert dev.endswith(" (dev)") and average == "–"
    assert "Runs of first-order-adamw were not tested" in by_name["loss"].note
    assert row(by_name["metric"], "commonest class")[1] == "50.5"  # of test alone
    assert [cells[0].text for cells in by_name["tests-loss"].rows] == ["skip-feedback"]
    assert row(by_name["rivals"], "first-order-adamw")[1:5] == ["–"] * 4
    assert row(by_name["rivals"], "mezo")[1] == "1.5" and "the best of 2;" in by_name["rivals"].note
    assert row(by_name["pairs"], "mezo")[1:] == ["–", "1 (2)", "–"]
    assert "first-order-adamw: scored on dev, not on test as the others" in report.story.facts[-1][1]
    assert report.story.won.startswith("Only mezo learns from forward passes alone and finished and tested every run")
    report = reported(tmp_path, {"mezo"})
    assert report.story.won == (
        "No method that learns from forward passes alone finished and tested all its runs, so no method won."
    )


def test_scores_are_on_dev_if_nothing_was_tested(tmp_path: Path):
    report = reported(tmp_path, set(FINALS))
    text = markdown(report).replace("accuracy on test (on dev", "")
    assert "on test" not in text and "100 test questions" not in text
    assert "Accuracy (%) on dev by task" in text and "100 dev questions" in text
    assert "They may be too good" in text and "(dev)" not in text
    for picture in report.pictures:
        assert "on test" not in picture.svg, picture.name


def test_tasks_on_different_splits_are_named(tmp_path: Path):
    reported(tmp_path, set())
    for path in (tmp_path / "cells" / "sst2").glob("*/*.json"):
        content = json.loads(path.read_text())
        content["run_info"]["task"], content["metrics"]["test"] = "rte", {}
        other = Path(str(path).replace("sst2", "rte"))
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text(json.dumps(content))
    table = tables.scores(Analysis(Comparison(tmp_path), "loss"))
    assert table.title.startswith("Loss on test or dev by task")
    assert "No run on rte was tested: its scores are on dev." in table.note and "(dev)" not in table.note
