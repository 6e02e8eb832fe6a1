"""The committed model is small, loads offline, and has the figures of its card."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from metazo.pico import grammar
from metazo.pico.score import encode, loss_and_hits, perplexity, score

MODEL = Path(grammar.__file__).parent / "model"


@pytest.fixture(scope="module")
def pico():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def card(row: str) -> list[float]:
    """The figures of a row of the card's tables."""
    found = re.search(rf"^\| {re.escape(row)} \|(.*)\|$", (MODEL / "card.md").read_text(), re.MULTILINE)
    assert found, f"no row {row!r} in card.md"
    return [float(cell) for cell in found[1].split("|")]


def test_size(pico):
    assert (MODEL / "model.safetensors").stat().st_size < 4 * 2**20
    assert 1_000_000 <= pico.num_parameters() <= 2_000_000
    assert pico.config.tie_word_embeddings
    assert len(pico.config.architectures) == 1 and pico.config.architectures[0] == "LlamaForCausalLM"


def test_label_words_are_single_tokens(tokenizer):
    words = [word for form in grammar.PROMPTS.values() for word in form.words or ()]
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    assert all(len(each) == 1 for each in ids) and len({each[0] for each in ids}) == len(words)


def test_tokenizer_begins_and_goes_round(tokenizer):
    text = "It's a test: two words, naïve “quotes” and 42 numbers.\n\nEnd"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 1 and tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 2
    assert tokenizer.decode(ids[1:]) == text


@pytest.mark.parametrize("task", grammar.TASKS)
def test_prompts_are_short(task, tokenizer):
    rows = [row for split in grammar.SPLITS for row in grammar.examples(task, split, 300)]
    assert encode(task, rows, tokenizer).ids.shape[1] <= 52


def test_perplexity_of_held_out_text_is_the_cards(pico, tokenizer):
    text = Path(__file__).with_name("alice.txt").read_text()
    measured = perplexity(pico, tokenizer, text)
    assert measured == pytest.approx(card("carroll-alice.txt, start"), rel=0.01)


@pytest.mark.parametrize("task", grammar.TASKS)
def test_zero_shot_is_the_cards(task, pico, tokenizer):
    with torch.no_grad():
        loss, accuracy = score(pico, tokenizer, task, grammar.examples(task, "test", 1000))
    assert loss == pytest.approx(card(task)[0], rel=0.02)
    assert accuracy == pytest.approx(card(task)[1], abs=0.01)


def test_padding_changes_nothing(pico, tokenizer):
    for task in grammar.TASKS:
        rows = grammar.examples(task, "test", 6)
        together = loss_and_hits(pico, encode(task, rows, tokenizer))[0]
        alone = sum(loss_and_hits(pico, encode(task, [row], tokenizer))[0] for row in rows) / len(rows)
        assert torch.allclose(together, torch.as_tensor(alone), rtol=1e-4)


def test_a_few_first_order_steps_learn_topic(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    test = grammar.examples("pico_topic", "test", 200)
    before = score(model, tokenizer, "pico_topic", test)
    train = grammar.examples("pico_topic", "train", 320)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for i in range(0, len(train), 16):
        loss_and_hits(model, encode("pico_topic", train[i : i + 16], tokenizer))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    after = score(model, tokenizer, "pico_topic", test)
    assert before[1] < 0.8 and after[1] > 0.9 and after[0] < before[0] / 2
