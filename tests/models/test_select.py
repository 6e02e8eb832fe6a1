"""Tensors are chosen by name; a name that is tied to another says so."""

from __future__ import annotations

import pytest
from torch import nn

from metazo.errors import UserError
from metazo.models.select import select_trainable


def tied() -> nn.Module:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(4, 3), "inner": nn.Linear(3, 3), "lm_head": nn.Linear(3, 4, bias=False)}
    )
    model["lm_head"].weight = model["embed"].weight
    return model


@pytest.mark.parametrize("patterns", [(["lm_head*"], []), ([], ["lm_head*"])])
def test_a_tied_name_is_said(patterns: tuple[list[str], list[str]]) -> None:
    with pytest.raises(UserError, match=r"'lm_head\*' names lm_head.weight, which is tied to embed.weight"):
        select_trainable(tied(), *patterns)
    assert select_trainable(tied(), [], ["embed*"]) == 12
