"""micro has the shape and the figures of its card, has seen no held-out task, and can be made again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config

from metazo.micro import mixture
from metazo.models.embedded import EMBEDDED
from metazo.models.load import load_model
from metazo.pico.pretrain import rows_of, train
from metazo.pico.score import perplexity
from metazo.tasks import prepare, text
from metazo.tasks.evaluate import evaluate

MODEL = EMBEDDED["micro"]
TASK = {task.name: task for task in text.TASKS}


@pytest.fixture(scope="module")
def micro():
    return load_model("micro")


def card(row: str) -> list[str]:
    """The cells of a row of the card's tables."""
    found = re.search(rf"^\| {re.escape(row)} \|(.*)\|$", (MODEL / "card.md").read_text(), re.MULTILINE)
    assert found, f"no row {row!r} in card.md"
    return [cell.strip() for cell in found[1].split("|")]


def test_shape(micro):
    config = micro.model.config
    assert (MODEL / "model.safetensors").stat().st_size < 12 * 2**20 and 4e6 < micro.model.num_parameters() < 8e6
    assert config.model_type == "qwen2" and not config.tie_word_embeddings
    assert config.num_key_value_heads < config.num_attention_heads
    assert micro.model.model.layers[0].self_attn.q_proj.bias is not None


def test_no_task_of_the_mixture_is_of_a_held_out_family():
    assert {TASK[name].family for name in mixture.TASKS} <= {*text.META_TRAIN}
    assert not set(mixture.TASKS) & set(text.of_families(text.HELD_OUT))


def test_perplexity_of_held_out_text_is_the_cards(micro):
    alice = Path(__file__).parents[1].joinpath("pico", "alice.txt").read_text()
    told = [float(cell) for cell in card("carroll-alice.txt, start")]
    assert perplexity(micro.model, micro.tokenizer, alice) == pytest.approx(told, rel=0.01)


def test_the_mixture_asks_as_metazo_does(micro, text_data):
    """Tokens of prompt and of every answer are those of the task that metazo prepares."""
    for name in ("snips", "review_sentences", "spooky_author"):
        ready = prepare(TASK[name], micro, data=text_data, train=8, dev=0, test=0)
        prompts = {tuple(micro.tokenizer(prompt)["input_ids"]) for prompt, _ in mixture.instructions(text_data, name)}
        assert {tuple(each.ids) for each in ready.train} <= prompts
        answers = {answer for _, answer in mixture.instructions(text_data, name)}
        options = ready.words or ready.train[0].options
        assert {micro.tokenizer.decode(option) for option in options} == answers


@pytest.mark.parametrize("name", ["mpqa", "snips"])  # a new task, and one of the mixture
def test_accuracy_of_a_task_is_the_cards(micro, text_data, name):
    ready = prepare(TASK[name], micro, data=text_data, train=8, dev=0, test=300)
    result = evaluate(micro.model, ready, "test")
    assert card(name)[2:] == [f"{result['accuracy']:.3f}", f"{result['majority']:.3f}"]


def test_one_seed_one_result(micro, monkeypatch):
    """That another seed gives another is tested with pico. Of short rows, one layer and a fraction of the width, because Muon
    calculates in bfloat16, which takes up to a minute for all of it on a processor without 16-bit arithmetic."""
    small = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    monkeypatch.setattr(mixture, "Qwen2Config", lambda **told: Qwen2Config(**told | small))
    texts = [
        ("I like it a lot.\nThis review is", " positive"),
        ("Home again.", ""),
    ] * 400  # each row begins elsewhere in them
    rows = rows_of(texts, micro.tokenizer)[:, :, :32]
    assert len(rows[0].unique(dim=0)) > 5
    rows[0] %= 128
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model = mixture.new_model()
        train(model, [(rows, 1), (rows, 1)], 1)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.set_num_threads(threads)
    assert torch.equal(*results)
