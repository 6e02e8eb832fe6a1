"""Large models by their configurations: published numbers of parameters, blocks, memory, and the table that shows them."""

from __future__ import annotations

import shutil

import pytest
from transformers import LlamaConfig

from benchmarks import big_models as big
from metazo import recipes
from metazo.blocks import named_tensors, partition
from metazo.feedback.residual import find_residual
from metazo.recipes import locate
from metazo.runs.config import FinetuneConfig
from metazo.runs.dryrun import dry_run
from metazo.runs.estimate import Rates, step_seconds
from metazo.runs.method import build_optimizer
from metazo.settings import build, read_recipe
from metazo.step.precision import POLICIES

# Parameters as the Hub shows them for the published safetensors files; of OPT, see the closed form below.
PUBLISHED = {
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "FacebookAI/roberta-large": 355_412_057,  # without the pooler, with the head
    "distilbert/distilbert-base-uncased": 66_985_530,
}
# Networks in the tuners that the authors of ZO Fine-tuner published, one per tensor.
TUNED = {
    "meta-llama/Llama-3.2-1B": 146,
    "meta-llama/Llama-3.1-8B": 291,
    "Qwen/Qwen2.5-14B": 579,
    "facebook/opt-30b": 772,
}
RECIPES = ("mezo-causal", "mezo-lora-causal", "answer-column-causal", "mezo-masked")
TABLE = {found["model"]: found for found in big.committed(big.PAGE.read_text())}


@pytest.fixture(scope="module")
def bare():
    return {name: big.bare(name, "bfloat16") for name in big.CONFIGURATIONS}


def opt_parameters(width: int, layers: int) -> int:
    """Embeddings (tied), learned positions with two more rows, layers of 12 d^2 + 13 d, and a last norm."""
    return 50272 * width + 2050 * width + layers * (12 * width**2 + 13 * width) + 2 * width


def test_the_models_are_the_published_ones(bare) -> None:
    assert set(TABLE) == set(bare)
    for name, loaded in bare.items():
        config = loaded.model.config
        wanted = opt_parameters(config.hidden_size, config.num_hidden_layers) if "opt" in name else PUBLISHED[name]
        assert sum(parameter.numel() for parameter in loaded.model.parameters()) == wanted, name
        named = float(name.rsplit("-", 1)[1].lower().rstrip("b")) if loaded.kind == "causal" else wanted / 1e9
        assert wanted == pytest.approx(named * 1e9, rel=0.25), name


def test_blocks_and_fingerprints(bare) -> None:
    """A block per tensor, as the published tuners have them; feedback finds every layer."""
    prints = set()
    for name, loaded in bare.items():
        tensors = named_tensors(loaded.model)
        layers = partition(tensors, "layer")
        config = loaded.model.config
        stack = find_residual(loaded.model)
        assert len(stack.blocks) == config.num_hidden_layers, name
        inside = {f"{stack.path}.{index}" for index in range(config.num_hidden_layers)}
        assert inside <= {block.name for block in layers} and len(tensors) == int(TABLE[name]["blocks"]), name
        assert TUNED.get(name, len(tensors)) == len(tensors) == len(partition(tensors)), name
        again = big.facts(big.bare(name, "float32"))
        assert {key: TABLE[name][key] for key in again} == again == big.facts(loaded), name
        prints.add(again["fingerprint"])
    assert len(prints) == len(bare)


def test_memory_is_the_documented_bytes_per_weight(bare) -> None:
    """All rows of the table: inference, the policy's bytes, and for a compensated one a copy of the largest tensor."""
    for name, loaded in bare.items():
        found, sizes = TABLE[name], [parameter.numel() for parameter in loaded.model.parameters()]
        inference = float(found["inference"])
        assert 2 * sum(sizes) / 1e9 - 0.05 < inference < 2 * sum(sizes) / 1e9 + 1.5
        for precision in ("master", "compensated-16", "compensated-8"):
            scratch = 0 if precision == "master" else 2 * max(sizes)
            more = (POLICIES[precision].bytes * sum(sizes) + scratch) / 1e9
            assert float(found[precision]) == pytest.approx(inference + more, abs=0.11), (name, precision)
        assert float(found["LoRA"]) == pytest.approx(inference, abs=0.15), name
        activations = inference - 2 * sum(sizes) / 1e9
        assert 0 <= float(found["float32"]) - 4 * sum(sizes) / 1e9 + 0.05 < 2 * activations + 0.2, name
        for gpu, gib in big.GPUS.items():
            weights, memory = 2 * sum(sizes) / 1e9, gib * 2**30 / 1e9
            room = weights + 0.95 * (memory - weights)
            kinds = ("master", "compensated-16", "compensated-8", "LoRA")
            wanted = next((kind for kind in kinds if float(found[kind]) <= room), "-")
            assert found[f"on {gpu}"] == wanted, (name, gpu)


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", "facebook/opt-1.3b", "distilbert/distilbert-base-uncased"])
def test_the_table_is_what_is_computed_now(name: str) -> None:
    assert big.row(name) == TABLE[name]


def test_operations_and_time_of_a_step(bare) -> None:
    """2 per weight of a matrix and token, 4 d T per layer and token for attention, and the head at one position per row."""
    loaded = bare["meta-llama/Llama-3.2-1B"]
    config: LlamaConfig = loaded.model.config
    rows, tokens = big.SHAPE
    layers = [p.numel() for name, p in loaded.model.named_parameters() if p.ndim == 2 and "embed" not in name]
    attention = 4 * rows * tokens**2 * config.hidden_size * config.num_hidden_layers
    head = 2 * rows * config.vocab_size * config.hidden_size
    settings = big.recipe("mezo-causal", model=loaded.name)
    counted = big.step(settings, loaded)
    assert counted.forward_operations == pytest.approx(2 * rows * tokens * sum(layers) + attention + head, rel=1e-3)
    assert counted.step_operations == 2 * counted.forward_operations
    optimizer = build_optimizer(settings, loaded.model)
    seconds = step_seconds(counted, optimizer, Rates(operations=1e14, bytes=1e12, noise=1e11))
    weights = PUBLISHED["meta-llama/Llama-3.2-1B"]
    assert seconds == pytest.approx(2 * counted.forward_operations / 1e14 + 3 * weights / 1e11)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_planned_on_its_model(name: str, tmp_path, tiny) -> None:
    """By a dry run of the command, on a folder without weights; a masked model needs a tokenizer with the label words."""
    config = build(FinetuneConfig, read_recipe(locate(name)))
    assert config.model in big.CONFIGURATIONS and f"--config {name}" in recipes.text(name)
    model = "meta-llama/Llama-3.2-1B" if "causal" in name else config.model
    if name == "mezo-masked":
        shutil.copytree(tiny("roberta"), tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    big.CONFIGURATIONS[model].save_pretrained(tmp_path)
    found = dry_run(big.recipe(name, model=str(tmp_path), max_length=64, batch_size=2))
    assert found["steps"].startswith(f"{config.steps:,}") and found["optimizer"] == config.optimizer
    trained, whole = (int(each.replace(",", "")) for each in found["trained weights"].split(" of "))
    assert whole - (trained if config.lora else 0) == PUBLISHED[model] and (trained == whole) != bool(config.lora)
