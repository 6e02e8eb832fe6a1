"""Grids on a local cluster of ray: a killed worker's run is repeated; results are those of the default engine, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from metazo.comparisons import cluster as cluster_module
from metazo.comparisons.cell import Job, configuration
from metazo.comparisons.cluster import RayPool
from metazo.comparisons.compare import compare
from metazo.comparisons.grid import Grid, Run
from metazo.comparisons.results import Result
from metazo.errors import UserError
from metazo.settings import build
from tests.comparisons.finished import read_results

GRID = {
    "model": "pico", "tasks": ["pico_sentiment"], "budget": 60, "seeds": 2, "workers": 2, "lrs": [1e-4],
    "columns": ["zero-shot", {"name": "mezo", "lrs": [1e-3, 3e-3]}, "lozo"], "extensions": 1,
    "config": {"train_examples": 32, "dev_examples": 16, "test_examples": 16, "max_length": 48, "batch_size": 4,
               "eval_every": 10},
}  # fmt: skip


def grid(out: Path, **extra) -> Grid:
    return build(Grid, GRID, {"out": out}, extra)


def figures(out: Path) -> dict:
    """What was computed: every number of every run that is no time, no memory and no fact of the machine."""
    found = {}
    for result in read_results(out):
        info = result.run_info
        curve = [{k: v for k, v in point.items() if k != "seconds"} for point in result.train_info["curve"]]
        place = (info["task"], info["column"], info["kind"], info["seed"], info["lr"])
        found[place] = (info["status"], info["key"], curve, result.metrics, result.train_info["forwards"])
    return found


def test_without_ray_one_sentence_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        UserError, match=r"on a cluster of ray need ray, which is not installed: pip install 'metazo\[ray\]'"
    ):
        compare(grid(tmp_path / "out", engine="ray"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"gpus_per_run": 1}, "`gpus_per_run` is for `engine` ray"),
        ({"gpus_per_run": 1.5, "engine": "ray"}, "is a whole number, or a fraction from 0 to 1, not 1.5"),
        ({"gpus_per_run": -1, "engine": "ray"}, "not -1"),
        ({"cpus_per_run": 0}, "`cpus_per_run` must be at least 1, not 0"),
        ({"engine": "dask"}, "engine"),
    ],
)
def test_settings_that_no_engine_has(tmp_path, extra, words):
    with pytest.raises(UserError, match=words):
        grid(tmp_path / "out", **extra)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict:
    """The figures of the default engine."""
    pytest.importorskip("ray", reason="ray is not installed (pip install 'metazo[ray]')")
    out = tmp_path_factory.mktemp("plain") / "out"
    compare(grid(out))
    return figures(out)


class Killer(threading.Thread):
    """Kills one process of this machine's cluster as soon as it is in the middle of a run."""

    def __init__(self, out: Path):
        super().__init__(daemon=True)
        self.out, self.killed, self.over = out, None, threading.Event()

    def run(self) -> None:
        while self.killed is None and not self.over.is_set():
            if any((self.out / "running").glob("*mezo*/metrics.jsonl")):
                for process in psutil.Process().children(recursive=True):
                    with_name = "".join(process.cmdline()) if process.is_running() else ""
                    if with_name.startswith("ray::_task"):
                        os.kill(process.pid, signal.SIGKILL)
                        self.killed = process.pid
                        break
            time.sleep(0.02)


def test_a_worker_that_is_killed_in_mid_grid_changes_no_result(plain, tmp_path):
    killer = Killer(tmp_path / "out")
    killer.start()
    try:
        count = compare(grid(tmp_path / "out", engine="ray"))
    finally:
        killer.over.set()
        killer.join()
    assert killer.killed is not None and not psutil.pid_exists(killer.killed)
    assert count["failed"] == 0 and figures(tmp_path / "out") == plain
    assert not (tmp_path / "out" / "running").exists()
    again = compare(grid(tmp_path / "out", engine="ray"))
    assert again["kept"] == again["runs"] == count["runs"]


def test_a_run_that_fits_on_no_node_is_refused(plain, tmp_path):
    with pytest.raises(
        UserError, match="no node of the cluster has the 1 CPUs and 8 GPUs of a run; lower `cpus_per_run`"
    ):
        compare(grid(tmp_path / "out", engine="ray", gpus_per_run=8, cpus_per_run=1))


