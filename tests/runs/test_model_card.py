"""The card of a tuned model: what was minimised, and the tags by which the Hub lists it."""

from __future__ import annotations

from pathlib import Path

import pytest

from metazo.runs.config import FinetuneConfig
from metazo.runs.model_card import ModelCard

SUMMARY = {"lr": 1e-3, "steps": 2, "kept_step": 2, "forwards": 4, "before": {}, "dev": {}, "test": {}}


@pytest.mark.parametrize(
    ("settings", "tags", "minimised"),
    [
        ({}, "metazo, zeroth-order", "the task's loss"),
        ({"objective": "accuracy"}, "metazo, zeroth-order", "1 - accuracy"),
        ({"objective": "/home/me/reward.py:cost"}, "metazo, zeroth-order", "reward.py:cost"),
        ({"optimizer": "first-order-adamw"}, "metazo", "the task's loss"),
        ({"optimizer": "answer-column"}, "metazo", "the task's loss"),
    ],
)
def test_what_was_minimised_and_the_tags(settings: dict[str, str], tags: str, minimised: str) -> None:
    card = ModelCard(FinetuneConfig("pico", "pico_topic", Path("out"), **settings), SUMMARY, 10).text()
    assert f"tags: [{tags}]\n" in card and f"| minimised | {minimised} |" in card
    assert ("by forward passes alone" in card) == ("zeroth-order" in tags)
