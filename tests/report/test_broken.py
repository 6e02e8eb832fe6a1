"""A damaged or partial folder gives a correct report of the rest, and lists what is missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from metazo.comparisons.results import cell_path, write_search
from metazo.errors import UserError
from metazo.report import costs, figures
from metazo.report.analysis import Analysis
from metazo.report.build import Report, build
from metazo.report.comparison import Comparison
from metazo.report.write import html, markdown, runs_csv, write
from tests import warm
from tests.report import synthetic

COLUMN = {column.name: column for column in synthetic.COLUMNS}


def made(folder: Path) -> Report:
    """The report, with every form of it written once."""
    report = build(Comparison(folder))
    assert html(report) and markdown(report)
    return report


def test_failed_missing_not_a_number_and_torn(tmp_path: Path):
    columns = [COLUMN[name] for name in ("mezo", "tuner", "lozo", "first-order-adamw")]
    folder = synthetic.write(tmp_path, columns, ["sst2", "rte"])
    torn = cell_path(folder, "sst2", "tuner", "seed", 0)
    torn.write_text(torn.read_text()[:500])
    cell_path(folder, "sst2", "tuner", "seed", 1).unlink()
    failed = synthetic.result(COLUMN["tuner"], "sst2", 2, status="failed", reason="The worker was killed.")
    failed.save(cell_path(folder, "sst2", "tuner", "seed", 2))
    synthetic.result(COLUMN["tuner"], "sst2", 3, loss=float("nan")).save(cell_path(folder, "sst2", "tuner", "seed", 3))
    for seed, content in enumerate(
        (b"[]", b'{"run_info": 3, "train_info": [], "metrics": null}', b"\xff\xfe", b"{}", b"")
    ):
        cell_path(folder, "rte", "lozo", "seed", seed).write_bytes(content)
    (folder / "search.json").write_text('{"sst2": [')
    report = made(folder)
    data = report.data
    assert [run.seed for run in data.of("sst2", "tuner")] == [4]
    assert data.missing == [("sst2", "tuner", 1)]
    reasons = {(f.task, f.column, f.seed): f.reason for f in data.failures}
    assert reasons["sst2", "tuner", "2"] == "The worker was killed."
    assert reasons["sst2", "tuner", "3"] == "finished, but its loss on test is not a number"
    assert "JSON" in reasons["sst2", "tuner", "0"] and str(tmp_path) not in str(reasons)
    assert len([key for key in reasons if key[:2] == ("rte", "lozo")]) == 5
    test = Analysis(data, "loss").tests["tuner"]
    assert (test.pairs, test.losses) == (8, 2)  # torn and missing results are left out; a failed run counts as a loss
    assert report.story.won.startswith(
        "Not finished: 1 of 40 runs are missing. Only mezo "
    )  # neither lozo, which is missing, nor tuner, which fails
    assert "tuner: some runs failed" in report.story.facts[-1][1]
    assert Analysis(data, "loss").average("lozo") is None


@pytest.mark.parametrize(
    ("columns", "seeds", "says"),
    [
        (["mezo"], 1, "no two methods"),
        (["lozo", "fzoo"], 5, "no finished column mezo"),
        (["mezo", "tuner"], 1, "too few pairs to rule out chance"),
        (["mezo", "tuner"], 5, "cannot give p below 0.0625"),
        (["mezo", "tuner", "lozo", "fzoo"], 6, "p below 0.0312, which correction for 3 comparisons makes 0.0938"),
        (["first-order-adamw"], 2, "no two methods"),
        (["zero-shot"], 1, "no two methods"),
    ],
)
def test_small_comparisons_do_not_claim_too_much(tmp_path: Path, columns: list[str], seeds: int, says: str):
    folder = synthetic.write(tmp_path, [COLUMN[name] for name in columns], ["sst2"], seeds)
    assert says in made(folder).story.facts[0][1]


def test_a_lead_that_one_pair_decides_is_not_called_sure(tmp_path: Path):
    """lozo has the lower mean and loses 11 of 12 pairs, which is beyond chance."""
    for seed in range(12):
        for name, loss in (("mezo", 0.4 if seed else 0.75), ("lozo", 0.41 + 0.001 * seed if seed else 0.4)):
            synthetic.result(COLUMN[name], "sst2", seed, loss=loss).save(
                cell_path(tmp_path, "sst2", name, "seed", seed)
            )
    told = build(Comparison(tmp_path), "loss").story
    assert told.won.startswith("lozo came first") and "due to chance" not in told.won
    assert told.won.endswith("But most pairs of runs go the other way: lozo was worse in 11 of 12.")
    assert "p = 0.0342: the pairs differ beyond chance" in told.facts[0][1]
    assert "in the other direction than the averages" in told.facts[0][1] and "unlikely" not in told.facts[0][1]


def test_without_grid_and_search(tmp_path: Path):
    folder = synthetic.write(tmp_path, [COLUMN["mezo"], COLUMN["tuner"]], ["sst2"], 2, search=False, grid=False)
    assert made(folder).data.columns == ["mezo", "tuner"]


def test_a_task_of_a_file_has_its_name_wherever_the_file_is(tmp_path: Path):
    folder = synthetic.write(tmp_path, [COLUMN["mezo"], COLUMN["lozo"]], ["films", "rte"], 2)
    grid = yaml.safe_load((folder / "grid.yaml").read_text())
    grid["tasks"] = [{"name": "films", "file": "nowhere/mine.yaml"}, "rte"]
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    data = Comparison(folder)
    assert data.tasks == ["films", "rte"] and data.missing == []


def test_a_grid_that_is_still_running(tmp_path: Path):
    folder = synthetic.write(tmp_path, [COLUMN["mezo"], COLUMN["tuner"]], ["sst2", "rte"], 2)
    for path in (folder / "cells").glob("*/*/seed-*.json"):
        path.rename(path.with_name(path.name.replace("seed-", "search-0.001-")))
    report = made(folder)
    assert report.story.won.startswith("Not finished: 8 of 8 runs are missing. No task counts")
    assert [verdict.reason for verdict in Analysis(report.data, "loss").verdicts] == ["No run on it has finished."] * 2


def test_everything_failed(tmp_path: Path):
    for seed in range(2):
        failed = synthetic.result(COLUMN["mezo"], "sst2", seed, status="failed", reason="No room on the disk.")
        failed.save(cell_path(tmp_path, "sst2", "mezo", "seed", seed))
    report = made(tmp_path)
    assert report.headline is None and "no method won" in report.story.won
    assert "No room on the disk." in html(report)


def test_a_failed_run_of_a_search_is_counted_and_said_and_a_diverged_one_is_not(tmp_path: Path):
    """Earlier versions called both failed, with a reason that tells."""
    folder = synthetic.write(tmp_path, [COLUMN["mezo"], COLUMN["lozo"]], ["sst2"], 2, search=False)
    early = "The run stopped at step 118: the losses of 10 steps in a row were not finite."
    for lr, status, reason in ((1e-2, "diverged", "It is so."), (1e-3, "failed", early)):
        run = synthetic.result(COLUMN["mezo"], "sst2", 1000, "search", lr=lr, status=status, reason=reason)
        run.save(cell_path(folder, "sst2", "mezo", "search", 1000, lr))
    assert "What to know before trusting it" not in dict(made(folder).story.facts)
    run = synthetic.result(COLUMN["lozo"], "sst2", 1000, "search", lr=1e-3, status="failed", reason="No room.")
    run.save(cell_path(folder, "sst2", "lozo", "search", 1000, 1e-3))
    for seed in range(2):
        cell_path(folder, "sst2", "lozo", "seed", seed).unlink()
    told = made(folder).story
    assert told.won.startswith("Not finished: 2 of 4 runs are missing.")
    known = dict(told.facts)["What to know before trusting it"]
    assert "lozo: the learning-rate search is incomplete, because 1 run of it failed (No room); the same" in known
    assert "1 run failed or cannot be read, 2 runs missing" in known


def test_the_csv_tells_failed_diverged_and_unreadable_runs_apart(tmp_path: Path):
    folder = synthetic.write(tmp_path, [COLUMN["mezo"]], ["sst2"], 3)
    for seed, status in enumerate(("failed", "diverged")):
        run = synthetic.result(COLUMN["mezo"], "sst2", seed, status=status, reason="It is so.")
        run.save(cell_path(folder, "sst2", "mezo", "seed", seed))
    cell_path(folder, "sst2", "mezo", "seed", 2).write_text("{")
    rows = runs_csv(made(folder).data).splitlines()
    assert sorted(row.split(",")[4] for row in rows[1:]) == ["diverged", "failed", "unreadable"]


def test_damaged_sigma_and_curve_leave_the_rest(tmp_path: Path):
    folder = synthetic.write(tmp_path, [COLUMN["mezo"], COLUMN["tuner"]], ["sst2"], 1)
    path = cell_path(folder, "sst2", "tuner", "seed", 0)
    content = json.loads(path.read_text())
    content["train_info"]["sigma"]["values"] = [[1.0, 2.0]]
    content["train_info"]["curve"] = [{"forwards": 0}, 3]
    path.write_text(json.dumps(content))
    report = made(folder)
    assert not any(picture.name.startswith("sigma") for picture in report.pictures)
    assert report.story.won.startswith("tuner came first")


def test_empty_folder_is_one_sentence_and_exit_code_2(tmp_path: Path):
    with pytest.raises(UserError, match="holds no results"):
        Comparison(tmp_path)
    done = warm.run("metazo", "report", tmp_path, environment={"COLUMNS": "200"})
    assert done.returncode == 2 and "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert "holds no results of metazo compare" in done.stderr


def test_out_that_is_a_file(tmp_path: Path):
    folder = synthetic.write(tmp_path / "results", [COLUMN["mezo"]], ["sst2"], 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        write(build(Comparison(folder)), tmp_path / "file")


def test_the_first_picture_marks_columns_with_failed_runs_and_shows_negative_scores(tmp_path: Path):
    folder = synthetic.write(tmp_path, [COLUMN["mezo"], COLUMN["lozo"]], ["sst2"], 3)
    failed = synthetic.result(COLUMN["lozo"], "sst2", 0, status="diverged", reason="It diverged.")
    failed.save(cell_path(folder, "sst2", "lozo", "seed", 0))
    data = Comparison(folder)
    report = build(data)
    assert report.headline and "Hollow dot: some" in report.headline.caption
    analysis = Analysis(data, "loss")
    (axes,) = figures.headline(analysis).axes
    dots = [line for line in axes.lines if line.get_marker() == "o"]  # the best column is the last
    assert [column for column, _ in analysis.ranking] == ["lozo", "mezo"]
    assert [dot.get_markerfacecolor() == dot.get_color() for dot in dots] == [True, False]
    for info in data.infos:
        info["metric"] = "mcc"
    for seed, run in data.runs["sst2", "mezo"].items():
        data.runs["sst2", "mezo"][seed] = replace(run, metric=-0.3 + 0.01 * seed)
    (axes,) = figures.headline(Analysis(data, "metric")).axes
    assert min(min(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2) < -29


def test_measures_that_disagree_are_said(tmp_path: Path):
    """The first by accuracy is the last by loss."""
    for name, loss, accuracy in (("mezo", 0.3, 0.8), ("lozo", 0.4, 0.9)):
        result = synthetic.result(COLUMN[name], "sst2", 0, loss=loss)
        result.metrics["test"]["accuracy"] = accuracy
        result.save(cell_path(tmp_path, "sst2", name, "seed", 0))
    assert "By loss, mezo is first." in made(tmp_path).story.facts[-1][1]
    assert "By accuracy (%), lozo is first." in build(Comparison(tmp_path), "loss").story.facts[-1][1]


def test_runs_that_minimise_an_objective_are_judged_by_it_and_named(tmp_path: Path):
    """The reference's loss rises while its objective falls."""
    for objective, counts in ((0.3, True), (0.5, False)):
        run = synthetic.result(COLUMN["mezo"], "sst2", 0, loss=0.2)
        run.run_info["configuration"] |= {"objective": "accuracy"}
        run.train_info["curve"][-1]["dev"] |= {"loss": 0.9, "objective": objective}
        run.metrics["before"] |= {"objective": 0.45}
        run.save(cell_path(tmp_path, "sst2", "mezo", "seed", 0))
        data = Comparison(tmp_path)
        assert Analysis(data, "loss").verdicts[0].counts is counts
    report = build(data)
    assert "mezo: training minimised an objective (accuracy) and not the loss" in report.story.facts[-1][1]
    assert "Training minimises it" not in dict(report.story.terms)["Loss"]
    write_search(tmp_path, {"sst2": {"mezo": synthetic.searched(COLUMN["mezo"])}})
    data = Comparison(tmp_path)
    assert figures.sensitivity(data).axes[0].get_ylabel() == "objective on dev"
    assert costs.by_rate(data).note.endswith("Of mezo: the objective (accuracy).")


