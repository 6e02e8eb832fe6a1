"""The methods, one file each. The registry (registry.py) finds them, and the contract suite in tests/ tests them all.

`metazo.optimizers.MeZO` and all other classes are imported when they are first asked for. METHODS holds every class by
name, OPTIMIZERS those that evaluate the loss along directions (all but the first-order baselines).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_ELSEWHERE = {
    "ZOOptimizer": "metazo.optimizers.base",
    "Step": "metazo.step.record",
    "Update": "metazo.step.record",
    "register": "metazo.optimizers.registry",
    "first_outlier_layer": "metazo.optimizers.dominant_layer",
    "tuner_scale": "metazo.tuner.scale",
}


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        return getattr(import_module(_ELSEWHERE[name]), name)
    if not name[:1].isupper():  # a module of this folder, which Python imports next, or a name that does not exist
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    registry = import_module("metazo.optimizers.registry")
    registry.load()
    if name in ("METHODS", "OPTIMIZERS"):
        return getattr(registry, name)
    for cls in registry.METHODS.values():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    registry = import_module("metazo.optimizers.registry")
    registry.load()
    classes = [cls.__name__ for cls in registry.METHODS.values()]
    return sorted([*globals(), *_ELSEWHERE, *classes, "METHODS", "OPTIMIZERS"])
