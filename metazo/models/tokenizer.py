"""The tokenizer of a checkpoint that anybody may have written, and what it and its model must agree on."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.io.files import expanded, read_capped
from metazo.io.plain import parse_json
from metazo.models.checks import MAX_TOKENS
from metazo.models.sentence import SentenceClassifier

with needs("llm"):
    from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENIZER_BYTES = 2**28
MAX_GROWTH = 64
_EVERY = "a Z 0 é 語 \U0001f642 \x00 \n"
"""Characters that a tokenizer may not know: one that cannot take them says so when it is loaded."""


def read_tokenizer(source: str, name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id. Raises UserError for one that has no vocabulary or could exhaust the memory."""
    _check_size(expanded(source), name)
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes such a one if there are no files
        raise UserError(f"{name!r} has no tokenizer; write it there with tokenizer.save_pretrained")
    if tokenizer(_EVERY, verbose=False)["input_ids"] is None:
        raise UserError(f"the tokenizer of {name!r} makes no tokens")
    return tokenizer


def _check_size(folder: Path, name: str) -> None:
    """Refuse a token id far beyond any vocabulary, which makes the tokenizer take memory until the process is killed."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    content = parse_json(read_capped(path, MAX_TOKENIZER_BYTES, "tokenizer"))
    model = content.get("model") if isinstance(content, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    added = content.get("added_tokens") if isinstance(content, dict) else None
    ids += [token.get("id") for token in added or () if isinstance(token, dict)]
    largest = max((value for value in ids if isinstance(value, int)), default=0)
    if largest > MAX_TOKENS:
        raise UserError(
            f"the tokenizer of {name!r} has the token id {largest:,}; metazo takes at most {MAX_TOKENS:,} tokens"
        )
    longer = _growth(content)
    if longer > MAX_GROWTH:
        raise UserError(
            f"the tokenizer of {name!r} may make a text {longer:,} times as long, and metazo allows {MAX_GROWTH}; check the "
            "normalizer and the post_processor in its tokenizer.json"
        )


def _growth(part: Any) -> int:
    """How many times as long the steps of a tokenizer may make a text: by what they put in place of a character, before
    every text, or as copies of it. The product over all of them; a step of a known tokenizer makes 1 to 3."""
    if isinstance(part, list):
        return prod(min(_growth(each), MAX_GROWTH + 1) for each in part[: MAX_GROWTH + 1])
    if not isinstance(part, dict):
        return 1
    own = max(len(text) if isinstance(text := part.get(key), str) else 1 for key in ("content", "prepend"))
    if part.get("type") == "TemplateProcessing":
        own = max(len(part[key]) // 8 if isinstance(part.get(key), list) else 1 for key in ("single", "pair"))
    steps = [part.get(key) for key in ("normalizer", "post_processor", "normalizers", "processors")]
    return min(max(1, own) * _growth([step for step in steps if isinstance(step, dict | list)]), 10**9)


def set_pad(tokenizer: Any, model: PreTrainedModel | SentenceClassifier) -> None:
    """Set the padding token. Padding is masked out, so any token serves: the tokenizer's own, end of text, unknown, or 0.
    Raises UserError for a model without an embedding of tokens (Canine).

    The config follows the tokenizer: classifiers find the last token of a row by the config's padding token. Theirs is a
    special token in which no text ends; raises UserError if the tokenizer has none.
    """
    encoder = model.encoder if isinstance(model, SentenceClassifier) else model
    try:
        embeddings: Any = encoder.get_input_embeddings()
    except NotImplementedError as error:
        raise UserError(
            f"Models of type {model.config.model_type} have no embedding of tokens, which metazo needs: choose another model."
        ) from error
    rows = embeddings.weight.shape[0]
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:  # a token that was added without an embedding
        tokens = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.convert_ids_to_tokens(0))
        if type(model).__name__.endswith("ForSequenceClassification") and not model.config.is_encoder_decoder:
            tokens = _never_last(tokenizer)
        found = [t for t in tokens if t and tokenizer.convert_tokens_to_ids(t) < rows]
        if not found:
            raise UserError(
                f"{type(model).__name__} finds the end of a text by the padding token, and the tokenizer has neither that nor "
                "another special token in which no text ends: set tokenizer.pad_token, and save it with the model"
            )
        tokenizer.pad_token = found[0]
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id


def marks(tokenizer: Any, name: str = "text") -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text; ``name`` is text, or text_target for a decoder's."""
    plain, whole = (
        list(tokenizer(**{name: "a"}, add_special_tokens=own, verbose=False)["input_ids"]) for own in (False, True)
    )
    places = [at for at in range(len(whole)) if whole[at : at + len(plain)] == plain]
    return (whole[: places[0]], whole[places[0] + len(plain) :]) if places and plain else ([], [])


def _never_last(tokenizer: Any) -> list[str]:
    """Special tokens in which no text ends, the end of text first, as for other models; a text may end in an unknown word
    if the tokenizer puts no token after it."""
    last = tokenizer.convert_ids_to_tokens(marks(tokenizer)[1][-1:])
    first, unknown = tokenizer.eos_token, tokenizer.unk_token
    own = sorted(tokenizer.all_special_tokens, key=lambda token: token != first)
    return [token for token in own if token not in last and (last or token == first or token != unknown)]


_ROBERTAS = (
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "xmod",
    "ibert",
    "data2vec-text",
)
_AFTER_PADDING = frozenset((*_ROBERTAS, "longformer", "esm", "luke", "markuplm"))
"""Models whose positions start after the padding index."""


def context_length(model: PreTrainedModel | SentenceClassifier, tokenizer: PreTrainedTokenizerBase) -> int:
    config = model.config.get_text_config()
    limits = [tokenizer.model_max_length]
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        limits.append(getattr(config, name, None) or limits[0])
    if config.model_type in _AFTER_PADDING:
        limits[1] -= (getattr(config, "pad_token_id", 0) or 0) + 1
    elif config.model_type == "mpnet":
        limits[1] -= 2  # whose padding index is 1, whatever the config says
    return int(min(limits))


def end_token(tokenizer: Any, name: str) -> str:
    """The end token, which the classifier of an encoder-decoder scores. Raises UserError if the tokenizer adds none."""
    if tokenizer.eos_token is None or tokenizer.eos_token_id not in tokenizer("a").input_ids:
        raise UserError(
            f"as a classifier {name} scores the end token of a text, and its tokenizer adds none: use a tokenizer that does, "
            "or leave `kind` out"
        )
    return tokenizer.eos_token