def test_a_busy_machine_is_said(tmp_path: Path):
    for name, cpu in (("calm", 20.0), ("busy", 10.0)):
        result = synthetic.result(COLUMN["mezo"], "sst2", 0)
        result.train_info["cpu_seconds"] = cpu  # of 25 s of wall-clock time
        result.save(cell_path(tmp_path / name, "sst2", "mezo", "seed", 0))
        told = str(made(tmp_path / name).story.facts)
        assert ("runs took 2.5 times their processor time" in told) is (name == "busy")


@pytest.mark.parametrize("kind", ["seed", "time"])
def test_columns_that_a_busy_machine_slowed_down_are_said(tmp_path: Path, kind: str):
    for column in ("mezo", "lozo", "hizoo"):
        for which in ("seed", "time"):
            result = synthetic.result(COLUMN[column], "sst2", 0, which)
            slow = column == "lozo" and which == kind
            result.train_info["cpu_seconds"] = result.train_info["wall_seconds"] / (2.5 if slow else 1.2)
            result.save(cell_path(tmp_path, "sst2", column, which, 0))
    assert "busy during runs of lozo, which took up to 2.5 times their processor" in str(made(tmp_path).story.facts)


def test_budgets_that_differ_are_said(tmp_path: Path):
    """Columns may have their own, and parts of a grid may have been run before it was changed."""
    for name, seed, budget in (("mezo", 0, 2000), ("mezo", 1, 4000), ("lozo", 0, 2000), ("zero-shot", 0, 0)):
        result = synthetic.result(COLUMN.get(name, COLUMN["mezo"]), "sst2", seed)
        result.run_info |= {"budget": budget, "column": name}
        result.save(cell_path(tmp_path, "sst2", name, "seed", seed))
    told = made(tmp_path).story.compared
    assert "different budgets of forward passes per run, 2,000 for lozo and 2,000 or 4,000 for mezo (" in told
    assert "same budget" not in told
    cell_path(tmp_path, "sst2", "mezo", "seed", 1).unlink()
    assert "All had the same budget of 2,000 forward passes per run (" in made(tmp_path).story.compared


