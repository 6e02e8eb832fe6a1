"""What a run of a comparison is known by, and the machine that it ran on."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from hashlib import sha256
from typing import Any

from metazo.runs.config import FinetuneConfig
from metazo.runs.machine import cores, gpu, processor, system
from metazo.settings import with_role

# Where and how a run is done, not what it computes.
INCIDENTAL = with_role(FinetuneConfig, "place", "machine", "service", "evaluation")


def key(config: FinetuneConfig, hashes: dict[str, str | None]) -> str:
    """sha256 over the settings that differ from the defaults and the hashes of model, data and tuner.

    Settings at their default are left out, so that one that is added later does not make old results strange.
    """
    plain = {}
    for item in fields(config):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        value = getattr(config, item.name)
        if item.name not in INCIDENTAL and not item.metadata["hashed"] and value != default:
            plain[item.name] = value
    if plain.get("keep") == "none":
        plain["keep"] = "last"  # the same numbers
    text = json.dumps([plain, hashes], sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()


def facts() -> dict[str, Any]:
    """The machine that a run was done on."""
    return {"system": system(), "cpu": processor(), "cores": cores(), "gpu": gpu()}
