"""Runs on the embedded model learn, are reproducible, resume after kill -9, and refuse impossible settings."""

from __future__ import annotations

import io
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from metazo.errors import UserError
from metazo.io.terminal import Console
from metazo.runs.batches import batch_indices
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.setup import set_up
from metazo.settings import build
from metazo.steplog.format import scan
from tests import warm

LONG = 80  # steps of a small model: half a second, enough for a signal to arrive in mid-run
SMALL = {
    "task": "pico_sentiment",
    "optimizer": "mezo",
    "lr": 1e-4,
    "steps": 24,
    "batch_size": 4,
    "train_examples": 64,
    "dev_examples": 8,
    "test_examples": 8,
    "eval_every": 8,
    "snapshot_every": 10,
}


@pytest.fixture(scope="module", autouse=True)
def base(tiny: Callable[[str], Path]) -> None:
    """The runs are of a model of two layers."""
    SMALL["model"] = str(tiny("llama"))


def config(out: Path, **extra) -> FinetuneConfig:
    return build(FinetuneConfig, SMALL, {"out": out, **extra})


def files(folder: Path) -> dict[str, bytes]:
    """The parts that must be equal for two runs of one seed: weights, log, and metrics without times."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in metrics:
        record.pop("seconds")
    return {
        "weights": (folder / "model" / "model.safetensors").read_bytes(),
        "log": (folder / "steps.jsonl").read_bytes(),
        "metrics": json.dumps(metrics).encode(),
    }


@pytest.mark.parametrize("scale", ["none", "rms"])
def test_one_seed_one_result_and_another_seed_another(tiny, tmp_path, scale):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_settings(config(tmp_path / name, model=str(tiny("llama")), scale=scale, seed=seed))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a")["log"] != files(tmp_path / "c")["log"]


def test_output_folder(tmp_path):
    summary = run_settings(config(tmp_path / "run", keep="last"), plot=True)
    assert summary["forwards"] == 48 and summary["steps"] == 24
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test"]["loss"] == summary["test"]["loss"]
    base = AutoModelForCausalLM.from_pretrained(set_up(config(tmp_path / "x")).loaded.model.name_or_path)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    moved = [not torch.equal(a, b) for a, b in zip(base.float().parameters(), tuned.parameters())]
    assert all(moved)
    assert "majority" in summary["test"] and (tmp_path / "run" / "config.json").is_file()


@pytest.mark.parametrize("error", [ImportError("ft2font.so: failed to map segment"), MemoryError()])
def test_a_run_is_complete_without_a_picture_that_cannot_be_drawn(tiny, tmp_path, monkeypatch, error):
    """As in a job whose memory is limited (ulimit -v), which ended in a traceback after all steps."""

    def no_room(*arguments):
        raise error

    monkeypatch.setattr("metazo.plots.curves.plot_run", no_room)
    console = Console(file=io.StringIO(), width=200)
    summary = run_settings(config(tmp_path / "run", model=str(tiny("llama")), steps=2), console, plot=True)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert f"No curve.png: {str(error) or 'no memory is left'}\n" in console.file.getvalue()


def test_first_order_learns_and_beats_the_majority(tmp_path):
    sizes = {"steps": 30, "batch_size": 16, "train_examples": 400, "dev_examples": 16, "test_examples": 64}
    summary = run_settings(config(tmp_path / "fo", model="pico", optimizer="first-order-adamw", lr=1e-3, **sizes))
    assert summary["test"]["accuracy"] > summary["test"]["majority"] + 0.2
    assert summary["dev"]["loss"] < 0.7 * summary["before"]["loss"]


def test_freeze_and_train_select_by_pattern(tmp_path):
    setup = set_up(config(tmp_path / "x", train=["*mlp*"], freeze=["*layers.0*"]))
    names = [n for n, p in setup.loaded.model.named_parameters() if p.requires_grad]
    assert names and all("mlp" in name and "layers.0." not in name for name in names)


def test_accumulation_takes_other_examples_and_as_many_more_forwards(tmp_path):
    summary = run_settings(config(tmp_path / "run", accumulate=3, steps=4))
    assert summary["forwards"] == 24


def test_schedule(tmp_path):
    run_settings(config(tmp_path / "run", schedule="linear"))
    rates = [step.lr[0] for step in scan(tmp_path / "run" / "steps.jsonl").sound().steps]
    assert rates == pytest.approx([1e-4 * (1 - step / 24) for step in range(24)])


def test_batches_walk_through_permutations():
    seen = [place for step in range(5) for place in batch_indices(step, 4, 10, seed=1)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10)) and seen[:10] != seen[10:20]


def start(model: Path, out: Path, *extra: str) -> warm.Process:
    long = {"model": model, "batch_size": 16, "steps": LONG}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in (SMALL | long).items()]
    return warm.Process("metazo", "finetune", *flags, f"--out={out}", *extra)


def wait_for_steps(path: Path, count: int, process: warm.Process) -> None:
    until = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") <= count:
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("extra", "count"), [(("--scale=rms",), 4), (("--optimizer=mezo-adam", "--schedule=cosine"), 17)]
)
def test_killed_and_resumed_is_bit_identical(tiny, tmp_path, extra, count):
    model, whole, cut = tiny("llama"), tmp_path / "whole", tmp_path / "cut"
    assert start(model, whole, *extra).wait() == 0
    process = start(model, cut, *extra)
    wait_for_steps(cut / "steps.jsonl", count, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len((cut / "steps.jsonl").read_bytes().splitlines()) < LONG + 2
    assert start(model, cut, *extra, "--resume").wait() == 0
    assert files(whole) == files(cut)


def test_sigterm_finishes_the_step_and_says_how_to_go_on(tiny, tmp_path):
    process = start(tiny("llama"), tmp_path / "run")
    wait_for_steps(tmp_path / "run" / "steps.jsonl", 2, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "metazo finetune --resume" in errors and "Traceback" not in errors


def test_nan_before_the_first_step_leaves_nothing(tmp_path):
    from metazo.models.load import load_model

    loaded = load_model(SMALL["model"])
    with torch.no_grad():
        next(loaded.model.parameters()).fill_(torch.nan)
    loaded.model.save_pretrained(tmp_path / "broken")
    loaded.tokenizer.save_pretrained(tmp_path / "broken")
    for dtype, advice in (
        ("float32", "check"),
        ("float16", r"try float32 \(or bfloat16 instead of float16\), and check"),
    ):
        with pytest.raises(UserError, match=f"loss of .* is nan before the first step in {dtype}; {advice} the model"):
            run_settings(config(tmp_path / "run", model=str(tmp_path / "broken"), dtype=dtype))
    assert not (tmp_path / "run").exists()


def test_folders_that_hold_something(tmp_path):
    run_settings(config(tmp_path / "run", steps=2))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="already holds a run"):
        run_settings(config(tmp_path / "run"))
    with pytest.raises(UserError, match="`lr` was 0.0001 .* is 0.01 now"):
        run_settings(config(tmp_path / "run", lr=1e-2, steps=2, resume=True))
    again = run_settings(config(tmp_path / "run", steps=2, resume=True))
    assert again == json.loads((tmp_path / "run" / "summary.json").read_text()), "a complete run is not run again"
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds no run"):
        run_settings(config(tmp_path / "other", resume=True))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        run_settings(config(tmp_path / "mine"))
