"""Can MeZO's learning rate be read from the losses that it sees, so that no search is needed?

    python benchmarks/step_sizes.py --model MINILM --data DATA

DATA/<task>/{train,validation}.jsonl; about 25 minutes of one core. all-MiniLM-L6-v2 with a head of label phrases, last two
layers trained, MeZO, batches of 8, 150 steps (300 forward passes) of a rate that falls linearly to 0; the loss is that of
128 held-out examples.

1. A grid of rates on tasks for meta-training and on held-out tasks gives each task's best rate (mean over the seeds).
2. Before the first step, PROBES directions are probed on two batches, and L0 is evaluated on both:
   slope c = (L+ - L-) / (2 eps), curvature h = (L+ + L- - 2 L0) / eps^2. They cost 4 PROBES + 2 forward passes.
3. Rules whose constants are fitted to the best rates of the tasks for meta-training choose the rate of the held-out tasks:
   default       one rate for all tasks, the geometric mean of the best rates
   slope         a / root mean square of c
   curvature     a / mean of h
   newton        a (mean of c1 c2) / (mean of c^2 mean of h), the rate that is best for a quadratic
   regression    log rate = w0 + w1 log rms(c) + w2 log mean(h)
   meazo         the method meazo, which divides by a running root mean square of c; a as for slope
   The forward passes of the probes are taken from the run: it has fewer steps. default and meazo take none.
A cell is a held-out task and a seed. Its ratio is the loss over the loss of the task's best rate with that seed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from metazo.meta.horizon import HorizonTask
from metazo.models.load import load_model
from metazo.optimizers import MeZO
from metazo.optimizers.meazo import MEAZO
from metazo.runs.schedule import share
from metazo.tasks import get, prepare
from metazo.tasks.classes import fit_head

META = (
    "airline_sentiment",
    "app_reviews",
    "snips",
    "sarcasm_headlines",
    "mpqa",
    "cr",
    "tweet_emotion",
    "search_snippets",
)
HELD_OUT = ("banking77", "dailydialog_act", "ag_news", "subj", "stackoverflow_sentiment", "sms_spam")
KINDS = {"meta": META, "held-out": HELD_OUT}
RATES = tuple(1e-4 * 2**power for power in range(6))
EXTENSIONS = 2  # halvings of the lowest rate of a held-out task, as long as it is the best
SEEDS = {"meta": (0,), "held-out": (0, 1)}
BATCH, STEPS, LENGTH, EPS, PROBES = 8, 150, 16, 1e-3, 12
FLOOR = 0.05  # of the agreement of slopes
PROBE_FORWARDS = 4 * PROBES + 2


class Case:
    """A task on the model: runs from the base weights at any rate, and what the first probes show."""

    def __init__(self, model: str, data: Path, name: str):
        task = get(name)
        loaded = load_model(model, num_labels=task.num_labels, head="phrases")
        prepared = prepare(task, loaded, data=data, train=512, dev=128, test=0, max_length=LENGTH)
        self.net: Any = loaded.model.eval().requires_grad_(False)
        self.net.encoder.encoder.layer[-2:].requires_grad_(True)
        self.net.cache_frozen()
        fit_head(loaded, prepared, 32)
        self.task = HorizonTask(self.net, prepared)
        self.start = {name: value.clone() for name, value in self.net.state_dict().items()}
        self.before = self.task.held_out()

    def run(self, lr: float, seed: int, steps: int = STEPS, method: type = MeZO, scale: Any = None) -> float:
        """The loss on held-out examples after `steps` steps."""
        self.net.load_state_dict(self.start)
        optimizer = method(self.net.named_parameters(), lr, EPS, seed=seed, scale=scale, check_loss=False)
        for step in range(steps):
            self.task.step(optimizer, step, BATCH, seed, lr * share("linear", step, steps))
        return self.task.held_out()

    def probes(self, seed: int) -> dict[str, list[float]]:
        """Slopes and curvatures at the base weights, per direction: c1, h1 on one batch and c2, h2 on another."""
        self.net.load_state_dict(self.start)
        batches = [self.task.batch_at(1000 + place, BATCH, seed) for place in (0, 1)]
        found: dict[str, list[float]] = defaultdict(list)
        with torch.inference_mode():
            levels = [float(self.task.prepared.loss(self.net, batch)) for batch in batches]
        for place, batch in enumerate(batches, 1):
            probe = MeZO(self.net.named_parameters(), 0.0, EPS, seed=seed + 10**6, check_loss=False)
            for _ in range(PROBES):  # the same directions on both batches; at rate 0 the weights stay
                probe.step(lambda batch=batch: self.task.prepared.loss(self.net, batch))
                plus, minus = probe.last_step.losses
                found[f"c{place}"].append((plus - minus) / (2 * EPS))
                found[f"h{place}"].append((plus + minus - 2 * levels[place - 1]) / EPS**2)
        return dict(found)


def features(probes: dict[str, list[float]]) -> tuple[float, float, float]:
    """Root mean square of the slope, mean curvature (at least a tenth of its mean size), agreement of the slopes in [0, 1]."""
    c1, c2, h = np.array(probes["c1"]), np.array(probes["c2"]), np.array(probes["h1"] + probes["h2"])
    square = float(np.mean(np.concatenate([c1, c2]) ** 2))
    return (
        math.sqrt(square),
        max(float(h.mean()), 0.1 * float(np.abs(h).mean())),
        max(float((c1 * c2).mean()) / square, FLOOR),
    )


def grids(rows: list[dict[str, Any]]) -> dict[str, dict[float, dict[int, float]]]:
    """Losses of the grid by task, rate and seed, in the order of the rates that have been run with every seed."""
    found: dict[str, dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["rule"] == "grid":
            found[row["task"]][row["lr"]][row["seed"]] = row["loss"]
    seeds = {task: len(SEEDS[kind]) for kind, tasks in KINDS.items() for task in tasks}
    whole = {
        task: {lr: losses for lr, losses in sorted(rates.items()) if len(losses) == seeds[task]}
        for task, rates in found.items()
    }
    return {task: grid for task, grid in whole.items() if grid}


def lowest(grid: dict[float, dict[int, float]]) -> float:
    """The rate of the lowest mean loss."""
    return min(grid, key=lambda rate: fmean(grid[rate].values()))


def best_rates(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The rate of the lowest loss of each task, between the rates of the grid: the vertex of a parabola in log rate."""
    found = {}
    for task, grid in grids(rows).items():
        rates = list(grid)
        place = rates.index(lowest(grid))
        found[task] = rates[place]
        if 0 < place < len(rates) - 1:
            near = rates[place - 1 : place + 2]
            curve = np.polyfit(np.log(near), [fmean(grid[rate].values()) for rate in near], 2)
            found[task] = math.exp(-curve[1] / (2 * curve[0]))
    return found


