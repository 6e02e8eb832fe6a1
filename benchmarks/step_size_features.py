"""Does anything that MeZO can measure precisely before a run predict its best learning rate?

    python benchmarks/step_size_features.py --model MINILM --data DATA

About six minutes of one core. benchmarks/step_sizes.py chooses rates from 12 directions on two batches, with second differences
of losses for the curvature. Here the same tasks are measured as precisely as is possible: 80 directions, each on a batch of its
own, with the losses and scores of every example of both probes:

    slope      c = mean over the batch of c_i,  c_i = (l_i(theta + eps z) - l_i(theta - eps z)) / (2 eps)
    curvature  h = z^T G z with the Gauss-Newton matrix G: the variance under the softmax of d = (s+ - s-) / (2 eps), s the
               scores. It is never negative and needs no loss at theta.
    agreement  1 - sum (variance of c_i / B) / sum c^2: the share of c^2 that is not noise of the batch; at least FLOOR

and compared with the best rates of benchmarks/step_sizes.json. A rule rate = a x feature is as good as the logarithm of best
rate / feature is constant over tasks. The regression is judged on each task by the fit to the others.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step_sizes import BATCH, EPS, FLOOR, HELD_OUT, META, PROBES, Case
from torch.nn.functional import cross_entropy

from metazo.optimizers import MeZO

DIRECTIONS, SEEDS = 40, (0, 1)


def measured(case: Case) -> dict[str, Any]:
    """The features at the base weights; curvatures: the mean of every PROBES directions."""
    rows = []
    for seed in SEEDS:
        optimizer = MeZO(case.net.named_parameters(), 0.0, EPS, seed=seed + 10**6, check_loss=False)
        for step in range(DIRECTIONS):
            batch, seen = case.task.batch_at(1000 + step, BATCH, seed), []

            def loss(batch: Any = batch, seen: list[torch.Tensor] = seen) -> torch.Tensor:
                seen.append(case.task.prepared.scores(case.net, batch).double())
                return cross_entropy(seen[-1], batch["targets"])

            optimizer.step(loss)
            plus, minus = (cross_entropy(scores, batch["targets"], reduction="none") for scores in seen[-2:])
            slopes, p = (plus - minus) / (2 * EPS), ((seen[-2] + seen[-1]) / 2).softmax(1)
            moved = (seen[-2] - seen[-1]) / (2 * EPS)
            curvature = ((p * moved**2).sum(1) - (p * moved).sum(1) ** 2).mean()
            rows.append((float(slopes.mean()), float(slopes.var() / len(slopes)), float(curvature)))
    slope, noise, curvature = np.array(rows).T
    whole = len(curvature) // PROBES * PROBES
    return {
        "slope": round(float(np.sqrt((slope**2).mean())), 3),
        "curvature": round(float(curvature.mean()), 2),
        "agreement": round(max(1 - float(noise.sum() / (slope**2).sum()), FLOOR), 3),
        "curvatures": [round(float(part.mean()), 2) for part in curvature[:whole].reshape(-1, PROBES)],
    }


def summary(tasks: dict[str, dict[str, Any]], best: dict[str, float]) -> dict[str, float]:
    """Standard deviations over tasks of the logarithm of best rate / feature, and of a curvature from PROBES directions."""
    rate = np.log([best[task] for task in tasks])
    slope, curvature, agreement = (
        np.log([found[key] for found in tasks.values()]) for key in ("slope", "curvature", "agreement")
    )
    design, errors = np.stack([np.ones(len(rate)), curvature, agreement], 1), []
    for place in range(len(rate)):
        rest = np.arange(len(rate)) != place
        weights = np.linalg.lstsq(design[rest], rate[rest], rcond=None)[0]
        errors.append((rate[place] - design[place] @ weights, rate[place] - rate[rest].mean()))
    within = [np.std(found["curvatures"], ddof=1) / found["curvature"] for found in tasks.values()]
    return {
        "one rate for all": round(float(rate.std(ddof=1)), 2),
        "1 / slope": round(float((rate + slope).std(ddof=1)), 2),
        "1 / curvature": round(float((rate + curvature).std(ddof=1)), 2),
        "agreement / curvature": round(float((rate + curvature - agreement).std(ddof=1)), 2),
        "regression on both, task left out": round(float(np.sqrt(np.mean(np.square(errors), 0))[0]), 2),
        "one rate, task left out": round(float(np.sqrt(np.mean(np.square(errors), 0))[1]), 2),
        f"relative spread of a curvature from {PROBES} directions, median": round(float(np.median(within)), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/step_size_features.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    best = json.loads(Path("benchmarks/step_sizes.json").read_text())["best rates"]
    tasks: dict[str, dict[str, Any]] = json.loads(given.out.read_text())["tasks"] if given.out.exists() else {}
    for task in [*META, *HELD_OUT]:
        if task not in tasks:
            tasks[task] = measured(Case(given.model, Path(given.data), task))
            print(task, tasks[task], flush=True)
            content = {"summary": summary(tasks, best) if len(tasks) > 3 else {}, "tasks": tasks}
            given.out.write_text(json.dumps(content, indent=1) + "\n")
    for rule, spread in summary(tasks, best).items():
        print(f"{rule}: {spread}")


if __name__ == "__main__":
    main()
