"""Does meta-training beat the RMS rule? MeZO, RMS, random networks, published recipe and ratio objective on pico.

    python benchmarks/meta_objectives.py --out benchmarks/meta_objectives.json

Networks are meta-trained on one task and deployed on others, all arms with the same number of forward passes. The
learning rate of each arm is chosen from a grid on a separate seed by the loss on dev. Results are on other seeds, each
with networks of its own meta-seed: dev loss before and after, mean and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metazo.blocks import named_tensors
from metazo.io.files import write_whole
from metazo.meta.config import MetaConfig
from metazo.meta.loop import MetaRun
from metazo.meta.order import PreparedTask
from metazo.models.load import load_model
from metazo.optimizers import MeZO
from metazo.tasks import prepare, resolve
from metazo.tasks.evaluate import evaluate
from metazo.tuner.networks import PertNN
from metazo.tuner.scale import TunerScale

TUNE_SEED = 1000
_RMS: dict[str, Any] = {"features": "log", "parametrisation": "rms_exp", "meta_optimizer": "adam", "lr_meta": 3e-3}
RECIPES: dict[str, dict[str, Any]] = {
    "published": {
        "objective": "published",
        "features": "published",
        "parametrisation": "abs",
        "lr_update": 3e-4,
        "meta_optimizer": "sgd",
        "lr_meta": 0.1,
    },
    "one-step rms": {"objective": "published", "lr_update": 3e-4, "detach_kappa": False} | _RMS,
    "ratio": {"objective": "ratio"} | _RMS,
}


def meta_train(loaded, task: str, recipe: str, seed: int, steps: int) -> MetaRun:
    model = copy.deepcopy(loaded.model)
    prepared = prepare(resolve(task), loaded, train=1000, dev=1, test=1)
    config = MetaConfig(
        model=loaded.name,
        task=[task],
        out=Path("unused"),
        steps=steps,
        seed=seed,
        teacher_lr=0.01,
        restart_every=0.5,  # the teacher learns a pico task within two epochs
        **RECIPES[recipe],
    )
    run = MetaRun(model, named_tensors(model), [PreparedTask(prepared)], config)
    step = [run.step() for _ in range(steps)][-1]
    top = int(step.shares.argmax())
    print(f"  {recipe} {seed}: meta-loss {step.meta_loss:.3f}, largest share {float(step.shares[top]):.2f} "
          f"({run.scale.blocks[top].name}), sigma {float(step.scales.min()):.3f} to {float(step.scales.max()):.3f}",
          flush=True)  # fmt: skip
    return run


def scale_of(arm: str, networks: dict[tuple[str, int], MetaRun], blocks: int, seed: int):
    if arm == "mezo":
        return None
    if arm == "rms":
        return "rms"
    if arm == "random":
        return TunerScale(pertnn=PertNN(blocks, seed=100 + seed), every=50)
    run = networks[arm, 0 if seed == TUNE_SEED else seed]
    config = run.config
    kind = {"features": config.features, "parametrisation": config.parametrisation, "bound": config.bound}
    return TunerScale(pertnn=run.pertnn, every=50, **kind)


def deploy(loaded, prepared, scale, lr: float, seed: int, steps: int, batch_size: int) -> dict[str, float]:
    """Loss and accuracy on dev after `steps` steps of MeZO under a scale."""
    model = copy.deepcopy(loaded.model)
    optimizer = MeZO(model.named_parameters(), lr=lr, eps=1e-3, seed=seed, scale=scale)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = rng.choice(len(prepared.train), batch_size, replace=False)
        batch = prepared.collate([prepared.train[index] for index in chosen])
        optimizer.step(lambda: prepared.loss(model, batch))  # noqa: B023 (called at once)
    return evaluate(model, prepared, "dev")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pico")
    parser.add_argument("--meta-task", default="pico_topic")
    parser.add_argument("--tasks", nargs="+", default=["pico_sentiment", "pico_cause"])
    parser.add_argument("--arms", nargs="+", default=["mezo", "rms", "random", *RECIPES])
    parser.add_argument("--lr", nargs="+", type=float, default=[7.5e-5, 1.5e-4, 3e-4, 6e-4, 1.2e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--meta-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    began = time.monotonic()
    loaded = load_model(args.model)
    blocks = len(named_tensors(loaded.model))
    networks = {
        (recipe, seed): meta_train(loaded, args.meta_task, recipe, seed, args.meta_steps)
        for recipe in RECIPES
        if recipe in args.arms
        for seed in range(args.seeds)
    }
    print(f"meta-training: {time.monotonic() - began:.0f} s", flush=True)
    results: dict[str, Any] = {}
    for task in args.tasks:
        prepared = prepare(resolve(task), loaded, train=1000, dev=200, test=1)
        results[task] = {"before": evaluate(loaded.model, prepared, "dev")}
        print(f"{task}: before {results[task]['before']}", flush=True)
        for arm in args.arms:

            def final(lr: float, seed: int, arm=arm, prepared=prepared) -> dict[str, float]:
                scale = scale_of(arm, networks, blocks, seed)
                return deploy(loaded, prepared, scale, lr, seed, args.steps, args.batch_size)

            grid = {lr: final(lr, TUNE_SEED)["loss"] for lr in args.lr}
            lr = min(grid, key=lambda lr: grid[lr] if grid[lr] == grid[lr] else float("inf"))
            runs = [final(lr, seed) for seed in range(args.seeds)]
            losses = [run["loss"] for run in runs]
            results[task][arm] = {"lr": lr, "grid": grid, "runs": runs, "loss": statistics.mean(losses)}
            results[task][arm]["spread"] = statistics.stdev(losses) if len(losses) > 1 else 0.0
            accuracy = statistics.mean(run["accuracy"] for run in runs)
            print(f"{task} {arm}: lr {lr:g}, loss {statistics.mean(losses):.4f} +- "
                  f"{results[task][arm]['spread']:.4f}, accuracy {accuracy:.3f}; grid "
                  + ", ".join(f"{lr:g}: {loss:.3f}" for lr, loss in grid.items()), flush=True)  # fmt: skip
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    content = {"settings": settings | {"recipes": RECIPES}, "seconds": time.monotonic() - began, "results": results}
    content["torch"] = torch.__version__
    if args.out:
        write_whole(args.out, json.dumps(content, indent=1).encode())


if __name__ == "__main__":
    main()
