"""A real grid on the embedded model, by the command line and by Python; interruptions, kills, and a full disk."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer
from typer.testing import CliRunner

from metazo.comparisons import cell
from metazo.comparisons.cell import NO_SPACE, Job, configuration, status_of
from metazo.comparisons.compare import _Comparison, compare
from metazo.comparisons.examine import examine, plan
from metazo.comparisons.grid import Grid, Run, pairs_of
from metazo.comparisons.pool import Pool
from metazo.comparisons.results import Result, read_search
from metazo.errors import UserError
from metazo.io.lock import FolderLock
from metazo.io.terminal import Console
from metazo.runs.config import FinetuneConfig
from metazo.runs.folder import RunFolder
from metazo.runs.resources import require_space
from metazo.settings import build
from metazo_cli.compare import command
from tests import warm
from tests.comparisons.finished import read_results
from tests.io.test_lock import named

CONFIG = {
    "train_examples": 32,
    "dev_examples": 16,
    "test_examples": 16,
    "max_length": 48,
    "batch_size": 4,
    "eval_every": 4,
}
TINY: dict[str, Any] = {
    "tasks": ["pico_sentiment", "pico_topic"], "budget": 12, "seeds": 2, "workers": 1, "config": CONFIG,
    "columns": ["zero-shot", {"name": "mezo", "lrs": [1e-3]},
                {"name": "sgd", "optimizer": "first-order-sgd", "lrs": [1e-3, 1e-2]}],
    "extensions": 1,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small(tiny: Callable[[str], Path]) -> None:
    """Comparisons are of a model of two layers, unless a test needs runs that take time or space."""
    TINY["model"] = str(tiny("llama"))


def start(*arguments: object) -> warm.Process:
    return warm.Process("metazo", *arguments)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The results of the tiny grid, by one command."""
    out = tmp_path_factory.mktemp("compare")
    (out / "tiny.yaml").write_text(json.dumps(TINY | {"seeds": 9}))
    process = start("compare", out / "tiny.yaml", "--seeds=2", "--workers=2", f"--out={out / 'results'}")
    shown, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    assert "metazo report" in shown
    return out / "results"


@pytest.fixture
def copy(done, tmp_path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "results"))


def grid(out: Path, **extra) -> Grid:
    return build(Grid, TINY, {"out": out}, extra)


