"""The dominant-layer control: the tensors that it moves, the layer that it takes, and the search for the outlier layer."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from metazo.errors import UserError
from metazo.optimizers import DominantLayer, first_outlier_layer
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


IDS = torch.arange(20).view(2, 10)


@pytest.mark.parametrize("layer, prefix", [(0, "model.layers.0."), ("2", "model.layers.2."), (-1, "model.layers.3."),
                                           ("model.layers.1", "model.layers.1."), ("lm_head", "lm_head.")])  # fmt: skip
def test_only_that_layer_moves(model, layer, prefix):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = DominantLayer(model.named_parameters(), lr=1e-3, layer=layer)
    optimizer.step(lambda: model(input_ids=IDS, labels=IDS).loss)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith(prefix), name


def test_bad_layers(model):
    for layer in (4, "99", "layers", "mlp"):
        with pytest.raises(UserError, match="layer"):
            DominantLayer(model.named_parameters(), layer=layer)


def test_outlier_layer_is_found(model):
    weight = model.model.layers[2].mlp.down_proj.weight
    kept = weight.detach().clone()
    assert first_outlier_layer(model, lambda: model(input_ids=IDS)).startswith("model.layers.")
    with torch.no_grad():
        weight[3] *= 1e7  # one channel of the residual stream
    try:
        assert first_outlier_layer(model, lambda: model(input_ids=IDS)) == "model.layers.2"
        assert not model.model.layers[2]._forward_hooks
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    with pytest.raises(UserError, match="numbered"):
        linear = torch.nn.Linear(2, 2)
        first_outlier_layer(linear, lambda: linear(torch.ones(1, 2)))


def test_a_layer_whose_output_is_zeros_is_no_outlier():
    """An adapter or a head begins with weights of zeros."""
    layers = torch.nn.ModuleDict({"layers": torch.nn.Sequential(*(torch.nn.Linear(5, 5) for _ in range(3)))})
    silent, flat, spread = layers["layers"]
    for parameter in (*silent.parameters(), flat.weight):
        torch.nn.init.zeros_(parameter)
    torch.nn.init.ones_(flat.bias)
    spread.load_state_dict({"weight": torch.zeros(5, 5), "bias": torch.tensor([1.0, 1, 1, 1, 9])})
    assert first_outlier_layer(layers, lambda: layers["layers"](torch.ones(2, 5))) == "layers.2"


def test_a_run_finds_its_layer_and_the_log_names_it(tmp_path):
    """--layer outlier is settled before the first step: the log has the layer's name, so that a replay needs no data."""

    def run(layer: str, out) -> list[dict]:
        few = {"train_examples": 40, "dev_examples": 8, "test_examples": 8, "batch_size": 4, "keep": "none", "steps": 2}
        run_settings(
            FinetuneConfig("pico", "pico_topic", optimizer=DominantLayer.name, method={"layer": layer}, out=out, **few)
        )
        return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]

    found = run("outlier", tmp_path / "found")
    layer = found[0]["settings"]["method"]["layer"]
    assert layer.startswith("model.layers.")
    given = run(layer, tmp_path / "given")
    assert [line.get("losses") for line in found] == [line.get("losses") for line in given]


def test_what_is_frozen_is_not_dominant(model):
    model.requires_grad_(False)
    try:
        model.model.layers[3].requires_grad_(True)
        assert first_outlier_layer(model, lambda: model(input_ids=IDS)) == "model.layers.3"
    finally:
        model.requires_grad_(True)
