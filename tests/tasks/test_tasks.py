"""The list of tasks, names, and every task on real rows with a real small model."""

from __future__ import annotations

import json

import pytest
import torch

from metazo.errors import UserError
from metazo.models.load import load_model
from metazo.tasks import TASKS, get, names, prepare, resolve, text
from metazo.tasks.evaluate import evaluate

WANTED = [
    *("sst2", "cola", "mnli", "qnli", "snli", "trec"),
    *("rte", "cb", "boolq", "boolq_closed", "wsc", "wic", "multirc", "copa", "record"),
    *("squad", "drop", "gsm8k", "metamathqa"),
    *("pico_sentiment", "pico_topic", "pico_entail", "pico_cause", "pico_span", "books"),
]
REAL = ["sst2", "rte", "cb", "copa", "wsc", "boolq", "boolq_closed", "squad", "drop", "mnli", "qnli", "cola", "gsm8k"]
SPLIT_SIZES = {"cb": (150, 100, 56), "copa": (300, 100, 100), "rte": (1000, 500, 277), "wsc": (370, 184, 104)}


def test_every_task_of_the_papers_is_there():
    assert set(names()) - {task.name for task in text.TASKS} == set(WANTED)
    assert all(task.hub or task.generate or task.family for task in TASKS.values())
    assert all(task.metric and (task.classifier or task.kind != "classification") for task in TASKS.values())


@pytest.mark.parametrize("written", ["sst2", "SST-2", "SST2"])
def test_a_name_may_be_written_as_in_the_papers(written):
    assert resolve(written) is TASKS["sst2"]


def test_prepare_takes_a_name_as_well():
    loaded, sizes = load_model("pico"), {"train": 4, "dev": 2, "test": 2}
    named, same = (prepare(task, loaded, **sizes) for task in ("pico_sentiment", TASKS["pico_sentiment"]))
    assert named.train == same.train
    with pytest.raises(UserError, match="`task` is a name, a YAML file or a Task, not 5"):
        prepare(5, loaded)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="`loaded` is a model as metazo.load_model gives it, not 'pico'"):
        prepare("pico_sentiment", "pico")  # type: ignore[arg-type]


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match="unknown task 'sst3'; did you mean sst5 or sst2"):
        get("sst3")
    with pytest.raises(UserError, match="unknown task 'xxxxxxxx'; the tasks are sst2, "):
        get("xxxxxxxx")


@pytest.mark.parametrize("name", [*REAL, "pico_topic", "pico_cause", "pico_span"])
def test_real_rows_with_a_real_causal_model(shared, name):
    loaded = load_model(shared / "models" / "stories260k")
    ready = prepare(get(name), loaded, data=shared / "data", train=24, dev=8, test=8, max_length=256)
    drawn = [len(getattr(ready, split)) + ready.dropped[split] for split in ("train", "dev", "test")]
    assert drawn == [24, 8, 8] and (name == "gsm8k" or not any(ready.dropped.values()))
    assert all(len(example) <= 256 for example in ready.train + ready.dev + ready.test)
    assert ready.loss(loaded.model, ready.collate(ready.train[:8])).isfinite()
    ready.test = ready.test[:4]
    result = evaluate(loaded.model, ready, "test")
    assert {"loss", *get(name).metric, "examples"} <= result.keys() and result["examples"] == 4
    assert ("majority" in result) == (get(name).kind != "generation")
    assert torch.tensor(list(result.values())).isfinite().all()


@pytest.mark.parametrize("name", [name for name in REAL if get(name).kind == "classification"])
def test_real_rows_with_a_real_classifier(shared, minilm, name):
    loaded = load_model(minilm, num_labels=get(name).num_labels)
    ready = prepare(get(name), loaded, data=shared / "data", train=16, dev=4, test=4, max_length=64)
    assert ready.loss(loaded.model, ready.collate(ready.train[:4])).isfinite()
    assert evaluate(loaded.model, ready, "test").keys() >= {"loss", "accuracy", "majority"}


@pytest.mark.parametrize("name", SPLIT_SIZES)
def test_default_splits_are_the_papers(shared, name):
    loaded = load_model(shared / "models" / "stories3m")
    ready = prepare(get(name), loaded, data=shared / "data")
    found = tuple(len(getattr(ready, split)) + ready.dropped[split] for split in ("train", "dev", "test"))
    assert found == SPLIT_SIZES[name]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("wic", {"word": "run", "sentence1": "I run.", "sentence2": "A run.", "label": 0}),
        ("multirc", {"paragraph": "The cat sat.", "question": "Who sat?", "answer": "cat", "label": 1}),
        ("trec", {"text": "Who sat ?", "coarse_label": 3}),
        ("snli", {"premise": "A cat sat.", "hypothesis": "It sat.", "label": 0}),
        (
            "record",
            {"passage": "The cat sat.", "query": "@placeholder ran.", "entities": ["cat", "dog"], "answers": ["cat"]},
        ),
        ("metamathqa", {"query": "1 + 1?", "response": "The answer is: 2"}),
    ],
)
def test_tasks_without_shared_rows_take_rows_of_the_hubs_form(tiny, tmp_path, name, row):
    (tmp_path / name).mkdir()
    for split in ("train", "validation"):
        (tmp_path / name / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 12)
    loaded = load_model(tiny("llama"))
    ready = prepare(get(name), loaded, data=tmp_path, train=4, dev=2, test=3)
    assert ready.loss(loaded.model, ready.collate(ready.train)).isfinite()
    assert evaluate(loaded.model, ready, "test")["examples"] == 3
