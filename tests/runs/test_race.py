"""A race of learning rates: its run is that of the rate that wins, and takes no more forward passes than its settings allow."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from metazo import finetune, load_model
from metazo.errors import UserError
from metazo.io.terminal import Console
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings, tune
from metazo.runs.interrupt import Interrupted
from metazo.runs.race import half, lengths, race
from metazo.settings import build
from metazo.steplog.format import scan
from tests.cli.test_cli import metazo, refused

RATES = (1e-5, 3e-3, 1e-2)
SETTINGS: dict[str, Any] = {
    "task": "pico_sentiment", "forwards": 48, "batch_size": 4, "train_examples": 16, "dev_examples": 4, "test_examples": 4,
    "eval_every": 3, "schedule": "linear", "warmup": 2, "seed": 3,
}  # fmt: skip


@pytest.fixture
def settings(tiny) -> Any:
    return lambda **given: build(FinetuneConfig, {**SETTINGS, "model": str(tiny("llama")), **given})


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same_bits(one: Path, other: Path) -> bool:
    found, wanted = weights(one), weights(other)
    return found.keys() == wanted.keys() and all(value.equal(wanted[key]) for key, value in found.items())


@pytest.mark.parametrize(("arms", "length"), [(2, 1), (3, 4), (4, 5), (7, 2), (8, 3)])
def test_steps_that_are_spent_are_those_of_the_arms_that_lose(arms: int, length: int):
    left, taken = list(range(arms)), dict.fromkeys(range(arms), 0)
    while len(left) > 1:
        for arm in left:
            taken[arm] += length
        left = left[: half(len(left))]
    assert lengths(arms, length) == (taken[0], sum(taken.values()) - taken[0])


@pytest.mark.parametrize(
    "options", [{"patience": 9}, {"optimizer": "mezo-momentum"}, {"optimizer": "lozo", "scale": "rms"}]
)
def test_the_run_is_that_of_the_rate_that_wins_from_the_first_step(settings, tmp_path, options):
    steps = 24 - 9
    arms = {rate: tune(settings(steps=steps, forwards=None, lr=rate, **options)).history[0] for rate in RATES}  # type: ignore[index]
    first = {rate: fmean(loss for step in taken[:3] for loss in step.losses) for rate, taken in arms.items()}
    second = {rate: fmean(loss for step in taken[3:6] for loss in step.losses) for rate, taken in arms.items()}
    won = min(sorted(first, key=first.__getitem__)[:2], key=second.__getitem__)
    console = Console(file=io.StringIO(), width=200)
    found = race(settings(out=tmp_path / "race", **options), RATES, 3, console)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert (
        f"{won:g}, which won the race; steps of the others: 9" in told
        and f"rate {won:g}, loss {first[won]:.4f} in steps 1 to 3" in told
    )
    assert found.summary["lr"] == won and found.summary["steps"] == steps
    assert any(note.startswith("The race took 9 steps (18 forward passes) at other") for note in found.summary["notes"])
    run_settings(settings(steps=steps, forwards=None, lr=won, out=tmp_path / "plain", **options))
    assert (log := scan(tmp_path / "race/steps.jsonl").steps) == scan(tmp_path / "plain/steps.jsonl").steps
    assert [step.losses for step in log] == [step.losses for step in arms[won]]
    assert same_bits(tmp_path / "race", tmp_path / "plain")


def test_patience_counts_within_the_steps_of_the_race(settings, tmp_path):
    options = {"patience": 1, "eval_every": 1, "keep": "last"}
    found = race(settings(out=tmp_path / "race", **options), RATES, 3)
    run_settings(settings(steps=15, forwards=None, lr=found.summary["lr"], out=tmp_path / "plain", **options))
    logs = [scan(tmp_path / name / "steps.jsonl").steps for name in ("race", "plain")]
    assert logs[0] == logs[1] and 1 <= len(logs[0]) < 6 and found.summary["steps"] == len(logs[0])
    assert same_bits(tmp_path / "race", tmp_path / "plain")


def test_rates_that_cannot_be_told_apart_are_named(settings):
    console = Console(file=io.StringIO(), width=200)
    race(settings(), (1e-20, 2e-20, 1e-2), 1, console)
    assert "rate 2e-20 ties with 1e-20, which was named first and goes on" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_that_is_killed_before_it_has_its_first_steps_ends_the_same(settings, tmp_path):
    told = race(settings(out=tmp_path / "run"), RATES[:2], 3).summary["notes"]
    wanted = {name: value.clone() for name, value in weights(tmp_path / "run").items()}
    for name in ("summary.json", "metrics.jsonl"):
        (tmp_path / "run" / name).unlink()
    log = tmp_path / "run/steps.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:2]))  # header and one step
    rate = scan(log).header["settings"]["lr"]
    run_settings(settings(steps=21, forwards=None, lr=rate, out=tmp_path / "run", resume=True))
    assert all(value.equal(wanted[name]) for name, value in weights(tmp_path / "run").items())
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["notes"] == told and told[0].startswith("The race took 3 steps (6 forward passes) at other rates")


def test_rates_that_diverge_lose(settings, tmp_path):
    with pytest.raises(UserError, match="No rate of the race has finite losses"):
        race(settings(out=tmp_path / "run", max_bad_steps=1), (1e9, 1e12), 3)
    assert race(settings(out=tmp_path / "run", max_bad_steps=1), (1e9, 1e-4, 1e12), 3).summary["lr"] == 1e-4


def test_a_race_that_is_stopped_writes_nothing(settings, tmp_path, monkeypatch):
    from metazo.runs.unwritten import MemoryLog

    append = MemoryLog.append

    def press(log, step):
        append(log, step)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MemoryLog, "append", press)
    with pytest.raises(Interrupted, match="SIGINT in the race, of which nothing is written: start it again") as stopped:
        race(settings(out=tmp_path / "run"), RATES, 3)
    assert stopped.value.exit_code == 130 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rates", "length", "given", "words"),
    [
        ((1e-3,), 3, {}, "at least two different learning rates above 0, not \\(0.001,\\)"),
        ((1e-3, 1e-3), 3, {}, "different"),
        ((1e-3, 0.0), 3, {}, "above 0"),
        ((1e-3, float("nan")), 3, {}, "above 0"),
        (("1e-3", 0.001), 3, {}, "different"),
        (("1e-3", "fast"), 3, {}, "above 0"),
        ((True, 1e-3), 3, {}, "above 0"),
        (np.array(1e-3), 3, {}, "a list of at least two"),
        (b"ab", 3, {}, "a list of at least two"),
        ("1e-4,1e-3", 3, {}, "a list of at least two .* not '1e-4,1e-3'"),
        (RATES, 3, {"lr": 1e-3}, "`lr` is what the race finds"),
        (RATES, 3, {"resume": True}, "has its learning rate already"),
        (RATES, 8, {"forwards": 48}, "takes 40 steps before one rate is left, and the run has 24"),
        (RATES, 3, {"optimizer": "mezo-svrg", "forwards": 480}, "`forwards` cannot be kept in a race with mezo-svrg"),
        (RATES, 3, {"optimizer": "first-order-sgd"}, "those of first-order-sgd cannot be: give `lr`"),
    ],
)
def test_what_is_no_race_is_one_sentence(settings, tmp_path, rates, length, given, words):
    with pytest.raises(UserError, match=words):
        race(settings(out=tmp_path / "run", **given), rates, length)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "rates",
    [
        np.logspace(-4, -3, 2),
        torch.tensor([1e-4, 1e-3]),
        [np.float32(1e-4), np.float32(1e-3)],
        {1e-4: 1, 1e-3: 2}.keys(),
        (10.0**power for power in (-4, -3)),
        [1, 2],
    ],
    ids=["array", "tensor", "float32", "keys", "generator", "integers"],
)
def test_rates_are_any_iterable_of_numbers(settings, rates):
    with pytest.raises(UserError, match="`lr` is what the race finds"):  # which is looked at after the rates
        race(settings(lr=1e-3), rates)


def test_from_python_with_rows_in_memory(tiny):
    rows = [{"sentence": f"it was {word} .", "label": label} for word, label in (("great", 1), ("terrible", 0))] * 8
    sizes = {"train_examples": 8, "dev_examples": 4, "test_examples": 4, "batch_size": 2, "steps": 30}
    seen: list[int] = []
    found = finetune(
        str(tiny("llama")), "sst2", data=rows, race=(1e-4, 1e-3), on_step=lambda step: seen.append(step.step), **sizes
    )
    assert found.summary["lr"] in (1e-4, 1e-3) and seen == list(range(12, 18)) and len(found.losses) == 18
    with pytest.raises(UserError, match="give model and optimizer by name, or `lr` for objects in memory"):
        finetune(load_model(str(tiny("llama"))), "sst2", data=rows, race=(1e-4, 1e-3), **sizes)
    with pytest.raises(UserError, match="`race_steps` is the length of a round of `race`"):
        finetune(str(tiny("llama")), "sst2", data=rows, race_steps=2, **sizes)
    for number in (0, -3, True):
        with pytest.raises(UserError, match=f"`race_steps` is {number} and .*choose 1 or more"):
            finetune(str(tiny("llama")), "sst2", data=rows, race=(1e-4, 1e-3), race_steps=number, **sizes)
    seen.clear()
    finetune(
        str(tiny("llama")),
        "sst2",
        data=rows,
        race=["1e-4", "1e-3"],
        race_steps=np.int64(1),
        on_step=lambda step: seen.append(step.step),
        **sizes,
    )
    assert seen[0] == 1


def test_a_folder_in_use_is_refused_before_the_race(settings, tmp_path, monkeypatch):
    (tmp_path / "something").touch()
    monkeypatch.setattr("metazo.runs.race.tune", lambda *arguments, **options: pytest.fail("it ran"))
    with pytest.raises(UserError, match="is not empty"):
        race(settings(out=tmp_path), RATES)


def test_the_flag(tmp_path):
    recipe, out = tmp_path / "small.yaml", tmp_path / "a"
    sizes = "steps: 6, train_examples: 8, dev_examples: 4, test_examples: 4, batch_size: 2"
    recipe.write_text(f"{{model: pico, task: pico_topic, lr: 7.0, {sizes}}}")
    done = metazo("finetune", f"--config={recipe}", "--race=1e-4,2e-4", "--race-steps=1", f"--out={out}")
    assert done.returncode == 0 and "which won the race; steps of the others: 1" in done.stdout
    assert json.loads((out / "summary.json").read_text())["steps"] == 5
    one = ("finetune", "--model=pico", "--task=pico_topic", f"--out={tmp_path / 'run'}")
    assert "--race is '1e-4;1e-3'" in refused(*one, "--race=1e-4;1e-3").replace("\n", " ")
    assert "--race-steps is the length of a round of --race, which is not given" in refused(*one, "--race-steps=3")
    assert "--race has no dry run" in refused(*one, "--race=1e-4,1e-3", "--dry-run")
    assert "--lr is what the race finds" in refused(*one, "--race=1e-4,1e-3", "--lr=1e-3")
