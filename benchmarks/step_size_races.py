"""Can a run find MeZO's learning rate by racing a few rates at its start?

    python benchmarks/step_size_races.py --model MINILM --data DATA

About 20 minutes of one core. The tasks, runs and best rates are those of benchmarks/step_sizes.py. A run of 300 forward passes
starts with one arm per rate, from the same weights, with the same directions and batches. In every round each arm takes `round`
steps; its score is the mean loss of both probes over the steps of that round. The better half of the arms goes on, until one is
left, which takes the rest of the forward passes from where it is. Nothing is measured for the race alone: an arm costs memory
for its coefficients only, because MeZO's weights follow from them.

The rate of a step falls linearly to 0 at the last step that a winner takes, so all arms are at the same share of their rates.
A cell is a task and a seed, its ratio the loss on held-out examples over that of a whole run at the best rate of the task. Two
bounds say where a race loses: `winner, whole run` runs the chosen rate from the start with all forward passes, and `best rate,
rest of the run` takes the best rate of the task with as many steps as the winner takes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from step_sizes import BATCH, EPS, KINDS, SEEDS, STEPS, Case, grids, lowest

from metazo.optimizers import MeZO
from metazo.runs.schedule import share

RACES = {
    "4 arms, rounds of 5": ((5e-5, 2e-4, 8e-4, 3.2e-3), 5),
    "4 arms, rounds of 10": ((5e-5, 2e-4, 8e-4, 3.2e-3), 10),
    "3 arms, rounds of 8": ((1e-4, 4e-4, 1.6e-3), 8),
    "2 arms, rounds of 12": ((1e-4, 4e-4), 12),
}
"""Rates and steps per round."""


def lengths(arms: int, steps: int) -> tuple[int, int]:
    """(steps that the winner takes, steps of its arm within the race), if all arms together take STEPS."""
    spent = rounds = 0
    while arms > 1:
        spent, rounds, arms = spent + arms * steps, rounds + 1, -(-arms // 2)
    return STEPS - spent + rounds * steps, rounds * steps


class Arm:
    """A run at one rate that can be left and taken up again."""

    def __init__(self, case: Case, rate: float, seed: int, total: int):
        self.case, self.rate, self.seed, self.total = case, rate, seed, total
        self.weights, self.losses = {k: v.clone() for k, v in case.start.items()}, []
        case.net.load_state_dict(self.weights)
        self.optimizer = MeZO(case.net.named_parameters(), rate, EPS, seed=seed, check_loss=False)

    def go(self, steps: int) -> float:
        """Take the steps; returns the mean loss of their probes."""
        net, first = self.case.net, self.optimizer.steps
        net.load_state_dict(self.weights)
        for step in range(first, first + steps):
            self.case.task.step(self.optimizer, step, BATCH, self.seed, self.rate * share("linear", step, self.total))
            self.losses.append(fmean(self.optimizer.last_step.losses))
        self.weights = {k: v.clone() for k, v in net.state_dict().items()}
        score = fmean(self.losses[-steps:])
        return score if math.isfinite(score) else math.inf


def race(case: Case, seed: int, rates: tuple[float, ...], steps: int) -> tuple[float, float]:
    """(the rate that won, the loss on held-out examples at the end)."""
    total, taken = lengths(len(rates), steps)
    arms = [Arm(case, rate, seed, total) for rate in rates]
    while len(arms) > 1:
        arms = sorted(arms, key=lambda arm: arm.go(steps))[: -(-len(arms) // 2)]
    arms[0].go(total - taken)
    return arms[0].rate, case.task.held_out()


def summary(rows: list[dict[str, Any]], kind: str, key: str) -> dict[str, Any]:
    found = {}
    for name in RACES:
        cells = {f"{r['task']}/{r['seed']}": r[key] for r in rows if r["race"] == name and r["kind"] == kind}
        if cells:
            found[name] = {
                "within 5 %": round(fmean(ratio <= 1.05 for ratio in cells.values()), 3),
                "mean ratio": round(fmean(cells.values()), 4),
                "largest ratio": max(cells.values()),
            }
    return found


def one_rate(grid: dict[str, dict[float, dict[int, float]]], kind: str) -> dict[str, Any]:
    """The same figures without a race: every rate that the grids of all tasks share, for all tasks."""
    found = {}
    for rate in sorted(set.intersection(*(set(grid[task]) for tasks in KINDS.values() for task in tasks))):
        best = {task: grid[task][lowest(grid[task])] for task in KINDS[kind]}
        ratios = [grid[task][rate][seed] / loss for task, losses in best.items() for seed, loss in losses.items()]
        found[f"{rate:g}"] = {
            "within 5 %": round(fmean(ratio <= 1.05 for ratio in ratios), 3),
            "mean ratio": round(fmean(ratios), 4),
            "largest ratio": round(max(ratios), 4),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/step_size_races.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    grid = grids(json.loads(Path("benchmarks/step_sizes.json").read_text())["runs"])
    rows: list[dict[str, Any]] = json.loads(given.out.read_text())["runs"] if given.out.exists() else []
    known = {(row["race"], row["task"], row["seed"]) for row in rows}
    for kind, tasks in KINDS.items():
        for task in tasks:
            jobs = [(name, seed) for name in RACES for seed in SEEDS[kind] if (name, task, seed) not in known]
            case = Case(given.model, Path(given.data), task) if jobs else None
            best = lowest(grid[task])
            for name, seed in jobs:
                assert case is not None
                begun, (rates, steps) = time.process_time(), RACES[name]
                of_best, (rate, loss) = grid[task][best][seed], race(case, seed, rates, steps)
                row: dict[str, Any] = {"task": task, "kind": kind, "race": name, "seed": seed, "best rate": best}
                row |= {"lr": rate, "loss": round(loss, 4), "ratio": round(loss / of_best, 4)}
                near = min(
                    grid[task], key=lambda known: abs(math.log(known / rate))
                )  # the same, unless the grid ends above it
                row["winner, whole run"] = round(grid[task][near][seed] / of_best, 4)
                shorter = case.run(best, seed, lengths(len(rates), steps)[0])
                row["best rate, rest of the run"] = round(shorter / of_best, 4)
                rows.append(row | {"cpu_seconds": round(time.process_time() - begun, 1)})
                print(rows[-1], flush=True)
                write(given.out, rows, grid)
    write(given.out, rows, grid)
    for kind in KINDS:
        for key in ("ratio", "winner, whole run", "best rate, rest of the run"):
            for name, found in summary(rows, kind, key).items():
                print(f"{kind}, {name}, {key}: {found}")
        for one, found in one_rate(grid, kind).items():
            print(f"{kind}, no race, {one} for all tasks: {found}")


def write(path: Path, rows: list[dict[str, Any]], grid: dict[str, dict[float, dict[int, float]]]) -> None:
    found = {
        kind: {key: summary(rows, kind, key) for key in ("ratio", "winner, whole run", "best rate, rest of the run")}
        for kind in KINDS
    }
    for kind in KINDS:
        found[kind]["one rate for all tasks"] = one_rate(grid, kind)
    path.write_text(json.dumps({"summary": found, "runs": rows}).replace('{"task"', '\n{"task"') + "\n")


if __name__ == "__main__":
    main()
