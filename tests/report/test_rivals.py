"""Rank, work and memory of columns against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from metazo.comparisons.results import Result, cell_path
from metazo.report import costs, rivals
from metazo.report.analysis import Analysis
from metazo.report.build import build
from metazo.report.comparison import Comparison
from metazo.report.point_names import name_points
from tests.report import synthetic
from tests.report.synthetic import Column
from tests.report.test_tables import row, set_curve

FINALS = {"mezo": (0.5, 0.6, 0.7), "skip-feedback": (0.4, 0.6, 0.9), "first-order-adamw": (0.1, 0.2, 0.3)}
CURVES = {  # on dev, 100 of its own forward passes between evaluations
    "mezo": (0.69, 0.65, 0.6, 0.5),
    "skip-feedback": (0.69, 0.5, 0.45, 0.4),
    "first-order-adamw": (0.69, 0.68, 0.51, 0.3),
}
COSTS = {  # operations of a forward pass and of a step; memory of inference and of a step
    "mezo": (10, 20, 1000, 1010),
    "skip-feedback": (10, 30, 1000, 1050),
    "first-order-adamw": (5, 15, 1000, 2000),
}


def save(folder: Path, name: str, seed: int, **info) -> Result:
    column = Column(name, 0.5, optimizer=name)
    result = synthetic.result(column, "sst2", seed, loss=FINALS[name][seed], **info)
    names = ("forward_flops", "step_flops", "inference_bytes", "step_bytes")
    result.run_info["cost"] = dict(zip(names, COSTS[name]))
    set_curve(result, CURVES[name])
    result.train_info["steps"] = 150 if name == "mezo" else 100
    result.save(cell_path(folder, "sst2", name, "seed", seed))
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, finals in FINALS.items():
        for seed in range(len(finals)):
            save(tmp_path, name, seed)
    return tmp_path


def found(folder: Path) -> dict[str, rivals.Rival]:
    return {rival.column: rival for rival in rivals.rivals(Analysis(Comparison(folder), "loss"))}


def test_work_and_memory(folder: Path) -> None:
    """mezo: 150 steps of 20 operations, a forward pass has 10; AdamW trains half of it: 100 steps of 15."""
    by_name = found(folder)
    assert {name: rival.equivalents for name, rival in by_name.items()} == {
        "mezo": 300, "skip-feedback": 300, "first-order-adamw": 150,
    }  # fmt: skip
    assert [by_name[name].memory for name in CURVES] == [1.01, 1.05, 2.0]


def test_ratio_is_of_the_references_work(folder: Path) -> None:
    """mezo ends at 0.5: skip feedback is there at the first third of its 300, AdamW at the end of its 150."""
    by_name = found(folder)
    assert by_name["mezo"].ratio == 1.0
    assert by_name["skip-feedback"].ratio == pytest.approx(1 / 3)
    assert by_name["first-order-adamw"].ratio == pytest.approx(150 / 300)
    assert all(rival.tenth == 0 for rival in by_name.values())


def test_a_tenth_is_counted_by_pair(folder: Path) -> None:
    result = save(folder, "skip-feedback", 2)
    result.run_info["cost"]["step_flops"] = 9  # 100 of 300 forward passes at 9 / 30 of the work
    result.save(cell_path(folder, "sst2", "skip-feedback", "seed", 2))
    assert found(folder)["skip-feedback"].tenth == pytest.approx(1 / 3)


def test_ranks_share_ties_and_put_failures_last(folder: Path) -> None:
    """Seed by seed: AdamW is first, skip feedback second, level and last."""
    by_name = found(folder)
    assert [by_name[name].rank for name in FINALS] == pytest.approx([(3 + 2.5 + 2) / 3, (2 + 2.5 + 3) / 3, 1])
    assert next(iter(by_name)) == "first-order-adamw"
    save(folder, "first-order-adamw", 0, status="diverged", reason="Diverged.")
    by_name = found(folder)
    assert by_name["first-order-adamw"].rank == pytest.approx((3 + 1 + 1) / 3)
    assert by_name["mezo"].rank == pytest.approx((2 + 2.5 + 2) / 3)
    assert by_name["first-order-adamw"].ratio == pytest.approx(0.5)  # median of 1/2, 1/2 and never


def test_a_column_that_does_not_reach_it_says_so(folder: Path) -> None:
    for seed in range(3):
        result = save(folder, "skip-feedback", seed)
        set_curve(result, (0.69, 0.68, 0.67, 0.66))
        result.save(cell_path(folder, "sst2", "skip-feedback", "seed", seed))
    assert found(folder)["skip-feedback"].ratio == math.inf
    table = rivals.table(Analysis(Comparison(folder), "loss"))
    assert row(table, "skip-feedback")[6:8] == ["not reached", "0"]


def test_a_reference_that_ends_above_its_start_gives_no_loss_to_reach(folder: Path) -> None:
    """Every column has reached it before its first step: 0 forward passes are no figure of it."""
    for seed in range(3):
        result = save(folder, "mezo", seed)
        set_curve(result, (0.69, 0.65, 0.68, 0.7 if seed else 0.6))
        result.save(cell_path(folder, "sst2", "mezo", "seed", seed))
    by_name = found(folder)
    assert by_name["mezo"].ratio == 1.0 and by_name["skip-feedback"].ratio == pytest.approx(1 / 3)  # of seed 0 alone
    assert "lower than before training (1 of 3;" in rivals.table(Analysis(Comparison(folder), "loss")).note
    for seed in range(3):
        result = save(folder, "mezo", seed)
        set_curve(result, (0.69, 0.65, 0.68, 0.7))
        result.save(cell_path(folder, "sst2", "mezo", "seed", seed))
    assert {rival.ratio for rival in found(folder).values()} == {None}
    analysis = Analysis(Comparison(folder), "loss", needs_reference=False)
    assert {cell.text for cell in row_cells(costs.reach(analysis), "mezo")} == {"–"}


def row_cells(table, name):
    return next(cells[1:] for cells in table.rows if cells[0].text == name)


def test_the_table_and_the_picture_are_in_the_report(folder: Path) -> None:
    report = build(Comparison(folder))
    table = next(table for table in report.tables if table.name == "rivals")
    assert row(table, "first-order-adamw") == [
        "first-order-adamw",
        "1.0",
        "0.5",
        "0.200",
        "88.0",
        "150",
        "0.50",
        "0",
        "2.00",
    ]
    assert table.headings[4] == "accuracy (%)"
    for info in report.data.infos:
        info["metric"] = "f1"
    assert rivals.table(Analysis(report.data, "loss")).headings[4] == "F1 (× 100)"
    against = next(table for table in report.tables if table.name == "tests-best")
    assert against.title == "Paired with first-order-adamw, by loss"
    assert (
        against.note
        == "first-order-adamw was chosen by its rank in these runs, so p is corrected for all pairs of columns."
    )
    assert row(against, "mezo")[1:4] == ["3", "0, 3, 0", "-0.400"]
    assert "skip-feedback" in next(picture for picture in report.pictures if picture.name == "plane").svg


def test_every_two_columns_are_counted_by_pair(folder: Path) -> None:
    """mezo has 0.5, 0.6 and 0.7, skip feedback 0.4, 0.6 and 0.9: one won, one level, one lost by more than a tenth."""
    table = rivals.pairs(Analysis(Comparison(folder), "loss"))
    assert row(table, "skip-feedback") == ["skip-feedback", "0 (0)", "1 (2)", "–"]
    assert row(table, "mezo") == ["mezo", "0 (0)", "–", "1 (2)"]
    assert row(table, "first-order-adamw") == ["first-order-adamw", "–", "3 (3)", "3 (3)"]
    for name in ("first-order-adamw", "mezo"):
        save(folder, name, 0, status="diverged", reason="Diverged.")
    table = rivals.pairs(Analysis(Comparison(folder), "loss"))
    assert row(table, "first-order-adamw")[table.headings.index("mezo")] == "2 (2)"  # of two failures none is level
    assert row(table, "skip-feedback")[table.headings.index("first-order-adamw")] == "1 (1)"


def test_older_results_have_neither(tmp_path: Path) -> None:
    report = build(Comparison(synthetic.write(tmp_path, seeds=2)))
    assert not {"rivals", "plane"} & {part.name for section in report.sections for part in section.parts}


def test_the_mean_curve_is_over_equal_shares_of_the_runs(folder: Path) -> None:
    spent, losses = rivals.mean_curve(Comparison(folder), ["sst2"], "mezo", points=6)
    assert spent == pytest.approx([50, 100, 150, 200, 250, 300])
    assert losses == pytest.approx([0.67, 0.65, 0.625, 0.6, 0.55, 0.5])


def test_a_column_without_a_run_on_one_of_the_tasks_has_no_mean_curve(folder: Path) -> None:
    """It would be over other tasks than the others' means: the best of them, if it failed on a hard task."""
    for name in ("mezo", "skip-feedback"):
        for seed in range(3):
            column = Column(name, 0.5, optimizer=name)
            status = {} if name == "mezo" else {"status": "failed", "reason": "It stopped."}
            result = synthetic.result(column, "rte", seed, loss=0.5, **status)
            result.run_info["cost"] = dict(zip(("forward_flops", "step_flops"), COSTS[name]))
            set_curve(result, (0.69, 0.6, 0.6, 0.6))
            result.save(cell_path(folder, "rte", name, "seed", seed))
    data = Comparison(folder)
    assert rivals.mean_curve(data, ["sst2", "rte"], "skip-feedback") is None
    _, losses = rivals.mean_curve(data, ["sst2", "rte"], "mezo", points=3)
    assert losses == pytest.approx([(0.65 + 0.6) / 2, 0.6, (0.5 + 0.6) / 2])
    data.runs["rte", "mezo"].pop(0)  # a task weighs as much with two runs as with three
    assert rivals.mean_curve(data, ["sst2", "rte"], "mezo", points=3)[1] == pytest.approx(losses)
    told = build(data).story.facts[-1][1]
    assert "skip-feedback: no run finished on one of the tasks, so there is no average" in told


