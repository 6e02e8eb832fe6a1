"""Llamas with random weights, by configuration: speed and memory do not depend on the values of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metazo.io.extras import needs

with needs("llm"):
    from transformers import LlamaConfig, LlamaForCausalLM

Shape = tuple[int, int]
"""Batch size and length."""


def _llama(vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, groups: int | None = None):
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups or heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }


SIZES: dict[str, dict[str, Any]] = {
    "1M": _llama(4096, 64, 224, 8, 4),
    "10M": _llama(4096, 256, 688, 10, 4),
    "134M": _llama(32000, 768, 2048, 12, 12),
    "369M": _llama(32000, 1024, 2752, 24, 16),
    "1B": _llama(32000, 2048, 5504, 18, 16),
    "1.3B": _llama(32000, 2048, 5504, 24, 16),
    "7B": _llama(32000, 4096, 11008, 32, 32),
    "8B": _llama(128256, 4096, 14336, 32, 32, 8),
}


def build(size: str, dtype: str = "float32", device: str = "cpu") -> LlamaForCausalLM:
    """A Llama of that size in eval mode. The state of the global generator is restored."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.default_generator.manual_seed(0)
        model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES[size]), dtype=getattr(torch, dtype))
    return model.eval()


def lm_loss(model: LlamaForCausalLM, shape: Shape) -> Callable[[], Tensor]:
    """The ordinary language-model loss on random tokens, as a closure: logits at every position."""
    ids = torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(1)).to(model.device)
    return lambda: model(input_ids=ids, labels=ids).loss


def weight_bytes(model: LlamaForCausalLM) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
