"""Scores and losses against a plain implementation: one unpadded example at a time, with all logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from metazo.models.load import load_model
from metazo.tasks.encode import Encoder
from metazo.tasks.prepared import Prepared
from metazo.tasks.task import Task

CAUSAL = ("gpt2", "opt", "llama")
ROWS = [
    {"text": "the film", "a": "great", "b": "the cat sat on the mat", "answer": "the cat", "label": 0},
    {"text": "a warm and funny story . the dog ran to the park", "a": "no", "b": "maybe", "answer": "x", "label": 1},
    {"text": "who sat on the mat ? " * 4, "a": "the grass was cut", "b": "it", "answer": "the dog ran", "label": 1},
]


def task(kind: str, **more) -> Task:
    own = {"classification": {"labels": ["terrible", "great"]}, "choice": {"choices": ("a", "b")}}.get(kind, {})
    return Task(**{"name": "t", "kind": kind, "prompt": "{text} It was"} | own | more)


def prepared(loaded, description: Task) -> Prepared:
    encoder = Encoder(description, loaded)
    examples = [encoder(row, f"row {i}") for i, row in enumerate(ROWS)]
    out = Prepared(description, loaded.kind, loaded.tokenizer, encoder.room, encoder.words, encoder.at_position)
    out.train = examples
    return out


def likelihoods(model, example) -> list[torch.Tensor]:
    """Token log-probabilities of every option after the prompt."""
    out = []
    for option in example.options:
        logits = model(torch.tensor([example.ids + option])).logits[0, len(example.ids) - 1 : -1].float()
        out.append(log_softmax(logits, -1)[torch.arange(len(option)), option])
    return out


@pytest.mark.parametrize("name", CAUSAL)
def test_label_words_at_their_position_equal_full_logits(tiny, name):
    loaded = load_model(tiny(name))
    ready = prepared(loaded, task("classification"))
    assert ready.at_position
    scores = ready.scores(loaded.model, ready.collate(ready.train))
    for example, row in zip(ready.train, scores, strict=True):
        full = loaded.model(torch.tensor([example.ids])).logits[0, -1]
        torch.testing.assert_close(row, full[[word[0] for word in ready.words]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("labels", [["great", "great film"], ["Expression", "Entity"], ["the cat", "the dog"]])
def test_longer_label_words_are_compared_whole(tiny, name, labels):
    loaded = load_model(tiny(name))
    ready = prepared(loaded, task("classification", labels=labels))
    assert not ready.at_position
    batch = ready.collate(ready.train)
    scores = ready.scores(loaded.model, batch)
    expected = torch.stack([torch.stack([p.sum() for p in likelihoods(loaded.model, e)]) for e in ready.train])
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)
    loss = cross_entropy(expected, torch.tensor([e.targets[0] for e in ready.train]))
    torch.testing.assert_close(ready.loss(loaded.model, batch), loss, atol=1e-4, rtol=1e-5)


def test_label_words_that_share_their_first_token_are_compared_whole(tiny):
    loaded = load_model(tiny("gpt2"))
    ready = prepared(loaded, task("classification", labels=["great", "great ."]))
    assert not ready.at_position and ready.words[0][0] == ready.words[1][0]


@pytest.mark.parametrize("name", CAUSAL)
def test_choices_are_compared_per_token_and_trained_on_the_right_one(tiny, name):
    loaded = load_model(tiny(name))
    ready = prepared(loaded, task("choice"))
    expected = torch.stack([torch.stack([p.mean() for p in likelihoods(loaded.model, e)]) for e in ready.train])
    scores = ready.scores(loaded.model, ready.collate(ready.train, every_option=True))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    batch = ready.collate(ready.train)
    assert len(batch["input_ids"]) == len(ROWS)  # one row each: the right choice
    right = -expected[torch.arange(3), [row["label"] for row in ROWS]].mean()
    torch.testing.assert_close(ready.loss(loaded.model, batch), right, atol=1e-5, rtol=1e-5)


def test_a_row_with_fewer_choices_scores_minus_infinity_there(tiny):
    loaded = load_model(tiny("gpt2"))
    ready = prepared(loaded, task("choice"))
    ready.train[0].options.append(ready.train[0].options[0])
    scores = ready.scores(loaded.model, ready.collate(ready.train, every_option=True))
    assert scores.shape == (3, 3)
    assert scores[1:, 2].tolist() == [-torch.inf] * 2 and scores[0, 2].isfinite()


@pytest.mark.parametrize("name", CAUSAL)
def test_answers_are_trained_by_the_language_model_loss_on_the_answer_only(tiny, name):
    loaded = load_model(tiny(name))
    ready = prepared(loaded, task("generation"))
    for example in ready.train:
        ids = torch.tensor([example.ids + example.options[0]])
        labels = ids.clone()
        labels[:, : len(example.ids)] = -100
        expected = loaded.model(ids, labels=labels).loss
        loss = ready.loss(loaded.model, ready.collate([example]))
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["roberta", "bert_mlm"])
def test_the_masked_head_at_the_mask_equals_full_logits(tiny, name):
    loaded = load_model(tiny(name))
    ready = prepared(loaded, task("classification", prompt="{} is what {text} was ."))
    scores = ready.scores(loaded.model, ready.collate(ready.train))
    for example, row in zip(ready.train, scores, strict=True):
        full = loaded.model(torch.tensor([example.ids])).logits[0, example.mask_at]
        torch.testing.assert_close(row, full[[word[0] for word in ready.words]], atol=1e-5, rtol=1e-5)


def test_a_masked_head_of_another_name_falls_back_to_full_logits(tiny):
    loaded = load_model(tiny("roberta"))
    ready = prepared(loaded, task("classification"))
    batch = ready.collate(ready.train)

    class Wrapped(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids, attention_mask)

    wrapped = ready.scores(Wrapped(loaded.model), batch)
    torch.testing.assert_close(wrapped, ready.scores(loaded.model, batch), atol=1e-5, rtol=1e-5)


def test_a_causal_model_that_cannot_skip_logits_gives_the_same(tiny):
    loaded = load_model(tiny("llama"))
    ready = prepared(loaded, task("generation"))
    batch = ready.collate(ready.train)

    class Wrapped(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids, attention_mask)

    plain = ready.loss(Wrapped(loaded.model), batch)
    torch.testing.assert_close(plain, ready.loss(loaded.model, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("template", ["{text}", ("{text}", "{a}")])
def test_a_classifier_reads_text_or_text_pair(tiny, template):
    loaded = load_model(tiny("bert"), num_labels=2)
    ready = prepared(loaded, task("classification", classifier=template))
    texts = [[row["text"] for row in ROWS], *([[row["a"] for row in ROWS]] if template != "{text}" else [])]
    inputs = loaded.tokenizer(*texts, padding=True, return_tensors="pt")
    expected = loaded.model(**inputs, labels=torch.tensor([row["label"] for row in ROWS])).loss
    torch.testing.assert_close(ready.loss(loaded.model, ready.collate(ready.train)), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("classification", name) for name in (*CAUSAL, "roberta", "bert_mlm", "bert")]
    + [(kind, name) for kind in ("choice", "generation") for name in CAUSAL],
)
def test_padding_changes_no_loss_and_gradients_flow(tiny, name, kind):
    loaded = load_model(tiny(name))
    ready = prepared(loaded, task(kind))
    together = ready.loss(loaded.model, ready.collate(ready.train))
    alone = torch.stack([ready.loss(loaded.model, ready.collate([example])) for example in ready.train]).mean()
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    together.backward()
    gradients = [p.grad for p in loaded.model.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


def test_the_loss_of_a_bfloat16_model_is_float32(tiny):
    loaded = load_model(tiny("opt"), dtype="bfloat16")
    for kind in ("classification", "generation"):
        ready = prepared(loaded, task(kind))
        assert ready.loss(loaded.model, ready.collate(ready.train)).dtype == torch.float32
