"""Recognises the layout of a base model from the names of its tensors, and checks that no layer lacks a tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable

from metazo.errors import UserError

_LLAMA = {f"self_attn.{part}_proj.weight" for part in "qkvo"} | {
    f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")
}
_LLAMA |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
_OPT_MODULES = [*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "self_attn_layer_norm", "fc1", "fc2",
                "final_layer_norm"]  # fmt: skip
FAMILIES: dict[str, set[str]] = {
    "Llama": _LLAMA,
    "Qwen2": _LLAMA | {f"self_attn.{part}_proj.bias" for part in "qkv"},
    "Qwen3": _LLAMA | {f"self_attn.{part}_norm.weight" for part in "qk"},
    "OPT": {f"{module}.{kind}" for module in _OPT_MODULES for kind in ("weight", "bias")},
}
"""Tensors of one layer, by family. Mistral and other models of Llama's form count as Llama."""
_LAYER = re.compile(r"(.*?)\blayers\.(\d{1,6})\.(.+)")
_WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DataParallel and torch.compile add to every name."""


def unwrapped(names: Iterable[str]) -> list[str]:
    """The names without the prefix of a wrapper, if all have it."""
    found = list(names)
    while found:
        prefix = next((p for p in _WRAPPERS if all(name.startswith(p) and len(name) > len(p) for name in found)), None)
        if prefix is None:
            break
        found = [name.removeprefix(prefix) for name in found]
    return found


def layout(names: Iterable[str]) -> str:
    """The layout in words: "Llama, 16 layers of 9 tensors and 2 others", or "unknown" with the reason.

    Raises UserError for a known family if one of its layers lacks a tensor: such a file is incomplete.
    """
    layers: dict[int, set[str]] = {}
    others = 0
    for name in names:
        match = _LAYER.fullmatch(name)
        if match is None:
            others += 1
        else:
            layers.setdefault(int(match[2]), set()).add(match[3])
    if not layers:
        return "unknown: no tensor is named as one of a layer"
    seen = set().union(*layers.values())
    family = next((name for name, tensors in FAMILIES.items() if tensors == seen), None)
    if family is None:
        odd = sorted(seen - set().union(*FAMILIES.values()))
        why = f"{odd[0]!r} is in no family that metazo knows" if odd else "its layers hold another set of tensors"
        return f"unknown: {why} ({', '.join(FAMILIES)})"
    if sorted(layers) != list(range(len(layers))):
        missing = next(number for number in range(len(layers)) if number not in layers)
        raise UserError(f"the layers of this {family} tuner are not all there: layer {missing} is missing")
    for number, tensors in sorted(layers.items()):
        if tensors != seen:
            raise UserError(f"layer {number} of this {family} tuner lacks {sorted(seen - tensors)[0]}")
    return f"{family}, {len(layers)} layers of {len(seen)} tensors and {others} others"
