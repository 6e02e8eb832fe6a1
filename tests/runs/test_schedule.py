"""Warmup, early stopping, epochs, and numbers out of range."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

import metazo
from metazo import finetune
from metazo.errors import UserError
from metazo.meta.config import MetaConfig
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import _Run, run_settings
from metazo.runs.interrupt import Interrupted
from metazo.runs.schedule import SCHEDULES, number_of_steps, share, warmup_steps
from metazo.settings import build
from metazo.steplog.format import line, scan
from metazo_cli.main import main

SETTINGS = {
    "task": "pico_sentiment", "steps": 12, "batch_size": 2, "train_examples": 8, "dev_examples": 4,
    "test_examples": 4, "eval_every": 2, "snapshot_every": 5, "lr": 1e-4,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def base(tiny: Callable[[str], Path]) -> None:
    """The runs are of a model of two layers."""
    SETTINGS["model"] = str(tiny("llama"))


def config(out: Path, **settings) -> FinetuneConfig:
    return build(FinetuneConfig, {**SETTINGS, "out": out, **settings})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warmup_the_schedule_is_what_it_was(schedule):
    before = {
        "constant": lambda d: 1.0,
        "linear": lambda d: 1 - d,
        "cosine": lambda d: 0.5 * (1 + math.cos(math.pi * d)),
    }
    assert [share(schedule, step, 7) for step in range(7)] == [before[schedule](step / 7) for step in range(7)]


def test_warmup_rises_evenly_and_then_the_schedule_runs_over_the_rest():
    """Against torch's own schedulers, chained: LinearLR from 1/5 over 4 steps, then LinearLR to 0 over 8."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 5, 1.0, total_iters=4)
    down = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=8)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], milestones=[4])
    for step in range(12):
        assert share("linear", step, 12, 4) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        both.step()


def test_warmup_is_a_share_below_1_and_a_number_of_steps_from_1_on():
    assert [warmup_steps(warmup, 30) for warmup in (None, 0, 0.1, 0.11, 1, 7, 99)] == [0, 0, 3, 4, 1, 7, 30]


def test_a_share_of_100_is_a_whole_number_whatever_rounding_does():
    """0.07 * 100 is 7.000000000000001."""
    for number in range(1, 120):
        once = FinetuneConfig(SETTINGS["model"], "pico_sentiment", epochs=number / 100, batch_size=1)
        assert number_of_steps(once, None, 100) == number
        assert number >= 100 or warmup_steps(number / 100, 100) == number
    assert warmup_steps(0.0701, 100) == 8


@pytest.mark.parametrize("evaluated", [4, 64])
def test_a_budget_holds_if_steps_cost_different_numbers_of_forwards(evaluated):
    """Two passes over four batches in every other step of SVRG; batches of an evaluation have nothing to do with it."""
    settings = {
        "train_examples": 32,
        "batch_size": 8,
        "eval_batch_size": evaluated,
        "dev_examples": 4,
        "test_examples": 4,
    }
    run = finetune(
        SETTINGS["model"], "pico_sentiment", optimizer="mezo-svrg", forwards=21, eval_every=9, max_length=40, **settings
    )
    assert (run.summary["steps"], run.summary["forwards"]) == (3, 8 + 4 + 8)


@pytest.mark.parametrize(
    "forwards, steps", [(20, 1), (23, 1), (24, 2), (31, 3), (415, 99), (416, 100), (435, 100), (436, 101)]
)
def test_a_first_step_that_takes_more_than_others_is_paid_for(forwards, steps):
    """Ten batches in a full step, which is one in a hundred: 20 forward passes, and 4 in each step after it."""
    optimizer = metazo.MeZOSVRG(torch.nn.Linear(2, 2).named_parameters(), interval=100)
    optimizer.full_closure = [lambda: 0.0] * 10
    config = FinetuneConfig(SETTINGS["model"], "pico_sentiment", optimizer="mezo-svrg", forwards=forwards)
    assert number_of_steps(config, optimizer, 16) == steps


