"""The four published `.pth` files are of three families; such files are imported in any order and wrapping."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, OPTConfig, Qwen2Config, Qwen3Config

from metazo.errors import UserError
from metazo.zoo import import_pth, model_shapes
from metazo.zoo.layout import layout
from tests.zoo.test_importer import saved

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 40}
GATED = SMALL | {"num_key_value_heads": 1, "intermediate_size": 24}
CONFIGS = {  # blocks of the published tuners: Llama-3.2-1B, Llama-3.1-8B, Qwen2.5-14B, OPT-30B
    "llama-1b": (
        LlamaConfig(num_hidden_layers=16, tie_word_embeddings=True, **GATED),
        "LlamaForCausalLM",
        146,
        "Llama",
    ),
    "llama-8b": (
        LlamaConfig(num_hidden_layers=32, tie_word_embeddings=False, **GATED),
        "LlamaForCausalLM",
        291,
        "Llama",
    ),
    "qwen-14b": (
        Qwen2Config(num_hidden_layers=48, tie_word_embeddings=False, **GATED),
        "Qwen2ForCausalLM",
        579,
        "Qwen2",
    ),
    "opt-30b": (
        OPTConfig(num_hidden_layers=48, ffn_dim=24, word_embed_proj_dim=16, **SMALL),
        "OPTForCausalLM",
        772,
        "OPT",
    ),
    "qwen3": (Qwen3Config(num_hidden_layers=3, tie_word_embeddings=True, **GATED), "Qwen3ForCausalLM", 35, "Qwen3"),
}


def pth(names: list[str], dtype: torch.dtype = torch.float32) -> bytes:
    torch.manual_seed(0)
    return saved({name: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype) for name in names})


@pytest.mark.parametrize("name", CONFIGS)
def test_files_of_the_published_forms(name: str, tmp_path: Path) -> None:
    config, architecture, count, family = CONFIGS[name]
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    shapes = model_shapes(tmp_path)
    assert len(shapes) == count
    names, path = [name for name, _ in shapes], tmp_path / "t.pth"
    path.write_bytes(pth(["module." + name for name in reversed(names)], torch.float16))
    tuner = import_pth(path, "base", tmp_path)
    assert [block.name for block in tuner.info.blocks] == names[
        ::-1
    ]  # in the order of the file; a model is matched by name
    assert tuner.fits(shapes).ok and tuner.info.recipe["stored type"] == "float16"
    assert tuner.info.recipe["layout"].startswith(f"{family}, {config.num_hidden_layers} layers of ")


def test_a_file_with_a_tensor_missing_is_refused(tmp_path: Path) -> None:
    config, architecture, _, _ = CONFIGS["qwen3"]
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    names, path = [name for name, _ in model_shapes(tmp_path)], tmp_path / "t.pth"
    path.write_bytes(pth([name for name in names if name != "model.layers.1.mlp.up_proj.weight"]))
    with pytest.raises(
        UserError, match=r"t\.pth cannot be imported: layer 1 of this Qwen3 tuner lacks mlp\.up_proj\.weight"
    ):
        import_pth(path, "base")
    path.write_bytes(pth([name for name in names if ".layers.1." not in name]))
    with pytest.raises(UserError, match="layer 1 is missing"):
        import_pth(path, "base")


def test_an_unknown_layout_is_said() -> None:
    assert layout(["w", "b"]) == "unknown: no tensor is named as one of a layer"
    assert "'attention.wqkv.weight' is in no family that metazo knows (Llama, " in layout(
        [f"model.layers.{n}.attention.wqkv.weight" for n in range(2)]
    )
    assert "another set of tensors" in layout(["model.layers.0.self_attn.q_proj.weight"])
