"""The models that metazo carries, by name."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parents[1]
PICO = _HERE / "pico" / "model"
EMBEDDED = {"pico": PICO, "micro": _HERE / "micro" / "model"}
"""Name and folder; every place that takes a model takes one of these names."""
