"""The best record and patience, which are kept as records come, against a comparison of all of them."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from metazo.runs.config import FinetuneConfig
from metazo.runs.records import Records


def config(**settings: Any) -> FinetuneConfig:
    return FinetuneConfig("pico", "pico_sentiment", patience=3, eval_every=1, **settings)


def drawn(dice: random.Random, step: int, objective: bool) -> dict[str, Any]:
    """Few values, so that records are equal in one number or in all."""
    faults = [] if objective else [90.0, math.inf, math.nan]
    dev = {"loss": dice.choice([0.5, 0.6, 0.7, *faults]), "accuracy": dice.choice([0.5, 0.75])}
    more = {"weights_finite": False} if dice.random() < 0.1 else {}
    return {"step": step, "dev": dev | ({"objective": dice.choice([0.2, 0.3])} if objective else {}), **more}


@pytest.mark.parametrize("metric", [None, "accuracy"])
@pytest.mark.parametrize("objective", [None, "f1"])
@pytest.mark.parametrize("seed", range(10))
def test_records_as_they_come_and_all_at_once(seed: int, metric: str | None, objective: str | None) -> None:
    dice, records = random.Random(seed), Records(config(objective=objective), metric, 30)
    for step in range(30):
        record = drawn(dice, step, objective is not None)
        others = [records._merit(other) for other in records.records]
        assert records.better(record) == (records.usable(record) and all(records._merit(record) > m for m in others))
        records.records.append(record)
        if dice.random() < 0.1:  # a run is resumed
            records.records = records.records[: dice.randrange(1, step + 2)]
        every = records.records
        assert records.best() is max(every, key=records._merit)
        losses = [each["dev"][records.minimised] if records.usable(each) else math.inf for each in every]
        assert records.stalled() == (len(losses) - 1 - losses.index(min(losses)) >= 3)


def test_a_record_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of a million steps may have as many evaluations, and asks after every step."""
    records, asked = Records(config(), None, 1000), []
    usable = Records.usable
    monkeypatch.setattr(Records, "usable", lambda self, record: asked.append(record) or usable(self, record))
    for step in range(1000):
        records.records.append({"step": step, "dev": {"loss": 1 / (step + 1)}})
        assert not records.stalled()
    assert len(asked) <= 6 * 1000 and records.best()["step"] == 999
