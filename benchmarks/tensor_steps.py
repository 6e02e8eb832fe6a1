"""How much a learned length of the steps of single tensors could gain: skip-feedback with the steps of a group scaled.

    python benchmarks/tensor_steps.py --model MINILM --data DATA        # 15 minutes on one core; goes on where it stopped

In a normalised step every tensor moves by the same share of its norm. Each run scales the share of one group of tensors of
the last two layers by FACTORS; all else, batches included, is as in the run with one share for all. 14 tasks of the families
for meta-training, 25 steps of batches of 16 at lr 0.006, linear to 0; the logarithm of the ratio of the losses on 256
held-out examples, in the mean over tasks with its standard error. Writes benchmarks/tensor_steps.json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

import torch
import yaml

from metazo.blocks import named_tensors
from metazo.meta.horizon import HorizonTask
from metazo.meta.horizon_config import HorizonConfig
from metazo.meta.horizon_setup import load
from metazo.meta.reset import Start
from metazo.optimizers.skip_feedback import SkipFeedback
from metazo.recipes import text
from metazo.runs.schedule import share

STEPS, BATCH, LR = 25, 16, 0.006
FACTORS = (0.3, 3.0)
GROUPS: dict[str, Callable[[str], bool]] = {
    "layer 4": lambda name: ".4." in name,
    "layer 5": lambda name: ".5." in name,
    "queries and keys": lambda name: "query" in name or "key" in name,
    "matrices of attention": lambda name: "attention" in name and _is_matrix(name),
    "matrices of the MLP": lambda name: "attention" not in name and _is_matrix(name),
    "weights of norms": lambda name: name.endswith("LayerNorm.weight"),
    "biases and norms": lambda name: not _is_matrix(name),
}


def _is_matrix(name: str) -> bool:
    return name.endswith("weight") and "LayerNorm" not in name


class Runs:
    """Runs of the tasks from the same base weights."""

    def __init__(self, model: str, data: Path):
        recipe = yaml.safe_load(text("meta-horizon-minilm"))
        given = {
            "model": model,
            "data": str(data),
            "batch_size": BATCH,
            "train_examples": 256,
            "eval_examples": 256,
            "out": Path("unused"),
        }
        self.tasks = load(HorizonConfig(**recipe | given))[1]
        self.base = Start(named_tensors(self.tasks[0].model))

    def loss(self, task: HorizonTask, scaled: Callable[[str], bool], factor: float) -> float:
        """The loss on held-out examples at the end of a run; the batches are those of the task."""
        self.base.restore()
        named = [(name, p) for name, p in task.model.named_parameters() if p.requires_grad]
        groups = [{"params": [pair], "lr": 0.0} for pair in named]
        optimizer = SkipFeedback(groups, LR, model=task.model)
        seed = self.tasks.index(task)
        for step in range(STEPS):
            batch = task.batch_at(step, BATCH, seed)
            for group, (name, _) in zip(optimizer.param_groups, named, strict=True):
                group["lr"] = LR * share("linear", step, STEPS) * (factor if scaled(name) else 1.0)
            optimizer.step(lambda batch=batch: task.prepared.loss(task.model, batch))
        return task.held_out()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/tensor_steps.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    losses: dict[str, dict[str, float]] = json.loads(given.out.read_text())["losses"] if given.out.exists() else {}
    runs = Runs(given.model, given.data)
    cases = [("all alike", 1.0, lambda name: False), *((n, f, which) for n, which in GROUPS.items() for f in FACTORS)]
    summary: dict[str, dict[str, float]] = {}
    for name, factor, which in cases:
        row = losses.setdefault(f"{name} x {factor:g}", {})
        for task in runs.tasks:
            if task.name not in row:
                row[task.name] = round(runs.loss(task, which, factor), 5)
        gains = [math.log(row[task.name] / losses["all alike x 1"][task.name]) for task in runs.tasks]
        found = {"mean": round(fmean(gains), 4), "error": round(stdev(gains) / math.sqrt(len(gains)), 4)}
        summary[f"{name} x {factor:g}"] = found
        print(f"{name} x {factor:g}: log ratio {found['mean']:+.4f} ± {found['error']:.4f}", flush=True)
        facts = {"log ratio of the loss": summary, "losses": losses}
        given.out.write_text(json.dumps(facts).replace('}, "', '},\n"') + "\n")


if __name__ == "__main__":
    main()
