"""The key that identifies a run of a comparison, and the facts of the machine on which it ran."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from hashlib import sha256
from typing import Any

from metazo.runs.config import FinetuneConfig
from metazo.runs.machine import cores, gpu, processor, system
from metazo.settings import with_role

# Settings that do not change the numbers of a run.
INCIDENTAL = with_role(FinetuneConfig, "place", "machine", "service", "evaluation")


def key(config: FinetuneConfig, hashes: dict[str, str | None]) -> str:
    """sha256 over the settings that differ from the defaults and the hashes of model, data, tuner and the user's own files.

    Settings at their default are left out, so that old results keep their key if a setting is added later.
    """
    plain = {}
    for item in fields(config):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        value = getattr(config, item.name)
        if item.name not in INCIDENTAL and not item.metadata["hashed"] and value != default:
            plain[item.name] = value
    if plain.get("keep") == "none":
        plain["keep"] = "last"  # these settings give the same numbers
    text = json.dumps([plain, hashes], sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()


def facts() -> dict[str, Any]:
    """Facts of the machine on which a run is done."""
    return {"system": system(), "cpu": processor(), "cores": cores(), "gpu": gpu()}