def test_failed_runs_are_in_the_denominators_and_named(folder: Path) -> None:
    save(folder, "skip-feedback", 1, status="failed", reason="It stopped.")
    analysis = Analysis(Comparison(folder), "loss")
    assert row(costs.reach(analysis), "skip-feedback")[1] == "100 (2 of 3)"
    assert row(costs.equal_time(analysis), "skip-feedback")[1].endswith(" (2 of 3)")
    assert not row(costs.equal_time(analysis), "mezo")[1].endswith(")")
    assert "skip-feedback: some runs failed, so that averages are over the others only" in rivals.table(analysis).note
    for seed in (0, 2):
        save(folder, "skip-feedback", seed, status="failed", reason="It stopped.")
    analysis = Analysis(Comparison(folder), "loss")
    assert row(costs.reach(analysis), "skip-feedback")[1] == "not reached (0 of 3)"


def test_without_a_column_with_gradients_the_table_says_so(folder: Path) -> None:
    for name in ("first-order-adamw", "skip-feedback"):
        for seed in range(3):
            cell_path(folder, "sst2", name, "seed", seed).unlink()
    note = rivals.table(Analysis(Comparison(folder), "loss", needs_reference=False)).note
    assert note.startswith("Over all tasks with runs (1 of 1; no column is trained with gradients)")
    save(folder, "first-order-adamw", 0, status="diverged", reason="It diverged.")
    note = rivals.table(Analysis(Comparison(folder), "loss", needs_reference=False)).note
    assert "no column with gradients has finished" in note and "some runs failed" not in note


