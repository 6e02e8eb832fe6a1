"""Scales that were learned over whole runs against the RMS rule and plain MeZO, on tasks of held-out families.

    metazo meta-train --config meta-horizon-minilm --model MINILM --data DATA --out runs/horizon
    python benchmarks/horizon_scales.py --model MINILM --data DATA --tuner runs/horizon

Setting, tasks and MeZO's grid of rates are those of benchmarks/step_sizes.py (--grid, its JSON). A column's rate is chosen
per task with seed 0: MeZO's from the whole grid, and those of the other columns by going up and down in factors of 2 from
MeZO's best until a rate has a worse one on both sides, or is 8 times as far. Results are those of the seeds 1 and 2.
About 8 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rescaled_twins import over_rms
from scipy.stats import wilcoxon
from step_sizes import Case

from metazo.step.scales import RMSScale
from metazo.tuner.file import Tuner
from metazo.tuner.scale import tuner_scale

TASKS = ("sms_spam", "dailydialog_act", "subj", "banking77", "ag_news", "stackoverflow_sentiment")
COLUMNS = ("mezo", "rms", "horizon")
TUNING, SEEDS = 0, (1, 2)
FACTORS = (0.5, 2.0)
Losses = dict[tuple[str, str, float, int], float]
"""Losses by task, column, rate and seed."""


def best(losses: Losses, task: str, column: str) -> float | None:
    """The rate of the lowest loss with the tuning seed; None if there was no run."""
    tuned = {
        lr: loss for (name, other, lr, seed), loss in losses.items() if (name, other, seed) == (task, column, TUNING)
    }
    return min(tuned, key=tuned.__getitem__, default=None)


def missing(losses: Losses, task: str, column: str) -> list[tuple[float, int]]:
    """Rates and seeds of a column's next runs: first beside the best rate so far, then the other seeds; none at the end."""
    start, top = best(losses, task, "mezo"), best(losses, task, column)
    if start is None:
        raise SystemExit(f"The grid has no runs of {task}; run benchmarks/step_sizes.py first.")
    if top is None:
        return [(start, TUNING)]
    near = [top * factor for factor in FACTORS if 1 / 9 < top * factor / start < 9] if column != "mezo" else []
    todo = [(lr, TUNING) for lr in near if (task, column, lr, TUNING) not in losses]
    return todo or [(top, seed) for seed in SEEDS if (task, column, top, seed) not in losses]


def measure(model: str, data: Path, tuner: Tuner, losses: Losses) -> Iterator[dict[str, Any]]:
    """The runs that are not among the losses yet."""
    for task in TASKS:
        case = None
        for column in COLUMNS:
            while todo := missing(losses, task, column):
                case = case or Case(model, data, task)
                for lr, seed in todo:
                    begun, scale = time.process_time(), None
                    if column == "rms":
                        scale = RMSScale()
                    elif column == "horizon":
                        scale = tuner_scale(tuner, case.net.named_parameters())
                    loss = round(case.run(lr, seed, scale=scale), 4)
                    losses[task, column, lr, seed] = loss if math.isfinite(loss) else math.inf
                    row = {"task": task, "column": column, "lr": lr, "seed": seed, "before": round(case.before, 4)}
                    yield row | {"loss": loss, "cpu_seconds": round(time.process_time() - begun, 1)}


def summary(losses: Losses) -> dict[str, Any]:
    """Mean loss of each column by task, and for each pair of columns the mean ratio, wins and Wilcoxon's p."""
    whole = [task for task in TASKS if not any(missing(losses, task, column) for column in COLUMNS)]
    cells = {c: [losses[task, c, best(losses, task, c) or 0.0, s] for task in whole for s in SEEDS] for c in COLUMNS}
    found: dict[str, Any] = {}
    for column in COLUMNS if whole else ():
        means = {
            task: round(fmean(cells[column][i * len(SEEDS) : (i + 1) * len(SEEDS)]), 4) for i, task in enumerate(whole)
        }
        found[column] = {"losses": means, "rates": {task: best(losses, task, column) for task in whole}}
    for one, other in (("rms", "mezo"), ("horizon", "mezo"), ("horizon", "rms")) if whole else ():
        ratios = [a / b for a, b in zip(cells[one], cells[other], strict=True)]
        test: Any = wilcoxon(cells[one], cells[other])
        wins = f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)}"
        found[f"{one} against {other}"] = {
            "mean ratio": round(fmean(ratios), 4),
            "wins": wins,
            "p": round(float(test.pvalue), 3),
        }
    return found


def write(path: Path, facts: dict[str, Any], losses: Losses, rows: list[dict[str, Any]]) -> None:
    content = facts | {"summary": summary(losses), "runs": rows}
    path.write_text(json.dumps(content).replace('{"task": "', '\n{"task": "') + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "tuner"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--grid", type=Path, default=Path("benchmarks/step_sizes.json"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/horizon_scales.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    tuner = Tuner.load(given.tuner)
    rows: list[dict[str, Any]] = json.loads(given.out.read_text())["runs"] if given.out.exists() else []
    grid = [row | {"column": "mezo"} for row in json.loads(given.grid.read_text())["runs"] if row["rule"] == "grid"]
    losses = {(row["task"], row["column"], row["lr"], row["seed"]): row["loss"] for row in grid + rows}
    facts = {"meta-training": tuner.info.recipe, "log sigma over RMS": over_rms(tuner)}
    for row in measure(given.model, Path(given.data), tuner, losses):
        rows.append(row)
        print(row, flush=True)
        write(given.out, facts, losses, rows)
    write(given.out, facts, losses, rows)
    for name, found in summary(losses).items():
        print(name, found)


if __name__ == "__main__":
    main()
