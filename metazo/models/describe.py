"""What a saved model says about its training, and how it generates."""

from __future__ import annotations

from typing import Any

from metazo.errors import UserError
from metazo.io.extras import needs
from metazo.io.plain import is_name, is_plain

with needs("llm"):
    from transformers import GenerationConfig


def describe(model: Any, record: dict[str, Any]) -> None:
    """Write into the model's config what it was trained on (`Prepared.record`), so that a saved model says it: the names
    of a classifier's classes (``id2label``), the end-of-text token (generation config), and the split (``metazo``).

    Raises UserError for a record that no run wrote.
    """
    labels, eos = record.get("labels"), record.get("eos")
    if not is_plain(record) or not (labels is None or (isinstance(labels, list) and all(map(is_name, labels)))):
        raise UserError("what the model was trained on is not a record that metazo wrote")
    config = model.config
    if labels is not None and len(labels) == config.num_labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    inner = getattr(model, "get_base_model", lambda: model)()
    if type(eos) is int and getattr(inner, "generation_config", None) is not None:
        there = inner.generation_config.eos_token_id
        ends = there if isinstance(there, list) else [] if there is None else [there]
        inner.generation_config.eos_token_id = ends if eos in ends else [*ends, eos]
        if len(inner.generation_config.eos_token_id) == 1:
            inner.generation_config.eos_token_id = inner.generation_config.eos_token_id[0]
    config.metazo = {key: value for key, value in record.items() if key not in ("labels", "eos")}


def plain_generation(model: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Greedy search that ends at the tokenizer's or the model's end of text, and nothing else of what the checkpoint's own
    generation config asks for (a repetition penalty, suppressed tokens, a temperature).
    """
    there = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = there if isinstance(there, list) else [there]
    ends = [end for end in dict.fromkeys([tokenizer.eos_token_id, *ends]) if end is not None]
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends or None,
        bos_token_id=tokenizer.bos_token_id,
    )