def test_a_task_counts_though_the_reference_does_not_learn_it(folder: Path) -> None:
    for seed in range(3):
        result = save(folder, "mezo", seed)
        set_curve(result, (0.69, 0.69, 0.7, 0.7))
        result.save(cell_path(folder, "sst2", "mezo", "seed", seed))
    data = Comparison(folder)
    assert not Analysis(data, "loss").tasks
    assert Analysis(data, "loss", needs_reference=False).tasks == ["sst2"]
    table = next(table for table in build(data).tables if table.name == "rivals")
    assert row(table, "first-order-adamw")[1] == "1.0" and "whether or not mezo does" in table.note


@pytest.mark.parametrize("height", [0.92, 0.05])
def test_names_of_a_stack_of_points_are_within_the_axes_and_apart(height: float) -> None:
    """Fifteen columns with the memory of inference and nearly one loss, at the top or at the bottom."""
    figure = Figure(figsize=(6, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xlim=(0.8, 1.6), ylim=(0, 1))
    name_points(axes, [(1.0, height + 0.003 * k, f"column-{k}") for k in range(15)] + [(1.4, 0.5, "another")])
    figure.draw_without_rendering()
    boxes, bounds = [Text.get_window_extent(name) for name in axes.texts], axes.get_window_extent()  # without the lines
    assert len(boxes) == 16
    assert all(
        bounds.x0 <= box.x0 and box.x1 <= bounds.x1 and bounds.y0 <= box.y0 and box.y1 <= bounds.y1 for box in boxes
    )
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])


