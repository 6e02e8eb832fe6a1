"""The step log is read back bit for bit; torn and changed lines are found and distinguished."""

from __future__ import annotations

import io
import math
import sys
import tracemalloc
import zlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metazo.errors import UserError
from metazo.io.lock import FolderLock
from metazo.io.terminal import Console
from metazo.step.estimators import MOST_QUERIES
from metazo.step.record import Step
from metazo.steplog.format import MAX_LINE, MAX_NESTED, line, scan
from metazo.steplog.inspect import diff, repair
from metazo.steplog.writer import StepLog
from metazo_cli.log import tell

HEADER = {"method": "mezo", "seed": 3}
STEPS = [Step(i, (i * 7919,), (0.1 * i, 1 / 3), (math.pi * i,), (1e-6,)) for i in range(20)]


def written(tmp_path, steps=STEPS):
    log = StepLog(tmp_path / "steps.jsonl", HEADER)
    for step in steps:
        log.append(step)
    log.close()
    return tmp_path / "steps.jsonl"


def test_reads_back_bit_for_bit(tmp_path):
    assert scan(written(tmp_path)).sound().steps == STEPS


def test_a_step_of_the_most_queries_reads_back(tmp_path):
    """The longest seeds and numbers that there are; a line that could not be read is not written."""
    n, longest = MOST_QUERIES, -sys.float_info.min
    assert len(repr(longest)) == 24 and len(repr(2**64 - 1)) == 20
    step = Step(0, (2**64 - 1,) * n, (longest,) * (2 * n), (longest,) * n, (longest,) * 9)
    log = StepLog(tmp_path / "log", HEADER)
    log.append(step)
    assert scan(log.path).sound().steps == [step]
    with pytest.raises(UserError, match=f"bytes, and at most {MAX_LINE:,} are read.*choose fewer queries"):
        log.finish(0, "0" * MAX_LINE)


def test_a_long_list_is_shown_shortened(tmp_path):
    step, text = Step(0, (1,), (0.5,) * 2 * MOST_QUERIES, (2.0,), (1e-6,)), io.StringIO()
    tell(scan(written(tmp_path, [step])), 1, Console(file=text, width=300))
    assert "(131,072 in all)" in text.getvalue() and len(text.getvalue()) < 10_000


@pytest.mark.parametrize("inner", ["[]", "{}"])
def test_a_long_line_that_would_take_many_times_its_bytes_is_damage(tmp_path, inner):
    head, chain = line({"metazo_steps": 1}, 0)
    body = b'{"step":[' + f"{inner},".encode() * MAX_NESTED + b"0]"
    bad = body + b',"crc":%d}\n' % zlib.crc32(body, chain)
    (tmp_path / "log").write_bytes(head + bad + b"x\n")
    tracemalloc.start()
    assert f"line 2 is bad (it has {len(bad):,} bytes)" in (scan(tmp_path / "log").damage or "")
    assert tracemalloc.get_traced_memory()[1] < 8 * len(bad)
    tracemalloc.stop()
    with pytest.raises(UserError, match=f"of a header {MAX_NESTED:,}"):
        StepLog(tmp_path / "other", HEADER | {"settings": {"train": [[]] * MAX_NESTED}})


def test_losses_that_are_not_finite(tmp_path):
    step = Step(0, (1,), (math.nan, math.inf), (), (1e-6,))
    (found,) = scan(written(tmp_path, [step])).sound().steps
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
def test_a_changed_bit_is_damage_named_by_its_line(tmp_path_factory, place, bit):
    """Except in the last line, for which it cannot be told from a torn line."""
    path = written(tmp_path_factory.mktemp("log"))
    data = bytearray(path.read_bytes())
    header = data.index(b"\n") + 1
    place = header + place % (len(data) - header)
    line = bytes(data[:place]).count(b"\n") + 1
    data[place] ^= 1 << bit
    path.write_bytes(data)
    found = scan(path)
    assert found.steps == STEPS[: line - 2]
    if b"\n" not in data[place : len(data) - 1]:  # the line break before the last line included
        assert found.torn and not found.damage
    else:
        assert found.damage and f"line {line} is bad" in found.damage
        for use in (lambda path: scan(path).sound(), lambda path: StepLog(path, HEADER)):
            with pytest.raises(UserError, match=f"line {line} .* metazo log repair"):
                use(path)
        assert path.read_bytes() == data, "a damaged log is left as it is"


def test_a_missing_line_is_damage(tmp_path):
    path = written(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7] + lines[8:]))
    assert "line 8" in (scan(path).damage or "")


def test_a_line_of_another_order_with_right_checksums_is_damage(tmp_path):
    path = written(tmp_path, [STEPS[0], STEPS[2], STEPS[3]])
    assert "holds step 2, and step 1 is expected" in (scan(path).damage or "")


def test_a_torn_tail_is_said(tmp_path):
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    said: list[str] = []
    StepLog(path, HEADER, say=said.append).close()
    assert "19 steps are intact" in said[0] and len(scan(path).sound().steps) == 19


