"""Inspects step logs: a summary, the differences of two logs, and repair."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

from metazo.io.files import write_whole
from metazo.io.lines import LineFile
from metazo.io.lock import FolderLock
from metazo.steplog.format import Scan, differences, encode, scan

_BARS = "▁▂▃▄▅▆▇█"


def summary(found: Scan) -> dict[str, Any]:
    """The figures of a log, as JSON values. Losses, or values of the run's objective, are means over a step's probes."""
    what = minimised(found)
    losses = [loss for _, loss in curve(found)]
    rates = [step.lr[0] for step in found.steps if step.lr]
    tenth = max(1, len(losses) // 10)
    return {
        "state": "damaged" if found.damage else "torn" if found.torn else "complete" if found.end else "whole",
        "steps": len(found.steps),
        "skipped": sum(not step.coefficients for step in found.steps),
        "kept step": found.end["kept"] if found.end else None,
        f"{what}, first tenth": mean(losses[:tenth]) if losses else None,
        f"{what}, last tenth": mean(losses[-tenth:]) if losses else None,
        f"{what}, lowest and highest": [min(losses), max(losses)] if losses else None,
        "learning rate, first and last": [rates[0], rates[-1]] if rates else None,
        "bytes": found.size,
        "bytes a step": round((found.size - _header_bytes(found)) / len(found.steps), 1) if found.steps else None,
    }


def minimised(found: Scan) -> str:
    """What the losses of the steps are: "loss", or "objective"."""
    return "objective" if (found.header.get("settings") or {}).get("objective") else "loss"


def mean(values: Sequence[float]) -> float:
    """The mean of floats of any size. It is nan or infinite if they are, and their sum may overflow without an error."""
    try:
        return fmean(values)
    except (OverflowError, ValueError):  # fsum refuses inf - inf, and sums beyond the largest float
        return sum(value / len(values) for value in values)


def _header_bytes(found: Scan) -> int:
    with found.path.open("rb") as file:
        return len(file.readline())


def curve(found: Scan) -> list[tuple[int, float]]:
    """Step and mean loss over its probes, for each step that was not skipped."""
    return [(step.step, mean(step.losses)) for step in found.steps if step.coefficients and step.losses]


def sparkline(values: list[float], width: int = 60) -> str:
    """A line of bars, each the mean of about the same number of values; values that are not finite are left out."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    width = min(width, len(values))
    cuts = [round(i * len(values) / width) for i in range(width + 1)]
    means = [mean(values[a:b]) for a, b in zip(cuts, cuts[1:])]
    low, high = min(means), max(means)
    span = high / 2 - low / 2  # half of the range, which cannot overflow
    top = (len(_BARS) - 1) / 2
    return "".join(_BARS[round((value / 2 - low / 2) / span * top * 2) if span > 0 else 0] for value in means)


def verify(path: Path) -> list[str]:
    """The faults of a log, one sentence each; none if it is intact. Raises UserError if the file is not a log."""
    found = scan(path)
    wrong = [found.damage] if found.damage else []
    if found.torn:
        wrong.append(f"it ends in {found.torn} bytes that are not a complete line (a torn tail)")
    missing = {"weights", "method", "settings", "noise", "environment"} - set(found.header)
    if missing:
        wrong.append(f"its header lacks {', '.join(sorted(missing))}, so it cannot be replayed")
    return wrong


def diff(a: Scan, b: Scan) -> dict[str, Any]:
    """The differences of two logs: fields of the headers, and the first step that differs, field by field."""
    headers = [{"field": key, "a": old, "b": new} for key, old, new in _flat_differences(a.header, b.header)]
    first = None
    for one, other in zip(a.steps, b.steps):
        # compared as written, because nan differs from itself
        changes = differences(encode(one), encode(other))
        if changes:
            first = {"step": one.step, "fields": [{"field": key, "a": old, "b": new} for key, old, new in changes]}
            break
    if first is None and len(a.steps) != len(b.steps):
        first = {"step": min(len(a.steps), len(b.steps)), "fields": []}
    return {
        "headers": headers,
        "first": first,
        "steps": [len(a.steps), len(b.steps)],
        "same": not headers and not first,
    }


def _flat_differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    rows = []
    for key, old, new in differences(a, b):
        if isinstance(old, dict) and isinstance(new, dict):
            rows += [(f"{key}.{name}", x, y) for name, x, y in differences(old, new)]
        else:
            rows.append((key, old, new))
    return rows


def repair(path: Path) -> tuple[int, int, Path | None]:
    """Keep the intact lines of a damaged or torn log; the rest is moved to a new file beside it.

    Returns: number of intact steps, number of moved bytes, and the path of the file that holds them. Raises UserError if a run
    is using the folder of the log.
    """
    with FolderLock(path.resolve().parent, "log"):
        return _repair(path)


def _repair(path: Path) -> tuple[int, int, Path | None]:
    found = scan(path)
    with path.open("rb") as file:
        file.seek(found.size)
        rest = file.read()
    if not rest:
        return len(found.steps), 0, None
    names = (path.with_name(f"{path.name}.damaged" + (f"-{n}" if n > 1 else "")) for n in count(1))
    aside = next(name for name in names if not os.path.lexists(name))  # what was put aside before is kept
    write_whole(aside, rest)
    lines = LineFile(path)
    lines.cut(found.size)
    lines.close()
    return len(found.steps), len(rest), aside
