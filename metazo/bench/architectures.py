"""Tiny random models of every architecture on which feedback was checked, with inputs and a loss, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metazo.io.extras import needs

VOCABULARY, LENGTH, ROWS = 61, 7, 3
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WIDE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
_SMALL = {"max_position_embeddings": 32} | _IDS
_GQA = {"num_key_value_heads": 2}
_GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32} | _IDS

# name: (class, configuration, settings), in transformers
CAUSAL = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", _WIDE | _SMALL | _GQA),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _WIDE | _SMALL | _GQA),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _WIDE | _SMALL | _GQA | {"head_dim": 4}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", _WIDE | _SMALL | _GQA | {"sliding_window": 4}),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", _WIDE | _SMALL | _GQA | {"head_dim": 4}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", _WIDE | _SMALL | _GQA | {"head_dim": 4, "sliding_window": 4}),
    "Phi": ("PhiForCausalLM", "PhiConfig", _WIDE | _SMALL),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", _WIDE | _SMALL | _GQA),
    "OLMo 2": ("Olmo2ForCausalLM", "Olmo2Config", _WIDE | _SMALL),
    "SmolLM3": ("SmolLM3ForCausalLM", "SmolLM3Config", _WIDE | _SMALL | _GQA),
    "StableLM": ("StableLmForCausalLM", "StableLmConfig", _WIDE | _SMALL | _GQA),
    "OPT": ("OPTForCausalLM", "OPTConfig", _WIDE | _SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "GPT-Neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        _SMALL | {"hidden_size": 16, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4},
    ),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _WIDE | _SMALL),
    "GPT-J": ("GPTJForCausalLM", "GPTJConfig", _GPT2 | {"rotary_dim": 4}),
    "Bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 16, "n_layer": 3, "n_head": 4} | _IDS),
    "Falcon": ("FalconForCausalLM", "FalconConfig", _WIDE | _IDS),
}
MASKED = {
    "BERT": ("BertForMaskedLM", "BertConfig", _WIDE | _SMALL),
    "RoBERTa": ("RobertaForMaskedLM", "RobertaConfig", _WIDE | _SMALL),
    "DistilBERT": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        _SMALL | {"dim": 16, "n_layers": 3, "n_heads": 4, "hidden_dim": 24},
    ),
    "DeBERTa-v2": (
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        _WIDE | _SMALL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "ELECTRA": ("ElectraForMaskedLM", "ElectraConfig", _WIDE | _SMALL | {"embedding_size": 8}),
    "MPNet": ("MPNetForMaskedLM", "MPNetConfig", _WIDE | _SMALL),
    "ModernBERT": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        _WIDE | _SMALL | {"local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
    ),
}
CLASSIFIERS = {
    "BERT, classifier": ("BertForSequenceClassification", "BertConfig", _WIDE | _SMALL),
    "RoBERTa, classifier": ("RobertaForSequenceClassification", "RobertaConfig", _WIDE | _SMALL),
    "Llama, classifier": ("LlamaForSequenceClassification", "LlamaConfig", _WIDE | _SMALL | _GQA),
}
_UNPADDED = ("Gemma 2", "Bloom")  # their own attention gives NaN at the padding in float64, which reaches the loss
NAMES = (*CAUSAL, *MASKED, *CLASSIFIERS)


@dataclass(frozen=True)
class Tiny:
    """A model, a loss on one position per row (label words at the last position, mask, class), and one on all positions."""

    model: nn.Module
    answer: Callable[[], Tensor]
    every: Callable[[], Tensor]


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tiny:
    """A tiny random model by name (NAMES), in evaluation mode, with weights large enough for every module to matter."""
    with needs("llm"):
        import transformers

    model_class, config_class, settings = (CAUSAL | MASKED | CLASSIFIERS)[name]
    config = getattr(transformers, config_class)(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = getattr(transformers, model_class)(config).to(dtype).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(0, 0.3)
            else:  # norms and biases that differ from their neutral values
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH))
        targets = torch.randint(0, 2, (ROWS,))
    mask = torch.ones_like(ids)
    padding = slice(None, 2) if name in CAUSAL else slice(-2, None)
    if name not in _UNPADDED:
        ids[-1, padding], mask[-1, padding] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    position = -1 if name in CAUSAL else 2

    def answer() -> Tensor:
        logits = model(**inputs).logits
        return cross_entropy(logits if logits.ndim == 2 else logits[:, position, 5:7], targets)

    def every() -> Tensor:
        logits = model(**inputs).logits
        if logits.ndim == 2:
            return cross_entropy(logits, targets)
        kept = mask[:, 1:].bool()
        return cross_entropy(logits[:, :-1][kept], ids[:, 1:][kept])

    return Tiny(model, answer, every)
