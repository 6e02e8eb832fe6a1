"""The classes of a head matched by name, and a head of label phrases from task to replay."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from metazo.errors import UserError
from metazo.models.describe import describe
from metazo.models.heads import Phrases
from metazo.models.load import load_model
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.replay import replay
from metazo.steplog.writer import StepLog
from metazo.tasks import from_yaml, prepare
from metazo.tasks.classes import class_names, fit_head, head_order
from metazo.tasks.evaluate import evaluate
from metazo.tasks.task import Task


def task(labels, **more) -> Task:
    return Task(name="rev", kind="classification", prompt="{text}. It was {}.", labels=labels, **more)


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "rev").mkdir()
    for split in ("train", "validation"):
        content = [{"text": f"{split} {i} {('bad', 'warm')[i % 2]}", "label": ("neg", "pos")[i % 2]} for i in range(24)]
        (tmp_path / "rev" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return tmp_path


@pytest.mark.parametrize(
    ("names", "labels", "order"),
    [
        ({0: "pos", 1: "neg"}, {"neg": "terrible", "pos": "great"}, [1, 0]),
        ({0: "NEG", 1: "Pos "}, {"neg": "terrible", "pos": "great"}, None),
        ({0: "great", 1: "terrible"}, {0: "terrible", 1: "great"}, [1, 0]),
        ({0: "1", 1: "0"}, {0: "terrible", 1: "great"}, [1, 0]),
        ({0: "LABEL_0", 1: "LABEL_1"}, {"neg": "terrible", "pos": "great"}, None),
    ],
)
def test_classes_are_matched_by_name(tiny, names, labels, order):
    config = load_model(tiny("bert"), num_labels=2).model.config
    config.id2label = names
    assert head_order(config, task(labels)) == (order, None)


def test_names_that_do_not_match_are_said(tiny):
    config = load_model(tiny("bert"), num_labels=2).model.config
    config.id2label = {0: "cats", 1: "dogs"}
    order, note = head_order(config, task({"neg": "terrible", "pos": "great"}))
    assert (
        order is None and note and "'cats', 'dogs', the labels of rev 'neg', 'pos': they are matched by order" in note
    )


def test_a_trained_classifier_scores_the_same_whatever_the_order_of_the_labels(tiny, tmp_path, rows):
    """Saved by one task and loaded by another with the labels in another order: the same loss, and training works."""
    one, other = task({"neg": "terrible", "pos": "great"}), task({"pos": "great", "neg": "terrible"})
    loaded = load_model(tiny("bert"), num_labels=2)
    ready = prepare(one, loaded, data=rows, train=12, dev=6, test=10)
    first = evaluate(loaded.model, ready, "test")
    describe(loaded.model, ready.record)
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved", num_labels=2, trained_head=True)
    swapped = prepare(other, again, data=rows, train=12, dev=6, test=10)
    assert swapped.order == [1, 0]
    assert evaluate(again.model, swapped, "test") == pytest.approx(first, abs=1e-6)
    assert (
        swapped.record["labels"] == ready.record["labels"] == ["neg", "pos"]
    )  # the names of the columns do not change
    batches = [p.loss(m.model, p.collate(p.train)) for p, m in ((ready, loaded), (swapped, again))]
    torch.testing.assert_close(*batches)


def test_class_names_are_values_that_are_text_or_else_words():
    assert class_names(task({"neg": "terrible", "pos": "great"}), None) == ["neg", "pos"]
    assert class_names(task({0: "terrible", 1: "great"}), [1, 0]) == ["great", "terrible"]


# -- the head of label phrases -------------------------------------------------------------------------------------------


@pytest.fixture
def sentence(tiny, tmp_path):
    folder = shutil.copytree(tiny("bert"), tmp_path / "sentence")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return folder


def test_the_head_of_label_phrases_is_its_formula_and_reads_no_label(sentence, rows):
    spoken = task({"neg": "terrible", "pos": "great"}, phrase="the film was {}")
    heads = []
    for shift in (0, 1):
        loaded = load_model(sentence, head="phrases", num_labels=2)
        ready = prepare(spoken, loaded, data=rows, train=12, dev=6, test=10)
        with pytest.raises(UserError, match="the head has no prototypes yet"):
            evaluate(loaded.model, ready, "test")
        for example in ready.train:
            example.targets = [(example.targets[0] + shift) % 2]
        fit_head(loaded, ready, batch_size=5)
        heads.append(loaded.model.head)

    def embed(texts):
        return torch.cat([loaded.model.embed(**loaded.tokenizer([text], return_tensors="pt")) for text in texts])

    phrases = embed(["the film was terrible", "the film was great"])
    trained = torch.cat([loaded.model.embed(torch.tensor([e.ids]), torch.ones(1, len(e.ids))) for e in ready.train])
    texts = embed(["the cat sat", "a warm and funny story"])
    offset = 20 * torch.stack([cosine_similarity(trained, phrase[None]) for phrase in phrases], 1).mean(0)
    expected = 20 * torch.stack([cosine_similarity(texts, phrase[None]) for phrase in phrases], 1) - offset
    torch.testing.assert_close(heads[0](texts), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(heads[0].prototypes, heads[1].prototypes) and torch.equal(heads[0].offset, heads[1].offset)


def test_phrases_that_the_encoder_does_not_tell_apart_are_refused(sentence, rows):
    loaded = load_model(sentence, head="phrases", num_labels=2)
    with pytest.raises(UserError, match="the phrases of classes 0 and 1 have the same embedding"):
        loaded.model.set_phrases(loaded.tokenizer, ["the cat", "the cat"])


def test_a_run_on_label_phrases_is_saved_and_replayed(sentence, rows, tmp_path):
    path = rows / "rev.yaml"
    path.write_text(
        'kind: classification\nprompt: "{text}. {}"\nlabels: {neg: terrible, pos: great}\nphrase: "the film was {}"\n'
    )
    sizes = {"train_examples": 12, "dev_examples": 6, "test_examples": 10}
    config = FinetuneConfig(
        str(sentence), str(path), tmp_path / "run", steps=3, batch_size=4, data=rows, head="phrases", lr=1e-3, **sizes
    )
    summary = run_settings(config)
    again = replay(tmp_path / "run" / "steps.jsonl", str(sentence), tmp_path / "again")
    assert again.identical
    spoken = from_yaml(path)
    for folder in (tmp_path / "run" / "model", tmp_path / "again"):
        loaded = load_model(folder, num_labels=2, trained_head=True)
        assert isinstance(loaded.model.head, Phrases)
        assert loaded.model.config.id2label == {0: "neg", 1: "pos"}
        ready = prepare(spoken, loaded, data=rows)  # sizes of the run, from the model
        assert [len(ready.train), len(ready.dev), len(ready.test)] == [12, 6, 10]
        assert evaluate(loaded.model, ready, "test") == pytest.approx(summary["test"], abs=1e-6)


def test_a_run_on_label_phrases_goes_on_where_the_offset_has_other_last_bits(sentence, rows, tmp_path, monkeypatch):
    """On another processor; the run takes the offset of its log. Other phrases are another run."""
    path = rows / "rev.yaml"
    text = (
        'kind: classification\nprompt: "{text}. {}"\nlabels: {neg: terrible, pos: great}\nphrase: "the film was {}"\n'
    )
    path.write_text(text)
    config = FinetuneConfig(
        str(sentence), str(path), tmp_path / "run", steps=4, batch_size=4, data=rows, head="phrases", lr=1e-3,
        train_examples=12, dev_examples=6, test_examples=10,
    )  # fmt: skip
    whole = run_settings(replace(config, out=tmp_path / "whole"))
    append, calibrate = StepLog.append, Phrases.calibrate

    def dying(log, step):
        if step.step == 2:
            raise KeyboardInterrupt
        append(log, step)

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(StepLog, "append", dying)
        run_settings(config)
    monkeypatch.setattr(Phrases, "calibrate", lambda head, texts: calibrate(head, texts.roll(1, 1)))
    path.write_text(text.replace("the film was", "that was"))
    with pytest.raises(UserError, match="belongs to another run"):
        run_settings(replace(config, resume=True))
    path.write_text(text)
    assert run_settings(replace(config, resume=True))["test"] == whole["test"]
