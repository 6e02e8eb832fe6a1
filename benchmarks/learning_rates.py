"""Chooses learning rates on pico from a grid for each method, on a separate seed, with the same tuner for all.

    python benchmarks/learning_rates.py --tuner TUNER --out benchmarks/learning_rates.json

Each method runs two tasks at 1,000 forward passes for each rate. The chosen rate has the lowest mean of the
two losses on dev among those whose next higher rate has not diverged, because on another seed the best rate itself may
diverge. No result is reported on the seed (1000). Results in the file of --out are kept: remove it for another tuner.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from metazo.errors import UserError
from metazo.io.files import write_whole
from metazo.runs.config import FinetuneConfig
from metazo.runs.finetune import run_settings

TASKS = ("pico_sentiment", "pico_topic")
SEED, FORWARDS = 1000, 1000
GRID = (7.5e-5, 1.5e-4, 2.1e-4, 3e-4, 4.2e-4, 6e-4)
DIVERGED = 1e4  # the loss of a run that stopped because ten steps in a row were bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuner", type=Path, required=True, help="a tuner for pico, made by metazo meta-train")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    methods: dict[str, dict[str, Any]] = {
        "mezo": {},
        "mezo, RMS scale": {"scale": "rms"},
        "tuner": {"tuner": str(args.tuner)},
    }
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for method, extra in methods.items():
        found.setdefault(method, {})
        for lr in GRID:
            if f"{lr:g}" in found[method]:
                continue
            losses = {}
            for task in TASKS:
                with tempfile.TemporaryDirectory() as folder:
                    config = FinetuneConfig(
                        model="pico", task=task, out=Path(folder) / "run", lr=lr, forwards=FORWARDS, seed=SEED,
                        dev_examples=200, test_examples=0, snapshot_every=0, keep="none", eval_every=500, **extra,
                    )  # fmt: skip
                    try:
                        losses[task] = run_settings(config)["dev"]["loss"]
                    except UserError:
                        losses[task] = DIVERGED
            found[method][f"{lr:g}"] = {**losses, "mean": sum(losses.values()) / len(losses)}
            print(f"{method}, lr {lr:g}: {losses}", flush=True)
            write_whole(args.out, (json.dumps(found, indent=1) + "\n").encode())
        means = [found[method][f"{lr:g}"]["mean"] for lr in GRID]
        safe = [(mean, lr) for mean, lr, above in zip(means, GRID, means[1:], strict=False) if above < 1]
        print(f"{method}: best {min(zip(means, GRID, strict=True))}, chosen {min(safe)}", flush=True)


if __name__ == "__main__":
    main()
