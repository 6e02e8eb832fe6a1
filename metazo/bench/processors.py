"""Short names of processors, and the columns of tables and plot: a part of a suite as measured on one processor."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

TITLES = {
    "steps": "Step / (2 × forward) by model and batch × length",
    "threads": "Step / (2 × forward) by threads and batch × length",
    "scaling": "Step / (2 × forward) by model size",
    "queries": "Several queries: step / (2 × queries × forward) of LOZO, step / (9 × forward) of FZOO",
    "precision": "Step / (2 × forward) of MeZO in bfloat16 by precision policy",
}


@dataclass
class Column:
    """A part of a suite as measured on one processor. head: the processor, if there are several, or else the part."""

    part: str
    head: str
    environment: dict[str, Any]
    rows: list[dict[str, Any]]


def labels(result: dict[str, Any]) -> list[str]:
    """A short name for each processor: its model, and further facts if two processors have the same model."""
    every = [there["environment"] for there in result["processors"]]
    names = [short_name(e.get("gpu") or e["cpu"]) for e in every]
    for key, form in (("microarchitecture", "{}"), ("cores", "{} cores"), ("dtype", "{}")):
        twice = [names.count(name) > 1 for name in names]
        names = [
            f"{name}, {form.format(e[key])}" if again and e.get(key) else name
            for name, again, e in zip(names, twice, every)
        ]
    return names


def short_name(model: str) -> str:
    """Intel(R) Xeon(R) Platinum 8592+ Processor @ 2.00GHz -> Intel Xeon Platinum 8592+"""
    return " ".join(re.sub(r"\((R|TM|tm)\)|\bProcessor\b|\bCPU\b|@.*", " ", model).split())


def columns(result: dict[str, Any], suite: str) -> list[Column]:
    """The columns ordered by part, and within a part by processor."""
    several = len(result["processors"]) > 1
    every = list(zip(labels(result), result["processors"]))
    names = dict.fromkeys(name for _, there in every for name in there["suites"].get(suite, {}))
    return [
        Column(
            name,
            label if several else shown_part(name),
            there["environment"],
            parts[name]["rows"],
        )
        for name in names
        for label, there in every
        if name in (parts := there["suites"].get(suite, {}))
    ]


def shown_part(part: str) -> str:
    """134M-8x64 -> 134M (8, 64)"""
    return re.sub(r"(\d+)x(\d+)", r"(\1, \2)", part).replace("-", " ")