@pytest.mark.parametrize("how", ["unreadable", "missing", "diverged"])
def test_a_column_that_lacks_runs_does_not_come_first(tmp_path: Path, how: str):
    """tuner has the lower average, of 1 of 3 runs."""
    folder = synthetic.write(tmp_path, [COLUMN["mezo"], COLUMN["tuner"]], ["sst2"], 3, search=False)
    assert build(Comparison(folder), "loss").story.won.startswith("tuner came first")
    for path in [cell_path(folder, "sst2", "tuner", "seed", seed) for seed in (1, 2)]:
        if how == "missing":
            path.unlink()
        elif how == "unreadable":
            path.write_text("{broken")
        else:
            synthetic.result(COLUMN["tuner"], "sst2", int(path.stem[-1]), status="diverged", reason="So.").save(path)
    report = build(Comparison(folder), "loss")
    only = "Only mezo learns from forward passes alone and finished every run: "
    assert report.story.won.removeprefix("Not finished: 2 of 6 runs are missing. ").startswith(only)
    told = report.story.facts[-1][1]
    assert f"tuner: some runs {'failed' if how == 'diverged' else 'are missing or cannot be read'}, so" in told
    assert report.headline and "Hollow dot" in report.headline.caption
    by_name = {table.name: table for table in report.tables}
    assert [row[0].text for row in by_name["summary"].rows] == ["mezo", "tuner"]  # the best first
    for name, place in (("summary", 4), ("loss", 1), ("loss", 2)):
        mezo, tuner = (next(row[place] for row in by_name[name].rows if row[0].text == c) for c in ("mezo", "tuner"))
        assert mezo.best and not tuner.best and tuner.text.endswith("(1 of 3)") and "(" not in mezo.text


