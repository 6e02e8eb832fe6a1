"""Makes the table of large models in docs/one-gpu.md: the memory of the recipes' steps, from configurations alone.

    python benchmarks/big_models.py            # half a minute; no weights, no network, no GPU

Each model is built on torch's meta device from its published configuration, and the step of a recipe is followed there
(metazo/runs/estimate.py) over a batch of 16 inputs of 256 tokens. CONFIGURATIONS has the numbers of the config.json files
that the publishers have on the Hub; settings that they share with transformers' defaults are left out.
tests/bench/test_big_models.py checks the numbers of parameters against those of the published checkpoints.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import DistilBertConfig, LlamaConfig, OPTConfig, PreTrainedConfig, Qwen2Config, RobertaConfig

from metazo.models.assemble import assemble
from metazo.models.load import LoadedModel
from metazo.models.skeleton import skeleton
from metazo.recipes import locate
from metazo.runs.config import FinetuneConfig
from metazo.runs.dryrun import META, assumed_loss
from metazo.runs.estimate import Estimate, estimate, scratch_bytes, state_bytes
from metazo.runs.fit_precision import ORDER, SHARE
from metazo.runs.method import build_optimizer
from metazo.settings import build, read_recipe
from metazo.tuner.match import fingerprint

PAGE = Path(__file__).parents[1] / "docs" / "one-gpu.md"
BEGIN, END = "<!-- large models: made by benchmarks/big_models.py -->", "<!-- end of large models -->"
SHAPE = (16, 256)  # rows and tokens of the batch
GPUS = {"24 GB": 23.1, "80 GB": 78.5, "141 GB": 138.5}
"""GiB that torch reports for an RTX 4090, an H100 and an H200, less 0.5 for CUDA's own context."""


def _llama(width: int, inner: int, layers: int, heads: int, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, tie_word_embeddings=tied, max_position_embeddings=131072, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def _qwen(width: int, inner: int, layers: int, heads: int, groups: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=152064, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, tie_word_embeddings=False, max_position_embeddings=32768,
        architectures=["Qwen2ForCausalLM"],
    )  # fmt: skip


def _opt(width: int, layers: int, heads: int) -> OPTConfig:
    return OPTConfig(
        vocab_size=50272, hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=2048, architectures=["OPTForCausalLM"],
    )  # fmt: skip


CONFIGURATIONS: dict[str, PreTrainedConfig] = {
    "meta-llama/Llama-3.2-1B": _llama(2048, 8192, 16, 32, tied=True),
    "meta-llama/Llama-3.1-8B": _llama(4096, 14336, 32, 32, tied=False),
    "Qwen/Qwen2.5-7B": _qwen(3584, 18944, 28, 28, 4),
    "Qwen/Qwen2.5-14B": _qwen(5120, 13824, 48, 40, 8),
    "facebook/opt-1.3b": _opt(2048, 24, 32),
    "facebook/opt-2.7b": _opt(2560, 32, 32),
    "facebook/opt-6.7b": _opt(4096, 32, 32),
    "facebook/opt-13b": _opt(5120, 40, 40),
    "facebook/opt-30b": _opt(7168, 48, 56),
    "FacebookAI/roberta-large": RobertaConfig(
        vocab_size=50265, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        max_position_embeddings=514, type_vocab_size=1, architectures=["RobertaForMaskedLM"],
    ),
    "distilbert/distilbert-base-uncased": DistilBertConfig(
        vocab_size=30522, dim=768, hidden_dim=3072, n_layers=6, n_heads=12, max_position_embeddings=512,
        architectures=["DistilBertForMaskedLM"],
    ),
}  # fmt: skip


def recipe(name: str, **changes: Any) -> FinetuneConfig:
    """The settings of a recipe that comes with metazo."""
    return build(FinetuneConfig, read_recipe(locate(name)), changes)


def bare(name: str, dtype: str) -> LoadedModel:
    """The model on the meta device."""
    return skeleton(name, config=CONFIGURATIONS[name], dtype=dtype)


def facts(loaded: LoadedModel) -> dict[str, str]:
    """Numbers of weights and blocks, and the beginning of the fingerprint by which tuners know the model."""
    shapes = [(name, tuple(parameter.shape)) for name, parameter in loaded.model.named_parameters()]
    weights = sum(parameter.numel() for parameter in loaded.model.parameters())
    return {"weights": f"{weights:,}", "blocks": str(len(shapes)), "fingerprint": str(fingerprint(shapes))[:8]}


def step(config: FinetuneConfig, loaded: LoadedModel) -> Estimate:
    return estimate(loaded.model, build_optimizer(config, loaded.model), assumed_loss(loaded, *SHAPE))


def row(name: str) -> dict[str, str]:
    """The cells of a model by column; bytes in GB (10^9 bytes)."""
    loaded = bare(name, "bfloat16")
    config = recipe("mezo-causal" if loaded.kind == "causal" else "mezo-masked", model=name, dtype="bfloat16")
    known = facts(loaded)
    counted = step(replace(config, precision="in-place"), loaded)
    bytes_of: dict[str, int] = {}
    for precision in ORDER:  # the forward pass is the same
        optimizer = build_optimizer(replace(config, precision=precision), loaded.model)
        bytes_of[precision] = counted.inference + state_bytes(optimizer) + scratch_bytes(optimizer)
    with_lora = recipe("mezo-lora-causal", model=name)
    adapted, _ = assemble(with_lora, labels=2, device=META, given=loaded)
    bytes_of["LoRA"] = step(with_lora, adapted).peak
    in_place = step(replace(config, dtype="float32"), bare(name, "float32")).peak
    return {
        "model": name,
        **known,
        "inference": _gb(counted.inference),
        **{column: _gb(value) for column, value in bytes_of.items()},
        "float32": _gb(in_place),
        "10^12 operations": f"{counted.step_operations / 1e12:,.0f}",
        **{f"on {gpu}": _fitting(bytes_of, counted.weights, gib * 2**30) for gpu, gib in GPUS.items()},
    }


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f}"


def _fitting(bytes_of: dict[str, int], weights: int, memory: float) -> str:
    """The first whose bytes beside the weights fit into what they leave free, by the rule of a run."""
    free = SHARE * (memory - weights)
    return next((name for name, needed in bytes_of.items() if needed - weights <= free), "-")


def table(rows: list[dict[str, str]]) -> str:
    lines = [
        list(rows[0]),
        ["---", *["---:"] * (len(rows[0]) - 4), *["---"] * 3],
        *(list(found.values()) for found in rows),
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def committed(page: str) -> list[dict[str, str]]:
    """The rows of the table in a page."""
    lines = page.split(BEGIN)[1].split(END)[0].strip().splitlines()
    heads, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(heads, cells, strict=True)) for cells in rows]


def main() -> None:
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    made = table([row(name) for name in CONFIGURATIONS])
    PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}")
    print(made)


if __name__ == "__main__":
    main()
