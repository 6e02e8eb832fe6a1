"""The environment in a log's header, and its comparison with that of a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from metazo.errors import UserError
from metazo.step.record import Step
from metazo.steplog.format import change, scan
from metazo.steplog.writer import ENVIRONMENTS, StepLog

HEADER: dict[str, Any] = {
    "weights": "0",
    "architecture": {"hidden_act": "silu", "layers": 2},
    "definition": {"metric": "accuracy", "prompt": "sha256:1"},
    "environment": {"torch": "1", "threads": 2},
}


def log(path: Path, said: list[str] | None = None, **header: Any) -> StepLog:
    return StepLog(path, {**HEADER, **header}, say=(said if said is not None else []).append)


def end(log: StepLog) -> None:
    log.append(Step(log.count, (1,), (1.0, 2.0), (0.5,), (1e-3,)))
    log.finish(log.count, "0")
    log.close()


def test_a_run_that_went_on_elsewhere_is_marked_whoever_ends_it(tmp_path):
    """The run starts with two threads, continues with one and ends with two, so its bits belong to neither environment."""
    path = tmp_path / "steps.jsonl"
    log(path).close()
    log(path, environment={"torch": "1", "threads": 1}).close()
    assert (tmp_path / ENVIRONMENTS).exists()
    end(log(path))
    assert scan(path).sound().end == {"kept": 1, "weights": "0", "mixed": True}
    assert not (tmp_path / ENVIRONMENTS).exists()


def test_a_run_of_one_environment_is_not_marked(tmp_path):
    log(tmp_path / "steps.jsonl").close()
    end(log(tmp_path / "steps.jsonl", environment={"torch": "1", "threads": 2, "later": "field"}))
    assert scan(tmp_path / "steps.jsonl").end == {"kept": 1, "weights": "0"}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"architecture": {"hidden_act": "gelu", "layers": 2}}, "hidden_act was 'silu' and is 'gelu' now"),
        ({"definition": {"metric": "f1", "prompt": "sha256:1"}}, "metric was 'accuracy' and is 'f1' now"),
        ({"definition": {"metric": "accuracy", "prompt": "sha256:2"}}, "the prompt changed"),
    ],
)
def test_what_changed_is_named(tmp_path, header, words):
    log(tmp_path / "steps.jsonl").close()
    with pytest.raises(UserError, match=words):
        log(tmp_path / "steps.jsonl", **header)


def test_what_an_older_log_does_not_record_is_said_and_not_checked(tmp_path):
    old = {key: value for key, value in HEADER.items() if key not in ("architecture", "definition")}
    StepLog(tmp_path / "steps.jsonl", old).close()
    said: list[str] = []
    log(tmp_path / "steps.jsonl", said).close()
    assert len(said) == 2 and "does not record the architecture" in said[0]


def test_fields_that_one_side_alone_knows_are_no_change():
    assert change({"a": 1, "old": 2}, {"a": 1, "new": 3}) is None
    assert change({"a": 1}, {"new": 3}, both=False) == "a was 1 and is None now"
