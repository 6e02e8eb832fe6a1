"""Can the step be had without a learning rate, and does the estimate help if the objective has no gradient?

    python benchmarks/step_length.py --model MINILM        # a few minutes of one core

Task books, which metazo carries; last two layers of all-MiniLM-L6-v2, head of label phrases, batches of 16, one seed, 120
forward passes each. Loss and error rate on 300 test passages.

fixed         skip feedback, learning rate that falls to 0: 3 forward passes per step
line search   after each estimate two forward passes, at once and twice the present length a; the next length is at the
              minimum of the parabola through the three losses of the batch, within [a / 2, 4 a]: 5 forward passes per step
guided        the objective is the error rate of the batch, which has no gradient: a two-point probe along the step of the
              skip estimate plus noise of its length, and a step in proportion to the slope: 5 forward passes per step
mezo          the same objective, plain MeZO: 2 forward passes per step
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from metazo.models.load import load_model
from metazo.optimizers.mezo import MeZO
from metazo.optimizers.skip_feedback import SkipFeedback
from metazo.tasks import get, prepare
from metazo.tasks.classes import fit_head
from metazo.tasks.evaluate import evaluate

BATCH, BUDGET, LENGTH, SEED = 16, 120, 32, 0
RUNS = [
    ("fixed", 1e-3), ("fixed", 4e-3), ("fixed", 1e-2), ("fixed", 3e-2), ("line search", 1e-4), ("line search", 1e-2),
    ("guided", 1e-2), ("guided", 1e-1), ("mezo", 4e-4),
]  # fmt: skip


class Bench:
    def __init__(self, model: str):
        task = get("books")
        loaded = load_model(model, num_labels=task.num_labels, head="phrases")
        self.prepared = prepare(task, loaded, train=BATCH * BUDGET // 2, dev=0, test=300, max_length=LENGTH)
        self.net: Any = loaded.model.eval()
        self.net.requires_grad_(False)
        self.net.encoder.encoder.layer[-2:].requires_grad_(True)
        self.net.cache_frozen()
        fit_head(loaded, self.prepared, 32)
        self.trained = [p for p in self.net.parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in self.trained]

    def set(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.trained, values):
            parameter.data.copy_(value)

    def values(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.trained]

    def run(self, method: str, lr: float) -> dict[str, Any]:
        self.set(self.start)
        torch.default_generator.manual_seed(SEED)
        cost = {"fixed": 3, "line search": 5, "guided": 5, "mezo": 2}[method]
        steps, length = BUDGET // cost, lr
        order = random.Random(SEED).sample(self.prepared.train, len(self.prepared.train))
        skip = SkipFeedback(self.net.named_parameters(), lr, model=self.net, recompute=False)
        mezo = MeZO(self.net.named_parameters(), lr=lr, seed=SEED)
        for step in range(steps):
            batch = self.prepared.collate(order[step * BATCH : (step + 1) * BATCH])
            loss = lambda batch=batch: self.prepared.loss(self.net, batch)  # noqa: E731
            wrong = lambda batch=batch: self._wrong(batch)  # noqa: E731
            if method == "mezo":
                mezo.param_groups[0]["lr"] = lr * (1 - step / steps)
                mezo.step(wrong)
                continue
            rate = {"fixed": lr * (1 - step / steps), "line search": length, "guided": 1e-2}[method]
            for group in skip.param_groups:
                group["lr"] = rate
            before = self.values()
            first = skip.step(loss)
            if method == "line search":
                length = self._search(before, first, loss, length)
            if method == "guided":
                self._probe(before, wrong, lr * (1 - step / steps))
        found = evaluate(self.net, self.prepared, "test", batch_size=50)
        return {"method": method, "lr": lr, "steps": steps} | {
            "loss": round(found["loss"], 4), "error": round(1 - found["accuracy"], 4), "last length": round(length, 6)
        }  # fmt: skip

    def _wrong(self, batch: Any) -> float:
        with torch.no_grad():
            scores = self.prepared.scores(self.net, batch)
        return float((scores.argmax(1) != batch["targets"]).float().mean())

    def _search(self, before: list, first: float, loss: Callable, length: float) -> float:
        """The least point of the parabola through the losses at 0, a and 2 a; the weights are set to it."""
        step = [new - old for new, old in zip(self.values(), before)]
        losses = [first]
        for multiple in (1.0, 2.0):
            self.set([old + multiple * move for old, move in zip(before, step)])
            with torch.no_grad():
                losses.append(float(loss()))
        bend = losses[2] - 2 * losses[1] + losses[0]
        slope = (4 * losses[1] - 3 * losses[0] - losses[2]) / 2  # of the parabola at 0, in units of 1 / a
        best = -slope / bend if bend > 0 else (4.0 if losses[2] < losses[0] else 0.5)
        best = min(4.0, max(0.5, best)) if math.isfinite(best) else 0.5
        self.set([old + best * move for old, move in zip(before, step)])
        return length * best

    def _probe(self, before: list, wrong: Callable, lr: float) -> None:
        """A two-point probe of the error rate along the estimate's step plus noise of its length."""
        step = [new - old for new, old in zip(self.values(), before)]
        direction = []
        for move in step:
            noise = torch.randn_like(move)
            direction.append(move + noise * (move.norm() / noise.norm()))
        ends = []
        for sign in (1, -1):
            self.set([old + sign * d for old, d in zip(before, direction)])
            ends.append(wrong())
        slope = (ends[0] - ends[1]) / 2
        # a slope of -1 / BATCH, one more right answer at one end, moves the weights by lr / 0.01 probes
        self.set([old - lr / 1e-2 * BATCH * slope * d for old, d in zip(before, direction)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/step_length.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench, rows = Bench(given.model), []
    before = evaluate(bench.net, bench.prepared, "test", batch_size=50)
    start = {"loss": round(before["loss"], 4), "error": round(1 - before["accuracy"], 4)}
    print(start, flush=True)
    for method, lr in RUNS:
        rows.append(bench.run(method, lr))
        print(rows[-1], flush=True)
        text = json.dumps({"before": start, "runs": rows}).replace('{"method"', '\n{"method"')
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