@pytest.mark.parametrize(
    ("address", "words"), [("auto", "Could not find any running Ray instance"), ("127.0.0.1:9", "Connection refused")]
)
def test_a_cluster_that_cannot_be_reached(plain, tmp_path, monkeypatch, address, words):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"`engine` ray: the cluster cannot be used: .*{words}"):
        compare(grid(tmp_path / "out", engine="ray"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster that the caller has started, which a comparison uses and leaves alone."""
    ray = pytest.importorskip("ray", reason="ray is not installed (pip install 'metazo[ray]')")
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=cluster_module.STORE)
    yield ray
    ray.shutdown()


def test_parts_and_engines_continue_each_other(plain, cluster, tmp_path):
    out = tmp_path / "out"
    compare(grid(out, engine="ray"), part="0/2")
    first = figures(out)
    assert 0 < len(first) < len(plain) and all(plain[place] == first[place] for place in first)
    count = compare(grid(out))  # the default engine does the rest
    assert count["kept"] == len(first) and figures(out) == plain
    shutil.rmtree(out / "cells" / "pico_sentiment" / "lozo")
    assert compare(grid(out, engine="ray"))["kept"] == len(plain) - 2
    assert figures(out) == plain and cluster.is_initialized()


def _job(out: Path, **config) -> Job:
    settings = Run("pico_sentiment", grid(out).resolved[1], "seed", 0, 1e-4, 8).config(grid(out), out / "run")
    settings = replace(settings, **config)
    info = {"trained_weights": 0, "configuration": configuration(settings), "status": "finished", "reason": None}
    return Job(settings, info, trains=True)


def collected(pool: RayPool, job: Job) -> Result:
    pool.submit(job)
    assert [each for each, _ in pool.running] == [job]
    until = time.monotonic() + 200
    while not (done := pool.collect(1.0)):
        assert time.monotonic() < until
    ((found, result),) = done
    assert found is job and result is not None and not pool.running
    return result


def test_a_run_whose_worker_always_dies_has_failed_and_the_next_goes_on(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_module, "RETRIES", 1)
    lines = (
        "import os, pathlib\n\ndef die(model, batch):\n    open({!r}, 'a').write('x')\n    os.kill(os.getpid(), {})\n"
    )
    (tmp_path / "die.py").write_text(lines.format(str(tmp_path / "deaths"), int(signal.SIGKILL)))
    with RayPool(1, 1, 0, print) as pool:
        result = collected(pool, _job(tmp_path, objective=f"{tmp_path / 'die.py'}:die"))
        assert result.run_info["status"] == "failed"
        assert "(WorkerCrashedError, 1 retries)" in result.run_info["reason"]
        assert (tmp_path / "deaths").read_text() == "xx"  # the run and its repetition
        assert collected(pool, _job(tmp_path)).finished


def test_a_worker_that_is_asked_to_stop_is_repeated(cluster, tmp_path):
    """As a scheduler does that takes a machine away."""
    lines = (
        "import os, pathlib, signal\n\ndef stop(model, batch):\n    mark = pathlib.Path({!r})\n    if not mark.exists():\n"
        "        mark.touch()\n        os.kill(os.getpid(), signal.SIGTERM)\n    return batch.loss(model)\n"
    )
    (tmp_path / "stop.py").write_text(lines.format(str(tmp_path / "asked")))
    with RayPool(1, 1, 0, print) as pool:
        result = collected(pool, _job(tmp_path, objective=f"{tmp_path / 'stop.py'}:stop"))
    assert (tmp_path / "asked").exists() and result.finished and result.train_info["forwards"] == 8


def test_a_run_has_the_threads_the_folder_and_the_methods_of_its_caller(cluster, tmp_path, monkeypatch):
    (tmp_path / "no_method.py").write_text("")
    (tmp_path / "look.py").write_text(
        "import os\n\ndef note(model, batch):\n    with open('seen', 'w') as file:\n"
        "        file.write(os.environ['METAZO_METHODS'] + ' ' + os.environ['MKL_NUM_THREADS'])\n    return batch.loss(model)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METAZO_METHODS", str(tmp_path / "no_method.py"))
    with RayPool(1, 2, 0, print) as pool:
        result = collected(pool, _job(tmp_path, objective="look.py:note"))
    assert result.finished and result.run_info["machine"]["threads"] == 2
    assert (tmp_path / "seen").read_text() == f"{tmp_path / 'no_method.py'} 2"