@pytest.mark.parametrize("forwards, steps", [(2, 1), (5, 1), (6, 2), (7, 2), (8, 3), (12, 4), (13, 4), (14, 5)])
def test_a_first_step_that_takes_less_than_others_is_paid_for(forwards, steps):
    """With one batch a full step of SVRG takes 2 passes, and the step after it 4."""
    optimizer = metazo.MeZOSVRG(torch.nn.Linear(2, 2).named_parameters())
    optimizer.full_closure = lambda: 0.0
    assert [optimizer.forwards_in(number) for number in (1, 2, 3, 4, 5)] == [2, 6, 8, 12, 14]
    settings = {"optimizer": "mezo-svrg", "forwards": forwards}
    assert number_of_steps(FinetuneConfig(SETTINGS["model"], "pico_sentiment", **settings), optimizer, 16) == steps
    with pytest.raises(UserError, match="`forwards` is 1 and a step of mezo-svrg takes 2; give more"):
        number_of_steps(
            FinetuneConfig(SETTINGS["model"], "pico_sentiment", **settings | {"forwards": 1}), optimizer, 16
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"steps": None, "epochs": 0.28, "train_examples": 25, "batch_size": 1},
            "counted 8 steps, 0 of them warmup, in",
        ),
        ({"steps": 100, "warmup": 0.07}, "counted 100 steps, 8 of them warmup, in place of 100 and 7"),
        ({"steps": None, "optimizer": "mezo-svrg", "forwards": 8, "batch_size": 8}, "counted 2 steps, 0 of them"),
    ],
)
def test_a_run_of_a_version_that_counted_otherwise_is_not_resumed(settings, words, tmp_path, monkeypatch):
    def stopping(self, step):
        raise Interrupted("SIGTERM", "SIGTERM")

    with monkeypatch.context() as patched:
        patched.setattr(_Run, "_stop_if_asked", stopping)
        with pytest.raises(Interrupted):
            run_settings(config(tmp_path / "run", **settings))
    log = tmp_path / "run/steps.jsonl"
    shutil.copytree(tmp_path / "run", tmp_path / "now")
    began = scan(log).header
    assert began.pop("counting") == 2
    log.write_bytes(line(began, 0)[0])
    with pytest.raises(UserError, match=f"begun by an earlier version of metazo, which {words}"):
        run_settings(config(tmp_path / "run", resume=True, **settings))
    if "steps" not in settings:
        assert run_settings(config(tmp_path / "now", resume=True, **settings))["steps"] < 8


def test_epochs_set_the_length(tmp_path):
    summary = run_settings(config(tmp_path / "run", steps=None, epochs=1.5, train_examples=10, accumulate=2, lr=0.0))
    assert summary["steps"] == 4  # 15 examples, 4 per step
    with pytest.raises(UserError, match="`steps` and `epochs` set the length"):
        config(tmp_path, epochs=1.0)


