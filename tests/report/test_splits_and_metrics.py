"""What a report says of the split and the metric of its scores, and of columns whose runs failed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from metazo.comparisons.results import Result, cell_path
from metazo.report import costs, rivals
from metazo.report.analysis import Analysis
from metazo.report.build import build
from metazo.report.comparison import Comparison
from metazo.report.figures import headline
from tests.report import synthetic
from tests.report.test_tables import row

MEZO, LOZO = (next(c for c in synthetic.COLUMNS if c.name == name) for name in ("mezo", "lozo"))
ADAMW = next(c for c in synthetic.COLUMNS if c.name == "first-order-adamw")


def without_test(folder: Path, column: str) -> None:
    for path in folder.glob(f"cells/*/{column}/*.json"):
        result = Result.load(path)
        replace(result, metrics=result.metrics | {"test": {}}).save(path)


def test_scores_on_dev_are_said_to_be_and_a_mixture_is_named(tmp_path: Path) -> None:
    folder = synthetic.write(tmp_path, [MEZO, LOZO], ["sst2"], seeds=2)
    assert Comparison(folder).on == "test"
    without_test(folder, "lozo")
    report = build(Comparison(folder))
    titles = [table.title for table in report.tables]
    mixed = "test (but on dev for lozo, whose scores cannot be compared with the others)"
    assert any(f"Loss on {mixed} by task" in title for title in titles)
    assert report.headline is not None and report.headline.title.endswith(f"on {mixed}")
    without_test(folder, "mezo")
    report = build(Comparison(folder))
    words = " ".join(f"{table.title} {table.note}" for table in report.tables)
    assert report.data.on == "dev" and "Loss on dev by task" in words and "on test" not in words


def test_a_dot_is_hollow_if_runs_failed_and_a_bar_may_be_below_zero(tmp_path: Path) -> None:
    folder = synthetic.write(tmp_path, [MEZO, LOZO], ["sst2"], seeds=3)
    for path in folder.glob("cells/*/*/seed-*.json"):
        result = Result.load(path)
        worse = -0.1 + 0.05 * result.run_info["seed"]
        test = {"loss": 0.5, "mcc": worse, "examples": 400}
        replace(result, run_info=result.run_info | {"metric": "mcc"}, metrics=result.metrics | {"test": test}).save(
            path
        )
    synthetic.result(LOZO, "sst2", 2, status="diverged", reason="It did.", metric="mcc").save(
        cell_path(folder, "sst2", "lozo", "seed", 2)
    )
    (axes,) = headline(Analysis(Comparison(folder), "metric")).axes
    dots = {float(line.get_ydata()[0]): line for line in axes.lines if len(line.get_xdata()) == 1}
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert [dots[float(names.index(name))].get_markerfacecolor() for name in ("mezo", "lozo")] == ["#0072B2", "white"]
    bars = [line.get_xdata() for line in axes.lines if line.get_linewidth() == 2.2]
    assert min(min(bar) for bar in bars) < -10  # in hundredths


def test_a_metric_has_its_own_name_and_a_task_without_accuracy_says_what_was_not_checked(tmp_path: Path) -> None:
    folder = synthetic.write(tmp_path, [MEZO, ADAMW], ["sst2"], seeds=2)
    cost = dict.fromkeys(("forward_flops", "step_flops", "inference_bytes", "step_bytes"), 10)
    for path in folder.glob("cells/*/*/seed-*.json"):
        result = Result.load(path)
        test = {"loss": 0.3, "macro_f1": 0.4, "accuracy": 0.505, "examples": 400}
        info = result.run_info | {"metric": "macro_f1", "cost": cost}
        replace(result, run_info=info, metrics=result.metrics | {"test": test}).save(path)
    data = Comparison(folder)
    (verdict,) = Analysis(data, "loss").verdicts
    assert (
        not verdict.counts and "does not learn it" in verdict.reason
    )  # an accuracy that is the commonest class's share
    for path in folder.glob("cells/*/*/seed-*.json"):
        result = Result.load(path)
        del result.metrics["test"]["accuracy"]
        result.save(path)
    data = Comparison(folder)
    assert "macro F1 (× 100)" in rivals.table(Analysis(data, "loss", needs_reference=False)).headings
    (verdict,) = Analysis(data, "loss").verdicts
    assert (
        verdict.counts
        and verdict.reason == "The results have no accuracy to compare with the share of the commonest class."
    )


def test_continued_runs_that_all_failed_have_no_loss_at_equal_time(tmp_path: Path) -> None:
    folder = synthetic.write(tmp_path, [MEZO, LOZO], ["sst2"], seeds=2)
    for seed in range(2):
        failed = synthetic.result(LOZO, "sst2", seed, "time", status="diverged", reason="It did.")
        failed.save(cell_path(folder, "sst2", "lozo", "time", seed))
    assert row(costs.equal_time(Analysis(Comparison(folder), "loss")), "lozo")[1].endswith("(0 of 2)")
