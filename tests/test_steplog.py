"""The step log: what is written is read back to the bit; torn and changed records are found."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metazo.errors import UserError
from metazo.optimizers.step import Step
from metazo.steplog import StepLog, scan

HEADER = {"method": "mezo", "seed": 3}
STEPS = [Step(i, (i * 7919,), (0.1 * i, 1 / 3), (math.pi * i,), (1e-6,)) for i in range(20)]


def written(tmp_path, steps=STEPS):
    log = StepLog(tmp_path / "steps.jsonl", HEADER)
    for step in steps:
        log.append(step)
    log.close()
    return tmp_path / "steps.jsonl"


def test_reads_back_bit_for_bit(tmp_path):
    assert scan(written(tmp_path))[1] == STEPS


def test_losses_that_are_not_finite(tmp_path):
    step = Step(0, (1,), (math.nan, math.inf), (), (1e-6,))
    (found,) = scan(written(tmp_path, [step]))[1]
    assert math.isnan(found.losses[0]) and found.losses[1] == math.inf and found.coefficients == ()


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10**6))
def test_a_torn_tail_is_dropped_and_the_log_goes_on(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("log")
    path = written(folder)
    data = path.read_bytes()
    header = data.index(b"\n") + 1
    path.write_bytes(data[: header + cut % (len(data) - header)])
    log = StepLog(path, HEADER)
    assert log.steps == STEPS[: len(log.steps)] and len(log.steps) >= path.read_bytes().count(b"\n") - 1
    for step in STEPS[len(log.steps) :]:
        log.append(step)
    log.close()
    assert path.read_bytes() == data


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_changed_bit_ends_the_log_before_it(tmp_path_factory, place, bit):
    path = written(tmp_path_factory.mktemp("log"))
    data = bytearray(path.read_bytes())
    header = data.index(b"\n") + 1
    place = header + place % (len(data) - header)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    steps = scan(path)[1]
    assert steps == STEPS[: len(steps)] and len(steps) <= bytes(data[:place]).count(b"\n")


def test_cut_keeps_the_first(tmp_path):
    log = StepLog(written(tmp_path), HEADER)
    log.cut(5)
    log.append(STEPS[5])
    log.close()
    assert scan(tmp_path / "steps.jsonl")[1] == STEPS[:6]


def test_another_runs_log_is_refused(tmp_path):
    path = written(tmp_path)
    with pytest.raises(UserError, match="seed is 3, now 4"):
        StepLog(path, {**HEADER, "seed": 4})


@pytest.mark.parametrize("content", [b"", b"{}\n", b"\xff\xfe\n", b'{"metazo_steps": 1}\n', b"[1]\n"])
def test_what_is_no_log_is_said(tmp_path, content):
    path = tmp_path / "steps.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a step log"):
        scan(path)