def test_a_name_without_a_line_is_nearer_to_its_point_than_to_any_other() -> None:
    """Two methods with nearly the memory and the loss of each other, above and below two more."""
    points = [
        (1.05, 0.626, "skip-feedback"),
        (1.06, 0.634, "feedback"),
        (1.06, 0.641, "exact-blocks"),
        (1.14, 0.65, "sgd"),
    ]
    figure = Figure(figsize=(6, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xlim=(0.8, 1.6), ylim=(0.6, 1))
    name_points(axes, points)
    figure.draw_without_rendering()
    at = {name: axes.transData.transform((x, y)) for x, y, name in points}
    assert len(axes.texts) == len(points)
    for name in axes.texts:
        box, line = Text.get_window_extent(name), getattr(name, "arrow_patch", None)
        gaps = {
            other: math.hypot(max(box.x0 - x, x - box.x1, 0), max(box.y0 - y, y - box.y1, 0))
            for other, (x, y) in at.items()
        }
        own = gaps.pop(name.get_text())
        assert line is not None or min(gaps.values()) > own + 4
    assert any(getattr(name, "arrow_patch", None) is not None for name in axes.texts)


def test_columns_that_lack_runs_are_last_and_named(folder: Path) -> None:
    assert found(folder)["first-order-adamw"].rank == 1.0
    cell_path(folder, "sst2", "first-order-adamw", "seed", 2).write_text("{broken")
    assert [*found(folder)][-1] == "first-order-adamw"
    note = rivals.table(Analysis(Comparison(folder), "loss")).note
    assert "first-order-adamw: some runs are missing or cannot be read, so that averages are over" in note
    cell_path(folder, "sst2", "first-order-adamw", "seed", 2).unlink()
    assert [*found(folder)][-1] == "first-order-adamw"
    cell_path(folder, "sst2", "skip-feedback", "seed", 2).unlink()
    assert next(iter(found(folder))) == "first-order-adamw"  # no other column with gradients has the run any more


def test_a_column_without_runs_takes_no_rank_from_the_others(folder: Path) -> None:
    """An unfinished comparison: fzoo is asked for and has none yet. mezo, the first of the grid, is the worst."""
    columns = [{"name": name, "optimizer": name} for name in (*FINALS, "fzoo")]
    (folder / "grid.yaml").write_text(yaml.safe_dump({"tasks": ["sst2"], "columns": columns, "seeds": 3}))
    by_name = found(folder)
    assert [by_name[name].rank for name in FINALS] == pytest.approx([(3 + 2.5 + 2) / 3, (2 + 2.5 + 3) / 3, 1])
    assert by_name["fzoo"].rank is None
    report = build(Comparison(folder))
    made = {table.name: table for table in report.tables}
    assert "the best of 3 (without fzoo, for want of a run" in made["rivals"].note
    assert made["tests-best"].title == "Paired with first-order-adamw, by loss"


def test_without_a_pair_that_all_have_there_is_no_order_and_no_best(folder: Path) -> None:
    cell_path(folder, "sst2", "mezo", "seed", 0).unlink()
    for seed in (1, 2):
        cell_path(folder, "sst2", "skip-feedback", "seed", seed).unlink()
    assert {rival.rank for rival in found(folder).values()} == {None}
    made = {table.name: table for table in build(Comparison(folder)).tables}
    assert "there are no ranks" in made["rivals"].note and "tests-best" not in made