def grid_of(rows: list[dict[str, Any]], task: str) -> list[float]:
    """The rates of a task's grid: RATES, and half the lowest rate if that is the best so far."""
    grid = grids(rows).get(task, {})
    rates = sorted({*RATES, *grid})
    further = task in HELD_OUT and set(RATES) <= set(grid) and rates[0] > RATES[0] / 2**EXTENSIONS * 1.01
    return [rates[0] / 2, *rates] if further and lowest(grid) == rates[0] else rates


def fitted(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The constants of every rule, from the tasks for meta-training alone."""
    best = {task: rate for task, rate in best_rates(rows).items() if task in META}
    seen = {row["task"]: features(row["probes"]) for row in rows if row["rule"] == "probes" and row["task"] in META}
    tasks = sorted(best)
    target = np.array([math.log(best[task]) for task in tasks])
    slope, curvature, agreement = (np.log([seen[task][place] for task in tasks]) for place in range(3))
    design = np.stack([np.ones(len(tasks)), slope, curvature], 1)
    return {
        "default": math.exp(target.mean()),
        "slope": math.exp((target + slope).mean()),
        "curvature": math.exp((target + curvature).mean()),
        "newton": math.exp((target - agreement + curvature).mean()),
        "regression": np.linalg.lstsq(design, target, rcond=None)[0].tolist(),
        "spread of the log of the best rates": float(target.std(ddof=1)),
    }


def chosen(constants: dict[str, Any], probes: dict[str, list[float]]) -> dict[str, float]:
    """The rate of every rule for a task."""
    slope, curvature, agreement = features(probes)
    w = constants["regression"]
    rates = {
        "default": constants["default"],
        "slope": constants["slope"] / slope,
        "curvature": constants["curvature"] / curvature,
        "newton": constants["newton"] * agreement / curvature,
        "regression": math.exp(w[0] + w[1] * math.log(slope) + w[2] * math.log(curvature)),
        "meazo": constants["slope"],
    }
    return {rule: min(max(rate, 1e-6), 1.0) for rule, rate in rates.items()}


def measure(model: str, data: Path, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The runs that are not among the rows yet: the grid and the probes of every task, then the rules."""
    for stage in ("grid", *["extension"] * EXTENSIONS, "rules"):
        known = {
            (row["rule"], row["task"], row.get("lr") if row["rule"] == "grid" else None, row["seed"]) for row in rows
        }
        for kind, tasks in (KINDS if stage == "grid" else {"held-out": HELD_OUT}).items():
            for task in tasks:
                jobs: list[tuple[str, float | None, int]] = []
                for seed in SEEDS[kind]:
                    if stage != "rules":
                        jobs += [("grid", rate, seed) for rate in grid_of(rows, task)] + [("probes", None, seed)]
                    else:
                        probes = next(r for r in rows if (r["rule"], r["task"], r["seed"]) == ("probes", task, seed))
                        jobs += [(rule, rate, seed) for rule, rate in chosen(fitted(rows), probes["probes"]).items()]
                jobs = [j for j in jobs if (j[0], task, j[1] if j[0] == "grid" else None, j[2]) not in known]
                case = Case(model, data, task) if jobs else None
                for rule, rate, seed in jobs:
                    assert case is not None
                    begun = time.process_time()
                    row: dict[str, Any] = {"task": task, "kind": kind, "rule": rule, "seed": seed}
                    if rate is None:
                        row |= {"probes": {key: [round(v, 4) for v in vs] for key, vs in case.probes(seed).items()}}
                    else:
                        free = rule in ("grid", "default", "meazo")
                        steps = STEPS if free else STEPS - PROBE_FORWARDS // 2
                        loss = case.run(rate, seed, steps, MEAZO if rule == "meazo" else MeZO)
                        row |= {"lr": rate, "before": round(case.before, 4), "loss": round(loss, 4)}
                    yield row | {"cpu_seconds": round(time.process_time() - begun, 1)}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratio to the best rate's loss by rule and cell, and the fraction of cells within 5 %."""
    grid = grids(rows)
    best = {task: lowest(grid[task]) for task in HELD_OUT if grid.get(task)}
    ratios: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["rule"] not in ("grid", "probes"):
            task, seed = row["task"], row["seed"]
            ratios[row["rule"]][f"{task}/{seed}"] = round(row["loss"] / grid[task][best[task]][seed], 4)
    return {
        rule: {
            "within 5 %": round(fmean(ratio <= 1.05 for ratio in cells.values()), 3),
            "mean ratio": round(fmean(cells.values()), 4),
            "largest ratio": max(cells.values()),
            "cells": cells,
        }
        for rule, cells in ratios.items()
    }


def precision(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How often the agreement of the slopes is at its floor, and the largest ratio of a task's curvatures between seeds."""
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for row in rows:
        if row["rule"] == "probes":
            found[row["task"]].append(features(row["probes"]))
    floor = [agreement == FLOOR for seen in found.values() for _, _, agreement in seen]
    spread = [max(h for _, h, _ in seen) / min(h for _, h, _ in seen) for seen in found.values()]
    return {"agreement at its floor": f"{sum(floor)} of {len(floor)}", "ratio of curvatures": round(max(spread), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/step_sizes.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = json.loads(given.out.read_text())["runs"] if given.out.exists() else []
    for row in measure(given.model, Path(given.data), rows):
        rows.append(row)
        print({key: value for key, value in row.items() if key != "probes"}, flush=True)
        write(given.out, rows)
    write(given.out, rows)
    for rule, found in summary(rows).items():
        print(
            f"{rule}: {found['within 5 %']:.0%} within 5 %, mean ratio {found['mean ratio']}, largest {found['largest ratio']}"
        )


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    whole = any(row["rule"] == "default" for row in rows)
    content = {"best rates": best_rates(rows), "rules": fitted(rows) if whole else {}, "summary": summary(rows)}
    content["precision"] = precision(rows) if whole else {}
    path.write_text(json.dumps(content | {"runs": rows}).replace('{"task"', '\n{"task"') + "\n")


if __name__ == "__main__":
    main()
