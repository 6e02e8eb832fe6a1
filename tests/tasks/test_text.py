"""The 22 real tasks: the table agrees with the data's own description, a family is in one split of tasks, and rows are read."""

from __future__ import annotations

import json

import pytest

from metazo.models.load import load_model
from metazo.tasks import prepare, text
from metazo.tasks.classes import fit_head
from metazo.tasks.evaluate import evaluate


def test_families_are_split_and_cover_every_task():
    assert len(text.TASKS) == 22 and len({task.family for task in text.TASKS}) == 17
    assert not {*text.META_TRAIN} & {*text.HELD_OUT}
    names = text.of_families(text.META_TRAIN) + text.of_families(text.HELD_OUT)
    assert sorted(names) == sorted(task.name for task in text.TASKS)


def test_phrases_and_families_are_those_of_the_data(text_data):
    for task in text.TASKS:
        told = json.loads((text_data / task.name / "labels.json").read_text())
        assert list(task.labels.values()) == told["names"] and task.family == told["family"]
        assert task.phrase == told["prompt"].replace("{label}", "{}")


@pytest.mark.parametrize("name", [task.name for task in text.TASKS if len(task.labels) < 20])
def test_a_model_reads_the_rows(text_data, tiny, name):
    task = next(task for task in text.TASKS if task.name == name)
    loaded = load_model(tiny("bert"), num_labels=task.num_labels)
    ready = prepare(task, loaded, data=text_data, train=64, dev=8, test=8)
    assert [len(ready.train), len(ready.dev), len(ready.test)] == [64, 8, 8]


def test_label_phrases_alone_beat_the_majority_on_real_news(text_data, minilm):
    """Without training MiniLM distinguishes the topics of AG News, with a head made of the task's sentence."""
    task = next(task for task in text.TASKS if task.name == "ag_news")
    loaded = load_model(minilm, head="phrases", num_labels=4)
    ready = prepare(task, loaded, data=text_data, train=64, dev=0, test=64, max_length=48)
    fit_head(loaded, ready)
    result = evaluate(loaded.model, ready, "test")
    assert result["accuracy"] > 0.6 > 0.45 > result["majority"]
