"""The tables' numbers against numbers computed by hand from a small comparison."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from metazo.comparisons.rates import walk
from metazo.comparisons.results import Result, Search, cell_path, write_search
from metazo.report import costs, figures, tables
from metazo.report.analysis import Analysis, band
from metazo.report.build import build
from metazo.report.comparison import CONTROL, FIRST, UNTRAINED, ZEROTH, Comparison
from metazo.report.story import story
from metazo.report.table import Table, loss
from tests.report import synthetic
from tests.report.synthetic import Column

LOSSES = {"mezo": (0.5, 0.6, 0.7), "lozo": (0.4, 0.5, 0.9), "first-order-adamw": (0.1, 0.1, 0.1)}


def set_curve(result: Result, losses: tuple[float, ...], step_forwards: int = 100, step_seconds: float = 2.0) -> None:
    points = result.train_info["curve"][: len(losses)]
    for place, (point, value) in enumerate(zip(points, losses)):
        point |= {"forwards": place * step_forwards, "seconds": place * step_seconds}
        point["dev"] |= {"loss": value}
    result.train_info |= {"curve": points, "seconds": points[-1]["seconds"], "forwards": points[-1]["forwards"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """mezo, lozo and first-order on one task with three seeds; the dev loss falls by a third per 100 forward passes."""
    for name, finals in LOSSES.items():
        column = Column(name, 0.5, optimizer=name)
        for seed, final in enumerate(finals):
            result = synthetic.result(column, "sst2", seed, loss=final)
            set_curve(result, (0.69, 0.6, 0.5, final), step_seconds=3.0 if name == "lozo" else 2.0)
            result.save(cell_path(tmp_path, "sst2", name, "seed", seed))
    return tmp_path


def row(table: Table, name: str) -> list[str]:
    return next([cell.text for cell in row] for row in table.rows if row[0].text == name)


def test_scores_are_means_and_standard_deviations(folder: Path):
    data = Comparison(folder)
    table = tables.scores(Analysis(data, "loss"))
    assert row(table, "mezo") == ["mezo", "0.600 ± 0.100", "0.600 ± 0.100"]
    assert row(table, "lozo") == ["lozo", "0.600 ± 0.265", "0.600 ± 0.265"]  # variance (0.04 + 0.01 + 0.09) / 2
    assert row(table, "first-order-adamw")[1] == "0.100 ± 0.000"
    score = tables.scores(Analysis(data, "metric"))
    assert row(score, "mezo")[1] == "64.0 ± 6.0"  # accuracy is 1 - 0.6 loss
    assert row(score, "commonest class") == ["commonest class", "50.5", "50.5"]


def test_the_spread_of_an_average_is_named_as_it_is_computed(tmp_path: Path):
    """It is that of one task. It was called the standard deviation over seeds, which of these averages is 0."""
    for task, finals in (("sst2", (0.4, 0.6)), ("rte", (0.6, 0.4))):
        for seed, final in enumerate(finals):
            result = synthetic.result(Column("mezo", 0.5, optimizer="mezo"), task, seed, loss=final)
            set_curve(result, (0.69, 0.6, 0.5, final))
            result.save(cell_path(tmp_path, task, "mezo", "seed", seed))
    analysis = Analysis(Comparison(tmp_path), "loss")
    found = [tables.scores(analysis), tables.summary(analysis, Analysis(analysis.data, "metric"))]
    assert row(found[0], "mezo")[1:] == ["0.500 ± 0.141"] * 3 and "0.500 ± 0.141" in row(found[1], "mezo")
    named = (
        "± of an average: the root mean square over its tasks of the standard deviation over seeds, which says how much"
    )
    assert all(named in table.note for table in found)


def test_pairs_are_counted_by_seed(folder: Path):
    test = Analysis(Comparison(folder), "loss").tests["lozo"]
    assert (test.pairs, test.wins, test.losses, test.p) == (3, 2, 1, 1.0)
    assert test.gain == pytest.approx(0.0, abs=1e-12)  # 0.1 + 0.1 - 0.2
    assert set(Analysis(Comparison(folder), "loss").tests) == {"lozo", "first-order-adamw"}


def test_the_words_and_the_choice_of_a_test_count_the_pairs_that_differ(tmp_path: Path):
    """Six pairs of which one ties are five."""
    for seed in range(6):
        for name, final in (("mezo", 0.5), ("lozo", 0.5 if seed == 5 else 0.4 + 0.01 * seed)):
            result = synthetic.result(Column(name, 0.5, optimizer=name), "sst2", seed, loss=final)
            result.save(cell_path(tmp_path, "sst2", name, "seed", seed))
    report = build(Comparison(tmp_path), "loss")
    section = next(section for section in report.sections if section.name == "tests")
    found = row(section.parts[0], "lozo")
    assert (found[1], found[2], found[5], found[7]) == ("6", "5, 0, 1", "sign flips", "0.0625")
    assert (
        "sign flips if fewer than 6 pairs differ; so many cannot give less than “least p” (0.0625 for 5)"
        in section.text
    )


def test_forward_passes_until_the_final_loss_of_the_reference(folder: Path):
    table = costs.reach(Analysis(Comparison(folder), "loss"))
    assert row(table, "that loss (nats)")[1] == "0.600"
    assert row(table, "first-order-adamw")[1] == "100"  # 0.6 is reached at the first evaluation
    data = Comparison(folder)
    data.runs["sst2", "mezo"] = {
        seed: replace(run, curve=(*run.curve[:-1], replace(run.curve[-1], loss=0.2)))
        for seed, run in data.runs["sst2", "mezo"].items()
    }
    table = costs.reach(Analysis(data, "loss"))
    assert row(table, "lozo")[1] == "not reached (0 of 3)"
    assert row(table, "first-order-adamw")[1] == "300"


def test_equal_time_reads_slow_runs_off_their_curves(folder: Path):
    analysis = Analysis(Comparison(folder), "loss")
    assert analysis.data.time_budget("sst2") == 6.0
    at = analysis.at_time("sst2", "lozo")  # an evaluation every 3 s: the last one in time is at 6 s
    assert at is not None and at.losses == (0.5, 0.5, 0.5) and at.kind == "read off"
    assert row(costs.equal_time(analysis), "mezo")[1] == "0.600"
    analysis.data.grid["time_budget"] = 2.0  # before the first evaluation after a step: not the loss before training
    assert row(costs.equal_time(analysis), "lozo")[1] == "– (0 of 3)"
    del analysis.data.grid["time_budget"]
    continued = "faster columns were run again"
    assert continued not in costs.equal_time(analysis).note
    analysis.data.grid["time_budget"] = 6.0
    assert continued in costs.equal_time(analysis).note
    mezo = Column("lozo", 0.5, optimizer="lozo")
    longer = synthetic.result(mezo, "sst2", 0, "time")
    set_curve(longer, (0.69, 0.3), step_seconds=4.0)
    longer.save(cell_path(folder, "sst2", "lozo", "time", 0))
    at = Analysis(Comparison(folder), "loss").at_time("sst2", "lozo")
    assert at is not None and at.losses == (0.3,) and at.kind == "ended" and at.runs == 3
    failed = synthetic.result(mezo, "sst2", 1, "time", status="failed", reason="It stopped.")
    failed.save(cell_path(folder, "sst2", "lozo", "time", 1))
    stopped = synthetic.result(mezo, "sst2", 0, status="failed", reason="It stopped.")
    stopped.save(cell_path(folder, "sst2", "lozo", "seed", 0))  # of another kind: does not count
    analysis = Analysis(Comparison(folder), "loss")
    assert row(costs.equal_time(analysis), "lozo")[1].endswith("(1 of 3)")
    failed = synthetic.result(mezo, "sst2", 0, "time", status="diverged", reason="It diverged.")
    failed.save(cell_path(folder, "sst2", "lozo", "time", 0))
    table = costs.equal_time(Analysis(Comparison(folder), "loss"))
    assert row(table, "lozo")[1] == "– (0 of 3)"  # not the loss of the runs that were not continued


@pytest.mark.parametrize("budget", ["reference", 6.0])
def test_runs_to_a_time_budget_that_were_not_done_are_missing(folder: Path, budget):
    """A column that is faster than mezo needs a longer run of every seed; one of three is done."""
    grid = {"columns": [*LOSSES, "fzoo"], "seeds": 3, "time_budget": budget, "tasks": ["sst2"]}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    fast = Column("fzoo", 0.5, optimizer="fzoo")
    for seed, kind in ((0, "seed"), (1, "seed"), (2, "seed"), (0, "time")):
        due = seed == 0 and kind == "time"  # that a column is faster is known when its reported runs are done
        assert len(Comparison(folder).untimed) == (3 if due else 0)
        result = synthetic.result(fast, "sst2", seed, kind, loss=0.5)
        set_curve(result, (0.69, 0.4) if kind == "time" else (0.69, 0.5), step_seconds=6.0 if kind == "time" else 2.0)
        result.save(cell_path(folder, "sst2", "fzoo", kind, seed))
    data = Comparison(folder)
    assert data.missing == [] and data.untimed == [("sst2", "fzoo", 1), ("sst2", "fzoo", 2)]
    assert row(costs.equal_time(Analysis(data, "loss")), "fzoo")[1] == "0.400 (1 of 3)"
    assert [cell.text for cell in costs.missing(data).rows[0]] == ["sst2", "fzoo", "time", "1, 2"]
    told = build(data).story
    assert told.won.startswith("Not finished: 2 runs to the time budget are missing.")
    assert "0 runs failed or cannot be read, 2 runs missing" in told.facts[-1][1]


def test_time_of_a_run_and_of_everything(folder: Path):
    assert row(costs.cells(Comparison(folder)), "lozo") == [
        "lozo",
        "9 (25)",
    ]  # 3 s per evaluation; 20 s and 5 s in the file


def test_band_is_the_median_and_the_middle_half(folder: Path):
    points, middle, low, high = band(Comparison(folder).of("sst2", "mezo"), "forwards")
    assert points.tolist() == [0, 100, 200, 300]
    assert (low[-1], middle[-1], high[-1]) == pytest.approx((0.55, 0.6, 0.65))


def test_a_learning_rate_at_the_edge_is_said_so(folder: Path):
    found = Search(1e-3, {"0.0001": 0.5, "0.001": 0.4}, True, [1000], 2, 800, 400)
    write_search(folder, {"sst2": {"mezo": found, "lozo": replace(found, lr=None, at_boundary=False)}})
    report = build(Comparison(folder))
    table = next(table for table in report.tables if table.name == "search")
    assert row(table, "mezo") == ["mezo", "0.001 ⚠ edge", "2", "800"]
    assert row(table, "lozo")[1] == "none"
    assert "mezo: the learning rate is at the edge" in report.story.facts[-1][1]


def test_the_report_tells_an_edge_from_a_gap_and_from_rates_that_all_diverged(folder: Path):
    """What a search that has used up its extensions gives. The gap is between the best rate and one ten times larger."""
    for finite, doubt, shown, words in (
        (lambda lr: lr < 1, "edge", "0.1 ⚠ edge", "is at the edge"),
        (lambda lr: lr < 0.05, "gap", "0.01 ⚠ gap", "tried diverged and is far from the chosen one"),
        (lambda lr: False, None, "none", "no learning rate of a search gave a finite loss"),
    ):
        walker, losses = walk([0.1, 1.0], 0 if doubt == "edge" else 2), {}
        wanted = next(walker)
        try:
            while True:
                losses |= {lr: abs(math.log10(lr / 0.01)) if finite(lr) else math.inf for lr in wanted}
                wanted = walker.send({lr: losses[lr] for lr in wanted})
        except StopIteration as stop:
            best, at_boundary = stop.value
        kept = {f"{lr:g}": loss if math.isfinite(loss) else None for lr, loss in losses.items()}
        found = Search(best, kept, at_boundary, [1000], len(kept), 800, 400)
        assert found.doubt == doubt
        write_search(folder, {"sst2": {"mezo": found}})
        report = build(Comparison(folder))
        labels = [line.get_label() for line in figures.sensitivity(report.data).axes[0].lines]
        assert (figures.CHOSEN[doubt] in labels) is (best is not None)
        table = next(table for table in report.tables if table.name == "search")
        assert row(table, "mezo")[1] == shown and words in report.story.facts[-1][1]
        assert doubt == "edge" or "at the edge" not in report.story.facts[-1][1]


def test_tasks_that_show_nothing_do_not_count(tmp_path: Path):
    """First-order training that is not better than the most frequent class, and a reference whose loss rises."""
    for task, first_order, mezo in (("good", 0.2, 0.5), ("hopeless", 0.75, 0.5), ("stuck", 0.2, 0.75)):
        for column, final in ((synthetic.COLUMNS[0], mezo), (synthetic.COLUMNS[7], first_order)):
            result = synthetic.result(column, task, 0, loss=final)
            set_curve(result, (0.69, final))
            result.save(cell_path(tmp_path, task, column.name, "seed", 0))
    analysis = Analysis(Comparison(tmp_path), "loss")
    assert analysis.tasks == ["good"]
    assert [verdict.counts for verdict in analysis.verdicts] == [True, False, False]
    assert "gradients" in analysis.verdicts[1].reason and "mezo" in analysis.verdicts[2].reason
    assert dict(analysis.ranking)["mezo"].mean == 0.5
    assert row(tables.tasks(analysis), "hopeless")[4] == "no"
    won = story(analysis, analysis).won
    assert (
        "Only mezo learns from forward passes alone and finished every run on the 1 of 3 tasks that count (good)" in won
    )


def test_accuracy_must_beat_the_commonest_class_by_two_standard_errors(tmp_path: Path):
    """0.505 + 2 sqrt(0.505 0.495 / 400) = 0.555."""
    for accuracy, learnt in ((0.55, False), (0.56, True)):
        result = synthetic.result(synthetic.COLUMNS[0], "sst2", 0, loss=0.5)
        result.metrics["test"]["accuracy"] = accuracy
        result.save(cell_path(tmp_path, "sst2", "mezo", "seed", 0))
        assert Analysis(Comparison(tmp_path), "loss").verdicts[0].counts is learnt
        assert "Not checked" not in Analysis(Comparison(tmp_path), "loss").verdicts[0].reason


def test_accuracy_is_checked_beside_another_metric_or_said_to_be_unchecked(tmp_path: Path):
    for accuracy, counts, said in ((0.55, False, False), (0.56, True, False), (None, True, True)):
        result = synthetic.result(synthetic.COLUMNS[0], "sst2", 0, loss=0.5, metric="mcc")
        result.metrics["test"] |= {"mcc": 0.0, "accuracy": accuracy}
        result.save(cell_path(tmp_path, "sst2", "mezo", "seed", 0))
        verdict = Analysis(Comparison(tmp_path), "loss").verdicts[0]
        assert verdict.counts is counts
        assert ("Not checked: whether mezo is above the commonest class" in verdict.reason) is said


@pytest.mark.parametrize(
    ("value", "beside", "text"),
    [
        (0.5, None, "0.500"),
        (0.0123, None, "0.012"),
        (0.00123, None, "0.0012"),
        (0.00021, 0.00123, "0.00021"),
        (0.0, None, "0.000"),
    ],
)
def test_losses_as_text(value: float, beside: float | None, text: str):
    assert loss(value, beside) == text


def test_the_family_of_a_column_follows_from_its_method_and_tuner_and_not_from_its_name(tmp_path: Path):
    columns = [
        (Column("first-order-free", 0.5), ZEROTH),
        (Column("random-mask", 0.4), ZEROTH),
        (Column("zero-shot", 0.6), ZEROTH),
        (Column("lora-adam-like", 0.6, optimizer="lozo"), ZEROTH),
        (Column("mezo", 0.2, optimizer="first-order-sgd"), FIRST),
        (Column("plain", 0.2, optimizer="skip-feedback"), FIRST),
        (Column("early", 0.2, optimizer="first-order-of-another"), FIRST),
        (Column("before", 1.0, optimizer="zero-shot"), UNTRAINED),
        (Column("dice", 0.1, configuration={"tuner": "random:3"}), CONTROL),
        (Column("found", 0.5, configuration={"tuner": "random-start/tuner.safetensors"}), ZEROTH),
    ]
    data = Comparison(synthetic.write(tmp_path, [column for column, _ in columns], ["sst2"], 1))
    assert {name: data.family(name) for name in data.columns} == {column.name: family for column, family in columns}
    grid = [
        {"name": "zero-shot", "optimizer": "lozo"},
        {"name": "a", "options": {"tuner": "random:0"}, "optimizer": "mezo"},
    ]
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"columns": grid}))
    (tmp_path / "cells/sst2/zero-shot/seed-0.json").unlink()
    data = Comparison(tmp_path)
    assert [data.family(name) for name in ("zero-shot", "a")] == [ZEROTH, CONTROL]  # no run yet


def test_columns_whose_averages_tie_share_the_first_place(tmp_path: Path):
    """By loss, mezo and lozo tie but for rounding; by accuracy all do."""
    for name, finals in {"fzoo": (0.6, 0.7), "mezo": (0.1 + 0.2, 0.3), "lozo": (0.3, 0.3)}.items():
        for seed, final in enumerate(finals):
            result = synthetic.result(Column(name, 0.5, optimizer=name), "sst2", seed, loss=final)
            result.metrics["test"]["accuracy"] = 0.8
            result.save(cell_path(tmp_path, "sst2", name, "seed", seed))
    data = Comparison(tmp_path)
    by_loss, by_accuracy = Analysis(data, "loss"), Analysis(data, "metric")
    told = story(by_loss, by_accuracy)
    assert told.won == (
        "lozo and mezo (the reference method) share first place, each with an average loss of 0.300, against 0.650 for fzoo, "
        "the next. The difference may be due to chance."
    )
    assert "By accuracy (%), fzoo, lozo and mezo share first place." in told.facts[-1][1]
    told = story(by_accuracy, by_loss)
    assert told.won.endswith(" share first place, each with 80.0 of 100 test questions right.")
    assert "By loss, lozo and mezo share first place." in told.facts[-1][1]
    assert [cells[4].best for cells in tables.summary(by_loss, by_accuracy).rows] == [True, True, False]
    assert [cells[1].best for cells in tables.scores(by_accuracy).rows] == [True] * 3 + [False]  # the commonest class


def test_a_lead_of_the_reference_may_be_chance(tmp_path: Path):
    for pairs, sure in ((2, False), (6, True)):
        for seed in range(pairs):
            for name, final in (("mezo", 0.3), ("lozo", 0.4 + 0.01 * seed)):
                result = synthetic.result(Column(name, 0.5, optimizer=name), "sst2", seed, loss=final)
                result.save(cell_path(tmp_path, "sst2", name, "seed", seed))
        told = build(Comparison(tmp_path), "loss").story.won
        assert told.startswith("mezo, the reference method, came first: an average loss of 0.300, against 0.4")
        assert told.endswith("for lozo, the second." if sure else " The difference may be due to chance.")
