"""Checks of a checkpoint that anybody may have written: the kind of model, its sizes, its weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from metazo.errors import UserError, first_sentence
from metazo.io.extras import needs
from metazo.io.files import read_capped
from metazo.io.plain import MAX_JSON_BYTES, parse_json
from metazo.io.processes import total
from metazo.models.parts import divided, held
from metazo.models.sentence import SentenceClassifier, find

with needs("llm"):
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        PreTrainedConfig,
        PreTrainedTokenizerBase,
    )

DECODERS_OR_ENCODERS = (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
ENDINGS = {
    "causal": ("ForCausalLM", "LMHeadModel"),
    "masked": ("ForMaskedLM",),
    "classifier": ("ForSequenceClassification", "SentenceClassifier"),
    "seq2seq": ("ForConditionalGeneration", "MTModel"),
}
"""How the names of the classes of each kind end."""
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
_LIMITS = {
    **dict.fromkeys(_LAYERS, (MAX_LAYERS, "layers")),
    **dict.fromkeys(_WIDTHS, (MAX_WIDTH, "units")),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions"), (MAX_TOKENS, "rows")),
    "num_labels": (MAX_WIDTH, "classes"),
}
_OTHER_INPUTS = ("vision_config", "audio_config", "image_size", "num_mel_bins", "feat_extract_norm")
_PADDED = {
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"),
    *("trocr", "camembert", "data2vec-text", "recurrent_gemma", "roberta", "roberta-prelayernorm", "roformer", "rwkv"),
    *("xlm", "xlm-roberta", "xlm-roberta-xl"),
}
_DECODERS = ("gpt_neox", "gpt_neox_japanese")
"""Models that read no later token although their config says that they are no decoders."""
_REFUSED = {
    **dict.fromkeys(
        ("convbert", "fnet", "nystromformer", "yoso"), "a model whose scores depend on the padding of a batch"
    ),
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
    check_sizes(config.to_dict(), name)


def check_sizes(settings: Mapping[str, Any], name: str) -> None:
    """Refuse sizes that no real model has, in a config or a config within it."""
    for key, value in settings.items():
        if isinstance(value, dict):
            check_sizes(value, name)
        limit, unit = _LIMITS.get(key, (0, None))
        if unit is not None and type(value) is int and not 0 <= value <= limit:
            raise UserError(
                f"the config of {name!r} has {key} {value:,}, and metazo builds at most {limit:,} {unit}; check config.json"
            )


def check_file(source: str, name: str, revision: str) -> None:
    """`check_sizes` of config.json as it was written: transformers makes lists of some of its numbers when it reads them.
    Raises ValueError for what is no JSON."""
    path = find(source, "config.json", revision)
    if path is None:  # which transformers reports
        return
    settings = parse_json(read_capped(path, MAX_JSON_BYTES, "settings of a model"))
    if isinstance(settings, dict):
        check_sizes(settings, name)


def kind_of(config: PreTrainedConfig, kind: str, name: str) -> str:
    """The kind of model to load: `kind`, or for "auto" that of the class which the checkpoint was saved as; without a head, an
    encoder-decoder is seq2seq and any other model a classifier. Raises UserError for a kind that it cannot be.
    """
    if kind == "auto":
        heads = [item for item in ENDINGS.items() if item[0] != "seq2seq"]  # for that the config is asked
        saved_as = (kind for cls in config.architectures or () for kind, ends in heads if cls.endswith(ends))
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
    chooses = hasattr(
        type(config), "is_decoder"
    )  # files of other types may have the field too, which then changes nothing
    if kind == "causal" and chooses and not config.is_decoder and config.model_type not in _DECODERS:
        raise UserError(
            f"`kind` causal: {name!r} is a {config.model_type} model that reads the tokens after a position too (is_decoder is "
            "false in its config.json), so it would see the answers; take it as masked or a classifier."
        )
    return kind


@torch.no_grad()
def check_float64(model: nn.Module, kind: str, name: str) -> None:
    """Raises UserError for a causal model that cannot compute in float64, as torch's products of experts cannot, and for one
    whose padded rows are NaN: the eager attention of several models takes the softmax in float32, in which the float64
    number that hides padding is minus infinity.
    """
    tensor = next(model.parameters(), None)
    if kind != "causal" or tensor is None or tensor.dtype != torch.float64 or tensor.device.type == "meta":
        return
    tokens = torch.zeros(1, 2, dtype=torch.long, device=tensor.device)
    padded = torch.tensor([[0, 1]], device=tensor.device)
    try:
        logits = model(input_ids=tokens, attention_mask=padded).logits
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"`dtype` float64: {name!r} cannot compute in it ({first_sentence(error)}); choose float32."
        ) from error
    if not bool(logits[0, -1].isfinite().all()):
        raise UserError(
            f"`dtype` float64: the attention of {name!r} is NaN for inputs with padding, because its softmax is in float32; "
            "choose float32, or another `attn_implementation` if the model has one."
        )


@torch.no_grad()
def check_padding(model: Any, tokenizer: PreTrainedTokenizerBase, kind: str, name: str, context: int) -> None:
    """Raises UserError for a model whose scores of a short row change if a longer row pads it, and for a causal model whose
    scores change with the tokens after them. Two short passes find out, so that no list of models is needed.

    Only weights in full precision are checked: the rounding of others may send a token to another expert, and some quantised
    layers change at their first pass.
    """
    for parameter in model.parameters():
        if (
            parameter.dtype not in (torch.float32, torch.float64)
            or parameter.is_meta
            or hasattr(parameter, "quant_state")
        ):
            return
        if is_traceable_wrapper_subclass(parameter):
            return
    encoder: Any = model.encoder if isinstance(model, SentenceClassifier) else model
    known = min(encoder.get_input_embeddings().weight.shape[0], len(tokenizer), 999)
    special = set(tokenizer.all_special_ids)  # which the tokenizer makes again each time
    tokens = [token for token in range(known) if token not in special]
    if not tokens or context < 2:
        return
    long = [tokens[at % len(tokens)] for at in range(min(context, 8))]
    short = long[: len(long) // 4 + 1]
    if kind == "classifier" and model.config.is_encoder_decoder:  # it scores the text at its end
        short[-1] = long[-1] = model.config.eos_token_id
    try:
        alone = _scores(model, tokenizer, kind, [short])[0]
        padded, whole = _scores(model, tokenizer, kind, [short, long])
    except Exception as error:
        raise UserError(
            f"{name!r} is a {model.config.model_type} model that fails on a plain batch of two texts ({type(error).__name__}: "
            f"{error}); check its config.json, or choose another model."
        ) from error
    count = len(short) if kind in ("causal", "masked") else len(alone)
    what = None
    if _differ(alone, padded[-count:] if kind == "causal" else padded[:count]):
        what = "depend on the padding of a batch"
    elif kind == "causal" and _differ(alone, whole[:count]):
        what = "depend on the tokens that come after"
    if what:
        raise UserError(
            f"{name!r} is a {model.config.model_type} model, whose scores as a {kind} model {what}; choose another model."
        )


def _scores(model: Any, tokenizer: Any, kind: str, rows: list[list[int]]) -> Tensor:
    """The scores (R, ...) of R rows, padded as `metazo.tasks.prepared` pads them."""
    side = "left" if kind == "causal" else "right"
    device = next(model.parameters()).device
    ids, mask = (
        pad_sequence([torch.tensor(row, device=device) for row in each], True, value, side)
        for each, value in ((rows, tokenizer.pad_token_id), ([[1] * len(row) for row in rows], 0))
    )
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if kind == "causal":
        inputs |= {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0), "use_cache": False}
    if kind == "seq2seq":  # not all of them name use_cache in their signature
        return model(**inputs, decoder_input_ids=ids[:, :1], use_cache=False).logits
    if isinstance(model, SentenceClassifier):
        return model.embed(**inputs)
    accepted = inspect.signature(model.forward).parameters
    return model(**{key: value for key, value in inputs.items() if key in accepted}).logits


def _differ(scores: Tensor, others: Tensor) -> bool:
    """Whether scores differ by far more than the rounding of float32."""
    return bool((scores - others).norm() > 0.003 * scores.norm())


def not_finite(model: nn.Module) -> list[str]:
    """A sentence about NaN or infinite weights, if there are any."""
    parts = list(held(model))
    wrong = [_holds_not_finite(values) for _, values, _ in parts]
    if divided(model):
        wrong = total(wrong)
    bad = [name for (name, *_), count in zip(parts, wrong, strict=True) if count]
    if not bad:
        return []
    return [f"{len(bad)} of {len(parts)} tensors of the model hold NaN or infinite weights, such as {bad[0]}"]


def _holds_not_finite(values: Tensor) -> bool:
    if not values.numel() or not values.is_floating_point() or is_traceable_wrapper_subclass(values):
        return False
    return not torch.stack(torch.aminmax(values)).isfinite().all()


def check_places(model: nn.Module, name: str) -> None:
    """Raises UserError for weights that a device map has put on the disk or offloaded."""
    away = [key for key, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if away:
        raise UserError(
            f"`device_map` offloads {len(away)} tensors of {name!r}, such as {away[0]}, and metazo needs all of them on "
            "devices; take a smaller model, `quantize`, or a larger device."
        )
