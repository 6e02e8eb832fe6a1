"""Scales that were learned over whole runs against the RMS rule and plain MeZO, on tasks of held-out families.

    metazo meta-train --config meta-horizon-minilm --model MINILM --data DATA --out runs/horizon
    python benchmarks/horizon_scales.py --model MINILM --data DATA --tuner runs/horizon

Setting, tasks and MeZO's grid of rates are those of benchmarks/step_sizes.py (--grid, its JSON). A column's rate is chosen
per task with seed 0: MeZO's from the whole grid, and those of the other columns by going up and down in factors of 2 from
MeZO's best until a rate has a worse one on both sides. Results are those of the seeds 1 and 2.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from scipy.stats import wilcoxon
from step_sizes import Case

from metazo.step.scales import RMSScale
from metazo.tuner.file import Tuner
from metazo.tuner.scale import tuner_scale

TASKS = ("sms_spam", "dailydialog_act", "subj", "banking77", "ag_news", "stackoverflow_sentiment")
COLUMNS = ("mezo", "rms", "horizon")
TUNING, SEEDS = 0, (1, 2)
FACTORS = (0.5, 2.0)


def climbed(start: float, loss: Callable[[float], float]) -> float:
    """The rate that no neighbour in factors of 2 beats, from `start` on; at most three factors away."""
    best, losses = start, {start: loss(start)}
    while True:
        for rate in (best * factor for factor in FACTORS):
            if rate not in losses and 1 / 9 < rate / start < 9:
                losses[rate] = loss(rate)
        found = min(losses, key=losses.__getitem__)
        if found == best:
            return best
        best = found


def measure(model: str, data: Path, tuner: Tuner, grid: list[dict[str, Any]], rows: list[dict]) -> Iterator[dict]:
    """The runs that are not among the rows yet."""
    for task in TASKS:
        if {(column, seed) for column in COLUMNS for seed in SEEDS} <= {
            (row["column"], row["seed"]) for row in rows if row["task"] == task
        }:
            continue
        case = Case(model, data, task)
        seen = {(row["column"], row["lr"], row["seed"]): row for row in rows if row["task"] == task}
        for row in grid:
            if (row["rule"], row["task"]) == ("grid", task):
                seen["mezo", row["lr"], row["seed"]] = row
        tuned = {lr: row["loss"] for (column, lr, seed), row in seen.items() if (column, seed) == ("mezo", TUNING)}
        first = min(tuned, key=tuned.__getitem__)
        fresh: list[dict] = []

        def loss(column: str, lr: float, seed: int, task=task, case=case, seen=seen, fresh=fresh) -> float:
            if (column, lr, seed) not in seen or (column == "mezo" and seed != TUNING):
                begun, scale = time.process_time(), None
                if (column, lr, seed) in seen:
                    value = seen[column, lr, seed]["loss"]
                else:
                    if column == "rms":
                        scale = RMSScale()
                    elif column == "horizon":
                        scale = tuner_scale(tuner, case.net.named_parameters())
                    value = case.run(lr, seed, scale=scale)
                row = {"task": task, "column": column, "lr": lr, "seed": seed, "before": round(case.before, 4)}
                row |= {"loss": round(value, 4), "cpu_seconds": round(time.process_time() - begun, 1)}
                seen[column, lr, seed] = row
                fresh.append(row)
            return seen[column, lr, seed]["loss"]

        for column in COLUMNS:
            rate = first if column == "mezo" else climbed(first, lambda lr, column=column: loss(column, lr, TUNING))
            for seed in SEEDS:
                loss(column, rate, seed)
            yield from fresh
            fresh.clear()


def summary(rows: list[dict]) -> dict[str, Any]:
    """Mean loss of each column by task, and for each pair of columns the mean ratio, wins and Wilcoxon's p."""
    cells: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for row in rows:
        if row["seed"] in SEEDS:
            cells[row["column"]][row["task"], row["seed"]] = row["loss"]
    tasks = sorted({task for task, _ in cells["rms"]})
    found: dict[str, Any] = {
        column: {task: round(fmean(v for (name, _), v in cells[column].items() if name == task), 4) for task in tasks}
        for column in COLUMNS
    }
    for one, other in (("rms", "mezo"), ("horizon", "mezo"), ("horizon", "rms")):
        both = sorted(set(cells[one]) & set(cells[other]))
        ratios = [cells[one][key] / cells[other][key] for key in both]
        if len(ratios) > 1:
            p = float(wilcoxon([cells[one][key] - cells[other][key] for key in both])[1])
            found[f"{one} against {other}"] = {
                "mean ratio": round(fmean(ratios), 4),
                "wins": f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)}",
                "p": round(p, 3),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "tuner"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--grid", type=Path, default=Path("benchmarks/step_sizes.json"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/horizon_scales.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    tuner = Tuner.load(given.tuner)
    rows: list[dict] = json.loads(given.out.read_text())["runs"] if given.out.exists() else []
    for row in measure(given.model, Path(given.data), tuner, json.loads(given.grid.read_text())["runs"], rows):
        rows.append(row)
        print(row, flush=True)
        scales = {block.name: round(b, 3) for block, b in zip(tuner.info.blocks, tuner.pertnn.b2.tolist()) if b}
        content = {
            "meta-training": tuner.info.recipe,
            "log sigma over RMS": scales,
            "summary": summary(rows),
            "runs": rows,
        }
        given.out.write_text(json.dumps(content).replace('{"task": "', '\n{"task": "') + "\n")
    for name, found in summary(rows).items():
        print(name, found)


if __name__ == "__main__":
    main()
