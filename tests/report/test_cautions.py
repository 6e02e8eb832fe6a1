"""A report says where its columns cannot be compared: settings, models, machines, schedules and starts that differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from metazo.comparisons.results import cell_path
from metazo.report import costs, figures, rivals, tables
from metazo.report.analysis import Analysis
from metazo.report.build import Report, build
from metazo.report.comparison import Comparison
from tests.report import synthetic
from tests.report.test_rivals import COSTS
from tests.report.test_tables import row, set_curve

COLUMN = {column.name: column for column in synthetic.COLUMNS}
TWO = [COLUMN["mezo"], COLUMN["lozo"]]


def change(folder: Path, task: str, column: str, seed: int = 0, train: dict | None = None, **info) -> None:
    result = synthetic.result(COLUMN[column], task, seed)
    result.run_info |= info
    result.train_info |= train or {}
    result.save(cell_path(folder, task, column, "seed", seed))


def ask(folder: Path, **column) -> None:
    """Another entry of lozo in the grid."""
    grid = yaml.safe_load((folder / "grid.yaml").read_text())
    grid["columns"][1] = {"name": "lozo", "optimizer": "lozo", **column}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))


def said(folder: Path) -> str:
    return dict(build(Comparison(folder)).story.facts).get("What to know before trusting it", "")


@pytest.mark.parametrize(
    "old, options, words",
    [
        ({"eps": 1e-3}, {"eps": 0.5}, "lozo (eps 0.001, not 0.5)"),
        ({"eps": 0.5, "method": {"rank": 4}}, {"eps": 0.5, "rank": 2}, "lozo (rank 4, not 2)"),
        ({"eps": 0.5, "method": {"rank": 4}}, {"eps": 0.5}, "lozo (rank 4 and its default)"),
        ({"eps": 0.5, "scale": "rms"}, {"eps": 0.5}, "lozo (scale rms and none)"),
    ],
)
def test_a_column_that_was_edited_before_a_part_was_run_is_named(tmp_path: Path, old, options, words):
    """rte is of the part, and sst2 is not."""
    folder = synthetic.write(tmp_path, TWO, ["sst2", "rte"], 1)
    ask(folder, options=options)
    new = {"scale": "none", "eps": options["eps"], "method": {k: v for k, v in options.items() if k == "rank"}}
    change(folder, "rte", "lozo", configuration=new, label="the new one")
    change(folder, "sst2", "lozo", configuration=new, label="the new one")
    assert "other settings" not in said(folder)
    change(folder, "sst2", "lozo", configuration={"scale": "none", "method": {}} | old, label="the old one")
    assert f"Runs of {words} have other settings than the grid's, so the columns cannot be compared." in said(folder)
    assert Comparison(folder).label("lozo") == "the old one or the new one"
    change(folder, "sst2", "lozo", configuration=new | {"eval_batch_size": 3, "out": "b"})  # no number depends on them
    assert "other settings" not in said(folder)


def test_a_rate_that_the_grid_gives_is_a_setting_too(tmp_path: Path):
    folder = synthetic.write(tmp_path, TWO, ["sst2"], 1)
    ask(folder, lrs=[1e-4])
    assert "other settings" not in said(folder)
    ask(folder, lrs=[3e-4])
    assert "lozo (lr 0.0001, not 0.0003)" in said(folder)


def test_runs_of_another_model_are_named(tmp_path: Path):
    folder = synthetic.write(tmp_path, TWO, ["sst2", "rte"], 1)
    assert "different models" not in said(folder)
    change(folder, "rte", "lozo", model="copy")  # with the same weights
    assert "different models" not in said(folder)
    change(folder, "rte", "lozo", model="micro", hashes={"model": "other"})
    assert "Runs are of different models (pico for mezo and lozo; micro for lozo), so" in said(folder)
    for task in ("sst2", "rte"):
        change(folder, task, "lozo", model="micro", hashes={"model": "other"})
    ask(folder, options={"model": "micro"})
    assert "different models" not in said(folder)


def test_columns_that_ran_on_different_machines_are_named(tmp_path: Path):
    folder = synthetic.write(tmp_path, TWO, ["sst2", "rte"], 1)
    cell_path(folder, "sst2", "lozo", "time", 0).unlink()
    change(folder, "sst2", "mezo", machine={"cpu": "a cpu", "gpu": None, "cores": 8, "threads": 1})
    assert "different machines" not in said(folder)  # the cores that a run may use, of which it uses one
    gpu = {"cpu": "another", "gpu": "H200", "cores": 16, "threads": 2}
    change(folder, "sst2", "lozo", machine=gpu)
    told = "Columns ran on different machines (a cpu, 1 thread for mezo and lozo; another, H200, 2 threads for lozo), so time"
    assert told in said(folder)
    change(folder, "sst2", "mezo", machine=gpu)  # one task here and one there
    assert "different machines" not in said(folder)


def test_what_is_noted_of_all_runs_of_a_column_alone_is_said(tmp_path: Path):
    folder = synthetic.write(tmp_path, TWO, ["sst2", "rte"], 1)
    shared, own = "Inputs were cut.", "lozo has no float32 master of its weights."
    for task in ("sst2", "rte"):
        change(folder, task, "mezo", train={"notes": [shared]})
        change(folder, task, "lozo", train={"notes": [shared, own, f"Steps that were skipped on {task}: 3."]})
    assert f"lozo: {own}" in said(folder) and "cut" not in said(folder) and "skipped" not in said(folder)
    change(folder, "rte", "lozo", train={"notes": [shared]})
    assert own not in said(folder)
    change(folder, "rte", "lozo", train={"notes": [shared, own]})
    assert own in said(folder)
    change(folder, "sst2", "mezo")  # as an earlier version wrote it: it is not known what was noted
    assert own not in said(folder)


def test_a_value_read_off_while_the_rate_falls_is_marked(tmp_path: Path):
    """lozo takes 9 s and mezo 6."""
    for name, seconds in (("mezo", 2.0), ("lozo", 3.0)):
        result = synthetic.result(COLUMN[name], "sst2", 0)
        set_curve(result, (0.69, 0.6, 0.5, 0.4), step_seconds=seconds)
        for schedule, mark in (("constant", ""), ("linear", " ‡" if name == "lozo" else "")):
            result.run_info["configuration"]["schedule"] = schedule
            result.save(cell_path(tmp_path, "sst2", name, "seed", 0))
            table = costs.equal_time(Analysis(Comparison(tmp_path), "loss"))
            assert row(table, name)[1] == ("0.500" if name == "lozo" else "0.400") + mark
            assert ("‡ Read off before the learning rate" in table.note) == bool(mark)


def test_the_loss_before_training_is_that_with_which_the_reference_starts(tmp_path: Path):
    folder = synthetic.write(tmp_path, TWO, ["sst2"], 2)
    for seed in (0, 1):
        result = synthetic.result(COLUMN["lozo"], "sst2", seed)
        result.metrics["before"]["loss"] = 4.365
        result.save(cell_path(folder, "sst2", "lozo", "seed", seed))
    data = Comparison(folder)
    table = tables.tasks(Analysis(data, "loss"))
    assert row(table, "sst2")[3] == "0.690"
    assert table.note.endswith(
        "Before: loss on dev of the untrained model with which mezo starts. Columns with another model, head or dev "
        "rows start elsewhere: lozo 4.365 on sst2."
    )
    for search in data.searches["sst2"].values():
        search.losses["0.001"] = 9.0  # above the axis
    mezo, lozo = (axes.get_ylim()[1] for axes in figures.sensitivity(data).axes)
    assert mezo == pytest.approx(1.3 * 0.69, rel=0.1) and lozo == pytest.approx(1.3 * 4.365, rel=0.1)
    assert (
        "elsewhere"
        not in tables.tasks(Analysis(Comparison(synthetic.write(tmp_path / "b", TWO, ["sst2"], 2)), "loss")).note
    )


def lucky(folder: Path) -> Report:
    """tuner has the best mean and the least memory, of the only run of three that did not diverge."""
    for column in (COLUMN[name] for name in ("mezo", "tuner", "lozo")):
        for seed in range(3):
            diverged = {"status": "diverged", "reason": "So."} if column.name == "tuner" and seed else {}
            result = synthetic.result(column, "sst2", seed, **diverged)
            names = ("forward_flops", "step_flops", "inference_bytes", "step_bytes")
            result.run_info["cost"] = dict(zip(names, COSTS["mezo"]))
            result.train_info["peak_memory_bytes"] = {"mezo": 10e6, "tuner": 9e6, "lozo": 12e6}[column.name]
            result.save(cell_path(folder, "sst2", column.name, "seed", seed))
    return build(Comparison(folder), "loss")


def test_means_of_the_runs_that_are_left_are_hollow_and_not_in_the_front(tmp_path: Path):
    report = lucky(tmp_path)
    analysis = Analysis(report.data, "loss")
    assert analysis.ranking[0][0] == "tuner"
    *dots, front = figures.pareto(analysis).axes[0].lines
    assert [dot.get_markerfacecolor() == "white" for dot in dots] == [False, False, True]
    assert [*front.get_xdata()] == [10, 12]  # mezo and lozo, without tuner's 9 MB
    right = rivals.plane(analysis).axes[1]
    assert [dot.get_markerfacecolor() == "white" for dot in right.lines].count(True) == 1
    captions = {picture.name: picture.caption for picture in report.pictures}
    assert all("Hollow point: some of the column’s runs failed" in captions[name] for name in ("pareto", "plane"))
    assert "Lines of tuner are of the runs that are left" in captions["curves-forwards"]
    whole = build(Comparison(synthetic.write(tmp_path / "whole", TWO, ["sst2"], 2)))
    assert not any("Hollow" in picture.caption or "are left" in picture.caption for picture in whole.pictures)


def test_searches_are_told_by_their_runs_if_only_parts_were_run(tmp_path: Path):
    """No search.json: that is written by a call for the whole grid."""
    folder = synthetic.write(tmp_path, TWO, ["sst2"], 1, search=False)
    losses = {"mezo": {1e-5: 0.6, 3e-5: 0.5, 1e-4: 0.4}, "lozo": {3e-5: 0.5, 1e-4: 0.4, 3e-4: None}}
    for name, found in losses.items():
        for lr, loss in found.items():
            bad = {"status": "diverged", "reason": "So."} if loss is None else {}
            result = synthetic.result(COLUMN[name], "sst2", 1000, "search", lr=lr, **bad)
            result.metrics["dev"] = None if loss is None else {"loss": loss}
            result.save(cell_path(folder, "sst2", name, "search", 1000, lr))
    report = build(Comparison(folder))
    found = report.data.searches["sst2"]
    assert found["mezo"].losses == {"1e-05": 0.6, "3e-05": 0.5, "0.0001": 0.4}
    assert (found["mezo"].lr, found["mezo"].doubt, found["mezo"].runs, found["mezo"].seeds) == (1e-4, "edge", 3, [1000])
    assert (found["lozo"].lr, found["lozo"].doubt, found["lozo"].losses["0.0003"]) == (1e-4, None, None)
    assert "mezo: the learning rate is at the edge of the tried rates" in said(folder)
    assert {"search", "by-rate"} <= {table.name for table in report.tables}
    for status, lr in (("failed", 1e-5), ("finished", 3e-4)):  # an unfinished search, and a reported run of another one
        again = synthetic.result(COLUMN["lozo"], "sst2", 1000, "search", lr=3e-4, status=status, reason="No memory.")
        again.save(cell_path(folder, "sst2", "lozo", "search", 1000, 3e-4))
        change(folder, "sst2", "mezo", lr=lr if status == "finished" else 1e-4)
        assert ("lozo" in Comparison(folder).searches["sst2"]) is (status == "finished")
    assert "mezo" not in Comparison(folder).searches["sst2"]


def test_columns_with_other_test_rows_or_batches_are_named(tmp_path: Path):
    folder = synthetic.write(tmp_path, TWO, ["sst2"], 1)
    assert "different" not in said(folder)
    result = synthetic.result(COLUMN["lozo"], "sst2", 0)
    result.metrics["test"]["examples"] = 10
    result.run_info["configuration"]["batch_size"] = 64
    result.save(cell_path(folder, "sst2", "lozo", "seed", 0))
    words = said(folder)
    assert "scored on different numbers of examples (400 for mezo; 10 for lozo), so scores cannot be compared" in words
    assert "batches of different sizes (16 for mezo; 64 for lozo), so equal forward passes are not equal work" in words
