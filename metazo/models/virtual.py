"""Virtual tokens of prefix and prompt adapters before a model's input, with positions that follow the attention mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def virtual_tokens(model: nn.Module) -> int:
    """The number of virtual tokens that a model's adapter puts before its input; 0 for any other model."""
    config: Any = getattr(model, "active_peft_config", None)
    return config.num_virtual_tokens if getattr(config, "is_prompt_learning", False) else 0


def with_virtual_tokens(model: Any, inputs: dict[str, Any]) -> Any:
    """The output of the base model on inputs (B, L) after the virtual tokens of its adapter.

    inputs: input_ids, attention_mask and position_ids, (B, L) each, and further arguments. Differs from calling the model:
    the positions of a row's tokens are counted from the end of the virtual tokens, whatever the row's padding.
    """
    rest, config = dict(inputs), model.active_peft_config
    ids, mask = rest.pop("input_ids"), rest.pop("attention_mask")
    count, (rows, length) = config.num_virtual_tokens, ids.shape
    mask = torch.cat([mask.new_ones(rows, count), mask], dim=1)
    positions = rest.get("position_ids")
    if config.peft_type == "PREFIX_TUNING":
        if positions is not None:
            rest["position_ids"] = positions + count
        past = model.get_prompt(rows, max_cache_len=length + count)
        return model.base_model(input_ids=ids, attention_mask=mask, past_key_values=past, **rest)
    if positions is not None:
        before = torch.arange(count, device=ids.device).expand(rows, count)
        rest["position_ids"] = torch.cat([before, positions + count], dim=1)
    embedded = model.word_embeddings(ids)
    embedded = torch.cat([model.get_prompt(batch_size=rows).to(embedded.dtype), embedded], dim=1)
    return model.base_model(inputs_embeds=embedded, attention_mask=mask, **rest)
