"""Learned feedback against the skip rule, which needs nothing learned, on tasks that the feedback was not fitted on.

    metazo meta-train --learn feedback --model MINILM --data DATA --out runs/feedback --texts 1280
    python benchmarks/learned_feedback.py --model MINILM --data DATA --tuner runs/feedback

DATA/<task>/{train,validation}.jsonl; about 3 minutes of one core (--layers 6: 10). The feedback is fitted on the texts
of the families for meta-training; the tasks here are of held-out families. Head of label phrases, batches of 16, 40 steps
(120 forward passes) of a learning rate that falls to 0. Every method has the same two rates and seeds; a cell is a task
and a set of trained layers, and its loss is that of the better rate, mean over the seeds.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from metazo.feedback.tuner import FeedbackTuner
from metazo.models.load import load_model
from metazo.optimizers.feedback import Feedback
from metazo.optimizers.skip_feedback import SkipFeedback
from metazo.tasks import get, prepare
from metazo.tasks.classes import fit_head
from metazo.tasks.evaluate import evaluate

TASKS = ("subj", "ag_news", "stackoverflow_sentiment")
RATES, SEEDS = (4e-3, 1e-2), (0, 1)
BATCH, STEPS, LENGTH = 16, 40, 32
KEY = ("task", "layers", "method", "lr", "seed")


def cases(model: str, data: Path, tuner: FeedbackTuner, task: str, layers: int, known: set[tuple]):
    """The runs of a task with these top layers trained, one after the other, but for the known ones."""
    made = [(m, lr, s) for s in SEEDS for lr in RATES for m in ("skip-feedback", "feedback")]
    wanted = [(m, lr, s) for m, lr, s in made if (task, layers, m, lr, s) not in known]
    if not wanted:
        return
    found = get(task)
    loaded = load_model(model, num_labels=found.num_labels, head="phrases")
    prepared = prepare(found, loaded, data=data, train=STEPS * BATCH, dev=0, test=300, max_length=LENGTH)
    net: Any = loaded.model.eval()
    net.requires_grad_(False)
    net.encoder.encoder.layer[-layers:].requires_grad_(True)
    net.cache_frozen()
    fit_head(loaded, prepared, 32)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    before = evaluate(net, prepared, "test", batch_size=50)
    for method, lr, seed in wanted:
        net.load_state_dict(start)
        options: dict[str, Any] = {"tuner": tuner} if method == "feedback" else {}
        cls = Feedback if method == "feedback" else SkipFeedback
        optimizer = cls(net.named_parameters(), lr, model=net, recompute=False, seed=seed, **options)
        order, begun = random.Random(seed).sample(prepared.train, len(prepared.train)), time.process_time()
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / STEPS)
            batch = prepared.collate(order[step * BATCH : (step + 1) * BATCH])
            optimizer.step(lambda batch=batch: prepared.loss(net, batch))
        after = evaluate(net, prepared, "test", batch_size=50)
        yield dict(zip(KEY, (task, layers, method, lr, seed))) | {
            "before": round(before["loss"], 4), "loss": round(after["loss"], 4), "accuracy": round(after["accuracy"], 4),
            "cpu_seconds": round(time.process_time() - begun, 1),
        }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Loss of both methods per task and trained layers, and the mean of the ratios."""
    cells: dict[tuple, dict[str, dict[float, list[dict]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        cells[row["task"], row["layers"]][row["method"]][row["lr"]].append(row)
    lines, ratios = [], defaultdict(list)
    for (task, layers), methods in cells.items():
        best = {m: min(rates.values(), key=lambda runs: fmean(r["loss"] for r in runs)) for m, rates in methods.items()}
        losses = {m: fmean(r["loss"] for r in runs) for m, runs in best.items()}
        ratios[layers].append(losses["feedback"] / losses["skip-feedback"])
        shown = [
            f"{losses[m]:.3f} ({fmean(r['accuracy'] for r in best[m]):.3f})" for m in ("skip-feedback", "feedback")
        ]
        start = next(iter(best.values()))[0]["before"]
        lines.append(f"| {task} ({start:.3f}) | {layers} | {' | '.join(shown)} | {ratios[layers][-1]:.3f} |")
    lines += [f"| mean | {layers} | | | {fmean(found):.3f} |" for layers, found in ratios.items()]
    heads = "| task (start) | trained layers | skip-feedback | feedback | ratio of losses |\n|---|---|---|---|---|"
    return "\n".join([heads, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "tuner"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/learned_feedback.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    tuner = FeedbackTuner.load(given.tuner)
    rows: list[dict[str, Any]] = json.loads(given.out.read_text())["runs"] if given.out.exists() else []
    for layers in given.layers:
        for task in TASKS:
            known = {tuple(row[name] for name in KEY) for row in rows}
            for row in cases(given.model, Path(given.data), tuner, task, layers, known):
                rows.append(row)
                print(row, flush=True)
                text = json.dumps({"fit": tuner.info.recipe, "cosines": tuner.info.scores, "runs": rows})
                given.out.write_text(text.replace('{"task"', '\n{"task"') + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
