"""Can pico learn, to first order and to zeroth order? The figures of its card (`metazo/pico/model/card.md`).

    python benchmarks/pico_learnable.py --out benchmarks/pico_learnable.json

First order: Adam. Zeroth order: plain MeZO-SGD (Malladi et al. 2023) in twelve lines, so that the figure
depends on nothing but torch; eps 1e-3, two forward passes per step. Both draw batches of 16 from 1,000 train
rows. Each learning rate starts from the same weights; the best is chosen by the loss on 300 validation rows and
reported on 1,000 test rows with held-out words and templates. One seed. Tasks already in the file of --out are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from metazo.io.files import write_whole
from metazo.pico import grammar
from metazo.pico.score import encode, loss_and_hits, score

MODEL = Path(grammar.__file__).parent / "model"


def first_order(model, batches, lr: float, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for step in range(steps):
        loss_and_hits(model, batches(step))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - (step + 1) / steps)


def add(parameters: list, noise: list, alpha: float) -> None:
    for parameter, z in zip(parameters, noise, strict=True):
        parameter.add_(z, alpha=alpha)


@torch.no_grad()
def mezo(model, batches, lr: float, steps: int, eps: float = 1e-3) -> None:
    parameters = list(model.parameters())
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        noise = [torch.randn(p.shape, generator=generator) for p in parameters]
        batch, losses = batches(step), []
        for sign in (1, -1):
            add(parameters, noise, sign * eps)
            losses.append(float(loss_and_hits(model, batch)[0]))
            add(parameters, noise, -sign * eps)
        slope = (losses[0] - losses[1]) / (2 * eps)
        add(parameters, noise, -lr * slope)


def batches_of(task: str, tokenizer, rows: list[dict], size: int = 16, seed: int = 0):
    """Function of the step: batch of ``size`` rows, drawn without repetition within a batch."""

    def batch(step: int):
        return encode(task, random.Random(f"{seed}/{step}").sample(rows, size), tokenizer)

    return batch


def learn(task: str, original, tokenizer, args: argparse.Namespace) -> dict[str, Any]:
    """[loss, accuracy] on test before and after, at the chosen rate; and MeZO's loss reduction as a fraction of Adam's."""
    train, validation, test = (
        grammar.examples(task, split, n) for split, n in (("train", 1000), ("validation", 300), ("test", 1000))
    )
    batches = batches_of(task, tokenizer, train)
    found: dict[str, Any] = {"before": score(original, tokenizer, task, test)}
    ways = {"adam": (first_order, args.adam_lr, args.adam_steps), "mezo": (mezo, args.lr, args.steps)}
    for name, (way, rates, steps) in ways.items():
        grid: dict[float, tuple[float, Any]] = {}
        began = time.monotonic()
        for lr in rates:
            model = copy.deepcopy(original)
            way(model, batches, lr, steps)
            loss = score(model, tokenizer, task, validation)[0]
            grid[lr] = (loss if loss == loss else float("inf"), model)
        best = min(grid, key=lambda lr: grid[lr][0])
        found[name] = {"test": score(grid[best][1], tokenizer, task, test), "lr": best, "steps": steps}
        found[name] |= {"validation": {lr: loss for lr, (loss, _) in grid.items()}, "s": time.monotonic() - began}
    after, adam = found["mezo"]["test"][0], found["adam"]["test"][0]
    found["share"] = (found["before"][0] - after) / (found["before"][0] - adam)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--tasks", nargs="+", default=list(grammar.TASKS), choices=grammar.TASKS)
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3], help="learning rates of MeZO")
    parser.add_argument("--steps", type=int, default=500, help="steps of MeZO, two forward passes each")
    parser.add_argument("--adam-lr", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--adam-steps", type=int, default=100)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    original = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    found = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    print("| task | before: loss, accuracy | Adam | MeZO | MeZO's share of Adam's reduction | rates | class prior |")
    print("|---|---|---|---|---|---|---|")
    for task in args.tasks:
        found[task] = at = learn(task, original, tokenizer, args)
        pairs = (at["before"], at["adam"]["test"], at["mezo"]["test"])
        cells = [f"{loss:.3f}, {accuracy:.3f}" for loss, accuracy in pairs]
        words = grammar.PROMPTS[task].words
        prior = "none" if grammar.PROMPTS[task].kind == "generation" else f"{1 / len(words or (1, 2)):.2f}"
        rates = f"{at['adam']['lr']:g}, {at['mezo']['lr']:g}"
        print(f"| {task} | {' | '.join(cells)} | {at['share']:.2f} | {rates} | {prior} |", flush=True)
        if args.out:
            write_whole(args.out, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
