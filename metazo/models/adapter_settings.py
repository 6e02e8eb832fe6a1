"""Checks of an adapter_config.json that anybody may have written, before peft reads it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from metazo.errors import UserError
from metazo.io.bounded import bounded
from metazo.io.plain import read_json, shown
from metazo.models.checks import MAX_LAYERS, MAX_WIDTH
from metazo.models.embedded import ADAPTERS


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_WIDTH


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _patterns(value: Any) -> bool:
    return isinstance(value, str) or _texts(value)


def _of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _layers(value: Any) -> bool:
    pairs = isinstance(value, list) and all(
        isinstance(each, list) and len(each) == 2 and all(map(_whole, each)) for each in value
    )
    return pairs and sum(max(end - start, 0) for start, end in value) <= MAX_LAYERS


_SIZES = ("r", "num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim", "encoder_hidden_size")
_PATTERNS = "a regular expression or a list of names"
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern"), (_patterns, _PATTERNS)
    ),
    **dict.fromkeys(("modules_to_save", "target_parameters"), (_texts, "a list of names")),
    **dict.fromkeys(_SIZES, (_whole, f"a whole number of at most {MAX_WIDTH:,}")),
    "rank_pattern": (_of(_whole), f"ranks of at most {MAX_WIDTH:,} by the names of layers"),
    "alpha_pattern": (_of(_number), "numbers by the names of layers"),
    **dict.fromkeys(("lora_alpha", "lora_dropout"), (_number, "a number")),
    "init_lora_weights": (lambda value: isinstance(value, bool | str), "true, false or a name"),
    "layer_replication": (_layers, f"pairs of layers [start, end] of at most {MAX_LAYERS:,} layers"),
    "megatron_config": (lambda value: False, "null, because metazo has no layers of Megatron"),
}
"""What a field must be if it is not null."""
_PLAIN = re.compile(r"[\w.|^$:-]*")
"""A pattern without groups and repetitions, which is right and takes no time."""


def check_adapter_settings(folder: Path, layers: Iterable[str]) -> None:
    """Raises UserError for a field of a wrong type or size, and for a regular expression that is none, or that takes endless
    time on the names of the layers."""
    settings = read_json(folder / ADAPTERS, "settings of adapters")
    for name, (fits, what) in _FIELDS.items():
        value = settings.get(name)
        if value is not None and not fits(value):
            raise UserError(f"{folder / ADAPTERS} has {name} {shown(value)}, and it must be {what}.")
    patterns = [(name, text) for name in _FIELDS for text in _expressions(name, settings) if not _PLAIN.fullmatch(text)]
    names = [*layers]

    def match(text: str) -> None:
        for name in names:  # the ways in which peft uses them
            re.fullmatch(text, name)
            re.match(rf"(.*\.)?({text})$", name)
            re.match(rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.", name)

    for _ in bounded(match, [(f"{folder / ADAPTERS}: {name} {shown(text)}", text) for name, text in patterns]):
        pass


def _expressions(name: str, settings: Mapping[str, Any]) -> list[str]:
    """The regular expressions of a field; lists of targets are names."""
    value = settings.get(name)
    if isinstance(value, str) and name != "init_lora_weights":
        return [value]
    return [*value] if value and name in ("layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern") else []
