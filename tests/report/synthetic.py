"""A synthetic comparison in the form of metazo compare, with known numbers."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from metazo.comparisons.results import Result, Search, cell_path, write_search

BEFORE = 0.69
BLOCKS = ["embed_tokens.weight"] + [
    f"layers.{depth}.{kind}.weight" for depth in range(4) for kind in ("attn.q", "attn.v", "mlp.up", "mlp.down", "norm")
]
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)


@dataclass
class Column:
    """end: final loss as a fraction of the loss before; speed: seconds per 1,000 forwards; memory in MB."""

    name: str
    end: float
    speed: float = 10.0
    memory: float = 40.0
    optimizer: str = "mezo"
    configuration: dict[str, Any] = field(default_factory=dict)
    sigma: bool = False


COLUMNS = (
    Column("mezo", 0.60),
    Column("mezo-rms", 0.52, 11, configuration={"scale": "rms"}),
    Column("tuner", 0.45, 12, 44, configuration={"tuner": "pico"}, sigma=True),
    Column("random-tuner-0", 0.63, 12, 44, configuration={"tuner": "random:0"}, sigma=True),
    Column("lozo", 0.55, 8, 41, "lozo"),
    Column("fzoo", 0.66, 10, 40, "fzoo"),
    Column("hizoo", 0.58, 15, 95, "hizoo"),
    Column("first-order-adamw", 0.20, 14, 210, "first-order-adamw"),
    Column("lora-adamw", 0.25, 13, 120, "first-order-adamw"),
    Column("zero-shot", 1.0, 0, 30, "zero-shot"),
)
TASKS = ("sst2", "rte", "cb")


def curve(
    column: Column, seed: int, task: str, budget: int = 2000, points: int = 20, stretch: float = 1.0
) -> list[dict]:
    """An exponential curve from BEFORE to the fraction `end` of it, with noise from the seed."""
    random_ = random.Random(f"{column.name} {task} {seed}")
    end = BEFORE * column.end * (1 + random_.uniform(-0.06, 0.06))
    found = []
    for point in range(points + 1 if column.name != "zero-shot" else 1):
        done = point / points
        loss = BEFORE if point == 0 else end + (BEFORE - end) * math.exp(-4 * done * stretch) + random_.uniform(0, 0.01)
        forwards = round(done * budget * stretch)
        found.append(
            {
                "step": forwards // 2, "forwards": forwards, "seconds": forwards / 1000 * column.speed,
                "train_loss": None if point == 0 else loss, "lr": 1e-4,
                "dev": {"loss": loss, "accuracy": accuracy(loss), "majority": 0.52, "examples": 200},
            }
        )  # fmt: skip
    return found


def accuracy(loss: float) -> float:
    return round(1 - 0.6 * loss, 4)


def result(column: Column, task: str, seed: int, kind: str = "seed", loss: float | None = None, **info: Any) -> Result:
    """A run; loss: on test, by default that of the curve's end plus 0.01."""
    points = curve(column, seed, task, stretch=1.5 if kind == "time" else 1.0)
    loss = points[-1]["dev"]["loss"] + 0.01 if loss is None else loss
    sigma = None
    if column.sigma:
        rows = [
            [math.exp((d % 5 - 2) * 0.4 * t + math.sin(d + seed)) * (1 + t) for d in range(len(BLOCKS))]
            for t in range(5)
        ]
        sigma = {"blocks": BLOCKS, "steps": [0, 250, 500, 750, 999], "values": rows}
    scores = {"loss": loss, "accuracy": accuracy(loss) if math.isfinite(loss) else None, "examples": 400}
    return Result(
        run_info={
            "task": task, "column": column.name, "kind": kind, "seed": seed, "lr": 1e-4, "model": "pico",
            "optimizer": column.optimizer, "label": column.name, "metric": "accuracy", "budget": 2000,
            "configuration": {"model": "pico", "task": task, "batch_size": 16, "eps": 1e-3, **column.configuration},
            "hashes": {"model": "ab" * 32, "data": "cd" * 32, "tuner": None}, "key": "0",
            "versions": {"metazo": "0.1.0", "torch": "2.13.0"}, "workers": 2, "started": "2026-01-01T00:00:00Z",
            "machine": {"cores": 2, "threads": 1, "system": "Linux", "cpu": "a cpu", "gpu": None},
            "status": "finished", "reason": None, **info,
        },
        train_info={
            "curve": points, "steps": 1000, "forwards": points[-1]["forwards"], "seconds": points[-1]["seconds"],
            "evaluation_seconds": 3.0, "wall_seconds": points[-1]["seconds"] + 5,
            "trained_weights": 1_570_000, "peak_memory_bytes": column.memory * 1e6,
            "sigma": sigma,
        },
        metrics={
            "before": {"loss": BEFORE, "accuracy": 0.55, "examples": 200}, "dev": points[-1]["dev"], "test": scores,
            "majority": {"dev": 0.52, "test": 0.505},
        },
    )  # fmt: skip


def write(folder: Path, columns=COLUMNS, tasks=TASKS, seeds: int = 5, search: bool = True, grid: bool = True) -> Path:
    """A whole results folder."""
    for task in tasks:
        for column in columns:
            for seed in range(seeds):
                result(column, task, seed).save(cell_path(folder, task, column.name, "seed", seed))
            if column.name == "lozo":
                for seed in range(seeds):
                    result(column, task, seed, "time").save(cell_path(folder, task, column.name, "time", seed))
    if grid:
        settings = {
            "model": "pico", "tasks": list(tasks), "columns": [{"name": column.name} for column in columns],
            "budget": 2000, "seeds": list(range(seeds)), "search_seeds": [100], "search_budget": 1000,
            "time_budget": None, "reference": "mezo", "workers": 2, "config": {"batch_size": 16},
        }  # fmt: skip
        (folder / "grid.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    if search:
        write_search(folder, {task: {c.name: searched(c) for c in columns if c.name != "zero-shot"} for task in tasks})
    return folder


def searched(column: Column) -> Search:
    best = 4 if column.name == "fzoo" else 2
    losses: dict[str, float | None] = {
        f"{rate:g}": BEFORE * (column.end + 0.12 * (place - best) ** 2) for place, rate in enumerate(RATES)
    }
    if best == 2:
        losses[f"{RATES[-1]:g}"] = None
    return Search(RATES[best], losses, best == 4, [100], len(RATES), len(RATES) * 1000, 1000)
