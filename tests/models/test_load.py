"""Loading: the kind, the dtype, the seeded head, the pad token, and one clear sentence for a model that cannot be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoConfig, AutoModel, Gemma2Config, Gemma2ForCausalLM, GraniteMoeConfig, GraniteMoeForCausalLM

import metazo
from metazo.errors import UserError
from metazo.models import checks, load
from metazo.models.assemble import as_loaded
from metazo.models.describe import describe
from metazo.models.load import load_model
from metazo.models.skeleton import skeleton
from metazo.models.tokenizer import context_length, set_pad
from metazo.tasks import prepare, resolve
from metazo.tasks.evaluate import evaluate
from metazo.zoo.importer import model_shapes


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


def test_a_loader_that_gives_another_dtype_is_refused(tiny, monkeypatch):
    """As the kernels of some quantised checkpoints need one. A dtype that the model's own code gives to a weight is kept."""
    made = load._language_model
    monkeypatch.setattr(load, "_language_model", lambda *given: made(*given).half())
    with pytest.raises(
        UserError, match="`dtype` is float32, and transformers loads .* in float16; take `dtype` float16"
    ):
        load_model(tiny("llama"))
    assert load_model(tiny("llama"), dtype="float16").cast is None
    monkeypatch.setattr(load, "_language_model", made)
    norm, init = transformers.models.llama.modeling_llama.LlamaRMSNorm, nn.Module.__init__

    class Wide(norm):
        def __init__(self, width: int, eps: float):
            init(self)
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width, dtype=torch.float32)), eps

    monkeypatch.setattr(transformers.models.llama.modeling_llama, "LlamaRMSNorm", Wide)
    loaded = load_model(tiny("llama"), dtype="bfloat16")
    assert loaded.model.model.norm.weight.dtype == torch.float32 and loaded.cast is None


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
        (dict(name_or_path=folder, kind="encoder"), "unknown model kind 'encoder'"),
        (dict(name_or_path=folder, kind="seq2seq"), "`kind` seq2seq: .* is a gpt2 model, which is no encoder-decoder"),
        (dict(name_or_path=folder, device="nowhere"), "device 'nowhere' cannot be used"),
        (dict(name_or_path=tmp_path / "absent"), "does not exist"),
        (dict(name_or_path=folder / "config.json"), "is a file; name the folder that holds it"),
        (dict(name_or_path=tmp_path), "no config.json"),
        (dict(name_or_path="nobody/no-such-model"), "'nobody/no-such-model' cannot be loaded"),
    ]:
        with pytest.raises(UserError, match=words):
            load_model(**arguments)


def test_what_is_no_name_is_one_clear_sentence():
    with pytest.raises(UserError, match="`name_or_path` is a folder, a Hub id or pico, not 5"):
        metazo.load_model(5)  # type: ignore[arg-type]


def test_a_folder_without_a_tokenizer_says_so(tiny, tmp_path):
    """transformers makes a tokenizer of special tokens alone, and every label word would be blamed."""
    folder = shutil.copytree(tiny("gpt2"), tmp_path / "model")
    for path in folder.glob("*"):
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    with pytest.raises(UserError, match="has no tokenizer; write it there"):
        load_model(folder)


def test_a_model_without_an_embedding_of_tokens_is_refused(tmp_path):
    config = transformers.CanineConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    transformers.CanineForSequenceClassification(config).save_pretrained(tmp_path)
    load_model("pico").tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="Models of type canine have no embedding of tokens"):
        load_model(tmp_path, kind="classifier")


@pytest.mark.parametrize("broken", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_truncated_file_is_a_user_error(tiny, tmp_path, broken):
    folder = shutil.copytree(tiny("gpt2"), tmp_path / "model")
    content = (folder / broken).read_bytes()
    (folder / broken).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(folder)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_a_model_without_a_language_model_head_is_not_given_a_random_one(tiny, tmp_path, kind):
    folder = shutil.copytree(tiny("bert"), tmp_path / "bert")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"is_decoder": kind == "causal"}))
    with pytest.raises(UserError, match=f"no trained {kind} language model"):
        load_model(folder, kind=kind)


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


# -- faults that earlier versions did not report --------------------------------------------------------------------------