def test_the_log_of_a_run_that_is_on_is_not_repaired(tmp_path):
    """It cut what the run had appended since the log was read."""
    (tmp_path / "run").mkdir()
    path = written(tmp_path / "run")
    path.write_bytes(data := path.read_bytes()[:-9])
    (tmp_path / "link").symlink_to(path)
    with FolderLock(tmp_path / "run"):
        for name in (path, tmp_path / "link"):
            with pytest.raises(UserError, match="`log` .*run is in use by .*; wait until it ends"):
                repair(name)
    assert path.read_bytes() == data and repair(path)[0] == 19


def test_repair_keeps_what_is_whole_and_the_rest_beside(tmp_path):
    path = written(tmp_path)
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:6]) + b"garbage\n" + b"".join(lines[6:]))
    count, rest, aside = repair(path)
    assert (count, scan(path).sound().steps) == (5, STEPS[:5]) and aside is not None and len(aside.read_bytes()) == rest
    path.write_bytes(path.read_bytes() + b"more")
    again = repair(path)[2]
    assert again is not None and again != aside and again.read_bytes() == b"more"
    assert len(aside.read_bytes()) == rest, "what was put aside before is kept"
    log = StepLog(path, HEADER)
    for step in STEPS[5:]:
        log.append(step)
    log.close()
    assert path.read_bytes() == data


@pytest.mark.parametrize("every", [1, 3, 50])
def test_lines_are_handed_over_on_schedule(tmp_path, every):
    log = StepLog(tmp_path / "steps.jsonl", HEADER, flush_every=every, fsync_every=7)
    for number, step in enumerate(STEPS, start=1):
        log.append(step)
        there = scan(log.path).steps
        assert len(there) >= max(number - number % every, number - number % 7)
    log.close()
    assert scan(log.path).sound().steps == STEPS


def test_the_end_says_what_was_kept(tmp_path):
    log = StepLog(written(tmp_path), HEADER)
    log.finish(12, "abc")
    log.close()
    before = log.path.read_bytes()
    again = StepLog(log.path, HEADER)
    assert again.end == {"kept": 12, "weights": "abc"} and again.steps == STEPS
    again.finish(12, "abc")
    again.close()
    assert log.path.read_bytes() == before
    log = StepLog(log.path, HEADER)
    log.cut(20)
    log.close()
    assert scan(log.path).end is None and scan(log.path).steps == STEPS


def test_other_versions_are_said_and_other_weights_refused(tmp_path):
    header = {"weights": "abc", "environment": {"torch": "1", "threads": 1}}
    StepLog(tmp_path / "log", header).close()
    said: list[str] = []
    StepLog(tmp_path / "log", {**header, "environment": {"torch": "2", "threads": 1}}, say=said.append).close()
    assert "torch 1 then and 2 now" in said[0] and "threads" not in said[0]
    with pytest.raises(UserError, match="its weights is 'abc', now 'def'"):
        StepLog(tmp_path / "log", {**header, "weights": "def"})


def test_a_diff_names_the_first_step_and_field(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    changed = [*STEPS[:4], replace(STEPS[4], lr=(2e-6,)), *STEPS[5:]]
    a, b = scan(written(tmp_path / "a")), scan(written(tmp_path / "b", changed))
    assert diff(a, a)["same"]
    assert diff(a, b)["first"] == {"step": 4, "fields": [{"field": "lr", "a": [1e-6], "b": [2e-6]}]}


@pytest.mark.parametrize(
    "record",
    [
        {"step": True, "seeds": [1], "losses": [0.1], "c": [1.0], "lr": [1.0]},
        {"step": 0, "seeds": [-1], "losses": [0.1], "c": [1.0], "lr": [1.0]},
        {"step": 0, "seeds": [1.5], "losses": [0.1], "c": [1.0], "lr": [1.0]},
        {"step": 0, "seeds": [1], "losses": ["1e999999"], "c": [1.0], "lr": [1.0]},
        {"step": 0, "seeds": [1], "losses": [10**400], "c": [1.0], "lr": [1.0]},
        {"step": 0, "seeds": 1, "losses": [0.1], "c": [1.0], "lr": [1.0]},
        {"step": 0, "seeds": [1], "losses": [0.1], "c": [1.0]},
        {"step": 0, "seeds": [1], "losses": [0.1], "c": [1.0], "lr": [1.0], "more": 1},
        {"step": 0, "seeds": [1], "losses": [1] * (2 * MOST_QUERIES + 1), "c": [1.0], "lr": [1.0]},
        {"kept": 5, "weights": "x"},
        [1],
        7,
    ],
)
def test_a_record_with_right_checksum_and_wrong_content_is_no_step(tmp_path, record):
    head, chain = line({"metazo_steps": 1}, 0)
    bad, _ = line(record, chain) if isinstance(record, dict) else (b"%r\n" % record, 0)
    (tmp_path / "log").write_bytes(head + bad + b"x\n")
    assert "line 2" in (scan(tmp_path / "log").damage or "")


def test_cut_keeps_the_first(tmp_path):
    log = StepLog(written(tmp_path), HEADER)
    log.cut(5)
    log.append(STEPS[5])
    log.close()
    assert scan(tmp_path / "steps.jsonl").sound().steps == STEPS[:6]


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
