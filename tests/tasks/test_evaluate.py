"""Evaluation: metrics against a plain loop, independence of order and batch, generation that ends where it should."""

from __future__ import annotations

import pytest
import torch

from metazo.errors import UserError
from metazo.models.load import load_model
from metazo.tasks import get, prepare
from metazo.tasks.evaluate import evaluate, generate


def ready(tiny, model="llama", task="pico_sentiment", **sizes):
    loaded = load_model(tiny(model), num_labels=get(task).num_labels)
    return loaded.model, prepare(get(task), loaded, **({"train": 8, "dev": 30, "test": 24} | sizes))


@pytest.mark.parametrize(("model", "task"), [("llama", "pico_topic"), ("bert", "pico_topic"), ("gpt2", "pico_cause")])
def test_metrics_equal_a_plain_loop(tiny, model, task):
    network, prepared = ready(tiny, model, task)
    result = evaluate(network, prepared, "test", batch_size=7)
    losses, right = [], []
    for example in prepared.test:
        losses.append(prepared.loss(network, prepared.collate([example])).item())
        scores = prepared.scores(network, prepared.collate([example], every_option=True))
        right.append(scores.argmax().item() in example.targets)
    assert result["loss"] == pytest.approx(sum(losses) / 24, abs=1e-5)
    assert result["accuracy"] == sum(right) / 24
    counts = torch.bincount(torch.tensor([example.targets[0] for example in prepared.test]))
    assert result["majority"] == counts.max().item() / 24
    assert result["examples"] == 24


def test_order_and_batch_size_do_not_matter(tiny):
    network, prepared = ready(tiny, task="pico_topic")
    first = evaluate(network, prepared, batch_size=32)
    prepared.dev.reverse()
    second = evaluate(network, prepared, batch_size=3)
    assert first == pytest.approx(second, abs=1e-5)


def test_limit_takes_the_first_examples_and_their_majority(tiny):
    network, prepared = ready(tiny)
    some = evaluate(network, prepared, limit=5)
    prepared.dev = prepared.dev[:5]
    assert some == evaluate(network, prepared) and some["examples"] == 5


def test_the_mode_is_put_back_and_nothing_is_trained(tiny):
    network, prepared = ready(tiny)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    evaluate(network, prepared)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_an_empty_split_is_a_user_error(tiny):
    network, prepared = ready(tiny, dev=0)
    with pytest.raises(UserError, match="the dev split of task 'pico_sentiment' holds no examples"):
        evaluate(network, prepared)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_model_that_has_learned_the_answers_generates_them(tiny, model):
    """Overfit six rows by first-order steps: F1 and exact match go to 1, so prompt, padding, stop and metric agree."""
    network, prepared = ready(tiny, model, "pico_span", train=6, dev=0, test=1)
    assert evaluate(network, prepared, "train")["exact_match"] == 0
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = prepared.loss(network, prepared.collate(prepared.train))
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            break
    result = evaluate(network, prepared, "train")
    assert (result["f1"], result["exact_match"]) == (1, 1)
    steps = []
    hook = network.register_forward_hook(lambda *_: steps.append(1))
    assert generate(network, prepared, prepared.train) == [example.references[0] for example in prepared.train]
    hook.remove()
    assert len(steps) == max(len(example.options[0]) for example in prepared.train) < prepared.room  # then all stopped


def test_generation_without_stop_text_ends_at_the_end_token(tiny):
    loaded = load_model(tiny("llama"))
    task = get("pico_span").model_copy(update={"stop": None, "max_new_tokens": 20})
    prepared = prepare(task, loaded, train=2, dev=0, test=1)
    optimizer = torch.optim.Adam(loaded.model.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        prepared.loss(loaded.model, prepared.collate(prepared.train)).backward()
        optimizer.step()
    assert generate(loaded.model, prepared, prepared.train) == [example.references[0] for example in prepared.train]
