"""Measures the effect on block scales of reading the weights' statistics only every N steps. Writes
benchmarks/statistics_every.json.

    python benchmarks/statistics_every.py        # about a minute on two cores

pico on pico_sentiment, 300 steps of batch 16 with statistics read at every step. For the same weights and losses it computes
the scales that readings every N steps would have given: by N, the largest relative difference of kappa sigma of any block at
any step, and the mean over blocks and steps. RMS rule, and a tuner of the zoo (log features).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from metazo.optimizers import ZOOptimizer
from metazo.runs.batches import batch_indices
from metazo.runs.config import FinetuneConfig
from metazo.runs.setup import set_up
from metazo.tasks.closures import BatchLoss

RESULT = Path(__file__).with_suffix(".json")
STEPS, BATCH, EVERY = 300, 16, (1, 10, 50, 100, 300)
ARMS: dict[str, dict[str, Any]] = {
    "rms": {"optimizer": "mezo", "scale": "rms", "lr": 3e-4},
    "tuner": {"optimizer": "zo-finetuner", "tuner": "auto", "lr": 6e-4},
}


def differences(arm: str, steps: int = STEPS) -> dict[str, dict[str, float]]:
    """By N: largest and mean relative difference to readings at every step."""
    config = FinetuneConfig(
        model="pico", task="pico_sentiment", out=Path("unused"), batch_size=BATCH, statistics_every=1, **ARMS[arm]
    )
    setup = set_up(config)
    optimizer, train = setup.optimizer, setup.prepared.train
    assert isinstance(optimizer, ZOOptimizer) and optimizer.scale is not None
    optimizer.tensors_state()
    shadows = {every: replace(optimizer.scale, every=every) for every in EVERY}
    states = {}
    for every, scale in shadows.items():
        scale.bind(optimizer.tensors)
        states[every] = scale.init()
    found: dict[int, list[torch.Tensor]] = {every: [] for every in EVERY}
    for step in range(steps):
        scales = {every: shadows[every].scales(states[every], step, optimizer.weights.read) for every in EVERY}
        right = torch.tensor(list(scales[1].values()))
        for every in EVERY:
            found[every].append((torch.tensor(list(scales[every].values())) / right - 1).abs())
        batch = [train[place] for place in batch_indices(step, BATCH, len(train), config.seed)]
        optimizer.step(BatchLoss(setup.loaded.model, setup.prepared, batch, setup.device))
        assert optimizer.last_step is not None
        for every, scale in shadows.items():
            scale.observe(states[every], *optimizer.estimator.plus_minus(optimizer.last_step.losses))
    return {
        str(every): {
            "largest": round(float(torch.stack(values).max()), 5),
            "mean": round(float(torch.stack(values).mean()), 6),
        }
        for every, values in found.items()
    }


def main() -> None:
    result = {arm: differences(arm) for arm in ARMS}
    RESULT.write_text(json.dumps({"steps": STEPS, "rows": result}, indent=1) + "\n")
    for arm, rows in result.items():
        for every, row in rows.items():
            print(f"{arm:6} every {every:>3}: largest {row['largest']:.2%}, mean {row['mean']:.3%}")


if __name__ == "__main__":
    main()
