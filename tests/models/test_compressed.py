"""Checkpoints of compressed-tensors: decompressed when they are loaded, and a quantised base for all that follows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import metazo
from metazo.errors import UserError
from metazo.models.assemble import load
from metazo.models.load import load_model
from metazo.models.parts import hash_of
from metazo.models.quantize import quantised
from metazo.runs.config import FinetuneConfig
from metazo.runs.dryrun import dry_run
from metazo.runs.finetune import run_settings, tune
from metazo.runs.replay import replay
from metazo.settings import build

SMALL = {
    "task": "pico_sentiment", "lora": 4, "lr": 1e-3, "steps": 4, "train_examples": 32, "keep": "last",
    "dev_examples": 16, "test_examples": 16, "eval_every": 4, "snapshot_every": 0,
}  # fmt: skip
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FORMATS = {
    "int-quantized": WEIGHTS,
    "pack-quantized": WEIGHTS | {"num_bits": 4},
    "float-quantized": WEIGHTS | {"type": "float"},
    "rounds its inputs": WEIGHTS,
}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """A small Llama in a format of compressed-tensors: its folder, and its weights as they were rounded."""
    made: dict[str, tuple[Path, dict]] = {}

    def make(kind: str) -> tuple[Path, dict]:
        if kind in made:
            return made[kind]
        plain, how = load_model(tiny("llama")), QuantizationArgs(**FORMATS[kind])
        inputs = QuantizationArgs(**WEIGHTS | {"strategy": "token", "dynamic": True}) if "inputs" in kind else None
        group = QuantizationScheme(targets=["Linear"], weights=how, input_activations=inputs)
        apply_quantization_config(plain.model, QuantizationConfig(config_groups={"all": group}, ignore=["lm_head"]))
        rounded = {}
        for name, layer in plain.model.named_modules():
            if hasattr(layer, "weight_scale"):
                weight = layer.weight.data
                scale, _ = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), how)
                layer.weight_scale.data.copy_(scale)
                if how.type == "int":
                    half = 2 ** (how.num_bits - 1)
                    rounded[f"{name}.weight"] = (weight / scale).round().clamp(-half, half - 1) * scale
                else:
                    rounded[f"{name}.weight"] = (weight / scale).to(torch.float8_e4m3fn).float() * scale
        kind_of_file = "int-quantized" if inputs else kind
        compressor = ModelCompressor.from_pretrained_model(plain.model, kind_of_file)
        compressor.compress_model(plain.model)
        folder = tmp_path_factory.mktemp("compressed") / kind_of_file
        plain.model.save_pretrained(folder)
        compressor.update_config(folder)
        plain.tokenizer.save_pretrained(folder)
        made[kind] = folder, rounded
        return made[kind]

    return make


def config(out: Path, model: Path, **extra) -> FinetuneConfig:
    return build(FinetuneConfig, SMALL | {"model": str(model)}, {"out": out, **extra})


@pytest.mark.parametrize("kind", FORMATS)
def test_it_is_decompressed_when_it_is_loaded(saved, kind: str) -> None:
    folder, rounded = saved(kind)
    loaded = load_model(folder)
    weights = dict(loaded.model.named_parameters())
    assert rounded and all(torch.equal(weights[name], value) for name, value in rounded.items())
    assert f"{len(rounded)} layers of {folder}, which compressed-tensors saved, are decompressed" in loaded.notes[0]
    before = hash_of(loaded.model)
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, AutoModelForCausalLM.from_pretrained(folder)(ids).logits)
    assert hash_of(loaded.model) == before
    assert set(rounded) <= set(quantised(loaded.model))
    narrow = load_model(folder, dtype="bfloat16").model
    assert {p.dtype for p in narrow.parameters() if p.is_floating_point()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_run_is_interrupted_resumed_replayed_evaluated_and_continued(saved, tmp_path: Path, kind: str) -> None:
    folder, _ = saved(kind)

    def stop(step) -> None:
        if step.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(config(tmp_path / "part", folder), on_step=stop)
    resumed = run_settings(config(tmp_path / "part", folder, resume=True))
    summary = run_settings(config(tmp_path / "run", folder))
    assert resumed["test"] == summary["test"] == metazo.evaluate(tmp_path / "run")
    assert replay(tmp_path / "run/steps.jsonl", folder, tmp_path / "again").identical
    assert quantised(load(tmp_path / "run", merge=True).model)
    more = run_settings(config(tmp_path / "more", tmp_path / "run/model", lora=0, adapter="continue"))
    assert more["test"] == metazo.evaluate(tmp_path / "more")


@pytest.mark.parametrize("optimizer", ["first-order-adamw", "first-order-fused"])
@pytest.mark.parametrize("kind", ["int-quantized", "pack-quantized", "float-quantized"])
def test_a_gradient_passes_the_layers(saved, tmp_path: Path, kind: str, optimizer: str) -> None:
    start = metazo.evaluate(saved(kind)[0], "pico_sentiment", examples=16, train_examples=32, dev_examples=16)
    summary = run_settings(config(tmp_path / "run", saved(kind)[0], optimizer=optimizer))
    assert summary["test"] == metazo.evaluate(tmp_path / "run") and summary["test"]["loss"] < start["loss"]


def test_what_it_cannot_be_used_for_is_one_sentence(saved, tmp_path: Path) -> None:
    for kind, extra, said in (
        ("float-quantized", {"lora": 0}, r"is quantised, and .* cannot be trained; train adapters"),
        ("pack-quantized", {"merge": True}, "`merge`: .* is quantised, and the sum would be rounded"),
        ("rounds its inputs", {"optimizer": "first-order-sgd"}, "layers that round as they compute"),
        ("int-quantized", {"quantize": "int8"}, "is quantised already"),
    ):
        for start in (run_settings, dry_run):
            with pytest.raises(UserError, match=said):
                start(config(tmp_path / "run", saved(kind)[0], **extra))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_model_in_memory_is_decompressed_too(saved, tmp_path: Path, kind: str) -> None:
    folder, rounded = saved(kind)
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    model.model.norm.requires_grad_(True)  # saved whole, with its configuration
    given = SMALL | {"lora": 0, "out": tmp_path / "run", "tokenizer": load_model(folder).tokenizer}
    tuned = metazo.finetune(model, given.pop("task"), **given)
    again = load_model(tmp_path / "run/model").model
    weights = dict(again.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in rounded.items()) and quantised(again)
    assert metazo.evaluate(tmp_path / "run") == pytest.approx(tuned.summary["test"], rel=1e-6)


def test_a_model_in_memory_with_adapters_is_decompressed_too(saved) -> None:
    folder, rounded = saved("int-quantized")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    metazo.finetune(model, tokenizer=load_model(folder).tokenizer, **SMALL | {"lora": 0, "keep": "none"})
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(model.get_base_model().get_submodule(name).base_layer.weight, rounded[f"{name}.weight"])
