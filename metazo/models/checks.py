"""Checks of a checkpoint that anybody may have written: the kind of model, its sizes, its weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.models.parts import whole

with needs("llm"):
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        PreTrainedConfig,
    )

DECODERS_OR_ENCODERS = (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
MAX_LAYERS, MAX_WIDTH, MAX_TOKENS = 2000, 2**17, 2**22
"""Limits on a config: a larger number is a mistake or an attack, and would take hours or all memory before the weights are
read."""
_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    *("num_decoder_layers", "encoder_layers", "decoder_layers"),
)
_WIDTHS = (
    *("hidden_size", "n_embd", "d_model", "intermediate_size", "num_attention_heads"),
    *("d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "encoder_attention_heads", "decoder_attention_heads"),
)
_OTHER_INPUTS = ("vision_config", "audio_config", "image_size", "num_mel_bins", "feat_extract_norm")
_PADDED = {
    *("bart", "camembert", "data2vec-text", "recurrent_gemma", "roberta", "roberta-prelayernorm", "roformer", "rwkv"),
    *("xlm", "xlm-roberta", "xlm-roberta-xl"),
}
_REFUSED = {
    "encoder-decoder": "two models put together",
    "prophetnet": "an encoder-decoder whose losses depend on the padding of a batch",
    "t5gemma2": "a model of images or sound",
}


def check_config(config: PreTrainedConfig, name: str) -> None:
    """Refuse a model that is not a language model or classifier of text, and sizes that no real model has."""
    mappings = (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,) if config.is_encoder_decoder else DECODERS_OR_ENCODERS
    known = any(
        type(config) in kind for kind in mappings
    )  # not by their keys, which import every model of transformers
    what = None
    if any(hasattr(config, name) for name in _OTHER_INPUTS):
        what = "a model of images or sound"
    elif config.model_type in _REFUSED:
        what = _REFUSED[config.model_type]
    elif not known and (config.is_encoder_decoder or not any(a.endswith("Model") for a in config.architectures or ())):
        what = (
            "no model that transformers has as a causal, masked, classification or sequence-to-sequence model of text"
        )
    if what:
        raise UserError(
            f"{name!r} is a {config.model_type} model, which is {what}; metazo takes causal, masked, classification and "
            "sequence-to-sequence models of text"
        )
    text = config.get_text_config()
    for names, limit, unit in (
        (_LAYERS, MAX_LAYERS, "layers"),
        (_WIDTHS, MAX_WIDTH, "units"),
        (("vocab_size", "max_position_embeddings", "n_positions"), MAX_TOKENS, "rows"),
    ):
        for key in names:
            value = getattr(text, key, None)
            if isinstance(value, int) and not isinstance(value, bool) and not 0 <= value <= limit:
                raise UserError(
                    f"the config of {name!r} has {key} {value:,}, and metazo builds at most {limit:,} {unit}; check config.json"
                )


def kind_of(config: PreTrainedConfig, kind: str, name: str) -> str:
    """The kind of model to load: `kind`, or for "auto" that of the class which the checkpoint was saved as; without a head, an
    encoder-decoder is seq2seq and any other model a classifier. Raises UserError for a kind that it cannot be.
    """
    if kind == "auto":
        endings = {
            "causal": ("ForCausalLM", "LMHeadModel"),
            "masked": "ForMaskedLM",
            "classifier": "ForSequenceClassification",
        }
        saved_as = (kind for cls in config.architectures or () for kind, end in endings.items() if cls.endswith(end))
        kind = next(saved_as, "seq2seq" if config.is_encoder_decoder else "classifier")
        if kind != "causal":
            return kind
    if kind == "causal" and config.model_type in _PADDED:
        raise UserError(
            f"{name!r} is a {config.model_type} model, whose scores as a causal model depend on the padding of a batch or on "
            "positions of its own; take it as masked, a classifier or sequence-to-sequence, or choose another model."
        )
    if kind != "classifier" and (kind == "seq2seq") != config.is_encoder_decoder:
        what = "an encoder-decoder" if config.is_encoder_decoder else "no encoder-decoder"
        raise UserError(
            f"`kind` {kind}: {name!r} is a {config.model_type} model, which is {what}; leave `kind` out or name another."
        )
    return kind


@torch.no_grad()
def check_float64(model: nn.Module, kind: str, name: str) -> None:
    """Raises UserError for a causal model in float64 whose padded rows are NaN: the eager attention of several models takes
    the softmax in float32, in which the float64 number that hides padding is minus infinity.
    """
    tensor = next(model.parameters(), None)
    if kind != "causal" or tensor is None or tensor.dtype != torch.float64 or tensor.device.type == "meta":
        return
    tokens = torch.zeros(1, 2, dtype=torch.long, device=tensor.device)
    padded = torch.tensor([[0, 1]], device=tensor.device)
    if not bool(model(input_ids=tokens, attention_mask=padded).logits[0, -1].isfinite().all()):
        raise UserError(
            f"`dtype` float64: the attention of {name!r} is NaN for inputs with padding, because its softmax is in float32; "
            "choose float32, or another `attn_implementation` if the model has one."
        )


def not_finite(model: nn.Module) -> list[str]:
    """A sentence about NaN or infinite weights, if there are any."""
    plain = (
        (n, p.detach())
        for n, p in whole(model)
        if p.numel() and p.is_floating_point() and not is_traceable_wrapper_subclass(p)
    )
    bad = [n for n, values in plain if not torch.stack(torch.aminmax(values)).isfinite().all()]
    if not bad:
        return []
    return [
        f"{len(bad)} of {len(list(model.parameters()))} tensors of the model hold NaN or infinite weights, such as {bad[0]}"
    ]
