"""Whether the weights of a checkpoint are those of the model that its config.json describes: transformers draws at random what
is missing, and reports it where metazo silences the report."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from metazo.errors import UserError

_COMPUTED = re.compile(
    r"(^|\.)(rotary_emb\.\w+|inv_freq|masked_bias|attn\.bias|attention\.bias|causal_mask|position_ids|version|_float_tensor"
    r"|embed_positions\.weights)$"
)
"""Tensors that some versions of transformers and fairseq wrote, and that a model computes by itself."""
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def absent(model: Any, missing: Iterable[str]) -> list[str]:
    """The missing tensors of a transformers model, sorted, without buffers that it computes by itself."""
    weights = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    return sorted(key for key in missing if key in weights or not _COMPUTED.search(key))


def check_body(missing: Iterable[str], heads: Iterable[str], name: str, what: str = "weights") -> None:
    """Raises UserError for missing tensors outside the layers `heads` and the pooler, which may be new.

    A pooler is left out of models that were saved without a classifier's head, and of those whose hidden states are pooled.
    """
    heads = set(heads)
    body = sorted(key for key in missing if key.split(".")[0] not in heads and "pooler" not in key.split("."))
    if body:
        more = f" and {len(body) - 1} more" if len(body) > 1 else ""
        raise UserError(
            f"model {name!r} has no {what} for {body[0]!r}{more}, so that these would be random; name a complete checkpoint"
        )


def unused(model: Any, unexpected: Iterable[str], name: str) -> list[str]:
    """A note about tensors of the files that the body of a transformers model has no place for, if there are any.

    The head of another kind of model, a pooler, a model of images beside the text's, what a model computes by itself, and
    layers that predict further tokens belong to many checkpoints, and are not named.
    """
    config = model.config
    layers, further = (getattr(config, key, None) for key in ("num_hidden_layers", "num_nextn_predict_layers"))
    ends = range(layers, layers + further) if isinstance(layers, int) and isinstance(further, int) else range(0)
    parts = {key.split(".")[0] for key, _ in model.base_model.named_parameters()}

    def counts(key: str) -> bool:
        layer = _LAYER.search(key)
        return (
            key.removeprefix(f"{model.base_model_prefix}.").split(".")[0] in parts
            and not _COMPUTED.search(key)
            and not (layer and int(layer[1]) in ends)
            and (key.endswith(".weight") or not getattr(config, "quantization_config", None))  # scales and zeros
        )

    found = sorted(filter(counts, unexpected))
    if not found:
        return []
    several = f"{len(found)} tensors in the files of {name}, such as {found[0]}, are"
    return [
        f"{several if len(found) > 1 else f'A tensor in the files of {name}, {found[0]}, is'} not used, because the model that "
        "its config.json describes has no place for them; check the number of layers and the other settings there"
    ]
