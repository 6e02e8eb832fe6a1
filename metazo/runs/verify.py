"""The checks of a replay: that a log can be replayed, and that its steps and weights are those of the run."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from metazo.blocks import chunks
from metazo.errors import UserError
from metazo.io.files import is_file
from metazo.models.load import LoadedModel
from metazo.optimizers import METHODS
from metazo.runs.header import environment
from metazo.runs.locate import SUMMARY
from metazo.runs.machine import instructions
from metazo.runs.tuned import MEMORY
from metazo.steplog.format import Scan
from metazo.steplog.format import differences as log_differences

_NEEDED = {"weights": str, "method": str, "settings": dict}
_NEWER = instructions().keys()  # logs of earlier versions do not record them


def replayable_header(found: Scan, optimizer: Any) -> dict[str, Any]:
    """The header. Raises UserError if an entry that a replay needs is missing, or if the run cannot be replayed."""
    header = found.header
    for key, kind in _NEEDED.items():
        if not isinstance(header.get(key), kind):
            raise UserError(f"{found.path} cannot be replayed: its header has no {key!r}.")
    if header["method"].startswith(MEMORY) and optimizer is None:
        raise UserError(
            f"{found.path} is of a run whose optimizer was an object in memory ({header['method']}): give a new one over the "
            "base model's tensors as `optimizer`."
        )
    method = optimizer or METHODS.get(header["method"])
    if method is None or not method.replayable:
        known = ", ".join(name for name, cls in METHODS.items() if cls.replayable)
        raise UserError(
            f"{found.path} cannot be replayed: its method is {header['method']!r}, and the methods whose steps follow from "
            f"their record are {known}."
        )
    if header["settings"].get("head") == "prototype":
        raise UserError(
            f"{found.path} cannot be replayed: its classification head was made from the training data (`head='prototype'`), "
            "which is not in the log."
        )
    return header


def end_of(found: Scan, to: int | None) -> list[str]:
    """What the end of a log lacks, in sentences. Raises UserError if the run beside it is complete, so that the step whose
    weights it kept was in the line that is missing, and `to` names no other.
    """
    notes = [f"{found.torn} bytes of a torn line at its end were left out."] if found.torn else []
    if found.end is not None:
        return notes
    if to is None and is_file(found.path.parent / SUMMARY):
        raise UserError(
            f"{found.path} has lost its end, which names the step whose weights the run kept: resume the run, "
            "which computes what is lost again, or give `to`."
        )
    what = "The log has no last line, because its run is not finished or its end was cut off"
    return [*notes, what + (f": these are the weights of its last step, {len(found.steps)}." if to is None else ".")]


def environment_changes(header: dict[str, Any], found: Scan, loaded: LoadedModel) -> list[str]:
    """Differences from the recorded environment, which may change the last bits; empty only if all of it is equal, as far
    as the log's version recorded it.
    """
    then = header.get("environment")
    now = environment(next(loaded.model.parameters()).device)
    if not isinstance(then, dict):
        return ["the log does not record its environment"]
    words = [
        f"{name} {old} then and {new} now"
        for name, old, new in log_differences(then, now)
        if name in then or name not in _NEWER
    ]
    if found.end is not None and found.end.get("mixed"):
        words.append("the run was resumed in another environment")
    return words


def distance(model: nn.Module, log: Path) -> float | None:
    """The relative Euclidean distance of the weights from those in the run's folder, if these exist and fit."""
    saved = log.parent / "model" / "model.safetensors"
    if not is_file(saved):
        return None
    apart = size = 0.0
    with suppress(SafetensorError, OSError, RuntimeError), safe_open(saved, "pt") as file:
        names = set(file.keys())
        for name, parameter in model.named_parameters():
            if name in names:
                kept, again = file.get_tensor(name), parameter.detach().cpu()
                if kept.shape != again.shape:
                    return None
                for start, stop in chunks(kept):
                    part = kept.view(-1)[start:stop].double()
                    apart += float((again.reshape(-1)[start:stop].double() - part).square().sum())
                    size += float(part.square().sum())
    return math.sqrt(apart / size) if size else None
