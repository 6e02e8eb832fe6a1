"""What the header of a log says of an optimizer that was given in memory, whose hyperparameters no setting of the run names."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from hashlib import sha256
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from metazo.blocks import uncompiled
from metazo.io.tensorfile import weights_hash
from metazo.optimizers.registry import Method
from metazo.optimizers.saving import NEUTRAL
from metazo.step.precision import policy

PARTS = ("noise", "rule", "scale", "estimator")
NO_NUMBERS = ("backend", "blocks", "counts", "tensors")
"""Attributes of parts on which no number depends, or that the optimizer sets when it takes up its tensors."""
RATES = "learning rates"
LONGEST = 200  # characters of a value that is not replaced by its hash


def optimizer_record(optimizer: Method) -> dict[str, Any]:
    """The hyperparameters of an optimizer before its first step, its parts' included, by name: numbers and words, and hashes of
    tensors and of long values. Attributes that are anything else, or private, are left out.
    """
    cls = type(optimizer)
    names = {name for each in cls.__mro__ for name in inspect.signature(each.__init__).parameters}
    own = {name: getattr(optimizer, name, None) for name in sorted(names - {*optimizer.common} - NEUTRAL)}
    groups: Any = optimizer.param_groups  # type: ignore[attr-defined]
    eps, probing = getattr(optimizer, "eps", None), getattr(optimizer, "probing", None)
    chosen, dtypes = getattr(optimizer, "precision", None), {each.dtype for group in groups for each in group["params"]}
    stored = sorted({policy(chosen, dtype) for dtype in dtypes}) if chosen else None
    found: dict[str, Any] = {"method": optimizer.name}
    found["names of the trained tensors"] = [
        [
            uncompiled(name)
            for name, tensor in zip(group.get("param_names", ()), group["params"])
            if tensor.requires_grad
        ]
        for group in groups
    ]
    found |= {"eps": eps, "precision": stored}
    found["probing"] = None if probing == "auto" else probing  # which is settled later
    found |= {name: value for name, value in own.items() if name not in PARTS}
    for part in PARTS:
        value = getattr(optimizer, part, None)
        found[part] = getattr(value, "name", None) or (type(value).__qualname__ if value is not None else "none")
        held = {name: held for name, held in getattr(value, "__dict__", {}).items() if name not in NO_NUMBERS}
        found |= {f"{part}'s {name}": held[name] for name in held if not name.startswith("_") and name != "name"}
    found["seed"] = found.pop("noise's run_seed", None)
    found[RATES] = [float(group["lr"]) for group in groups]
    found["weight decay"] = [float(group["weight_decay"]) for group in groups]
    found["weight decay of a group's own"] = [bool(group.get("own_decay")) for group in groups]
    return {name: plain for name, value in found.items() if (plain := _plain(value)) is not None}


def _plain(value: Any) -> bool | int | float | str | None:
    """A value as JSON holds it; None if it cannot be compared later."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    if isinstance(value, Tensor):
        return f"sha256:{weights_hash([('', value)])}"
    if isinstance(value, list | tuple | Mapping):
        items = [*value.items()] if isinstance(value, Mapping) else value
        parts = [_plain(item) for item in items]
        value = None if None in parts else ", ".join(map(str, parts))
    if not isinstance(value, str | Real):
        return None
    text = str(value)
    return text if len(text) <= LONGEST else f"sha256:{sha256(text.encode()).hexdigest()}"
