"""Which runs a comparison does, which rate a search chooses and which results are kept, without models or training."""

from __future__ import annotations

import math
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from metazo.comparisons import compare as module
from metazo.comparisons.cell import NO_SPACE, Job
from metazo.comparisons.compare import compare
from metazo.comparisons.examine import Facts
from metazo.comparisons.grid import Grid
from metazo.comparisons.packed import pack
from metazo.comparisons.results import Result, read_search
from metazo.errors import UserError
from metazo.io.terminal import Console
from metazo.runs.interrupt import Interrupted
from metazo.settings import build
from metazo_cli.compare import command
from tests.comparisons.finished import read_results

GRID: dict[str, Any] = {"model": "pico", "tasks": ["pico_sentiment"], "columns": ["mezo"], "budget": 40, "seeds": 3}
Dev = Callable[[float], dict[str, float]]
Ends = Callable[[dict[str, Any]], str]


class Instant:
    """A pool whose runs end at once, with the scores that `dev` gives their learning rate.

    left: number of runs after which a worker is asked to stop; ends: the status of a run.
    """

    def __init__(self, dev: Dev, left: float, ends: Ends):
        self.dev, self.left, self.ends, self.jobs = dev, left, ends, []

    def __enter__(self) -> Instant:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    @property
    def idle(self) -> bool:
        return not self.jobs

    @property
    def running(self) -> list[tuple[Job, float]]:
        return [(job, 0.0) for job in self.jobs]

    def submit(self, job: Job) -> None:
        self.jobs.append(job)

    def collect(self, timeout: float) -> list[tuple[Job, Result | None]]:
        job, self.left = self.jobs.pop(), self.left - 1
        if self.left < 0:
            return [(job, None)]
        if job.keep is not None:
            job.keep.mkdir(parents=True, exist_ok=True)
            (job.keep / "rate").write_text(str(job.info["lr"]))
        job.info["status"] = self.ends(job.info)
        job.info["reason"] = None if job.info["status"] == "finished" else f"It has {job.info['status']}; do something."
        train = {"forwards": 40, "seconds": 1.0, "wall_seconds": 1.0, "curve": []}
        return [(job, Result(job.info, train, {"dev": self.dev(job.info["lr"])}))]


def best_at(best: float) -> Dev:
    return lambda lr: {"loss": abs(math.log10((lr or best) / best))}


SMALL = best_at(1e-3)


@pytest.fixture
def run(tmp_path, monkeypatch) -> Callable[..., dict[str, int]]:
    """Compare with runs that end at once, in one folder."""
    tuner: dict[str, str] = {}

    def examine(grid: Grid) -> dict[tuple[str, str], Facts]:
        rates = {column.name: column.lrs or grid.lrs or [1e-3] for column in grid.resolved}
        return {
            (task, name): Facts(lrs, 1, {}, "", None, 1.0, 0, 0, None, dict(tuner))
            for task in grid.tasks
            for name, lrs in rates.items()
        }

    def call(
        dev: Dev = SMALL,
        left: float = math.inf,
        part: str | None = None,
        ends: Ends = lambda info: "finished",
        console: Console | None = None,
        use: dict[str, str] | None = None,
        **extra,
    ) -> dict[str, int]:
        tuner.update(use or {})
        monkeypatch.setattr(module, "examine", examine)
        monkeypatch.setattr(module, "_pool", lambda grid, console: Instant(dev, left, ends))
        return compare(build(Grid, GRID, {"out": tmp_path}, extra), console, part=part)

    return call


def rates(out: Path, kind: str = "seed") -> dict[int, float]:
    """The learning rates of the results by seed."""
    return {result.run_info["seed"]: result.run_info["lr"] for result in read_results(out, kind)}


def test_a_column_that_waits_for_a_result_that_no_run_gives_is_an_error(run, monkeypatch):
    """Two runs of one path give one result, and the column must not vanish."""
    monkeypatch.setattr("metazo.comparisons.grid.read_rates", lambda where, lrs: lrs)
    with pytest.raises(RuntimeError, match="wait for a result that no run gives: 1"):
        run(lrs=[1e-3, 1e-3, 3e-3])


def test_every_run_has_a_folder_of_its_own(run, tmp_path, monkeypatch):
    """Also if names have hyphens: the first parts of a task and the last of a column may be exchanged."""
    tasks = [str(tmp_path / f"{name}.yaml") for name in ("t", "t-a")]
    for path in map(Path, tasks):
        path.write_text(f'name: {path.stem}\nkind: classification\nprompt: "{{text}}?"\nlabels: {{0: No, 1: Yes}}\n')
    monkeypatch.setattr(Instant, "idle", property(lambda pool: len(pool.jobs) < 4))
    columns = [{"name": name, "optimizer": "mezo"} for name in ("a-b", "b")]
    assert run(tasks=tasks, columns=columns, seeds=1)["runs"] == 4


