"""What a run of a comparison is known by, and the machine that it ran on."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import MISSING, fields
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from metazo.runs.config import FinetuneConfig

# Where and how a run is done, not what it computes.
INCIDENTAL = ("out", "resume", "device", "data", "zoo", "snapshot_every", "eval_batch_size")
HASHED = ("model", "task", "tuner")  # known by their hashes, wherever they lie


def key(config: FinetuneConfig, hashes: dict[str, str | None]) -> str:
    """sha256 over the settings that differ from the defaults and the hashes of model, data and tuner.

    Settings at their default are left out, so that one that is added later does not make old results strange.
    """
    plain = {}
    for item in fields(config):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        value = getattr(config, item.name)
        if item.name not in (*INCIDENTAL, *HASHED) and value != default:
            plain[item.name] = value
    if plain.get("keep") == "none":
        plain["keep"] = "last"  # the same numbers
    text = json.dumps([plain, hashes], sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def machine() -> dict[str, Any]:
    """No names, paths or addresses."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