def test_nothing_finished_every_run_though_it_is_alone(tmp_path: Path):
    folder = synthetic.write(tmp_path, [COLUMN["mezo"]], ["sst2"], 3)
    path = cell_path(folder, "sst2", "mezo", "seed", 2)
    path.unlink()
    told = made(folder).story.won
    assert told.startswith(
        "Not finished: 1 of 3 runs are missing. So far, only mezo learns from forward passes alone and"
    )
    assert "every run" not in told and "of 100 test questions right" in told
    path.write_text("{broken")
    assert made(folder).story.won == (
        "No method that learns from forward passes alone finished all its runs, so no method won."
    )


def test_columns_with_as_many_runs_are_ranked_while_a_comparison_runs(tmp_path: Path):
    """A column with gradients may be further."""
    folder = synthetic.write(tmp_path, [COLUMN[c] for c in ("mezo", "tuner", "lozo", "lora-adamw")], ["sst2"], 3)
    for name in ("mezo", "tuner", "lozo"):
        cell_path(folder, "sst2", name, "seed", 2).unlink()
    told = build(Comparison(folder), "loss").story
    assert told.won.startswith(
        "Not finished: 3 of 12 runs are missing. Of the methods that learn from forward passes alone, "
    )
    assert "tuner is first so far: an average loss of" in told.won and "the reference method" in told.won
    assert "In 2 pairs of runs" in told.facts[0][1]