def save(loaded, folder):
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def test_a_new_head_is_said_and_refused_for_evaluation(tiny, tmp_path):
    loaded = load_model(tiny("gpt2"), kind="classifier", num_labels=2)
    assert loaded.new_head and "gets a new head of 2 classes: its first answers are random" in loaded.notes[0]
    folder = save(load_model(tiny("bert"), num_labels=3), tmp_path / "three")
    assert not load_model(folder, num_labels=3, trained_head=True).notes
    other = load_model(folder, num_labels=2)
    assert other.new_head and "in place of the trained one of 3 classes" in other.notes[0]
    for source, classes in ((tiny("gpt2"), 2), (tiny("bert"), 2), (folder, 2)):
        with pytest.raises(UserError, match="there is no trained head of 2 classes in"):
            load_model(source, kind="classifier", num_labels=classes, trained_head=True)


def test_a_loss_does_not_depend_on_the_batch_whatever_padding_the_config_names(tiny, tmp_path):
    """Only pad_token_id of the config differs from the tokenizer's: the last token is found by it."""
    loaded = load_model(tiny("llama"), kind="classifier", num_labels=2)
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id
    loaded.model.config.pad_token_id = 7
    again = load_model(save(loaded, tmp_path), num_labels=2)
    texts = ["the film was great", "a warm and funny story it was great . the cat sat"]
    alone = [again.model(**again.tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    together = again.model(**again.tokenizer(texts, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_a_padding_token_without_an_embedding_is_not_used(tiny, tmp_path):
    loaded = load_model(tiny("gpt2"))
    loaded.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    again = load_model(save(loaded, tmp_path))
    assert again.tokenizer.pad_token == "</s>"


def test_a_decoder_scores_the_end_token_that_its_tokenizer_appends(tiny, tmp_path):
    loaded = load_model(tiny("llama"), kind="classifier", num_labels=2)
    loaded.tokenizer._tokenizer.post_processor = TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    loaded.tokenizer.pad_token = loaded.model.config.pad_token_id = None
    again = load_model(save(loaded, tmp_path))
    texts = ["the film was great", "a warm and funny story it was great . the cat sat"]
    ids = [again.tokenizer(text).input_ids for text in texts]
    last = [again.model.model(torch.tensor([own])).last_hidden_state[0, -1] for own in ids]
    batch = again.tokenizer(texts, padding=True, return_tensors="pt")
    assert ids[0][-1] == again.tokenizer.eos_token_id != again.tokenizer.pad_token_id
    torch.testing.assert_close(again.model(**batch).logits, again.model.score(torch.stack(last)), atol=1e-5, rtol=1e-5)
    for name in ("bos_token", "unk_token", "pad_token"):
        setattr(again.tokenizer, name, None)
    with pytest.raises(UserError, match="LlamaForSequenceClassification finds the end of a text by the padding token"):
        set_pad(again.tokenizer, again.model)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (transformers.ProphetNetConfig(), "is a prophetnet model, which is an encoder-decoder whose losses depend on"),
        (
            transformers.WhisperConfig(encoder_layers=1, decoder_layers=1),
            "is a whisper model, which is a model of images or sound",
        ),
        (
            transformers.EncoderDecoderConfig(
                encoder=transformers.BertConfig().to_dict(), decoder=transformers.BertConfig().to_dict()
            ),
            "is a encoder-decoder model, which is two models put together",
        ),
        (transformers.T5Config(d_ff=10**7), "has d_ff 10,000,000, and metazo builds at most 131,072 units"),
        (transformers.BartConfig(decoder_layers=10**5), "has decoder_layers 100,000"),
        (transformers.ViTConfig(), "is a vit model, which is a model of images or sound"),
        (transformers.CLIPConfig(), "is a clip model, which is a model of images or sound"),
        (transformers.LlavaConfig(), "is a llava model, which is a model of images or sound"),
        (
            transformers.LlamaConfig(num_hidden_layers=10**7),
            "has num_hidden_layers 10,000,000, and metazo builds at most 2,000 layers",
        ),
        (transformers.GPT2Config(n_embd=10**8), "has hidden_size|n_embd 100,000,000"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_models_that_are_none_of_the_four_kinds_are_refused_by_name(tiny, tmp_path, config, words):
    shutil.copytree(tiny("gpt2"), tmp_path, dirs_exist_ok=True)
    config.save_pretrained(tmp_path)
    for kind in ("auto", "classifier"):
        with pytest.raises(UserError, match=words):
            load_model(tmp_path, kind=kind)


def test_a_config_without_a_padding_token_is_no_traceback(tmp_path, tiny):
    shutil.copytree(tiny("gpt2"), tmp_path, dirs_exist_ok=True)
    config = transformers.RwkvConfig(vocab_size=382, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)
    transformers.RwkvForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a rwkv model, whose scores as a causal model depend on the padding"):
        load_model(tmp_path)
    config = transformers.GPTNeoXConfig(vocab_size=382, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    config.intermediate_size = 32
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings.pop("pad_token_id", None)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert load_model(tmp_path).kind == "causal"


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"model": {"vocab": {"a": 4000000000}}}', '{"added_tokens": [{"id": 4e9}]}']
)
def test_broken_tokenizers_are_one_sentence(tiny, tmp_path, content):
    shutil.copytree(tiny("gpt2"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="cannot be loaded|has the token id 4,000,000,000"):
        load_model(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_remarked_on(tiny, tmp_path, value):
    loaded = load_model(tiny("gpt2"))
    assert loaded.notes == []
    with torch.no_grad():
        loaded.model.transformer.h[0].attn.c_attn.weight[3, 4] = value
    notes = load_model(save(loaded, tmp_path)).notes
    assert notes == [
        "1 of 28 tensors of the model hold NaN or infinite weights, such as transformer.h.0.attn.c_attn.weight"
    ]


def test_a_saved_model_says_what_it_was_trained_on(tiny, tmp_path):
    loaded = load_model(tiny("bert"), num_labels=2)
    describe(loaded.model, {"task": "t", "labels": ["bad", "good"], "seed": 3, "eos": 2})
    again = load_model(save(loaded, tmp_path), num_labels=2)
    assert again.model.config.id2label == {0: "bad", 1: "good"} and again.model.config.label2id == {"bad": 0, "good": 1}
    assert again.model.config.metazo == {"task": "t", "seed": 3}
    for _ in range(2):  # written twice by one training
        describe(again.model, {"task": "u", "seed": 1})
    describe(again.model, {"task": "v", "seed": 1})
    assert again.model.config.metazo == {
        "task": "v", "seed": 1, "earlier": [{"task": "u", "seed": 1}, {"task": "t", "seed": 3}]
    }  # fmt: skip
    causal = load_model(tiny("gpt2"))
    causal.model.generation_config.eos_token_id = 5
    describe(causal.model, {"task": "t", "eos": 2})
    assert load_model(save(causal, tmp_path / "causal")).model.generation_config.eos_token_id == [5, 2]
    with pytest.raises(UserError, match="training data was not written by metazo"):
        describe(causal.model, {"labels": ["a\x1b[2J"]})


def test_causal_models_whose_scores_depend_on_padding_are_refused(tmp_path):
    config = transformers.RobertaConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, is_decoder=True
    )
    transformers.RobertaForCausalLM(config).save_pretrained(tmp_path)
    for kind in ("auto", "causal"):
        with pytest.raises(UserError, match="roberta model, whose scores as a causal model depend on the padding"):
            load_model(tmp_path, kind=kind)


def test_models_whose_scores_depend_on_padding_are_refused_by_name_and_by_their_scores(tiny, tmp_path, monkeypatch):
    """The decoder of MBart counts positions through the padding; Nystroemformer's convolution reads it."""
    sizes = {"vocab_size": 440, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    decoder = {
        "d_model": 16,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 16,
        "encoder_layers": 1,
    }
    encoder = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "initializer_range": 0.3,
    }
    models = [
        ("causal", transformers.MBartForCausalLM(transformers.MBartConfig(**sizes, **decoder))),
        ("masked", transformers.NystromformerForMaskedLM(transformers.NystromformerConfig(**sizes, **encoder))),
        ("classifier", transformers.FNetForSequenceClassification(transformers.FNetConfig(**sizes, **encoder))),
    ]
    tokenizer = load_model(tiny("bert")).tokenizer
    for kind, model in models:
        for dtype in ("float32", "bfloat16"):
            with pytest.raises(UserError, match=r"scores .*depend on the padding of a batch"):
                load_model(save(SimpleNamespace(model=model, tokenizer=tokenizer), tmp_path / kind), dtype=dtype)
    monkeypatch.setattr(checks, "_PADDED", ())
    monkeypatch.setattr(checks, "_REFUSED", {})
    for kind, model in models:
        said = f"model, whose scores as a {kind} model depend on the padding of a batch; choose another model"
        with pytest.raises(UserError, match=said):
            load_model(tmp_path / kind)
        with pytest.raises(UserError, match=said):
            as_loaded(model, tokenizer)


def test_a_causal_model_that_reads_later_tokens_is_refused(tiny, tmp_path):
    loaded = load_model(tiny("bert_mlm"))
    with pytest.raises(UserError, match="`kind` causal: .* is a bert model that reads the tokens after a position too"):
        load_model(tiny("bert_mlm"), kind="causal")
    config = loaded.model.config
    for decoder in (True, False):
        config.is_decoder = decoder
        model = transformers.BertLMHeadModel(config)
        if decoder:
            assert load_model(save(SimpleNamespace(model=model, tokenizer=loaded.tokenizer), tmp_path)).kind == "causal"
            assert as_loaded(model, loaded.tokenizer).kind == "causal"
            continue
        with pytest.raises(UserError, match="whose scores as a causal model depend on the tokens that come after"):
            as_loaded(model, loaded.tokenizer)


def test_float64_is_refused_for_attention_whose_padded_rows_are_nan(tmp_path):
    tokenizer = load_model("pico").tokenizer
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    said = "`dtype` float64: the attention of .* is NaN for inputs with padding"
    assert load_model(tmp_path).dtype == torch.float32
    ids, mask = torch.zeros(1, 2, dtype=torch.long), torch.tensor([[0, 1]])
    if model.double()(input_ids=ids, attention_mask=mask).logits[0, 1].isfinite().all():
        pytest.skip("this version of transformers computes padded rows in float64 too")
    with pytest.raises(UserError, match=said):
        load_model(tmp_path, dtype="float64")
    with pytest.raises(UserError, match=said):
        as_loaded(model, tokenizer)
    assert load_model("pico", dtype="float64").dtype == torch.float64


class Linear4bit(nn.Linear):
    """In the place of bitsandbytes' layer, with what it does to its weights on a processor with AVX512-BF16."""

    def __init__(self, *sizes):
        super().__init__(*sizes, bias=False)
        self.support_avx512bf16_for_cpu = True
        self.weight.requires_grad_(False).quant_state = SimpleNamespace()

    def forward(self, x):
        state = self.weight.quant_state
        if self.support_avx512bf16_for_cpu and not self.training and not x.requires_grad:
            state.packing_format_for_cpu = True
        if getattr(state, "packing_format_for_cpu", False):
            return super().forward(x.detach().bfloat16().float())
        return super().forward(x)


@pytest.mark.parametrize("by", ["as_loaded", "load_model"])
def test_four_bit_layers_of_a_processor_are_kept_from_bfloat16(tiny, monkeypatch, by):
    """Their kernel for eval mode has no gradient, and would be that of train mode from then on."""

    def quantised(*args):
        model = original(*args)
        model.model.layers[1].mlp.down_proj = Linear4bit(*model.model.layers[1].mlp.down_proj.weight.shape[::-1])
        return model

    original = load._language_model
    monkeypatch.setattr(load, "_language_model", quantised)
    if by == "as_loaded":
        monkeypatch.setattr(load, "keep_unpacked", lambda model: None)
    loaded = load_model(tiny("llama"))
    if by == "as_loaded":
        loaded = as_loaded(loaded.model, loaded.tokenizer)
    layer, ids = loaded.model.model.layers[1].mlp.down_proj, torch.arange(3, 9)[None]
    loaded.model.requires_grad_(False)
    with torch.inference_mode():
        before = loaded.model.eval()(ids).logits
    assert not hasattr(layer.weight.quant_state, "packing_format_for_cpu")
    x = torch.ones(1, layer.in_features, requires_grad=True)
    assert torch.autograd.grad(layer(x).sum(), x)[0].any()
    assert torch.equal(loaded.model(ids).logits, before)


def test_four_bit_layers_that_have_run_before_are_warned_about(tiny):
    loaded = load_model(tiny("llama"))
    loaded.model.lm_head = Linear4bit(*loaded.model.lm_head.weight.shape[::-1]).eval()
    with torch.inference_mode():
        loaded.model(torch.arange(3, 9)[None])
    with pytest.warns(UserWarning, match="1 4-bit layers, such as lm_head, have run in eval mode on this CPU"):
        as_loaded(loaded.model, loaded.tokenizer)


@pytest.mark.parametrize(
    "kind", ["mpnet", "roberta", "xlm-roberta-xl", "xmod", "ibert", "data2vec-text", "esm", "luke", "markuplm"]
)
def test_an_input_of_the_context_length_has_positions_and_one_more_token_has_none(kind: str) -> None:
    size = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    extra = {"default_language": "en_XX", "languages": ["en_XX"]} if kind == "xmod" else {}
    config = AutoConfig.for_model(kind, **size, **extra, max_position_embeddings=34, pad_token_id=1)
    model = AutoModel.from_config(config).eval()
    length = context_length(model, SimpleNamespace(model_max_length=10**30))  # type: ignore[arg-type]
    assert length == 32
    model(input_ids=torch.full((1, length), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, length + 1), 5))


def test_a_field_that_a_type_does_not_have_refuses_no_causal_model(tiny, tmp_path):
    """Configurations that the first versions of transformers wrote name every field, such as is_decoder of a GPT-2."""
    folder = tmp_path / "gpt2"
    shutil.copytree(tiny("gpt2"), folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"is_decoder": False}))
    assert load_model(str(folder)).kind == "causal"


def changed(tiny, name: str, folder: Path, **settings: object) -> Path:
    path = shutil.copytree(tiny(name), folder / name)
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | settings))
    return path


