"""Virtual tokens of prefix and prompt adapters before a model's input, with positions that follow the attention mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metazo.feedback.column import cache_argument


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
        return model.base_model(input_ids=ids, attention_mask=mask, **{_cache(model): past}, **rest)
    if positions is not None:
        before = torch.arange(count, device=ids.device).expand(rows, count)
        rest["position_ids"] = torch.cat([before, positions + count], dim=1)
    return model.base_model(inputs_embeds=_embedded(model, ids), attention_mask=mask, **rest)


def generate_after_virtual_tokens(model: Any, ids: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    """Tokens (B, V + L + N): a placeholder for each of the V virtual tokens, ids (B, L), and the base model's continuation.

    settings: further arguments of the base model's `generate`. Its own code continues from the virtual tokens, because peft's
    looks for the cache under the name of transformers before 5.24 only and would put the virtual tokens before every step.
    """
    rows, count = len(ids), virtual_tokens(model)
    places = torch.cat([ids.new_zeros(rows, count), ids], dim=1)
    mask = torch.cat([mask.new_ones(rows, count), mask], dim=1)
    if model.active_peft_config.peft_type == "PREFIX_TUNING":
        settings[_cache(model)] = model.get_prompt(rows, max_cache_len=-1)  # without a limit, as in peft's own
        return model.base_model.generate(input_ids=places, attention_mask=mask, **settings)

    def embed(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = kwargs["input_ids"]
        if given.shape[1] > 1:  # a step that continues a cache has one token
            kwargs = kwargs | {"input_ids": None, "inputs_embeds": _embedded(model, given[:, count:])}
        return args, kwargs

    # `generate` takes embeddings of some architectures only
    with model.base_model.register_forward_pre_hook(embed, with_kwargs=True):
        return model.base_model.generate(input_ids=places, attention_mask=mask, **settings)


def _cache(model: Any) -> str:
    return cache_argument(model.base_model) or "past_key_values"  # peft's name for it


def _embedded(model: Any, ids: Tensor) -> Tensor:
    """The embeddings (B, V + L, d) of the virtual tokens and of ids (B, L)."""
    embedded = model.word_embeddings(ids)
    return torch.cat([model.get_prompt(batch_size=len(ids)).to(embedded.dtype), embedded], dim=1)