def test_patience_ends_the_run_after_so_many_evaluations_without_a_lower_loss(tmp_path):
    """At learning rate 0 no evaluation is lower than the first: the third ends the run, for every value of `steps`.

    The method is first-order, so that no probe leaves rounding errors in the weights.
    """
    summary = run_settings(config(tmp_path / "run", optimizer="first-order-sgd", lr=0.0, patience=3))
    assert summary["steps"] == 6 and "Stopped early after step 6 of 12" in summary["notes"][-1]
    losses = [json.loads(row)["dev"]["loss"] for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and losses.index(min(losses)) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"warmup": 0.5, "schedule": "linear"},
        {"optimizer": "first-order-sgd", "lr": 0.0, "patience": 2},
        {"steps": None, "epochs": 3.0},
    ],
)
def test_stopped_and_resumed_is_bit_identical(tmp_path, settings, monkeypatch):
    run_settings(config(tmp_path / "whole", **settings))
    stop = _Run._stop_if_asked

    def stopping(self, step):
        if step == 3:
            self.caught.append("SIGTERM")
        stop(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(_Run, "_stop_if_asked", stopping)
        with pytest.raises(Interrupted):
            run_settings(config(tmp_path / "cut", **settings))
    run_settings(config(tmp_path / "cut", resume=True, **settings))
    for name in ("steps.jsonl", "model/model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    if "warmup" in settings:
        rates = [step.lr[0] / 1e-4 for step in scan(tmp_path / "cut/steps.jsonl").sound().steps]
        assert rates == pytest.approx([*(n / 7 for n in range(1, 7)), *(1 - n / 6 for n in range(6))])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_loss": math.nan}, "`max_loss` must be a finite number, not nan"),
        ({"max_loss": math.inf}, "`max_loss` must be a finite number, not inf"),
        ({"seed": -1}, "`seed` must be at least 0, not -1"),
        ({"lr": 1e38, "optimizer": "first-order-adamw"}, "`lr` must be at most 1e.30, not 1e.38"),
        ({"lr": math.nan}, "`lr` must be a finite number"),
        ({"eps": 0.0}, "`eps` must be above 0, not 0"),
        ({"lora": 10**9}, "`lora` must be at most 4,096"),
        ({"steps": 10**12}, "`steps` must be at most 1,000,000,000"),
        ({"model": "m" * 300}, "`model` has a name of 300 bytes"),
        ({"task": "t" * 256 + "/x.yaml"}, "`task` has a name of 256 bytes"),
        ({"out": Path("a/\udcff")}, "`out` 'a/.udcff' is not UTF-8"),
        ({"patience": 1, "dev_examples": 0, "keep": "last"}, "`patience` counts evaluations on dev"),
    ],
)
def test_a_setting_out_of_range_is_said(tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        config(**{"out": tmp_path / "run", **settings})


def test_a_name_that_the_locale_cannot_say_is_not_blamed_for_it(monkeypatch):
    """In the locale C, Python (with PYTHONUTF8=0) hands the bytes of ü on as two halves of characters."""
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    with pytest.raises(UserError, match="of this locale, ascii, does not have; set LC_ALL to C.UTF-8"):
        config(Path("runs/\udcc3\udcbc"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"momentum": -1.0}, "`momentum` must be at least 0, not -1"),
        ({"momentum": 1.0}, "`momentum` must be below 1"),
        ({"hidden": 10**9}, "`hidden` must be at most 65,536"),
        ({"seed": -1}, "`seed` must be at least 0"),
        ({"restart_every": math.inf}, "`restart_every` must be a finite number"),
        ({"unroll": 200, "objective": "published"}, "`unroll` must be at most 32"),
        ({"bound": 1000.0}, "`bound` must be at most 20"),
        ({"entropy": math.inf}, "`entropy` must be a finite number"),
        ({"teacher_lr": 1e38, "teacher": "adamw"}, "`teacher_lr` must be at most 1e.30"),
    ],
)
def test_a_setting_of_meta_training_out_of_range_is_said(tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        build(MetaConfig, {"model": SETTINGS["model"], "task": ["pico_topic"], "out": tmp_path, **settings})


def test_several_ranks_are_refused_before_anything_is_written_and_said_once(tmp_path, monkeypatch, capsys):
    arguments = ["metazo", "compare", "--model=pico", "--tasks=pico_sentiment", "--optimizers=mezo", "--budget=4"]
    arguments.append(f"--out={tmp_path / 'run'}")
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, words in (("0", "torchrun started 2"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr().err
        assert ended.value.code == 2 and words in told and bool(told) == bool(words)
    assert not (tmp_path / "run").exists()


def test_markup_in_names_is_text(tmp_path, capsys):
    """[/red] closes a style that is not open, which rich refuses to print."""
    out = tmp_path / "[/red]"
    summary = run_settings(config(out, steps=2, lr=0.0), Console(width=200))
    assert summary["steps"] == 2 and (out / "model").is_dir()
    assert run_settings(config(out, steps=2, lr=0.0, resume=True), Console(width=200)) == summary
    assert "[/red]" in capsys.readouterr().out
