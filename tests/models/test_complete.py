"""Checkpoints whose weights are not those of the model that their config.json describes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, EsmConfig, EsmForMaskedLM, EsmForSequenceClassification

from metazo.errors import UserError
from metazo.models.adapters import add_adapters
from metazo.models.assemble import load
from metazo.models.complete import unused
from metazo.models.load import load_model
from metazo.models.sentence import POOLING_FILE
from metazo.models.wanted import Adapter


def rewritten(source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a model whose tensors `change` has changed."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def without(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


@pytest.mark.parametrize("head", ["linear", "prototype", "phrases"])
def test_an_encoder_without_some_of_its_weights_is_refused(tiny, tmp_path: Path, head: str) -> None:
    folder = rewritten(tiny("bert"), tmp_path / "m", without("layer.1."))
    with pytest.raises(
        UserError, match=r"has no weights for 'encoder\.layer\.1\.attention\S+' and 15 more, so that these"
    ):
        load_model(folder, kind="classifier", head=head, num_labels=2)


def test_a_saved_sentence_classifier_without_some_of_its_weights_is_refused(tiny, tmp_path: Path) -> None:
    loaded = load_model(tiny("bert"), kind="classifier", head="linear", num_labels=2)
    loaded.model.save_pretrained(tmp_path / "run" / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "run" / "model")
    assert (tmp_path / "run" / "model" / POOLING_FILE).exists()
    assert not load(tmp_path / "run", num_labels=2, trained_head=True).notes  # it has no pooler, which nothing reads
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "model")
    rewritten(tmp_path / "run" / "model", tmp_path / "cut" / "model", without("layer.0.output.dense.bias"))
    with pytest.raises(UserError, match=r"has no weights for 'encoder\.layer\.0\.output\.dense\.bias', so that"):
        load(tmp_path / "cut", num_labels=2)


@pytest.mark.parametrize(
    ("name", "body", "layer"), [("bert", "bert", "encoder.layer.1"), ("gpt2", "transformer", "h.1")]
)
def test_a_classifier_without_some_of_its_weights_is_not_said_to_have_a_new_head(
    tiny, tmp_path: Path, name: str, body: str, layer: str
) -> None:
    loaded = load_model(tiny(name), kind="classifier", num_labels=2)
    loaded.model.save_pretrained(tmp_path / "whole")
    loaded.tokenizer.save_pretrained(tmp_path / "whole")
    cut = rewritten(tmp_path / "whole", tmp_path / "cut", without(f"{layer}."))
    for trained in (True, False):
        with pytest.raises(UserError, match=rf"has no weights for '{body}\.{layer}\.\S+' and \d+ more, so that these"):
            load_model(cut, num_labels=2, trained_head=trained)


def test_a_classifier_whose_weights_have_another_shape_is_refused(tiny, tmp_path: Path) -> None:
    loaded = load_model(tiny("bert"), kind="classifier", num_labels=2)
    loaded.model.save_pretrained(tmp_path / "whole")
    loaded.tokenizer.save_pretrained(tmp_path / "whole")
    wrong = "bert.encoder.layer.0.intermediate.dense.bias"
    cut = rewritten(tmp_path / "whole", tmp_path / "cut", lambda tensors: tensors.update({wrong: torch.zeros(3)}))
    with pytest.raises(UserError, match=f"has no weights of the shape that its config.json gives for '{wrong}', so"):
        load_model(cut, num_labels=2)


def test_a_missing_pooler_or_head_is_new(tiny, tmp_path: Path) -> None:
    loaded = load_model(tiny("bert"), kind="classifier", num_labels=2)
    loaded.model.save_pretrained(tmp_path / "whole")
    loaded.tokenizer.save_pretrained(tmp_path / "whole")
    for part in ("pooler", "classifier"):
        cut = rewritten(tmp_path / "whole", tmp_path / part, without(f"{part}."))
        found = load_model(cut, num_labels=2)
        assert found.new_head and all(part in name for name in found.unsaved) and "a new head" in found.notes[0]


def test_a_buffer_that_the_model_computes_is_not_missed(tmp_path: Path, tiny) -> None:
    """Rotary frequencies, which the versions of transformers keep in different places, or leave out."""
    wide = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = EsmConfig(vocab_size=440, pad_token_id=1, mask_token_id=4, position_embedding_type="rotary", **wide)
    for name, kind in (("masked", EsmForMaskedLM), ("classifier", EsmForSequenceClassification)):
        kind(config).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tiny("bert")).save_pretrained(tmp_path / name)
        cut = rewritten(tmp_path / name, tmp_path / f"{name}-cut", without("inv_freq"))
        whole, found = (load_model(folder, num_labels=2).model.state_dict() for folder in (tmp_path / name, cut))
        assert all(torch.equal(value, found[key]) for key, value in whole.items())
    assert not load_model(cut, trained_head=True).unsaved
    assert load_model(cut, kind="classifier", head="prototype", num_labels=2)


def configured(source: Path, out: Path, **settings: object) -> Path:
    """A copy of a model with other settings."""
    shutil.copytree(source, out)
    found = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(found | settings))
    return out


@pytest.mark.parametrize(
    ("name", "options", "count", "first"),
    [
        ("llama", {}, 9, "model.layers.1.input_layernorm.weight"),
        ("bert", {"kind": "classifier"}, 16, "encoder.layer.1.attention.output.LayerNorm.bias"),
        ("bert", {"kind": "classifier", "head": "linear"}, 16, "encoder.layer.1.attention.output.LayerNorm.bias"),
    ],
)
def test_layers_that_the_config_leaves_out_are_noted(tiny, tmp_path: Path, name: str, options, count, first) -> None:
    assert not any("not used" in note for note in load_model(tiny(name), **options).notes)
    loaded = load_model(configured(tiny(name), tmp_path / "m", num_hidden_layers=1), **options)
    said = f"{count} tensors in the files of {tmp_path / 'm'}, such as {first}, are not used, because the model"
    assert loaded.notes[0].startswith(said)
    if options.get("head"):
        loaded.model.save_pretrained(tmp_path / "m")
        assert not any("not used" in note for note in load_model(tmp_path / "m").notes)


def test_tensors_that_belong_to_other_models_are_not_noted(tiny, tmp_path: Path) -> None:
    """Heads, poolers and models of images, what a model computes by itself, and layers that predict further tokens."""
    others = (
        *("score.weight", "model.visual.blocks.0.norm.weight", "mtp.layers.0.norm.weight", "model.pooler.dense.weight"),
        *("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.attn.masked_bias"),
    )
    folder = rewritten(tiny("llama"), tmp_path / "m", lambda t: t.update({name: torch.zeros(2) for name in others}))
    assert load_model(folder).notes == []
    assert load_model(tiny("bert_mlm"), kind="classifier").notes[0].count("not used") == 0
    cut = configured(folder, tmp_path / "further", num_hidden_layers=1, num_nextn_predict_layers=1)
    assert load_model(cut).notes == []
    unknown = rewritten(
        tiny("llama"), tmp_path / "bias", lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(64)})
    )
    assert (
        load_model(unknown)
        .notes[0]
        .startswith(f"A tensor in the files of {unknown}, model.layers.0.mlp.up_proj.bias, is not used, because")
    )


def test_the_scales_of_a_quantised_checkpoint_are_not_noted(tiny) -> None:
    model = load_model(tiny("llama")).model
    names = ["model.layers.0.mlp.up_proj.weight_scale", "model.layers.0.mlp.up_proj.input_scale"]
    assert unused(model, names, "m")
    model.config.quantization_config = {"quant_method": "fp8"}
    assert unused(model, names, "m") == [] and unused(model, ["model.layers.3.mlp.up_proj.weight"], "m")


@pytest.mark.parametrize("kind", [torch.int32, torch.bool, torch.int8])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_whole_numbers_in_the_place_of_weights_are_refused(tiny, tmp_path: Path, name: str, kind: torch.dtype) -> None:
    part = "0.mlp.up_proj.weight" if name == "llama" else "0.output.dense.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = next(key for key in tensors if key.endswith(part))
        tensors[key] = (100 * tensors[key]).to(kind)
        tensors["model.layers.0.attn.bias"] = torch.ones(3, dtype=torch.bool)  # a mask, which is no parameter

    folder = rewritten(tiny(name), tmp_path / "m", change)
    for options in [{}] if name == "llama" else [{"kind": "classifier"}, {"kind": "classifier", "head": "prototype"}]:
        with pytest.raises(
            UserError, match=rf"model\.safetensors of .* holds \S+{part} as (BOOL|I\d+), and weights have"
        ):
            load_model(folder, **options)


def test_whole_numbers_in_adapters_and_heads_are_refused(tiny, tmp_path: Path) -> None:
    loaded = load_model("pico")
    add_adapters(loaded, Adapter("lora"), 0)
    loaded.model.save_pretrained(tmp_path / "lora")
    encoder = load_model(tiny("bert"), kind="classifier", head="linear", num_labels=2)
    encoder.model.save_pretrained(tmp_path / "head")
    encoder.tokenizer.save_pretrained(tmp_path / "head")
    for file, said in (
        ("lora/adapter_model.safetensors", "holds {} as I32, and adapters have a fraction"),
        ("head/head.safetensors", "has no matrix of weights"),
    ):
        load(tmp_path / file.partition("/")[0])
        tensors = load_file(tmp_path / file)
        name = max(tensors, key=lambda name: tensors[name].dim())
        save_file(tensors | {name: tensors[name].int()}, tmp_path / file, {"format": "pt", "head": "linear"})
        with pytest.raises(UserError, match=said.format(name)):
            load(tmp_path / file.partition("/")[0])


@pytest.fixture
def sharded(tiny, tmp_path: Path) -> Path:
    loaded = load_model(tiny("llama"))
    loaded.model.save_pretrained(tmp_path / "s", max_shard_size="30KB")
    loaded.tokenizer.save_pretrained(tmp_path / "s")
    assert load_model(tmp_path / "s").notes == []
    return tmp_path / "s"


def test_a_tensor_with_different_values_in_two_shards_is_refused(sharded: Path) -> None:
    first, *_, last = sorted(sharded.glob("*.safetensors"))
    name, value = next(iter(load_file(first).items()))
    save_file(load_file(last) | {name: value}, last, {"format": "pt"})
    load_model(sharded)  # twice the same
    save_file(load_file(last) | {name: value + 1}, last, {"format": "pt"})
    with pytest.raises(UserError, match=f"{first.name} and {last.name} of .* both hold {name}, with different values"):
        load_model(sharded)


@pytest.mark.parametrize("lead", ["../{}", "/tmp/{}", "sub/../../{}", "..\\{}", "C:{}"])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_that_leads_elsewhere_is_refused(sharded: Path, index: str, lead: str) -> None:
    table = json.loads((sharded / "model.safetensors.index.json").read_text())
    name, file = next(iter(table["weight_map"].items()))
    table["weight_map"][name] = away = lead.format(file)
    (sharded / file).rename(sharded.parent / file)
    (sharded / "model.safetensors.index.json").unlink()
    (sharded / index).write_text(json.dumps(table))
    with pytest.raises(
        UserError, match=rf"{index} of .* names \S*{file}' as a file of weights, which is not in the model"
    ) as told:
        load_model(sharded)
    assert repr(away)[1:-1] in str(told.value)


def test_shards_in_a_folder_below_are_read(sharded: Path) -> None:
    table = json.loads((sharded / "model.safetensors.index.json").read_text())
    (sharded / "below").mkdir()
    for file in set(table["weight_map"].values()):
        (sharded / file).rename(sharded / "below" / file)
    table["weight_map"] = {name: f"below/{file}" for name, file in table["weight_map"].items()}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(table))
    assert load_model(sharded).notes == []


def test_a_config_that_names_weights_elsewhere_is_refused(tiny, tmp_path: Path) -> None:
    folder = configured(tiny("llama"), tmp_path / "m", transformers_weights="../model.safetensors")
    with pytest.raises(UserError, match=r"config\.json of .* names '\.\./model\.safetensors' as a file of weights"):
        load_model(folder)
