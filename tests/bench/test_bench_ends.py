"""metazo bench: what it says at its end, after a signal, of a file that it cannot add to, and of threads."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from metazo.bench import along_training, measurements, render, suites
from metazo.bench.timing import spread
from metazo.errors import UserError
from tests.bench.test_bench import metazo, processor


def _one(environment: dict, suites: object) -> str:
    return json.dumps({"format": 2, "processors": [{"environment": environment, "suites": suites}]})


WHOLE = dict.fromkeys(("cpu", "device", "dtype", "python", "torch", "transformers", "numba"), "a") | {"cores": 2}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (_one({}, {"steps": 1}), "`cpu` of `environment` is None"),
        (_one(WHOLE | {"torch": 2}, {}), "`torch` of `environment` is 2"),
        (_one(WHOLE, {"steps": 1}), "suite steps is 1"),
        (_one(WHOLE, {"steps": {"one": []}}), r"steps/one is \[\]"),
        (_one(WHOLE, {"steps": {"one": {"date": "", "load": [], "rows": 1}}}), "`rows` of steps/one is 1"),
        (
            _one(WHOLE, {"steps": {"one": {"date": "", "load": [], "rows": [{}]}}}),
            "`case` of a row of steps/one is None",
        ),
        (
            _one(WHOLE, {"steps": {"one": {"date": "", "load": [], "rows": [{"case": "a", "ratio": {}}]}}}),
            "`median` of `ratio` of a in steps/one is None",
        ),
    ],
)
def test_figures_that_no_table_can_show_are_refused_before_anything_is_measured(text: str, found: str, tmp_path: Path):
    """The bench measured, and ended in a KeyError when it made the tables."""
    (tmp_path / "speed.json").write_text(text)
    with pytest.raises(UserError, match=f"cannot be read as figures of metazo bench: {found}"):
        suites.run([suites.Part("steps", "one", lambda tick: pytest.fail("measured"))], tmp_path, suites.Settings(True))


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch):
    """Stands for the suites of the command line."""

    def given(*made: suites.Part) -> None:
        monkeypatch.setattr(suites, "parts", lambda settings: list(made))

    return given


def kernel(tick) -> suites.Rows:
    return [{"case": "a", "dtype": "float32", "rate": spread([1.0])}]


def test_the_end_names_the_files_that_were_written(parts, tmp_path: Path):
    """It named speed.png, which is drawn of steps and scaling alone."""
    (tmp_path / "speed.png").write_bytes(b"of an earlier bench")
    parts(suites.Part("kernels", "1-thread", kernel))
    done = metazo("bench", "--quick", "--out", str(tmp_path))
    assert done.code == 0 and f"speed.json and speed.md are in {tmp_path}" in done.out and "png" not in done.out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_with_a_sentence(number: signal.Signals, code: int, parts, tmp_path: Path):
    def stop(tick) -> suites.Rows:
        os.kill(os.getpid(), number)
        return kernel(tick)

    parts(*(suites.Part("kernels", name, run) for name, run in (("1-thread", kernel), ("2-threads", stop))))
    before = signal.signal(
        signal.SIGTERM, lambda *_: None
    )  # by default it would end the tests if bench did not hear it
    try:
        done = metazo("bench", "--quick", "--out", str(tmp_path))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done.code == code
    assert f"stopped: 1 of 2 parts are in {tmp_path}; name the rest with --suite." in " ".join(done.error.split())
    (result,) = measurements.read(tmp_path / "speed.json")["processors"]
    assert list(result["suites"]["kernels"]) == ["1-thread"]


def test_a_signal_ends_a_measurement_of_cosines_with_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(along_training, "run", lambda out, quick: os.kill(os.getpid(), signal.SIGTERM) or [])
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        done = metazo("bench", "--quick", "--suite", "feedback", "--out", str(tmp_path))
    finally:
        signal.signal(signal.SIGTERM, before)
    said = " ".join(done.error.split())
    assert done.code == 143 and "stopped: SIGTERM before all cosines were measured; start it again." in said


def test_the_notes_name_threads_that_are_not_one_per_core():
    there = processor("AMD EPYC", 1.5)
    (part,) = there["suites"]["steps"].values()
    result = {"format": 2, "processors": [there]}
    assert "2 cores, float32" in render.sentence(result)
    part["threads"] = 2
    there["suites"]["kernels"] = {"1-thread": part | {"threads": 1}}  # its name says with how many it was measured
    assert "2 cores, float32" in render.sentence(result)
    there["suites"]["steps"]["134M-8x64"] = part | {"threads": 1}
    there["suites"]["scaling"] = {name: part | {"threads": 1} for name in ("1M-1x32", "10M-1x32")}
    there["suites"]["meta"] = {"134M-1x32": part | {"threads": 4}}
    assert "2 cores (1 thread in steps/134M-8x64, scaling; 4 threads in meta), float32" in render.sentence(result)