def test_grids_that_alternate_get_their_results_back(run, tmp_path):
    """Each grid's results remain, however often another one took their place."""
    first, second = {"lrs": [1e-3]}, {"lrs": [1e-4]}
    for settings in (first, second, {"config": {"batch_size": 4}}):
        assert run(**settings)["kept"] == 0
    for settings in (first, second, first):
        assert run(**settings)["kept"] == 3 and set(rates(tmp_path).values()) == set(settings["lrs"])


def test_a_result_that_an_earlier_version_put_aside_is_found(run, tmp_path):
    run(lrs=[1e-3])
    run(lrs=[1e-4])
    (aside,) = (tmp_path / "superseded").rglob("seed-2-*.json")
    aside.rename(aside.with_name("seed-2.json"))
    assert run(lrs=[1e-3])["kept"] == 3


def test_results_of_another_use_of_the_tuner_are_put_aside_and_those_that_record_none_are_kept(run, tmp_path):
    first, second = {"trust": "a"}, {"trust": "b"}
    for use, kept in ((first, 0), (second, 0), (first, 3)):
        assert run(use=use)["kept"] == kept
    for path in (tmp_path / "cells").rglob("seed-*.json"):
        result = Result.load(path)
        assert result.run_info.pop("use") == first
        result.save(path)  # as an earlier version wrote it
    pack(tmp_path)
    assert run(use={"trust": "c"})["kept"] == 3


@pytest.mark.parametrize("part", [None, "0/1"])
@pytest.mark.parametrize(
    ("dev", "after", "runs"),
    [(SMALL, {"lrs": [1e-4]}, 1), (best_at(1e-4), {"lrs": [1e-3, 1e-4, 1e-5]}, 4)],
    ids=["another rate", "another search"],
)
def test_a_stopped_comparison_has_no_results_of_two_rates(run, tmp_path, part, dev, after, runs):
    run(lrs=[1e-3])
    with pytest.raises(Interrupted):
        run(dev, left=runs, part=part, **after)
    assert rates(tmp_path) == {0: 1e-4}
    assert run(dev, **after)["kept"] == runs and rates(tmp_path) == dict.fromkeys(range(3), 1e-4)


def test_a_stopped_comparison_has_no_longer_runs_of_another_rate(run, tmp_path):
    """All that finish before the time budget continue."""
    run(lrs=[1e-3], time_budget=2)
    assert rates(tmp_path, "time") == dict.fromkeys(range(3), 1e-3)
    with pytest.raises(Interrupted):
        run(left=1, lrs=[1e-4], time_budget=2)
    assert rates(tmp_path, "time") == {}


def test_longer_runs_of_another_time_budget_are_put_aside(run, tmp_path):
    """Every run takes a second. Within a budget that a run nearly uses up, no longer run may give the loss."""
    run(time_budget=2)
    longer = {path: path.read_bytes() for path in (tmp_path / "cells").rglob("time-*.json")}
    run(time_budget=1)
    assert len(longer) == 3 and not any(path.exists() for path in longer)
    with pytest.raises(Interrupted):
        run(left=1, time_budget=4)
    assert [result.run_info["budget"] for result in read_results(tmp_path, "time")] == [160]
    assert run(time_budget=2)["kept"] == 6 and {path: path.read_bytes() for path in longer} == longer


def test_a_search_chooses_by_the_objective_of_its_runs(run, tmp_path):
    """The loss is lowest at another rate."""
    dev: Dev = lambda lr: best_at(1e-3)(lr) | {"objective": abs(math.log10(lr / 1e-2)) - 5}  # noqa: E731
    run(dev, lrs=[1e-4, 1e-3, 1e-2], config={"objective": "accuracy"})
    search = read_search(tmp_path)["pico_sentiment"]["mezo"]
    assert (search.lr, search.losses["0.01"], search.at_boundary) == (1e-2, -5, False)
    assert set(rates(tmp_path).values()) == {1e-2}


def test_a_finished_run_whose_model_is_wanted_and_not_there_is_done_again(run, tmp_path):
    columns = ["mezo", "zero-shot"]  # which has no tuned model
    run(columns=columns)
    assert run(columns=columns, keep_models=True)["kept"] == 3
    assert len(list((tmp_path / "models/pico_sentiment/mezo").iterdir())) == 3
    assert run(columns=columns, keep_models=True)["kept"] == 6


def test_models_are_put_aside_and_come_back_with_their_results(run, tmp_path):
    def kept() -> set[str]:
        return {path.read_text() for path in (tmp_path / "models").rglob("rate")}

    run(lrs=[1e-3], keep_models=True)
    run(lrs=[1e-4], keep_models=True)
    assert kept() == {"0.0001"}
    assert run(lrs=[1e-3], keep_models=True)["kept"] == 3 and kept() == {"0.001"}
    assert run(lrs=[1e-4])["kept"] == 3 and kept() == {"0.0001"}


