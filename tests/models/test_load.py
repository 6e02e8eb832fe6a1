"""Loading: the kind, the dtype, the seeded head, the pad token, and one clear sentence for what cannot be loaded."""

from __future__ import annotations

import shutil

import pytest
import torch

from metazo.errors import UserError
from metazo.models.load import load_model


@pytest.mark.parametrize(
    ("name", "kind", "context"),
    [
        ("gpt2", "causal", 256),
        ("opt", "causal", 256),
        ("llama", "causal", 256),
        ("roberta", "masked", 256),
        ("bert_mlm", "masked", 256),
        ("bert", "classifier", 256),
    ],
)
def test_auto_kind_follows_the_checkpoint(tiny, name, kind, context):
    loaded = load_model(tiny(name))
    assert (loaded.kind, loaded.context_length) == (kind, context)
    assert not loaded.model.training
    assert loaded.tokenizer.pad_token_id is not None
    assert loaded.name == str(tiny(name))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtype_is_the_one_asked_for(tiny, tmp_path, dtype):
    half = load_model(tiny("opt"), dtype="float16")
    half.model.save_pretrained(tmp_path)
    half.tokenizer.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=dtype)
    assert loaded.dtype == getattr(torch, dtype)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {loaded.dtype}


def test_float32_is_the_default_even_for_a_half_checkpoint(tiny, tmp_path):
    half = load_model(tiny("opt"), dtype="float16")
    half.model.save_pretrained(tmp_path)
    half.tokenizer.save_pretrained(tmp_path)
    assert next(load_model(tmp_path).model.parameters()).dtype == torch.float32


def test_new_head_follows_the_seed_and_leaves_the_global_generator_alone(tiny):
    before = torch.get_rng_state()
    first, same, other = (load_model(tiny("bert"), num_labels=3, seed=seed).model.classifier for seed in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    assert first.weight.shape[0] == 3
    assert torch.equal(first.weight, same.weight)
    assert not torch.equal(first.weight, other.weight)
    assert first.bias.abs().max() == 0


def test_a_masked_checkpoint_becomes_a_classifier_when_asked(tiny):
    loaded = load_model(tiny("roberta"), kind="classifier", num_labels=4)
    assert loaded.kind == "classifier"
    assert loaded.model.config.num_labels == 4


def test_a_trained_head_is_kept_and_one_of_another_size_replaced(tiny, tmp_path):
    trained = load_model(tiny("bert"), num_labels=3)
    trained.model.save_pretrained(tmp_path)
    trained.tokenizer.save_pretrained(tmp_path)
    weight = trained.model.classifier.weight
    assert torch.equal(load_model(tmp_path, num_labels=3, seed=9).model.classifier.weight, weight)
    assert load_model(tmp_path, num_labels=2).model.classifier.weight.shape[0] == 2


def test_bad_requests_are_one_clear_sentence(tiny, tmp_path):
    folder = tiny("gpt2")
    for arguments, words in [
        (dict(name_or_path=folder, dtype="int8"), "unknown dtype 'int8'"),
        (dict(name_or_path=folder, kind="seq2seq"), "unknown model kind 'seq2seq'"),
        (dict(name_or_path=folder, device="nowhere"), "device 'nowhere' cannot be used"),
        (dict(name_or_path=tmp_path / "absent"), "does not exist"),
        (dict(name_or_path=tmp_path), "no config.json"),
        (dict(name_or_path="nobody/no-such-model"), "'nobody/no-such-model' cannot be loaded"),
    ]:
        with pytest.raises(UserError, match=words):
            load_model(**arguments)


@pytest.mark.parametrize("broken", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_truncated_file_is_a_user_error(tiny, tmp_path, broken):
    folder = shutil.copytree(tiny("gpt2"), tmp_path / "model")
    content = (folder / broken).read_bytes()
    (folder / broken).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(folder)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_a_model_without_a_language_model_head_is_not_given_a_random_one(tiny, kind):
    with pytest.raises(UserError, match=f"no trained {kind} language model"):
        load_model(tiny("bert"), kind=kind)


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_a_user_error(tiny, tmp_path, missing):
    folder = shutil.copytree(tiny("gpt2"), tmp_path / "model")
    (folder / missing).unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(folder)


@pytest.mark.parametrize("name", ["stories260k", "stories3m"])
def test_real_story_models_load(shared, name):
    loaded = load_model(shared / "models" / name)
    assert (loaded.kind, loaded.context_length) == ("causal", 512)


def test_minilm_becomes_a_classifier(minilm):
    loaded = load_model(minilm, num_labels=2)
    assert (loaded.kind, loaded.context_length) == ("classifier", 512)