def cells(out: Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and content of every result."""
    return {str(p.relative_to(out)): (p.stat().st_mtime_ns, p.read_bytes()) for p in (out / "cells").rglob("*.json")}


def test_every_run_of_the_grid_is_there_and_complete(done):
    results = list(read_results(done))
    assert {r.run_info["status"] for r in results} == {"finished"} and not (done / "running").exists()
    reported = [
        (r.run_info["task"], r.run_info["column"], r.run_info["seed"]) for r in results if r.run_info["kind"] == "seed"
    ]
    assert len(set(reported)) == len(reported) == 2 * 3 * 2
    for result in results:
        info, train, metrics = result.run_info, result.train_info, result.metrics
        assert info["configuration"]["seed"] == info["seed"] and set(metrics) == {"before", "dev", "test", "majority"}
        points = [point["forwards"] for point in train["curve"]]
        if info["column"] == "zero-shot":
            assert points == [0] and metrics["dev"] == metrics["before"] and info["lr"] is None
        else:
            assert points[0] == 0 and points[-1] == train["forwards"] == 12 and train["peak_memory_bytes"] > 5e5
            assert train["seconds"] > 0 and metrics["dev"]["loss"] == train["curve"][-1]["dev"]["loss"]
        if info["kind"] == "seed":
            assert 0.2 < metrics["majority"]["test"] < 1 and 0 <= metrics["test"]["accuracy"] <= 1
    assert str(done) not in "".join(path.read_text() for path in (done / "cells").rglob("*.json"))


def test_a_search_is_on_other_seeds_and_says_what_it_cost(done):
    searches = read_search(done)
    for columns in searches.values():
        sgd, mezo = columns["sgd"], columns["mezo"]
        assert sgd.runs == len(sgd.losses) >= 2 and sgd.forwards == 12 * sgd.runs and min(sgd.seeds) >= 1000
        tried = {float(lr): loss for lr, loss in sgd.losses.items()}
        assert sgd.lr == min(tried, key=lambda lr: tried[lr])
        assert sgd.at_boundary == (sgd.lr in (min(tried), max(tried)))
        assert (mezo.lr, mezo.runs, "zero-shot" in columns) == (1e-3, 0, False)  # a single rate needs no search
    chosen = {r.run_info["lr"] for r in read_results(done, "seed") if r.run_info["column"] == "sgd"}
    assert chosen == {columns["sgd"].lr for columns in searches.values()}


def test_what_is_finished_is_not_run_again(copy):
    before = cells(copy)
    counts = compare(grid(copy))
    assert counts["kept"] == counts["runs"] == len(before) and cells(copy) == before


def test_one_seed_one_result(copy):
    """The same runs in other workers, in another order: bit-identical numbers."""
    again = copy.parent / "again"
    compare(grid(again, tasks=["pico_sentiment"], columns=[TINY["columns"][1]], seeds=1, workers=1))
    name = Path("cells/pico_sentiment/mezo/seed-0.json")
    first, second = Result.load(copy / name), Result.load(again / name)
    assert first.metrics == second.metrics and first.run_info["key"] == second.run_info["key"]
    losses = [[(p["step"], p["train_loss"], p["dev"]) for p in r.train_info["curve"]] for r in (first, second)]
    assert losses[0] == losses[1]


def test_a_changed_grid_runs_what_changed_and_puts_the_rest_aside(copy):
    before = cells(copy)
    diverging = {"name": "mezo", "lrs": [1e38]}
    counts = compare(grid(copy, columns=["zero-shot", diverging], tasks=["pico_topic"], time_budget="reference"))
    assert counts == {"runs": 4, "kept": 2, "failed": 0, "diverged": 2, "not_run": 0, "unsettled": 0}
    aside = {str(path.relative_to(copy / "superseded")) for path in (copy / "superseded").rglob("*.json")}
    assert {f"{name.rpartition('-')[0]}.json" for name in aside} == {name.removeprefix("cells/") for name in before} - {
        f"pico_topic/zero-shot/seed-{seed}.json" for seed in (0, 1)
    }
    for seed in (0, 1):
        result = Result.load(copy / f"cells/pico_topic/mezo/seed-{seed}.json")
        reason = result.run_info["reason"]
        assert result.run_info["status"] == "diverged" and "Diverged" in reason
        assert "replay" not in reason and "`out`" not in reason and "running" not in reason  # the run's folder is gone
        assert set(result.metrics.values()) == {None} and result.train_info["curve"]
        # what it took until then, which is a search's cost, and not what the last evaluation says
        assert result.train_info["forwards"] == 2 * result.train_info["steps"] > 0
    assert compare(grid(copy, columns=["zero-shot", diverging], tasks=["pico_topic"]))["kept"] == 4  # a failure is kept
    assert compare(grid(copy))["kept"] == len(before)  # and the results that were put aside are used again
    assert {name: text for name, (_, text) in cells(copy).items()} == {name: text for name, (_, text) in before.items()}


@pytest.mark.parametrize("part", [None, "0/1"])
def test_a_result_of_another_model_configuration_or_task_definition_is_not_used_again(copy, part):
    """Weights and rows, and so the key, may be the same."""
    path = copy / "cells/pico_topic/mezo/seed-1.json"
    right = path.read_bytes()
    other = Result.load(path)
    other.run_info["inputs"], other.metrics["dev"]["loss"] = "0" * 64, 0.125
    other.save(path)
    count = compare(grid(copy), part=part)
    assert count["runs"] - count["kept"] == 1
    assert Result.load(path).metrics == json.loads(right)["metrics"]
    (aside,) = (copy / "superseded/pico_topic/mezo").glob("seed-1-*.json")
    assert Result.load(aside).metrics == other.metrics


def test_killed_stopped_and_continued(tmp_path):
    out = tmp_path / "results"
    settings = grid(out, model="pico", tasks=["pico_topic"], columns=[TINY["columns"][1]], seeds=6)
    settings.write()
    process = start("compare", out / "grid.yaml")
    wait_for(process, lambda: len(cells(out)) >= 2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=20)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert children and not alive  # workers end with the process that started them
    first = cells(out)
    process = start("compare", out / "grid.yaml")
    wait_for(process, lambda: len(cells(out)) > len(first))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command continues" in " ".join(errors.split())
    second = cells(out)
    assert first.items() <= second.items() and 3 <= len(second) < 6
    counts = compare(settings)
    assert (counts["runs"], counts["kept"], counts["failed"], counts["diverged"]) == (6, len(second), 0, 0)
    assert second.items() <= cells(out).items()


def wait_for(process: warm.Process, what: Callable[[], object]) -> None:
    until = time.monotonic() + 280
    while not what():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.02)


def test_two_at_once_are_refused(copy):
    with FolderLock(copy), pytest.raises(UserError, match=f"in use by {named(os.getpid(), ' on ')}"):
        compare(grid(copy))


def test_a_worker_that_is_asked_to_stop_leaves_its_job_unfinished(tmp_path):
    """A worker is stopped at its start, during its imports, and in the middle of a run; no search uses its cell."""
    settings = grid(tmp_path, budget=10**7)
    with Pool(1, 1) as pool:
        for seed, number in enumerate((signal.SIGTERM, signal.SIGINT)):
            job = _job(settings, seed, 10**7)
            pool.submit(job)
            if seed:
                until = time.monotonic() + 120
                while not RunFolder.read_records(job.config.out):
                    assert time.monotonic() < until
                    time.sleep(0.02)
            process = pool.workers[0].process
            os.kill(process.pid or 0, number)
            if number == signal.SIGINT:  # Ctrl-C reaches workers too, and the parent decides about it
                time.sleep(0.3)
                assert process.is_alive()
                os.kill(process.pid or 0, signal.SIGTERM)
            ((found, result),) = pool.collect(60)
            assert found is job and result is None and not job.config.out.exists()


def test_a_process_warms_up_before_its_first_job_also_if_that_does_not_train(tmp_path, monkeypatch):
    """What the process takes once, such as kernels, is no memory or time of a column."""
    told, warm_up = [], cell.warm_up
    monkeypatch.setattr(cell, "_warm", False)
    monkeypatch.setattr(cell, "warm_up", lambda job: (told.append(job), warm_up(job)))
    config = build(FinetuneConfig, {"model": TINY["model"], "task": "pico_sentiment", "out": tmp_path / "run"}, CONFIG)
    job = Job(config, {"trained_weights": 0, "status": "finished", "reason": None}, trains=False)
    assert [cell.work(job).finished for _ in range(2)] == [True, True] and told == [job]


def test_a_killed_worker_is_a_failed_run_and_the_next_goes_on(tmp_path):
    settings = grid(tmp_path, budget=10**7)
    jobs = [_job(settings, seed, forwards) for seed, forwards in ((0, 10**7), (1, 8))]
    with Pool(1, 1) as pool:
        pool.submit(jobs[0])
        until = time.monotonic() + 120
        while not RunFolder.read_records(jobs[0].config.out):
            assert time.monotonic() < until
            time.sleep(0.02)
        os.kill(pool.workers[0].process.pid or 0, signal.SIGKILL)
        ((job, result),) = pool.collect(30)
        assert job is jobs[0] and result.run_info["status"] == "failed" and "SIGKILL" in result.run_info["reason"]
        assert result.train_info["curve"][0]["step"] == 0 and not job.config.out.exists()
        pool.submit(jobs[1])
        ((job, result),) = pool.collect(120)
        assert result.finished and result.train_info["forwards"] == 8 and result.train_info["notes"] == []


def _job(settings: Grid, seed: int, forwards: int) -> Job:
    config = Run("pico_topic", settings.resolved[1], "seed", seed, 1e-4, forwards).config(
        settings, settings.out / str(seed)
    )
    info = {"trained_weights": 0, "configuration": configuration(config), "status": "finished", "reason": None}
    return Job(config, info, trains=True)


def test_a_disk_without_space_is_told_from_other_failures(tmp_path):
    """The refusal before a run, and what libraries make of a full disk: its name in a text, or a cause."""
    with pytest.raises(UserError) as refused:
        require_space(tmp_path, 1 << 62, "The run")
    full, wrapped = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), UserError("The model cannot be written.")
    wrapped.__cause__ = full
    for error in (refused.value, full, wrapped, OSError("I/O error: No space left on device (os error 28)")):
        assert status_of(error) == NO_SPACE
    assert status_of(OSError(errno.EIO, "gone")) == status_of(UserError("bad")) == "failed"


def test_a_full_disk_stops_the_comparison_and_the_same_call_continues(tmp_path):
    """A real small file system; skipped if none can be mounted."""
    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(small)], capture_output=True)
    if mount.returncode:
        pytest.skip("cannot mount a small file system")
    try:
        (small / "ballast").write_bytes(b"0" * 26_000_000)
        settings = grid(
            small / "results",
            model="pico",
            columns=TINY["columns"][:2],
            tasks=["pico_topic"],
            workers=1,
            keep_models=True,
        )
        for _ in range(2):
            with pytest.raises(UserError, match=r"mezo, lr 0.001, seed 0: .*free\); make room"):
                compare(settings)
        assert {result.run_info["column"] for result in read_results(small / "results")} == {"zero-shot"}
        (small / "ballast").unlink()
        counts = compare(settings)
        assert (counts["runs"], counts["kept"], counts["failed"]) == (4, 2, 0)
        assert (small / "results/models/pico_topic/mezo/seed-1/config.json").is_file()
    finally:
        gc.collect()  # errors keep files open
        subprocess.run(["umount", str(small)], check=True)


def test_dry_run_writes_nothing(tmp_path):
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    arguments = [str(tmp_path / "tiny.yaml"), f"--out={tmp_path / 'results'}", "--dry-run", "--json"]
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert plan["seconds"] > 0 and plan["runs"].startswith("4 of the searches") and not (tmp_path / "results").exists()
    assert plan["learning rates"]["pico_topic, sgd"] == [1e-3, 1e-2]
    done = CliRunner().invoke(app, [*arguments, "--part=5/6"])
    part = json.loads(done.stdout)
    assert (part["columns"], part["tasks"], part["seconds"] < plan["seconds"]) == ("sgd", "pico_topic", True)
    assert [*part["learning rates"]] == ["pico_topic, sgd"]
    assert "give INDEX/COUNT" in str(CliRunner().invoke(app, [*arguments, "--part=99/3"]).exception)
    part = json.loads(CliRunner().invoke(app, [*arguments, "--part=6/7"]).stdout)  # there are six pairs
    assert (part["columns"], part["seconds"]) == ("", 0)


def test_the_time_left_is_that_of_columns_that_train(tmp_path):
    """Work that a column without training never does would be left at the end."""
    found = grid(tmp_path, tasks=["pico_topic"], columns=["zero-shot", {"name": "mezo", "lrs": [1e-3]}])
    comparison = _Comparison(found, examine(found), Console(), False, pairs_of(found, None)[0], None)
    assert comparison._size() == (4, 2 * 12)


def test_the_planned_disk_has_the_models_that_are_kept(tmp_path):
    found = grid(tmp_path, tasks=["pico_topic"], columns=["zero-shot", "mezo"], seeds=20, keep_models=True)
    size = sum(path.stat().st_size for path in Path(TINY["model"]).iterdir())
    assert 0.95 * 20 * size < plan(found, examine(found))["bytes on disk"] < 1.05 * 20 * size + 10**6


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"tasks": ["pico_sentimant"]}, "did you mean pico_sentiment"),
        ({"tasks": ["pico_topic", "pico_topic"]}, "is given twice"),
        (
            {"columns": [{"name": "a", "optimizer": "lozo", "options": {"rank": 0}}]},
            "Column 'a' on pico_sentiment: `rank` must",
        ),
        ({"columns": ["fzoo"], "budget": 3}, "3 forward passes do not pay for one step (9)"),
        ({"config": {**CONFIG, "dev_examples": 0}}, "no dev examples"),
        (
            {"columns": TINY["columns"][2:], "search_config": {"dev_examples": 0}},
            "Column 'sgd' on pico_sentiment, with `search_config`: there are no dev examples",
        ),
        (
            {"columns": TINY["columns"][2:], "search_config": {"accumulate": 13}},
            "with `search_config`: 12 forward passes do not pay for one step",
        ),
        (
            {"columns": TINY["columns"][2:], "search_config": {"eval_every": 0}},
            "Column 'sgd', with `search_config`: `eval_every` must be at least 1, not 0",
        ),
        ({"columns": [{"name": "a", "options": {"dtype": "float8"}}]}, "Column 'a': `dtype` is 'float8'"),
        (
            {"columns": ["mezo", {"name": "a", "options": {"test_examples": 10}}]},
            "Column 'a' on pico_sentiment: its 10 test rows are not the 16 of column 'mezo'",
        ),
        (
            {"columns": ["mezo", {"name": "a", "options": {"dev_examples": 20}}]},
            "Column 'a' on pico_sentiment: its 20 dev rows are not the 16 of column 'mezo'",
        ),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_written(tmp_path, extra, words):
    with pytest.raises(UserError) as error:
        compare(grid(tmp_path / "results", **extra))
    assert words in str(error.value) and not (tmp_path / "results").exists()


def test_columns_that_leave_out_other_rows_are_refused(tmp_path):
    """Rows with choices that are too long for one column are left out there alone."""
    rows = [{"c": "x", "a": "good " * (30 if n % 2 else 3), "b": f"bad {n}", "label": n % 2} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "{name: long, kind: choice, prompt: 'Q {c}', choices: [a, b], files: {train: rows.jsonl}, context: c}"
    (tmp_path / "task.yaml").write_text(text)
    columns = ["mezo", {"name": "short", "optimizer": "mezo", "options": {"max_length": 24}}]
    with pytest.raises(UserError, match=r"Column 'short' on .*: its \d+ dev rows are not the 8 of column 'mezo'"):
        compare(
            grid(tmp_path / "out", tasks=[str(tmp_path / "task.yaml")], columns=columns, lrs=[1e-3],
                 config={**CONFIG, "max_length": 200, "train_examples": 16, "dev_examples": 8, "test_examples": 8})
        )  # fmt: skip


def test_a_grid_is_taken_by_its_name_or_file(tmp_path):
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    for given in ("grid-pico", tmp_path / "tiny.yaml"):
        with pytest.raises(UserError, match="`part` is 'x'"):  # of a grid that was read
            compare(given, part="x")
    with pytest.raises(UserError, match="recipe grid-pic is not a file"):
        compare("grid-pic")
    with pytest.raises(UserError, match="`grid` is a metazo.Grid, its YAML file or the name of one, not 5"):
        compare(5)  # type: ignore[arg-type]


def test_parts_of_a_grid_divide_it_and_a_call_without_part_does_the_rest(copy):
    """Every second pair of task and column; the third missing run is left to the whole call."""
    gone = [copy / "cells" / name for name in ("pico_sentiment/zero-shot", "pico_sentiment/mezo", "pico_topic/mezo")]
    files = [path / "seed-1.json" for path in gone]
    before, searches = cells(copy), read_search(copy)
    for file in files:
        file.unlink()
    (copy / "search.json").unlink()
    with FolderLock(copy / "parts" / "1-of-2"):
        for part in (None, "1/2", "01/02"):
            with pytest.raises(UserError, match="in use by (another )?process"):
                compare(grid(copy), part=part)
        assert compare(grid(copy), part="0/2")["runs"] - compare(grid(copy), part="0/2")["kept"] == 0
    assert [file.exists() for file in files] == [True, False, True]
    assert not (copy / "search.json").exists()
    with FolderLock(copy), pytest.raises(UserError, match="in use by (another )?process"):
        compare(grid(copy), part="1/2")
    count = compare(grid(copy))
    assert count["runs"] - count["kept"] == 1 and not (copy / "parts").exists()
    after = cells(copy)
    again = {str(file.relative_to(copy)) for file in files}
    assert {name for name in before if after[name] != before[name]} == again and read_search(copy) == searches
    for name in again:
        found, wanted = (json.loads(each[name][1]) for each in (after, before))
        assert found["metrics"] == wanted["metrics"] and found["run_info"]["key"] == wanted["run_info"]["key"]


@pytest.mark.parametrize("part", ["2/2", "1", "a/b", "-1/2", "/"])
def test_a_part_that_does_not_exist_is_refused(tmp_path, part):
    with pytest.raises(UserError, match="give INDEX/COUNT"):
        compare(grid(tmp_path / "out"), part=part)
    assert not (tmp_path / "out").exists()
