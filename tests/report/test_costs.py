"""The tables of forward passes and time of a comparison that is not finished, and what their words promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from metazo.comparisons.results import cell_path
from metazo.report import costs
from metazo.report.analysis import Analysis
from metazo.report.build import build
from metazo.report.comparison import Comparison
from metazo.report.story import _memory_ratios
from metazo.report.table import Table
from tests.report import synthetic
from tests.report.synthetic import Column
from tests.report.test_tables import row, set_curve


def save(folder: Path, name: str, seed: int, end: float = 0.4, **info) -> None:
    result = synthetic.result(Column(name, 0.5, optimizer=name), "sst2", seed, loss=end, **info)
    set_curve(result, (0.69, 0.6, 0.55, end))
    result.save(cell_path(folder, "sst2", name, "seed", seed))


def ask(folder: Path, seeds: int, **settings) -> Path:
    columns = [{"name": name} for name in ("mezo", "lozo", "fzoo")]
    grid = {"tasks": ["sst2"], "columns": columns, "seeds": seeds, "reference": "mezo", **settings}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    return folder


def tables(folder: Path) -> tuple[Table, Table]:
    analysis = Analysis(Comparison(folder), "loss")
    return costs.reach(analysis), costs.equal_time(analysis)


@pytest.mark.parametrize("seeds, reached", [(2, 1), (3, 1), (4, 2), (3, 2), (4, 3)])
def test_not_reached_is_what_the_note_says(tmp_path: Path, seeds, reached):
    """A median is never of half of the runs: it is between a number and infinity."""
    for seed in range(seeds):
        save(tmp_path, "mezo", seed, 0.5)
        save(tmp_path, "lozo", seed, 0.45 if seed < reached else 0.54)
    reach, _ = tables(tmp_path)
    assert "“not reached”: half of the runs or more did not." in reach.note
    text = "not reached" if seeds - reached >= seeds / 2 else "300"
    assert row(reach, "lozo")[1] == f"{text} ({reached} of {seeds})"


def test_runs_that_are_missing_are_in_the_numbers_of_runs(tmp_path: Path):
    for seed in range(3):
        save(tmp_path, "lozo", seed)
        save(tmp_path, "fzoo", seed, 0.45)
    save(ask(tmp_path, 3), "mezo", 0, 0.5)
    reach, time = tables(tmp_path)
    assert row(reach, "that loss (nats)")[1] == "0.500 (1 of 3)" and row(reach, "mezo")[1] == "300 (1 of 3)"
    assert row(time, "time (s)")[1] == "6 (1 of 3)" and row(time, "mezo")[1] == "0.500 (1 of 3)"
    assert row(reach, "lozo")[1] == "300" and row(time, "lozo")[1] == "0.400"
    assert row(tables(ask(tmp_path, 3, time_budget=6.0))[1], "time (s)")[1] == "6"  # given, and not of runs
    for seed in (1, 2):
        save(tmp_path, "mezo", seed, 0.5, status="failed", reason="It stopped.")
    assert row(tables(tmp_path)[0], "that loss (nats)")[1] == "0.500 (1 of 3)"


def test_the_best_is_bold_while_all_columns_lack_the_same_runs(tmp_path: Path):
    for seed in range(2):
        for name, end in (("mezo", 0.5), ("lozo", 0.4), ("fzoo", 0.45)):
            save(tmp_path, name, seed, end)
    for table in tables(ask(tmp_path, 3)):
        cells = {cells[0].text: cells[1] for cells in table.rows}
        assert (
            cells["lozo"].text.endswith(" (2 of 3)") and cells["lozo"].best and not cells["mezo"].text.endswith("of 2)")
        )
    save(tmp_path, "mezo", 2, 0.5)  # which lozo and fzoo lack now
    _, time = tables(tmp_path)
    assert [cells[0].text for cells in time.rows if cells[1].best] == ["mezo"]


def test_both_tables_say_how_fine_they_are(tmp_path: Path):
    report = build(Comparison(synthetic.write(tmp_path, synthetic.COLUMNS[:3], ["sst2"], 2)))
    notes = {table.name: table.note for table in report.tables}
    for name in ("reach", "time"):
        assert "The figures are as fine as the spacing of evaluations." in notes[name], name


def test_a_task_without_a_run_of_the_reference_has_no_time(tmp_path: Path):
    for seed in range(2):
        save(tmp_path, "mezo", seed)
        result = synthetic.result(Column("lozo", 0.5, optimizer="lozo"), "cb", seed, loss=0.4)
        result.save(cell_path(tmp_path, "cb", "lozo", "seed", seed))
    _, time = tables(ask(tmp_path, 2, tasks=["sst2", "cb"]))
    assert row(time, "time (s)")[1:] == ["6", "–"]


def test_memory_is_compared_task_by_task(tmp_path: Path):
    """A median over the runs of all tasks would say that gradients take less memory (60 MB against 100 MB)."""
    for task, mezo, adamw in (("sst2", 20, 60), ("rte", 100, 300)):
        for column, memory, seeds in (("mezo", mezo, 3), ("first-order-adamw", adamw, 3 if task == "sst2" else 1)):
            for seed in range(seeds):
                result = synthetic.result(Column(column, 0.5, memory=memory, optimizer=column), task, seed)
                set_curve(result, (0.69, 0.6, 0.5, 0.4 + (column == "mezo") * 0.1))
                result.save(cell_path(tmp_path, task, column, "seed", seed))
    data = Comparison(tmp_path)
    ratios = _memory_ratios(data, ["sst2", "rte"], ["first-order-adamw", "mezo"])
    assert ratios == pytest.approx([3, 3], rel=0.2) and _memory_ratios(data, ["sst2"], ["mezo"]) == []
