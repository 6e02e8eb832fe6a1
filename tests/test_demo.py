"""The demo's folder: an interrupted demo continues, and a former one is replaced wherever the folder is."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path

import pytest

from metazo import demo
from metazo.errors import UserError
from metazo.io.terminal import Console
from metazo.runs.interrupt import Interrupted

SMALL = {"model": "pico", "forwards": 6, "texts": 64, "examples": 4}


def test_an_interrupted_demo_continues_by_the_same_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real, calls = tmp_path / "my demo", demo.run_settings, []

    def run(config, console, plot):
        """Only the first two runs are real; the second is interrupted when it is called first."""
        name = config.out.name
        calls.append((name, config.resume))
        if calls == [("mezo", False), ("rms", False)]:
            config.out.mkdir(parents=True)
            raise Interrupted("SIGTERM after step 1 of 3", "SIGTERM")
        return real(config, console) if name == "mezo" else {"optimizer": name}

    monkeypatch.setattr(demo, "run_settings", run)
    monkeypatch.setattr(demo, "draw", lambda out, model, plot: plot.write_bytes(b""))
    with pytest.raises(Interrupted, match=r"SIGTERM in the middle of the demo.* and the same command continues\."):
        demo.run_demo(out, Console(quiet=True), **SMALL)
    with pytest.raises(UserError, match="holds a demo that has not ended, with other settings .*'seed': 0"):
        demo.run_demo(out, Console(quiet=True), **SMALL, seed=1)
    begun = out / demo.MARKER
    begun.write_text(
        json.dumps({name: value for name, value in json.loads(begun.read_text()).items() if name != "examples"})
    )
    with pytest.raises(UserError, match="`dev_examples` was 4 when"):  # an earlier version did not write them there
        demo.run_demo(out, Console(quiet=True), **SMALL | {"examples": 8})
    calls.clear()
    fitted, kept = (out / "feedback" / "tuner.safetensors").stat(), (out / "books/mezo/summary.json").read_bytes()
    found = demo.run_demo(out, Console(quiet=True), **SMALL)
    assert calls[:2] == [("mezo", True), ("rms", False)] and [*found.runs] == [*demo.SHOWN.values()]
    assert found.runs["MeZO"] == json.loads(kept)
    assert (out / "feedback" / "tuner.safetensors").stat() == fitted
    assert [path.name for path in (out / "zoo/pico").iterdir()] == ["feedback-v1"]
    with pytest.raises(UserError, match="is not empty; choose another folder, or replace an earlier demo"):
        demo.run_demo(out, Console(quiet=True), **SMALL)


@pytest.mark.parametrize("step", ["learn_feedback", "draw"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_demo_that_is_stopped_outside_its_runs_says_how_it_continues(
    step: str, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(demo, "learn_feedback", lambda config, console: None)
    monkeypatch.setattr(demo.zoo, "push", lambda *given, **named: "pico/feedback-v1")
    monkeypatch.setattr(demo, "run_settings", lambda *given, **named: {})
    monkeypatch.setattr(demo, step, lambda *given, **named: signal.raise_signal(signal.SIGTERM))
    words = "the same command, without `overwrite=True`, continues" if overwrite else "the same command continues"
    with pytest.raises(Interrupted, match=f"^SIGTERM in the middle of the demo; .* and {words}") as stopped:
        demo.run_demo(tmp_path / "demo", console, **SMALL | {"texts": 5000}, overwrite=overwrite)
    assert stopped.value.exit_code == 143
    assert "fit feedback for pico on 1,600 passages" in console.file.getvalue()  # as many as the task has
    assert json.loads((tmp_path / "demo" / demo.MARKER).read_text())["texts"] == 5000  # what the same command asks for


@pytest.mark.parametrize("link", [False, True])
def test_a_former_demo_is_replaced_in_its_folder(tmp_path: Path, link: bool) -> None:
    """The folder itself stays: it may be a mount point, or the target of a link."""
    out, there = tmp_path / "demo", tmp_path / "disk"
    there.mkdir()
    (there / "books").mkdir()
    (there / "mine").symlink_to(tmp_path, target_is_directory=True)
    if link:
        out.symlink_to(there)
    out = out if link else there
    with pytest.raises(UserError, match="holds no former demo"):
        demo.clear(out)
    (there / demo.MARKER).write_text("{}")
    before = there.stat().st_ino
    demo.clear(out)
    assert not list(out.iterdir()) and there.stat().st_ino == before and out.is_symlink() == link
