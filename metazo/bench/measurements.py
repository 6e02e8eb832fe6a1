"""speed.json: the machine and versions, and by suite and part the rows that were measured. No names, no paths."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from metazo.errors import UserError
from metazo.io.files import write_whole
from metazo.runs.machine import processor, system, versions

FORMAT = 1
NAME = "speed.json"


def environment(device: str, dtype: str, quick: bool) -> dict[str, Any]:
    """What the figures depend on, and what two runs must share to lie in one file."""
    found: dict[str, Any] = {
        "quick": quick,
        "device": device,
        "dtype": dtype,
        "cpu": processor(),
        "cores": os.cpu_count(),
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    found |= {"system": system(), "python": platform.python_version()}
    packages = versions(("torch", "transformers", "numba", "numpy", "metazo"))
    return found | {package: number or "not installed" for package, number in packages.items()}


def load_average() -> float | None:
    """Over one minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def opened(path: Path, environment: dict[str, Any]) -> dict[str, Any]:
    """What the file holds, to be added to, or an empty result. Raises UserError where the figures do not go together."""
    if not path.exists():
        return {"format": FORMAT, "environment": environment, "suites": {}}
    result = read(path)
    theirs = result["environment"]
    for key in environment:
        if theirs.get(key) != environment[key]:
            raise UserError(
                f"{path} holds figures with {key} {theirs.get(key)!r}, these would be with {environment[key]!r}: "
                "choose another `out`."
            )
    return result


def read(path: Path) -> dict[str, Any]:
    """Raises UserError where it is not a file of this kind."""
    try:
        result = json.loads(path.read_text())
        if (
            result["format"] == FORMAT
            and isinstance(result["suites"], dict)
            and isinstance(result["environment"], dict)
        ):
            return result
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as figures of metazo bench: {error}.") from error
    raise UserError(f"{path} is not of format {FORMAT} of metazo bench; choose another `out`.")


def write(path: Path, result: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
