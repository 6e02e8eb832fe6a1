"""Options that share their prompt, against one unpadded row per option."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from metazo.bench import architectures
from metazo.models.load import load_model
from metazo.optimizers import LOZO
from metazo.tasks import options
from metazo.tasks.options import arranged, takes_trees, trees
from metazo.tasks.prepared import Batch, option_likelihoods
from tests.tasks.test_scores import CAUSAL, prepared, task

PROMPTS = [[3, 4, 5, 6, 7, 8], [9, 10, 4], [11, 3, 5, 6]]
ANSWERS = [[[5, 6, 7], [5, 6, 8, 9], [10]], [[4, 4], []], [[7, 8], [7, 9], [12, 13, 14]]]
LETTERS = [[[5], [6], [7]], [[5], [6]], [[5], [6], [7], [8]]]
OTHERS = {"Bloom": "bloom", "GPT-Neo": "gpt_neo"}  # ALiBi; local layers


def batch(answers: list[list[list[int]]]) -> Batch:
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return Batch(input_ids=ids, attention_mask=mask, position_ids=positions, **trees(answers, 0))


@torch.no_grad()
def plain(model: nn.Module, answers: list[list[list[int]]]) -> list[Tensor]:
    """Log-likelihoods of each answer's tokens, one unpadded row at a time."""
    found = []
    for prompt, own in zip(PROMPTS, answers, strict=True):
        for answer in own:
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            found.append(logits[torch.arange(len(answer)), answer])
    return found


def close(found: Tensor, expected: list[Tensor]) -> None:
    for row, right in zip(found, expected, strict=True):
        torch.testing.assert_close(row[: len(right)], right, atol=2e-5, rtol=1e-5)
        assert not row[len(right) :].any()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", architectures.CAUSAL)
def test_every_architecture_scores_options_as_one_row_each(name, attention):
    model = architectures.build(name, dtype=torch.float32).model  # float64 is NaN at the padding
    if not (attention == "sdpa" and name == "Gemma 2"):  # which has no sdpa
        model.set_attn_implementation(attention)
    for answers in (ANSWERS, LETTERS):
        shared = batch(answers)
        with torch.no_grad():
            close(option_likelihoods(model, shared), plain(model, answers))
        rows = len(arranged(model, shared).inputs["input_ids"])
        joined = name not in (*OTHERS, "Mistral", "Gemma 2") or answers is LETTERS  # windows of 4 tokens
        assert rows == (len(PROMPTS) if joined else len(shared["answer"]))


@pytest.mark.parametrize("name", ["Mistral", "Gemma 2"])
def test_a_window_that_holds_every_token_changes_nothing(name):
    model = architectures.build(name, dtype=torch.float32).model
    assert not takes_trees(model, 10)
    for module in model.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = 10
    model.config.sliding_window = 10
    assert takes_trees(model, 10) and not takes_trees(model, 11)
    with torch.no_grad():
        close(option_likelihoods(model, batch(ANSWERS)), plain(model, ANSWERS))


def test_the_list_is_of_tested_architectures():
    tested = {architectures.build(name).model.config.model_type for name in architectures.CAUSAL}
    assert tested == options.TREES | set(OTHERS.values())


def test_falcon_with_alibi_takes_no_tree():
    model = architectures.build("Falcon").model
    assert takes_trees(model, 10)
    model.config.alibi = True
    assert not takes_trees(model, 10)


def test_beginnings_that_answers_share_are_one_node():
    found = trees([[[5, 6, 7], [5, 6, 8, 9], [10]]], 0)
    assert found["node_ids"].tolist() == [[5, 6, 8]] and found["node_depths"].tolist() == [[1, 2, 3]]
    assert found["node_sees"].tolist() == [[[True, False, False], [True, True, False], [True, True, True]]]
    assert found["read_at"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 0, 0, 0]]


def test_many_long_answers_have_rows_of_their_own():
    model = architectures.build("Llama").model
    long = [[[5] * 200 + [k] for k in range(3, 11)] for _ in PROMPTS]  # 8 answers begin alike: 200 nodes
    apart = [[[k] * 200 for k in range(3, 11)] for _ in PROMPTS]  # 1,592 nodes
    assert arranged(model, batch(long)).inputs["input_ids"].shape == (3, 206)
    assert arranged(model, batch(apart)).inputs["input_ids"].shape == (24, 205)


def test_windows_hold_whatever_the_flag_says():
    config = SmolLM3Config(**architectures.CAUSAL["SmolLM3"][2] | {"sliding_window": 5, "use_sliding_window": False})
    config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    torch.manual_seed(0)
    model = SmolLM3ForCausalLM(config).eval()
    assert not takes_trees(model, 10)
    with torch.no_grad():
        close(option_likelihoods(model, batch(ANSWERS)), plain(model, ANSWERS))


def test_rows_of_their_own_are_no_longer_than_the_longest():
    """A long prompt with short answers beside a short prompt with long ones, in a context that holds each."""
    model = architectures.build("GPT-Neo", dtype=torch.float32).model
    answers = [[[5, 6], [7, 6]], [[4] * 8, [6] * 7, []], [[7, 8], [7, 9], [12, 13, 14]]]
    found = arranged(model, batch(answers))
    assert found.inputs["input_ids"].shape == (8, 10) and found.keep == 8
    with torch.no_grad():
        close(option_likelihoods(model, batch(answers)), plain(model, answers))


def test_gradients_are_those_of_separate_rows():
    model = architectures.build("Llama").model

    def gradients() -> list[Tensor]:
        model.zero_grad()
        option_likelihoods(model, batch(ANSWERS)).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    joined = gradients()
    model.config.model_type = "unknown"
    for one, other in zip(joined, gradients(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("kind", ["classification", "choice"])
def test_padding_in_half_precision_gives_no_nan(tiny, name, kind):
    loaded = load_model(tiny(name), dtype="bfloat16")
    more = {"labels": ["the cat", "the dog sat"]} if kind == "classification" else {}
    ready = prepared(loaded, task(kind, **more))
    scores = ready.scores(loaded.model, ready.collate(ready.train, every_option=True))
    alone = torch.cat([ready.scores(loaded.model, ready.collate([e], every_option=True)) for e in ready.train])
    assert scores.isfinite().all()
    torch.testing.assert_close(scores, alone, atol=0.1, rtol=0.02)


def test_probes_together_have_the_losses_of_probes_in_turn(tiny):
    found = []
    for form in ("weights", "activations"):
        loaded = load_model(tiny("llama"))
        ready = prepared(loaded, task("classification", labels=["the cat", "the dog sat"]))
        rows = ready.collate(ready.train)
        optimizer = LOZO(loaded.model.named_parameters(), lr=1e-3, eps=1e-2, form=form)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step(lambda ready=ready, rows=rows, model=loaded.model: ready.loss(model, rows))
        found.append(optimizer.last_step.losses)
    assert found[0][0] != found[0][1]
    torch.testing.assert_close(*found, atol=0, rtol=1e-5)
