"""Sentence encoders: pooling and heads against formulas written out, files, and the cache of frozen layers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, AutoModel

from metazo.errors import UserError
from metazo.models import frozen
from metazo.models.heads import Prototypes
from metazo.models.load import LoadedModel, load_model
from metazo.models.sentence import SentenceClassifier
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings
from metazo.runs.inputs import architecture
from metazo.runs.replay import replay
from metazo.settings import build
from metazo.steplog.format import change, scan
from metazo.tasks.encode import Encoded
from metazo.tasks.prepared import Prepared
from metazo.tasks.task import Task

SENTENCES = ["the film was great", "a warm and funny story", "terrible", "the cat sat on the mat ."]


@pytest.fixture
def checkpoint(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny BERT whose config says, as for sentence-transformers, that its hidden states are averaged."""
    folder = tmp_path / "sentence"
    shutil.copytree(tiny("bert"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    pooling(folder, "mean_tokens")
    return folder


def pooling(folder: Path, mode: str) -> None:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({f"pooling_mode_{mode}": True, "word_embedding_dimension": 8})
    )


def classifier(loaded: LoadedModel) -> SentenceClassifier:
    assert isinstance(loaded.model, SentenceClassifier)
    return loaded.model


def inputs(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    batch = loaded.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def test_the_embedding_is_the_mean_over_real_tokens(checkpoint: Path) -> None:
    loaded = load_model(checkpoint, num_labels=2)
    model = classifier(loaded)
    for text, embedding in zip(SENTENCES, model.embed(**inputs(loaded))):
        alone = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
        expected = model.encoder(input_ids=alone).last_hidden_state[0].mean(0)
        torch.testing.assert_close(embedding, expected, rtol=1e-5, atol=1e-6)


def test_pooling_by_the_first_token(checkpoint: Path) -> None:
    pooling(checkpoint, "cls_token")
    loaded = load_model(checkpoint, num_labels=2)
    batch = inputs(loaded)
    expected = classifier(loaded).encoder(**batch).last_hidden_state[:, 0]
    torch.testing.assert_close(classifier(loaded).embed(**batch), expected)


def test_the_pooling_is_among_the_inputs_of_a_run(checkpoint: Path) -> None:
    """It is in a file of its own: a run that is resumed, and a comparison, notice that it has changed."""
    before = architecture(load_model(checkpoint, num_labels=2).model)
    pooling(checkpoint, "cls_token")
    after = architecture(load_model(checkpoint, num_labels=2).model)
    assert change(before, after) == "pooling was 'mean' and is 'cls' now"


def test_an_unknown_pooling_is_refused(checkpoint: Path) -> None:
    pooling(checkpoint, "max_tokens")
    with pytest.raises(UserError, match="pooling_mode_max_tokens"):
        load_model(checkpoint, num_labels=2)


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_the_pooling_as_sentence_transformers_6_writes_it(checkpoint: Path, mode: str) -> None:
    settings = {"embedding_dimension": 32, "pooling_mode": mode, "include_prompt": True}
    (checkpoint / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    if mode == "max":
        with pytest.raises(UserError, match="asks for max; metazo knows mean and cls"):
            load_model(checkpoint, num_labels=2)
    else:
        assert classifier(load_model(checkpoint, num_labels=2)).pooling == mode


def test_a_module_that_would_be_left_out_is_refused_by_name(checkpoint: Path) -> None:
    names = ["Transformer", "Pooling", "Normalize", "Dense"]
    modules = [{"idx": idx, "type": f"sentence_transformers.models.{name}"} for idx, name in enumerate(names)]
    (checkpoint / "modules.json").write_text(json.dumps(modules[:3]))
    assert classifier(load_model(checkpoint, num_labels=2)).pooling == "mean"
    (checkpoint / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="modules.json of .* has a 'Dense' module, which metazo would leave out"):
        load_model(checkpoint, num_labels=2)
    (checkpoint / "modules.json").write_text("{}")
    with pytest.raises(UserError, match="modules.json of .* cannot be read: it holds no list"):
        load_model(checkpoint, num_labels=2)


def test_auto_takes_the_checkpoints_own_class_where_it_is_no_sentence_encoder(tiny: Callable[[str], Path]) -> None:
    assert not isinstance(load_model(tiny("bert"), kind="classifier", num_labels=2).model, SentenceClassifier)


def test_a_head_is_for_classifiers(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="for classifiers"):
        load_model(tiny("llama"), head="prototype")
    with pytest.raises(UserError, match="unknown head"):
        load_model(tiny("bert"), head="mlp")


def test_a_new_head_follows_the_seed(checkpoint: Path) -> None:
    first, again, other = (
        classifier(load_model(checkpoint, num_labels=3, seed=seed)).head.weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)  # type: ignore[arg-type]


def test_prototype_logits_are_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings, labels = torch.randn(12, 5, generator=generator), torch.arange(12) % 3
    head = Prototypes(3, 5)
    head.fit(embeddings, labels)
    means = [(embeddings[labels == k] / embeddings[labels == k].norm(dim=1, keepdim=True)).mean(0) for k in range(3)]
    cosines = 20 * torch.stack([cosine_similarity(embeddings, mean[None]) for mean in means], 1)
    torch.testing.assert_close(head(embeddings), cosines - cosines.mean(0))


def test_a_class_without_examples_is_named() -> None:
    with pytest.raises(UserError, match="class 1"):
        Prototypes(2, 4).fit(torch.ones(3, 4), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("head", ["linear", "prototype"])
def test_saved_and_loaded_it_is_the_same(checkpoint: Path, tmp_path: Path, head: str) -> None:
    loaded = load_model(checkpoint, num_labels=2, head=head)
    model = classifier(loaded)
    if isinstance(model.head, Prototypes):
        model.head.fit(model.embed(**inputs(loaded)).detach(), torch.tensor([0, 0, 1, 1]))
    model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = classifier(load_model(tmp_path / "saved", num_labels=2))
    assert torch.equal(again(**inputs(loaded)).logits, model(**inputs(loaded)).logits)
    assert type(AutoModel.from_pretrained(tmp_path / "saved")) is type(model.encoder)
    assert classifier(load_model(tmp_path / "saved", num_labels=5)).classes == 5  # other classes: a new head


def test_frozen_layers_are_computed_once_and_change_nothing(checkpoint: Path) -> None:
    loaded = load_model(checkpoint, num_labels=2)
    model, batch = classifier(loaded), inputs(loaded)
    expected = model(**batch).logits
    model.encoder.embeddings.requires_grad_(False)
    model.encoder.encoder.layer[0].requires_grad_(False)
    assert model.cache_frozen() == 1
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-6)

    ran = []
    model.encoder.embeddings.register_forward_hook(lambda *_: ran.append(1))
    one = {name: value[:1] for name, value in batch.items()}  # in another batch, the same bits in the frozen layers
    torch.testing.assert_close(model(**one).logits, expected[:1], rtol=1e-5, atol=1e-6)
    assert not ran
    model(input_ids=one["input_ids"].flip(1), attention_mask=one["attention_mask"].flip(1))
    assert len(ran) == 1  # a row never seen


def test_inputs_learned_in_groups_have_the_bits_of_their_group_in_every_batch(checkpoint: Path) -> None:
    def model_with_cache() -> SentenceClassifier:
        model = classifier(load_model(checkpoint, num_labels=2, seed=0))
        model.encoder.embeddings.requires_grad_(False)
        model.encoder.encoder.layer[0].requires_grad_(False)
        model.cache_frozen()
        return model

    loaded = load_model(checkpoint, num_labels=2, seed=0)
    texts = [" ".join(SENTENCES[k % 4].split() * (1 + k % 3)) for k in range(12)]
    batches = [dict(loaded.tokenizer(texts[k : k + 5], padding=True, return_tensors="pt")) for k in (0, 5, 10)]
    expected = [classifier(loaded)(**batch).logits for batch in batches]
    first, again = model_with_cache(), model_with_cache()
    first.learn_frozen({**batch, "targets": torch.zeros(5)} for batch in batches)
    again.learn_frozen(reversed(batches))  # the groups do not depend on the order
    ran: list[int] = []
    first.encoder.embeddings.register_forward_hook(lambda *_: ran.append(1))
    for batch, logits in zip(batches, expected):
        torch.testing.assert_close(first(**batch).logits, logits, rtol=1e-5, atol=1e-6)
        assert torch.equal(first(**batch).logits, again(**batch).logits)
    assert not ran


def test_the_second_text_of_a_pair_has_its_own_segment(checkpoint: Path) -> None:
    loaded = load_model(checkpoint, num_labels=2)
    model = classifier(loaded)
    batch = loaded.tokenizer(SENTENCES[:2], SENTENCES[2:], padding=True, return_tensors="pt")
    assert batch["token_type_ids"].any()
    hidden = model.encoder(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    examples = [
        Encoded(row[real.bool()].tolist(), [0], types=types[real.bool()].tolist())
        for row, real, types in zip(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    ]
    task = Task(
        name="pairs", kind="classification", files={"train": "a.jsonl"}, labels={0: "no", 1: "yes"}, prompt="{a} {b} {}"
    )
    prepared = Prepared(task, "classifier", loaded.tokenizer, 1, [], True)
    torch.testing.assert_close(
        prepared.scores(model, prepared.collate(examples)),
        model.head((hidden * mask).sum(1) / mask.sum(1)),
        rtol=1e-5,
        atol=1e-6,
    )


def test_training_goes_on_above_the_cache(checkpoint: Path) -> None:
    loaded = load_model(checkpoint, num_labels=2)
    model, batch = classifier(loaded), inputs(loaded)
    model.encoder.embeddings.requires_grad_(False)
    model.encoder.encoder.layer[0].requires_grad_(False)
    wanted = torch.autograd.grad(
        model(**batch).logits.square().sum(), list(model.encoder.encoder.layer[1].parameters())
    )
    model.cache_frozen()
    with torch.inference_mode():
        model(**batch)  # the cache is filled here
    found = torch.autograd.grad(model(**batch).logits.square().sum(), list(model.encoder.encoder.layer[1].parameters()))
    for a, b in zip(wanted, found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.encoder.encoder.layer[1].output.dense.weight.add_(0.1)
        before = model(**batch).logits
        model._split = None
        torch.testing.assert_close(model(**batch).logits, before, rtol=1e-5, atol=1e-6)


def test_trained_embeddings_leave_nothing_to_cache(checkpoint: Path) -> None:
    assert classifier(load_model(checkpoint, num_labels=2)).cache_frozen() == 0


def test_frozen_outputs_are_shared_between_runs_of_the_same_model(checkpoint: Path, monkeypatch) -> None:
    monkeypatch.setattr(frozen, "_shared", None)
    frozen.share_between_runs()

    def cached(depth: int = 1, change: float = 0.0):
        loaded = load_model(checkpoint, num_labels=2, seed=0)
        model, ran = classifier(loaded), []
        with torch.no_grad():
            next(model.encoder.encoder.layer[0].parameters()).add_(change)
        model.encoder.embeddings.requires_grad_(False)
        for layer in model.encoder.encoder.layer[:depth]:
            layer.requires_grad_(False)
        model.cache_frozen()
        model.encoder.embeddings.register_forward_hook(lambda *_: ran.append(1))
        return model(**inputs(loaded)).logits, len(ran)

    (first, ran), (again, free) = cached(), cached()
    assert ran and not free and torch.equal(first, again)
    assert cached(change=0.1)[1] and cached(depth=2)[1]  # other weights and other layers are computed
    monkeypatch.setattr(frozen, "MOST_SHARED", 1)
    assert torch.equal(cached(change=0.2)[0], cached(change=0.2)[0])  # a full store is emptied


@pytest.fixture
def on_hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, SentenceClassifier]:
    """A repository in the cache of the Hub, whose revisions main and v1 are classifiers with other weights and pooling."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository, found = tmp_path / "cache" / "models--a--b", {}
    for number, (revision, mode) in enumerate((("main", "mean_tokens"), ("v1", "cls_token"))):
        pooling(checkpoint, mode)
        loaded = load_model(checkpoint, num_labels=2, seed=number)
        found[revision] = classifier(loaded)
        for parameter in found[revision].encoder.parameters():
            parameter.data.add_(number)
        snapshot = repository / "snapshots" / (str(number) * 40)
        found[revision].save_pretrained(snapshot)
        loaded.tokenizer.save_pretrained(snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(snapshot.name)
    return found


@pytest.mark.parametrize("revision", ["main", "v1"])
def test_weights_head_and_pooling_are_of_the_revision(on_hub: dict[str, SentenceClassifier], revision: str) -> None:
    saved = on_hub[revision]
    for options in ({}, {"head": "linear", "num_labels": 3}):  # with the head of the file, and with a new one
        model = classifier(load_model("a/b", kind="classifier", revision=revision, **options))
        assert model.pooling == saved.pooling
        torch.testing.assert_close(model.encoder.state_dict(), saved.encoder.state_dict())
        assert options or torch.equal(model.head.state_dict()["weight"], saved.head.state_dict()["weight"])


def test_options_that_a_saved_classifier_does_not_have_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    loaded = load_model(checkpoint, num_labels=2)
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="`attn_implementation`.* cannot be used with a head on pooled hidden states"):
        load_model(tmp_path / "saved", kind="classifier", attn_implementation="eager")


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
DISTIL = {"vocab_size": 40, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 32}


def encoder(family: str, trained: str, **more) -> SentenceClassifier:
    """A classifier on an encoder with random weights, one name of whose tensors is trained."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **((DISTIL if family == "distilbert" else SIZES) | more))
    model = SentenceClassifier(AutoModel.from_config(config), torch.nn.Linear(16, 2), "mean").eval()
    for name, parameter in model.encoder.named_parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
        parameter.requires_grad_(any(part in name for part in trained.split()))
    return model


@pytest.mark.parametrize(
    ("family", "cached", "more"),
    [
        ("bert", 2, {}),
        ("roberta", 2, {}),
        ("mpnet", 2, {}),
        ("deberta-v2", 2, {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}),
        ("deberta-v2", 0, {"conv_kernel_size": 3, "conv_act": "gelu"}),
        ("modernbert", 0, {"global_attn_every_n_layers": 2, "local_attention": 4}),
        ("megatron-bert", 0, {}),
        ("roberta-prelayernorm", 0, {}),
        ("esm", 0, {"position_embedding_type": "rotary"}),
        ("fnet", 0, {}),
        ("big_bird", 0, {"attention_type": "block_sparse"}),
        ("distilbert", 0, {}),
        ("electra", 0, {"embedding_size": 8}),
        ("longformer", 0, {"attention_window": [8] * 3}),
    ],
)
def test_a_cache_computes_the_function_of_the_saved_model_or_is_not_used(family, cached, more) -> None:
    model = encoder(family, "layer.2. layers.2.", **more)
    ids, mask = torch.randint(5, 40, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[1, 6:], ids[1, 6:] = 0, 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        assert model.cache_frozen() == cached and (model._split is not None) == bool(cached)
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "more"),
    [("mpnet", {}), ("deberta-v2", {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c"]})],
)
def test_a_trained_tensor_that_every_layer_reads_leaves_nothing_to_cache(family, more) -> None:
    assert encoder(family, "layer.2. relative_attention_bias rel_embeddings", **more).cache_frozen() == 0


def test_the_check_of_a_cache_draws_nothing_and_leaves_the_encoder_as_it_was(checkpoint: Path) -> None:
    model, calls = encoder("bert", "layer.2."), []
    model.register_forward_hook(lambda *_: calls.append(1))
    model.encoder.encoder.layer[0].train()  # its dropout would draw
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    kept = [(dict(vars(module)), dict(module._modules)) for module in model.encoder.modules()]
    assert model.cache_frozen() == 2
    assert torch.equal(torch.get_rng_state(), state) and modes == [module.training for module in model.modules()]
    assert kept == [(dict(vars(module)), dict(module._modules)) for module in model.encoder.modules()]
    assert not calls and model._split is not None and not model._split.known


@pytest.mark.parametrize("head", ["phrases", "prototype"])
def test_a_log_on_a_model_whose_head_is_made_is_replayed(checkpoint: Path, tmp_path: Path, head: str) -> None:
    """Only a head that the run made itself is in its log; that of a chain's second log is in the base."""
    settings = {
        "task": "pico_sentiment",
        "steps": 2,
        "train_examples": 16,
        "dev_examples": 4,
        "test_examples": 4,
        "lr": 1e-3,
    }
    first = {"model": str(checkpoint), "head": head, "out": tmp_path / "first", "keep": "last"}
    run_settings(build(FinetuneConfig, settings, first))
    second = {"model": str(tmp_path / "first" / "model"), "out": tmp_path / "second", "keep": "last"}
    run_settings(build(FinetuneConfig, settings, second))
    assert replay(tmp_path / "second" / "steps.jsonl", tmp_path / "first" / "model", tmp_path / "again").identical
    for name in ("first", "second"):  # a head that is made elsewhere has other last bits
        hashed = [key for key in scan(tmp_path / name / "steps.jsonl").header["architecture"] if "buffer head." in key]
        assert bool(hashed) == (name == "second")
    other = load_model(tmp_path / "first" / "model")
    other.model.head.prototypes.neg_()
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="not the base model of this log: the buffer head.prototypes changed"):
        replay(tmp_path / "second" / "steps.jsonl", tmp_path / "other")


def test_sentence_transformers_reads_a_tuned_encoder_as_its_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """Its own files say which parts there are, such as the scaling to length 1, and how long an input may be."""
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(kinds.items())
    ]
    (checkpoint / "modules.json").write_text(json.dumps(modules))
    (checkpoint / "sentence_bert_config.json").write_text('{"max_seq_length": 7, "do_lower_case": false}')
    loaded = load_model(checkpoint, num_labels=2)
    for folder in (tmp_path / "one", tmp_path / "two"):  # and a model that was read from such a folder
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        loaded = load_model(folder)
    first, again = (library.SentenceTransformer(str(folder)) for folder in (checkpoint, tmp_path / "two"))
    assert again.max_seq_length == 7
    assert (first.encode(SENTENCES) == again.encode(SENTENCES)).all()
