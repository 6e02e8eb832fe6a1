"""The demo's learning rates: a grid for each method, on a seed of its own, the same tuner for all.

    python benchmarks/learning_rates.py --demo runs/demo --out benchmarks/learning_rates.json

Each method runs both tasks of the demo at 1,000 forward passes for each rate; chosen is the rate with the lowest mean of
the two losses on dev. The seed (1000) is none that anything is reported on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from metazo.config import FinetuneConfig
from metazo.demo import TASKS
from metazo.errors import UserError
from metazo.files import write_whole
from metazo.finetune import finetune

SEED, FORWARDS = 1000, 1000
GRID = (1.5e-4, 3e-4, 6e-4, 1.2e-3)
DIVERGED = 1e4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="folder of a demo, for its tuner")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    methods: dict[str, dict[str, Any]] = {
        "mezo": {},
        "mezo, RMS scale": {"scale": "rms"},
        "tuner": {"tuner": str(args.demo / "meta" / "tuner.safetensors")},
    }
    found: dict[str, Any] = {}
    for method, extra in methods.items():
        found[method] = {}
        for lr in GRID:
            losses = {}
            for task in TASKS:
                with tempfile.TemporaryDirectory() as folder:
                    config = FinetuneConfig(
                        model="pico", task=task, out=Path(folder) / "run", lr=lr, forwards=FORWARDS, seed=SEED,
                        dev_examples=200, test_examples=0, snapshot_every=0, keep="none", eval_every=500, **extra,
                    )  # fmt: skip
                    try:
                        losses[task] = finetune(config)["dev"]["loss"]
                    except UserError:  # diverged: ten steps in a row were skipped
                        losses[task] = DIVERGED
            found[method][f"{lr:g}"] = {**losses, "mean": sum(losses.values()) / len(losses)}
            print(f"{method}, lr {lr:g}: {losses}", flush=True)
            write_whole(args.out, (json.dumps(found, indent=1) + "\n").encode())
        best = min(found[method], key=lambda lr: found[method][lr]["mean"])
        print(f"{method}: {best}", flush=True)


if __name__ == "__main__":
    main()
