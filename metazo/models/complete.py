"""Whether the weights of a checkpoint are those of the model that its config.json describes: transformers draws at random what
is missing, and reports it where metazo silences the report."""

from __future__ import annotations

from collections.abc import Iterable

from metazo.errors import UserError


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
