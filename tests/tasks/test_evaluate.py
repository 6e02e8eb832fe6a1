"""Evaluation: metrics against a plain loop, independence of order and batch, and the end of generation."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from metazo.errors import UserError
from metazo.models.load import load_model
from metazo.tasks import get, prepare
from metazo.tasks.encode import Encoder
from metazo.tasks.evaluate import evaluate, generate
from metazo.tasks.prepared import Prepared
from metazo.tasks.task import Task


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


@pytest.mark.parametrize("task", ["pico_topic", "pico_cause", "pico_span"])
def test_the_loss_alone_is_that_of_a_whole_evaluation_and_generates_nothing(tiny, monkeypatch, task):
    network, prepared = ready(tiny, task=task)
    prepared.dev = prepared.dev[:4]
    whole = evaluate(network, prepared)
    monkeypatch.setattr(network, "generate", None)
    assert evaluate(network, prepared, loss_only=True) == {"loss": whole["loss"], "examples": 4}


def test_every_mode_is_put_back_and_nothing_is_trained(tiny):
    network, prepared = ready(tiny)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    next(iter(network.children())).eval()
    modes = [module.training for module in network.modules()]
    evaluate(network, prepared)
    assert [module.training for module in network.modules()] == modes and len(set(modes)) == 2
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
    assert (
        len(steps) == max(len(example.options[0]) for example in prepared.train) < prepared.room
    )  # all rows have stopped


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


# -- faults that earlier versions did not report --------------------------------------------------------------------------


def test_generation_takes_nothing_of_the_checkpoints_generation_config_but_its_end(tiny):
    network, prepared = ready(tiny, "gpt2", "pico_span", train=6, dev=0, test=12)
    before = generate(network, prepared, prepared.test)
    config = network.generation_config
    config.repetition_penalty, config.no_repeat_ngram_size, config.min_new_tokens = 5.0, 1, 3
    config.suppress_tokens = list(range(5, 200))
    assert generate(network, prepared, prepared.test) == before
    assert network.generation_config is config and config.repetition_penalty == 5.0


@pytest.mark.parametrize("stop", ["\n", "###", "\n\nQ:", " was great", "é"])
@pytest.mark.parametrize("model", ["gpt2", "t5"])
def test_a_stop_text_of_several_tokens_ends_generation(tiny, monkeypatch, model, stop):
    """Not before the text is there, and not because the prompt ends with it; the answer is that of generating on."""
    network, prepared = ready(tiny, model, "pico_span", train=2, dev=0, test=2)
    prepared.task = prepared.task.model_copy(update={"stop": stop})
    tokenizer, steps = prepared.tokenizer, []
    told = tokenizer(f"the cat sat {stop} and it was {stop} good", add_special_tokens=False)["input_ids"]
    texts = [tokenizer.decode(told[: count + 1], skip_special_tokens=True) for count in range(len(told))]
    assert stop in texts[-1] or model == "t5"  # which writes no line breaks

    def told_token_by_token(input_ids, attention_mask, stopping_criteria):
        found = torch.tensor([prepared.start] * 2, dtype=torch.long) if prepared.start else input_ids
        for token in told:
            found = torch.cat([found, found.new_full((2, 1), token)], dim=1)
            steps.append(tokenizer.decode(found[0, -len(steps) - 1 :], skip_special_tokens=True))
            if bool(stopping_criteria(found, None).all()):
                break
        return found

    for example in prepared.test:
        example.ids = [*example.ids, *tokenizer(f" so{stop}", add_special_tokens=False)["input_ids"]]
    monkeypatch.setattr(network, "generate", told_token_by_token)
    assert generate(network, prepared, prepared.test) == [texts[-1].partition(stop)[0].strip()] * 2
    assert steps == [text for place, text in enumerate(texts) if not place or stop not in texts[place - 1]]


def test_an_answer_ends_at_the_models_own_end_of_text(tiny):
    """The model's first token becomes its end of text, so every answer that starts with it is empty."""
    network, prepared = ready(tiny, "gpt2", "pico_span", train=2, dev=0, test=2)
    prompt = prepared.test[0].ids
    first = int(network(torch.tensor([prompt])).logits[0, -1].argmax())
    assert generate(network, prepared, prepared.test[:1]) != [""]
    network.generation_config.eos_token_id = [2, first]
    assert generate(network, prepared, prepared.test[:1])[0] in ("", prepared.tokenizer.decode([first]).strip())


@pytest.mark.parametrize("task", ["pico_topic", "pico_cause", "pico_span"])
def test_a_score_that_is_not_finite_is_a_wrong_answer_and_a_loss_that_says_so(tiny, task):
    network, prepared = ready(tiny, "gpt2", task, train=2, dev=0, test=12)
    with torch.no_grad():
        network.transformer.ln_f.weight.fill_(float("nan"))
    result = evaluate(network, prepared, "test")
    assert math.isnan(result["loss"])
    assert all(result[metric] <= 0 for metric in prepared.task.metric)


def test_a_blank_choice_never_wins(tiny):
    """The scores of the other choices are those of a row without the blank one."""
    loaded = load_model(tiny("gpt2"))
    task = Task(name="c", kind="choice", prompt="{text}: {}", choices=("a", "b", "c"))
    row = {"text": "the cat", "a": "great", "b": " ", "c": "it was", "label": 0}
    encoder = Encoder(task, loaded)
    ready = Prepared(task, loaded.kind, loaded.tokenizer, encoder.room, encoder.words, encoder.at_position)
    ready.test = [encoder(row, "row 1")]
    scores = ready.scores(loaded.model, ready.collate(ready.test, every_option=True))[0]
    two = Task(name="c", kind="choice", prompt="{text}: {}", choices=("a", "c"))
    ready.test = [Encoder(two, loaded)(row, "row 1")]
    expected = ready.scores(loaded.model, ready.collate(ready.test, every_option=True))[0]
    torch.testing.assert_close(scores[[0, 2]], expected, atol=1e-5, rtol=1e-5)
    assert scores[1] == -torch.inf and evaluate(loaded.model, ready, "test")["accuracy"] in (0, 1)


def test_an_empty_prompt_scores_the_same_in_any_batch(tiny):
    loaded = load_model(tiny("gpt2"))
    loaded.tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    for kind, more in (("classification", {"labels": ["terrible", "great"]}), ("generation", {"answer": "a"})):
        task = Task(name="t", kind=kind, prompt="{text}{}", **more)
        encoder = Encoder(task, loaded)
        rows = [{"text": text, "a": "the cat", "label": 1} for text in ("", "the film was great it was")]
        ready = Prepared(task, loaded.kind, loaded.tokenizer, encoder.room, encoder.words, encoder.at_position)
        ready.test = [encoder(row, "row") for row in rows]
        assert ready.test[0].ids == [0]
        losses = [evaluate(loaded.model, ready, "test", batch_size=size)["loss"] for size in (1, 2)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        ready.loss(loaded.model, ready.collate(ready.test)).backward()  # a batch that begins with the empty row
