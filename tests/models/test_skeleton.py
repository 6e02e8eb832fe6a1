"""Models without weights, and the headers of files whose data are holes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig

from metazo.errors import UserError
from metazo.models.assemble import base_of
from metazo.models.load import load_model
from metazo.models.quantize import expect_bytes
from metazo.models.skeleton import skeleton, stored


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("opt", {"dtype": "bfloat16"}),
        ("bert_mlm", {}),
        ("roberta", {"num_labels": 3}),
        ("t5", {"dtype": "float16"}),  # of which transformers keeps some weights in float32
    ],
)
def test_a_skeleton_has_the_tensors_of_the_model(tiny, name, options) -> None:
    folder = tiny(name)
    whole, bare = load_model(folder, **options), skeleton(folder, **options)

    def facts(model):
        return [(key, tuple(p.shape), p.dtype) for key, p in model.named_parameters()]

    assert facts(bare.model) == facts(whole.model)
    assert all(tensor.is_meta for tensor in [*bare.model.parameters(), *bare.model.buffers()])
    assert (bare.kind, bare.context_length, bare.dtype) == (whole.kind, whole.context_length, whole.dtype)


def test_a_skeleton_of_a_sentence_encoder(minilm) -> None:
    whole, bare = load_model(minilm, num_labels=2), skeleton(minilm, num_labels=2)
    assert [n for n, _ in bare.model.named_parameters()] == [n for n, _ in whole.model.named_parameters()]
    for load in (load_model, skeleton):
        with pytest.raises(
            UserError, match="`attn_implementation`, .* cannot be used with a head on pooled hidden states"
        ):
            load(minilm, num_labels=2, attn_implementation="eager")


def test_the_layers_of_an_encoder_and_of_a_decoder_will_be_quantised(tiny) -> None:
    model = skeleton(tiny("t5")).model
    expect_bytes(model, "int8")
    linear = {name: module.weight for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    expected = {name for name, weight in linear.items() if hasattr(weight, "expected_bytes")}
    assert expected == linear.keys() - {"lm_head"} and any(name.startswith("decoder") for name in expected)


def test_how_much_of_a_model_quantisation_leaves_is_said(tiny) -> None:
    """GPT-2 has no linear layers; of Mixtral the experts and the router are left."""
    with pytest.raises(
        UserError, match=r"`quantize` int8 finds no linear layer in .* \(its largest weight beside .* is .*wpe.weight\)"
    ):
        skeleton(tiny("gpt2"), quantize="int8")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    mixtral = MixtralConfig(vocab_size=99, num_local_experts=8, num_key_value_heads=2, **sizes)
    attention, experts, router, norms = 4 * 64 * 64, 8 * 3 * 64 * 128, 8 * 64, 2 * 64
    left = 1 - 2 * attention / (2 * (attention + experts + router + norms) + 64)
    notes = skeleton("mixtral", config=mixtral, quantize="nf4").notes
    assert notes == [
        f"`quantize` nf4 leaves {left:.0%} of the weights as they are, such as model.layers.0.mlp.experts.gate_up_proj."
    ]
    for name in ("llama", "t5", "bart"):  # of an encoder-decoder both halves count
        assert not skeleton(tiny(name), quantize="int8").notes, name


def test_without_a_tokenizer_a_skeleton_says_so(tiny, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny("llama") / "config.json").read_bytes())
    bare = skeleton(tmp_path)
    assert bare.tokenizer is None and "tokenizer cannot be read" in bare.notes[0]


def sparse(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """A safetensors file whose data are a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def test_headers_are_read_and_weights_are_not(tmp_path: Path) -> None:
    sparse(tmp_path / "a.safetensors", {"x": (1000, 1000, 1000)})  # two GB, of which 4 kB exist
    sparse(tmp_path / "b.safetensors", {"y": (5,)})
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = stored(tmp_path)
    assert found is not None and found.tensors == {"x": ((1000, 1000, 1000), "BF16"), "y": ((5,), "BF16")}
    assert found.files == 2 and 2_000_000_010 < found.bytes < 2_000_001_000


def test_files_that_are_not_safetensors_are_refused(tmp_path: Path) -> None:
    assert stored(tmp_path) is None
    for data in (b"", b"\xff" * 100, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 9) + b'{"a": {}}'):
        (tmp_path / "a.safetensors").write_bytes(data)
        with pytest.raises(UserError, match="is not a safetensors file"):
            stored(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../a.safetensors"}}')
    with pytest.raises(UserError, match="does not say which file"):
        stored(tmp_path)


def test_the_base_of_a_run_and_of_adapters(tmp_path: Path, tiny) -> None:
    assert base_of("pico") == ("pico", None) and base_of("org/name", "v1") == ("org/name", "v1")
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    assert base_of(tmp_path / "run") == (str(model), None)
    (model / "config.json").unlink()
    (model / "adapter_model.safetensors").write_bytes(b"")
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(tiny("llama"))}
    (model / "adapter_config.json").write_text(json.dumps(settings))
    assert base_of(tmp_path / "run", "main") == (str(tiny("llama")), None)
    (model / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": "a/b", "revision": "v1"})
    )
    assert base_of(tmp_path / "run") == ("a/b", "v1")
