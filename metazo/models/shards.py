"""The files of a checkpoint's weights: which they are, and what is wrong with them although transformers loads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import safe_open

from metazo.errors import UserError
from metazo.io.files import read_capped
from metazo.io.plain import parse_json, shown
from metazo.models.sentence import find

WEIGHTS, INDEX, OLD_INDEX = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json"
MAX_INDEX_BYTES = 2**26  # those of the largest models with many experts have about 2^24
_WHOLE = {"BOOL", *(f"{sign}{bits}" for sign in "IU" for bits in (8, 16, 32, 64))}
"""Numbers without a fraction, as safetensors names them."""


def weight_files(source: str, name: str, config: Any, revision: str) -> list[Path]:
    """The files of safetensors that transformers loads; none for a checkpoint that has others.

    Raises UserError for the name of a file that leads out of the model's folder, and ValueError for an index that is no JSON.
    """
    named = getattr(config, "transformers_weights", None)
    for file in [named] if named else [WEIGHTS, INDEX, OLD_INDEX]:
        _check_name(file, "config.json", name)
        path = find(source, file, revision)
        if path is None:
            continue
        if not file.endswith(".json"):
            return [path] if file.endswith(".safetensors") else []
        index = parse_json(read_capped(path, MAX_INDEX_BYTES, "index of weights"))
        parts = index.get("weight_map") if isinstance(index, dict) else None
        names = list(parts.values()) if isinstance(parts, dict) else []  # transformers reports another form
        for part in names:
            _check_name(part, file, name)
        return [path.parent / part for part in sorted(set(names)) if part.endswith(".safetensors")]
    return []


def _check_name(file: Any, where: str, name: str) -> None:
    path = (
        PureWindowsPath(file) if isinstance(file, str) else None
    )  # it knows the separators and drives of every system
    if path is None or path.anchor or ".." in path.parts:
        raise UserError(
            f"{where} of {name!r} names {shown(file)} as a file of weights, which is not in the model's folder; get the model "
            "from its source again"
        )


def check_stored(files: list[Path], model: Any, name: str) -> None:
    """Raises UserError for whole numbers in the place of weights, unless the checkpoint is quantised, and for a tensor of which
    two files have different values. model: of transformers, loaded from these files."""
    prefix = f"{model.base_model_prefix}."
    weights = set()
    if not getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False):
        every = model.named_parameters(remove_duplicate=False)
        weights = {key for key, value in every if value.is_floating_point() or hasattr(value, "quant_state")}
    found: dict[str, Path] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for key, kind in whole_numbers(file):
                if {key, prefix + key, key.removeprefix(prefix)} & weights:
                    raise UserError(
                        f"{path.name} of {name!r} holds {key} as {kind}, and weights have a fraction; get the model from its "
                        "source again, or save it in a floating-point dtype"
                    )
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                if key in found and not _same(found[key], path, key):
                    raise UserError(
                        f"{found[key].name} and {path.name} of {name!r} both hold {key}, with different values; get the model "
                        "from its source again"
                    )
                found[key] = path


def whole_numbers(file: Any) -> Iterator[tuple[str, str]]:
    """Name and type of the tensors of an open file that have no fraction."""
    for key in file.keys():  # noqa: SIM118 (it is no mapping)
        if (kind := file.get_slice(key).get_dtype()) in _WHOLE:
            yield key, kind


def _same(first: Path, second: Path, key: str) -> bool:
    with safe_open(first, "pt") as one, safe_open(second, "pt") as other:
        return torch.equal(one.get_tensor(key), other.get_tensor(key))
