"""The models that metazo carries, by name, and the folders of others."""

from __future__ import annotations

from pathlib import Path

from metazo.errors import UserError
from metazo.io.files import expanded

_HERE = Path(__file__).parents[1]
PICO = _HERE / "pico" / "model"
EMBEDDED = {"pico": PICO, "micro": _HERE / "micro" / "model"}
"""Name and folder; every place that takes a model takes one of these names."""
ADAPTERS = "adapter_config.json"
"""The settings of peft's adapters: a folder that has them needs no config.json, because they name their base model."""


def check_folder(source: str, name: str) -> None:
    """Distinguish a path from a Hub id ("name" or "owner/name") before the network is asked for it."""
    folder = expanded(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model folder {name!r} has no config.json; name a folder written by save_pretrained")
    elif folder.is_file():
        raise UserError(f"model {name!r} is a file; name the folder that holds it and its config.json")
    elif folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise UserError(f"model folder {name!r} does not exist; check the path")