RATES = {"lrs": [1e-4, 1e-3, 1e-2]}


def at(rate: float, status: str) -> Ends:
    """Runs of the search at one rate do not finish."""
    return lambda info: status if (info["kind"], info["lr"]) == ("search", rate) else "finished"


@pytest.mark.parametrize("part", [None, "0/1"])
def test_a_search_with_a_failed_run_chooses_no_rate_and_the_next_call_repeats_the_run(run, tmp_path, part):
    """The rate of the failed run is the best. Each call tries it once; a column with a search that is whole is done."""
    columns = ["mezo", {"name": "fixed", "lrs": [1e-3]}]
    console = Console(record=True, file=StringIO(), width=500)
    for _ in range(2):
        count = run(ends=at(1e-3, "failed"), part=part, console=console, columns=columns, **RATES)
        assert (count["unsettled"], count["failed"], count["runs"]) == (1, 1, 3 + 3)
        assert {result.run_info["column"] for result in read_results(tmp_path, "seed")} == {"fixed"}
    assert count["kept"] == 5
    said = console.export_text()
    assert "incomplete: pico_sentiment, mezo: a run of the search failed" in said and "earlier calls" not in said
    assert not part or not (tmp_path / "search.json").exists()
    count = run(part=part, columns=columns, **RATES)
    assert (count["unsettled"], count["failed"], count["kept"], count["runs"]) == (0, 0, 5, 3 + 6)
    assert set(rates(tmp_path).values()) == {1e-3}
    if part is None:
        assert read_search(tmp_path)["pico_sentiment"]["mezo"].lr == 1e-3


@pytest.mark.parametrize("json", [[], ["--json"]])
def test_the_command_does_not_end_with_success_if_a_search_is_incomplete(run, tmp_path, json):
    app = typer.Typer()
    app.command()(command)
    for status, code, words in (("failed", 1, "Not finished: 1 incomplete search,"), ("finished", 0, "metazo report")):
        run(ends=at(1e-3, status), **RATES)
        done = CliRunner().invoke(app, [str(tmp_path / "grid.yaml"), *json])
        assert done.exit_code == code and (words in done.output or json), done.output
        assert ("metazo report" in done.output) is (not json and not code)


def test_a_search_with_a_failed_run_is_not_written_whatever_rate_is_best(run, tmp_path):
    for _ in range(2):
        assert run(ends=at(1e-2, "failed"), lrs=[1e-4, 1e-3, 1e-2], extensions=0)["unsettled"] == 1
        assert read_search(tmp_path) == {"pico_sentiment": {}} and rates(tmp_path) == {}


def test_results_are_put_aside_while_their_search_is_incomplete(run, tmp_path):
    run(lrs=[1e-3, 1e-4, 1e-5])
    assert run(best_at(1e-2), ends=at(1e-2, "failed"), lrs=[1e-3, 1e-2, 1e-1])["unsettled"] == 1
    assert read_search(tmp_path) == {"pico_sentiment": {}} and rates(tmp_path) == {}
    assert run(lrs=[1e-3, 1e-4, 1e-5])["kept"] == 4 + 3


def test_a_diverged_run_of_a_search_is_a_bad_rate_also_if_an_earlier_version_called_it_failed(run, tmp_path):
    count = run(best_at(1e-2), ends=at(1e-2, "diverged"), **RATES)
    assert count["unsettled"] == 0 and rates(tmp_path) == dict.fromkeys(range(3), 3e-3)
    path = next((tmp_path / "cells").rglob("search-0.01-*.json"))
    result = Result.load(path)
    result.run_info |= {
        "status": "failed",
        "reason": "The run stopped at step 118: the losses of 10 steps in a row were not",
    }
    result.save(path)
    assert run(best_at(1e-2), **RATES)["kept"] == count["runs"]


@pytest.mark.parametrize("part", [None, "0/1"])
def test_a_disk_without_space_stops_the_comparison_and_nothing_is_kept_of_the_run(run, tmp_path, part):
    with pytest.raises(UserError, match=r"search 1000: It has no space\); make room, and the same command continues"):
        run(ends=at(1e-3, NO_SPACE), part=part, **RATES)
    assert [result.run_info["lr"] for result in read_results(tmp_path)] == [1e-4]
    assert run(part=part, **RATES)["kept"] == 1


def test_runs_without_a_rate_are_not_run_and_not_said_to_be_finished_before(run, tmp_path):
    console = Console(record=True, file=StringIO(), width=500)
    for kept in (0, 2):
        count = run(ends=lambda info: "diverged", console=console, lrs=[1e-3, 1e-2], extensions=0)
        assert count == {"runs": 2, "kept": kept, "failed": 0, "diverged": 2, "not_run": 3, "unsettled": 0}
    assert "mezo: 3 not run: no learning rate of the search gave a finite loss" in console.export_text()
    (reason,) = {result.run_info["reason"] for result in read_results(tmp_path, "seed")}
    assert reason == "No learning rate of the search gave a finite loss on dev."


