"""Trains a small random model of each kind beyond plain text with MeZO, LOZO and a (random) tuner, and writes the table.

.venv/bin/python benchmarks/models_beyond_text.py       # a minute; docs/models_beyond_text.json and docs/integrations.md

Each model is built from its configuration, with a batch of random inputs and targets, and takes `STEPS` steps of each method
on that batch in evaluation mode. The last column is what `metazo finetune` says of the model: it trains causal, masked,
classification and sequence-to-sequence models of text, and refuses others by name.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (settings are given as dictionaries, which pyright compares with every field of a configuration)
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from metazo import LOZO, MeZO, UserError, ZOFinetuner
from metazo.blocks import NamedTensor, partition, tensor_id
from metazo.models.checks import check_config
from metazo.step.scales import RMSScale
from metazo.tuner.networks import PertNN
from metazo.tuner.scale import TunerScale

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "docs" / "models_beyond_text.json", ROOT / "docs" / "integrations.md"
BEGIN, END = "<!-- models: made by benchmarks/models_beyond_text.py -->", "<!-- end of models -->"
STEPS, RATES = 30, (1e-3, 1e-2)
IDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VISION = {**WIDE, "image_size": 16, "patch_size": 8}


@dataclass(frozen=True)
class Kind:
    """One row of the table: what the model is, and how it and its batch (arguments of its forward) are made."""

    name: str
    what: str
    make: Callable[[], tuple[nn.Module, dict[str, Any]]]


def ids(rows: int = 4, length: int = 8, least: int = 3) -> Tensor:
    return torch.randint(least, 64, (rows, length))


def text(cls: str, config: Any) -> tuple[nn.Module, dict[str, Any]]:
    tokens = ids()
    return getattr(hf, cls)(config), {"input_ids": tokens, "labels": tokens}


def sequence(cls: str, config: Any) -> tuple[nn.Module, dict[str, Any]]:
    return getattr(hf, cls)(config), {"input_ids": ids(), "labels": ids()}


def vit() -> tuple[nn.Module, dict[str, Any]]:
    model = hf.ViTForImageClassification(hf.ViTConfig(**VISION, num_labels=3))
    return model, {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 1])}


def clip() -> tuple[nn.Module, dict[str, Any]]:
    config = hf.CLIPConfig(
        text_config={**WIDE, **IDS, "max_position_embeddings": 16}, vision_config=VISION, projection_dim=16
    )
    tokens = ids()
    tokens[:, -1] = 2
    return hf.CLIPModel(config), {"input_ids": tokens, "pixel_values": torch.randn(4, 3, 16, 16), "return_loss": True}


def llava() -> tuple[nn.Module, dict[str, Any]]:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**WIDE, **IDS),
        image_token_index=63,
        vision_feature_layer=-1,
    )
    tokens = ids(2, 10, 3).clamp(max=62)
    tokens[:, 1:5] = 63  # (16 / 8)^2 patches
    labels = tokens.masked_fill(tokens == 63, -100)
    return hf.LlavaForConditionalGeneration(config), {
        "input_ids": tokens, "pixel_values": torch.randn(2, 3, 16, 16), "labels": labels,
    }  # fmt: skip


def qwen2_vl() -> tuple[nn.Module, dict[str, Any]]:
    config = hf.Qwen2VLConfig(
        text_config={**WIDE, **IDS, "num_key_value_heads": 2,
                     "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}},
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "patch_size": 4, "mlp_ratio": 2},
        image_token_id=63, vision_start_token_id=61, vision_end_token_id=62, video_token_id=60,
    )  # fmt: skip
    tokens = ids(1, 10, 3).clamp(max=59)
    tokens[:, 1], tokens[:, 2:6], tokens[:, 6] = 61, 63, 62  # 4 x 4 patches, merged by 2 x 2
    labels = tokens.masked_fill(tokens > 59, -100)
    patches = torch.randn(16, 3 * 2 * 4 * 4)
    more = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    more["mm_token_type_ids"] = (tokens == 63).int()
    return hf.Qwen2VLForConditionalGeneration(config), {"input_ids": tokens, "labels": labels, **more}


def whisper() -> tuple[nn.Module, dict[str, Any]]:
    config = hf.WhisperConfig(
        **IDS, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20, max_target_positions=16,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = hf.WhisperForConditionalGeneration(config)
    return model, {"input_features": torch.randn(4, 8, 40), "labels": ids()}


def wav2vec2() -> tuple[nn.Module, dict[str, Any]]:
    config = hf.Wav2Vec2Config(
        **WIDE, **IDS, conv_dim=(16, 16), conv_stride=(4, 4), conv_kernel=(8, 8), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_labels=3, classifier_proj_size=16,
    )  # fmt: skip
    model = hf.Wav2Vec2ForSequenceClassification(config)
    return model, {"input_values": torch.randn(4, 400), "labels": torch.tensor([0, 1, 2, 1])}


EXPERTS = {**WIDE, **IDS, "num_key_value_heads": 2, "num_experts_per_tok": 2}
KINDS = (
    Kind("T5", "sequence to sequence", lambda: sequence("T5ForConditionalGeneration", hf.T5Config(
        **IDS, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0))),
    Kind("BART", "sequence to sequence", lambda: sequence("BartForConditionalGeneration", hf.BartConfig(
        **IDS, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=16, decoder_start_token_id=2))),
    Kind("ViT", "images", vit),
    Kind("CLIP", "images and text, contrastive", clip),
    Kind("LLaVA", "images and text", llava),
    Kind("Qwen2-VL", "images and text", qwen2_vl),
    Kind("Whisper", "speech to text", whisper),
    Kind("wav2vec 2.0", "speech, classified", wav2vec2),
    Kind("Mixtral", "mixture of experts", lambda: text("MixtralForCausalLM", hf.MixtralConfig(
        **EXPERTS, num_local_experts=4))),
    Kind("Qwen2-MoE", "mixture of experts", lambda: text("Qwen2MoeForCausalLM", hf.Qwen2MoeConfig(
        **EXPERTS, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24))),
    Kind("Mamba", "state space", lambda: text("MambaForCausalLM", hf.MambaConfig(
        **IDS, hidden_size=32, num_hidden_layers=2, state_size=4))),
)  # fmt: skip


def random_tuner(model: nn.Module) -> TunerScale:
    """Untrained networks for every block, as `tuner` random:0 of the command line."""
    named = [NamedTensor(name, p, tensor_id(name), 0) for name, p in model.named_parameters()]
    blocks = partition(named)
    return TunerScale(pertnn=PertNN(len(blocks), seed=0), networks=[block.name for block in blocks])


METHODS: dict[str, Callable[[nn.Module, float], Any]] = {
    "MeZO": lambda model, lr: MeZO(model.named_parameters(), lr=lr, scale=RMSScale(), seed=1),
    "LOZO": lambda model, lr: LOZO(model.named_parameters(), lr=lr, scale=RMSScale(), seed=1),
    "tuner": lambda model, lr: ZOFinetuner(model.named_parameters(), lr=lr, scale=random_tuner(model), seed=1),
}


def trained(kind: Kind, method: str, steps: int = STEPS) -> tuple[float, float]:
    """(first loss, loss after the steps at the best of `RATES`), both without a probe."""
    first = best = float("inf")
    for rate in RATES:
        model, batch = made(kind)

        def loss(model: nn.Module = model, batch: dict[str, Any] = batch) -> Tensor:
            return model(**batch).loss

        with torch.no_grad():
            first = float(loss())
        optimizer = METHODS[method](model, rate)
        for _ in range(steps):
            optimizer.step(loss)
        optimizer.settle()
        with torch.no_grad():
            best = min(best, float(loss()))
    return first, best


def made(kind: Kind) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, batch = kind.make()
    return model.eval(), batch


def command_line(model: Any) -> str:
    """What `metazo finetune` says of the model: "trained", or why it refuses."""
    with TemporaryDirectory() as folder:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        config = hf.AutoConfig.from_pretrained(folder)
        try:
            check_config(config, "it")
        except UserError as error:
            return str(error).partition(", which is ")[2].partition(";")[0]
    return "trained"


def measured(steps: int = STEPS) -> dict[str, Any]:
    rows = {}
    for kind in KINDS:
        model, _ = made(kind)
        row: dict[str, Any] = {"what": kind.what, "weights": sum(p.numel() for p in model.parameters())}
        for method in METHODS:
            first, last = trained(kind, method, steps)
            row |= {"first": first, method: last}
        rows[kind.name] = row | {"command line": command_line(model)}
        print(kind.name, rows[kind.name], flush=True)
    return {
        "steps": steps,
        "rates": RATES,
        "versions": {"torch": torch.__version__, "transformers": hf.__version__},
        "rows": rows,
    }


def rendered(page: str, found: dict[str, Any]) -> str:
    """The page with the table in place of the old one."""
    lines = ["| model | kind | weights | loss before | " + " | ".join(METHODS) + " | `metazo finetune` |"]
    lines.append("|---|---|---|---|" + "---|" * len(METHODS) + "---|")
    for name, row in found["rows"].items():
        losses = " | ".join(f"{row[method]:.3f}" for method in METHODS)
        said = "trains it" if row["command line"] == "trained" else f"refuses {row['command line']}"
        lines.append(f"| {name} | {row['what']} | {row['weights']:,} | {row['first']:.3f} | {losses} | {said} |")
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = measured()
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(rendered(PAGE.read_text(), json.loads(RESULT.read_text())))