def test_a_number_of_classes_that_no_model_has_is_refused_before_a_list_is_made_of_it(tiny, tmp_path, monkeypatch):
    folder = changed(tiny, "gpt2", tmp_path, num_labels=10**6)
    monkeypatch.setattr(load.AutoConfig, "from_pretrained", None)
    for read in (load_model, skeleton):
        with pytest.raises(UserError, match="has num_labels 1,000,000, and metazo builds at most 131,072 classes"):
            read(folder)
    with pytest.raises(UserError, match="num_labels is more than 131,072"):
        model_shapes(folder)


@pytest.mark.parametrize("name", ["gpt2", "bert", "bert_mlm", "t5"])
def test_outputs_have_names_whatever_the_config_says(name: str, tiny, tmp_path):
    loaded = load_model(changed(tiny, name, tmp_path, return_dict=False))
    task = resolve("pico_span" if loaded.kind in ("causal", "seq2seq") else "pico_sentiment")
    if loaded.kind != "masked":
        ready = prepare(task, loaded, train=4, dev=4, test=4)
        assert evaluate(loaded.model, ready, "dev")["examples"] == 4


def test_a_sentence_encoder_has_names_too(minilm, tmp_path):
    folder = shutil.copytree(minilm, tmp_path / "m")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"return_dict": False}))
    loaded = load_model(folder, kind="classifier", num_labels=2)
    assert evaluate(loaded.model, prepare(resolve("pico_sentiment"), loaded, train=4, dev=4, test=4), "dev")


def test_a_model_that_fails_on_a_plain_batch_says_so(tiny):
    loaded = load_model(tiny("gpt2"))
    loaded.model.config.return_dict = False
    with pytest.raises(
        UserError, match="is a gpt2 model that fails on a plain batch of two texts .AttributeError: 'tuple'"
    ):
        as_loaded(loaded.model, loaded.tokenizer)


def test_a_model_that_cannot_compute_in_float64_is_refused_in_a_sentence(tmp_path):
    """torch multiplies the experts of a mixture in groups, and not in that type."""
    tokenizer = load_model("pico").tokenizer
    config = GraniteMoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    GraniteMoeForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.float32
    with pytest.raises(UserError, match="`dtype` float64: .* cannot compute in it .*Double.*; choose float32"):
        load_model(tmp_path, dtype="float64")