@pytest.mark.parametrize("part", [None, "0/1"])
def test_runs_of_a_search_that_it_no_longer_uses_are_put_aside(run, tmp_path, part):
    """Extensions choose rates that are in no list, and remain."""
    first = {"lrs": [1e-3, 1e-1], "ends": at(1e-1, "diverged")}
    run(**first)
    assert rates_tried(tmp_path) == {3e-4, 1e-3, 3e-3, 1e-1}
    run(part=part, **RATES)
    assert rates_tried(tmp_path) == {1e-4, 1e-3, 1e-2}
    assert run(part=part, lrs=[3e-3, 1e-2])["kept"] == 4 + 3 and rates_tried(tmp_path) == {3e-4, 1e-3, 3e-3, 1e-2}
    run(part=part, lrs=[1e-3])
    assert rates_tried(tmp_path) == set()
    assert run(part=part, **first)["kept"] == 4 + 3


def rates_tried(out: Path) -> set[float]:
    return {result.run_info["lr"] for result in read_results(out, "search")}


def test_a_part_of_a_changed_grid_puts_aside_what_is_not_of_it_in_its_own_pairs(run, tmp_path):
    """Of two columns the first is the part's; what is of the other is left to its own part, which may be running."""
    columns = [{"name": "mezo", "lrs": [1e-4, 1e-3]}, {"name": "lozo", "lrs": [1e-4, 1e-3]}]
    run(columns=columns)
    with pytest.raises(Interrupted):  # in its search
        run(left=0, part="0/2", columns=columns, budget=80)
    left = {result.run_info["column"] for result in read_results(tmp_path)}
    assert left == {"lozo"} and not (tmp_path / "search.json").exists()
    run(part="0/2", columns=columns, budget=80)
    run(part="1/2", columns=columns, budget=80, seeds=2)
    assert {result.run_info["budget"] for result in read_results(tmp_path)} == {80}
    assert set(rates(tmp_path)) == {0, 1, 2}
    assert run(columns=columns)["kept"] == 2 * (3 + 3) and len(read_search(tmp_path)["pico_sentiment"]) == 2


@pytest.mark.parametrize("part", [None, "0/1"])
def test_a_finished_comparison_keeps_its_reported_runs_if_a_failed_run_of_its_search_fails_again(run, tmp_path, part):
    """To earlier versions a failed run was a bad rate. Longer runs stay as well, and a rate that is left out settles it."""

    def reported() -> dict[Path, bytes]:
        kinds = ("seed-*", "time-*", "search.json")
        return {path: path.read_bytes() for kind in kinds for path in tmp_path.rglob(kind) if "aside" not in str(path)}

    run(ends=at(1e-2, "diverged"), time_budget=2, **RATES)
    (path,) = (tmp_path / "cells").rglob("search-0.01-*.json")
    result = Result.load(path)
    result.run_info |= {"status": "failed", "reason": "It has failed; do something."}
    result.save(path)
    before, console = reported(), Console(record=True, file=StringIO(), width=500)
    assert len(before) == 3 + 3 + 1
    for _ in range(2):
        count = run(ends=at(1e-2, "failed"), part=part, console=console, time_budget=2, **RATES)
        assert (count["unsettled"], count["failed"]) == (1, 1) and reported() == before
    said = "rate 0.001, stay. At rate 0.01 it failed as before, for the same reason; if it always does, give `lrs` without it"
    assert said in console.export_text()
    count = run(part=part, time_budget=2, lrs=[1e-4, 1e-3, 3e-3])
    assert count["unsettled"] == 0 and set(rates(tmp_path).values()) == {1e-3}


def test_a_part_of_an_unchanged_grid_keeps_the_searches_and_removes_them_if_it_finds_others(run, tmp_path):
    columns = [{"name": "mezo", "lrs": [1e-4, 1e-3, 1e-2]}, {"name": "lozo", "lrs": [1e-4, 1e-3, 1e-2]}]
    run(columns=columns)
    before = (tmp_path / "search.json").read_bytes()
    for part in ("0/2", "1/2", "0/2"):
        assert run(part=part, columns=columns)["kept"] == 3 + 3
        assert (tmp_path / "search.json").read_bytes() == before
    for path in (tmp_path / "cells").rglob("lozo/search-*.json"):
        path.unlink()
    run(best_at(3e-3), part="1/2", columns=columns)
    assert not (tmp_path / "search.json").exists()
    run(columns=columns)
    run(part="0/2", columns=columns, seeds=2)
    assert not (tmp_path / "search.json").exists()
