"""Can pico learn, to first order and to zeroth order? Prints the table of the card (`metazo/pico/model/card.md`).

python benchmarks/pico_learnable.py [--tasks pico_topic ...] [--lr 1e-4 3e-4 ...] [--steps 2500]

First order: Adam. Zeroth order: plain MeZO-SGD (Malladi et al. 2023) in twelve lines, so that the figure
rests on nothing but torch; batch 16, eps 1e-3, two forward passes a step. Each learning rate starts from the
same weights; the best is chosen by the loss on 300 validation rows and reported on 1,000 test rows.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--tasks", nargs="+", default=list(grammar.TASKS), choices=grammar.TASKS)
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3], help="learning rates of MeZO")
    parser.add_argument("--steps", type=int, default=2500, help="steps of MeZO, two forward passes each")
    parser.add_argument("--adam-lr", type=float, default=1e-3)
    parser.add_argument("--adam-steps", type=int, default=150)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    original = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    print("| task | before: loss, accuracy | Adam | MeZO | share of the reduction | lr of MeZO | s per forward |")
    print("|---|---|---|---|---|---|---|")
    for task in args.tasks:
        train, validation, test = (
            grammar.examples(task, split, n) for split, n in (("train", 1000), ("validation", 300), ("test", 1000))
        )
        batches = batches_of(task, tokenizer, train)
        before = score(original, tokenizer, task, test)
        model = copy.deepcopy(original)
        first_order(model, batches, args.adam_lr, args.adam_steps)
        adam = score(model, tokenizer, task, test)
        runs = []
        for lr in args.lr:
            model = copy.deepcopy(original)
            began = time.monotonic()
            mezo(model, batches, lr, args.steps)
            seconds = (time.monotonic() - began) / (2 * args.steps)
            chosen_by = score(model, tokenizer, task, validation)[0]
            runs.append((chosen_by if chosen_by == chosen_by else float("inf"), lr, model, seconds))
            print(f"  {task} lr {lr:g}: validation loss {chosen_by:.3f}", flush=True)
        _, lr, model, seconds = min(runs, key=lambda run: run[0])
        after = score(model, tokenizer, task, test)
        share = (before[0] - after[0]) / (before[0] - adam[0])
        cells = [f"{loss:.3f}, {accuracy:.3f}" for loss, accuracy in (before, adam, after)]
        print(f"| {task} | {' | '.join(cells)} | {share:.2f} | {lr:g} | {seconds:.4f} |", flush=True)


if __name__ == "__main__":
    main()
