"""Signals that ask a run to stop: recorded, or left alone if the process ignores them."""

from __future__ import annotations

import io
import os
import signal
import time
from typing import Any

import pytest

import metazo
from metazo.io.terminal import Console
from metazo.runs.interrupt import Interrupted, ends_at_once, interruptible, times_continued
from metazo.step.record import Step


def test_the_first_signal_is_noted_and_the_second_ends() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interruptible() as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == ["SIGTERM"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_work_that_saves_nothing_ends_at_once(name: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    told = pytest.raises(Interrupted, match=f"^{name} in the middle$")
    with told as stopped, ends_at_once("around it"), ends_at_once("in the middle"):
        signal.raise_signal(signal.Signals[name])
    assert stopped.value.by == name and stopped.value.exit_code == 128 + signal.Signals[name]
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_ignored_signal_stays_ignored() -> None:
    """As under nohup, and in a worker of a comparison, whose parent decides about Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible() as caught:
            os.kill(os.getpid(), signal.SIGINT)
            assert caught == []
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_process_that_is_continued_counts_it_and_calls_who_listened_before() -> None:
    heard: list[int] = []
    before, count = signal.signal(signal.SIGCONT, lambda number, frame: heard.append(number)), times_continued()
    try:
        with interruptible() as caught:
            os.kill(os.getpid(), signal.SIGCONT)
            assert (caught, heard, times_continued()) == ([], [signal.SIGCONT], count + 1)
    finally:
        signal.signal(signal.SIGCONT, before)


@pytest.mark.parametrize("at", ["step", "evaluation"])
def test_the_time_of_a_suspended_process_is_no_time_of_training(tiny, at: str) -> None:
    """Runs at equal time are as long as it says. Here the process sleeps instead, and gets the signal of its waking."""

    moments: list[float] = []

    def suspended(record: Step | dict[str, Any]) -> None:
        step = record.step if isinstance(record, Step) else record["step"]
        if isinstance(record, Step) == (at == "step") and step == 2:
            time.sleep(1.3)
            os.kill(os.getpid(), signal.SIGCONT)
        if isinstance(record, dict):
            moments.append(time.monotonic())

    console, steps = Console(file=io.StringIO(), width=400), {"steps": 4, "eval_every": 2, "keep": "none"}
    sizes = {"train_examples": 8, "dev_examples": 4, "test_examples": 0, **steps}
    calls = {"on_step": suspended, "on_evaluation": suspended, "console": console}
    tuned = metazo.finetune(str(tiny("llama")), "pico_topic", "mezo", lr=1e-4, **calls, **sizes)
    first, middle, last = (record["seconds"] for record in tuned.evaluations)
    assert first < middle < last < first + moments[-1] - moments[0] - 1.3
    assert ("The process was suspended for about " in console.file.getvalue()) == (at == "step")


def test_a_process_that_is_suspended_in_every_step_has_a_time_of_training(tiny) -> None:
    """cpulimit suspends a process many times per second: no step tells how long one takes undisturbed."""
    computed: list[float] = []
    loaded = metazo.load_model(str(tiny("llama")))
    loaded.model.register_forward_hook(lambda *given: os.kill(os.getpid(), signal.SIGCONT))
    sizes = {"steps": 4, "eval_every": 4, "keep": "none", "train_examples": 8, "dev_examples": 4, "test_examples": 0}
    note = {"on_step": lambda step: computed.append(time.thread_time())}
    tuned = metazo.finetune(loaded, "pico_topic", "mezo", lr=1e-4, **note, **sizes)
    first, last = (record["seconds"] for record in tuned.evaluations)
    assert last - first > computed[-1] - computed[0] - 0.001 > 0  # seconds are rounded to thousandths