def test_runs_of_seeds_that_the_grid_does_not_ask_for_are_left_out(tmp_path: Path):
    folder = synthetic.write(tmp_path, [COLUMN["mezo"], COLUMN["lozo"]], ["sst2"], 4, search=False)
    failed = synthetic.result(COLUMN["lozo"], "sst2", 3, status="failed", reason="No room.")
    failed.save(cell_path(folder, "sst2", "lozo", "seed", 3))
    grid = yaml.safe_load((folder / "grid.yaml").read_text()) | {"seeds": 2}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    report = made(folder)
    assert {run.seed for run in report.data.of("sst2", "mezo")} == {0, 1} and report.data.failures == []
    assert Analysis(report.data, "loss").tests["lozo"].pairs == 2 and report.story.won.startswith("lozo came first")
    assert "6 runs of seeds that the grid does not ask for: left out." in report.story.facts[-1][1]  # 2 of kind time


def test_a_reference_without_a_finished_run_is_said_beside_the_tasks(tmp_path: Path):
    folder = synthetic.write(tmp_path, [COLUMN["mezo"], COLUMN["lozo"]], ["sst2"], 2, search=False)
    for seed in range(2):
        failed = synthetic.result(COLUMN["mezo"], "sst2", seed, status="diverged", reason="It diverged.")
        failed.save(cell_path(folder, "sst2", "mezo", "seed", seed))
    (verdict,) = Analysis(made(folder).data, "loss").verdicts
    assert (
        verdict.counts and "mezo, the reference, has no finished run, so it is not known whether it" in verdict.reason
    )


def test_runs_of_other_settings_than_the_grids_are_named(tmp_path: Path):
    """A part of a changed grid leaves the pairs of other parts in place. Numbers are the same however they are written."""
    folder = synthetic.write(tmp_path, [COLUMN["mezo"], COLUMN["lozo"]], ["sst2"], 1)
    grid = yaml.safe_load((folder / "grid.yaml").read_text())
    grid["config"] = {"batch_size": 16, "eps": "1e-3", "merge": "no", "schedule": "linear", "method": {"rank": 2}}
    grid["columns"][0]["options"] = {"batch-size": 4}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    for column, schedule in (("mezo", "linear"), ("lozo", "constant")):
        path = cell_path(folder, "sst2", column, "seed", 0)
        content = json.loads(path.read_text())
        content["run_info"]["configuration"] = {
            "batch_size": 4 if column == "mezo" else 16, "eps": 0.001, "merge": False, "schedule": schedule,
            "method": {"rank": 2, "interval": 3},
        }  # fmt: skip
        path.write_text(json.dumps(content))
    said = made(folder).story.facts[-1][1]
    assert (
        "Runs of lozo (schedule constant, not linear) have other settings than the grid's" in said
        and "mezo (" not in said
    )
