"""A reward on generated text, which has no gradient: the model writes answers, and steps raise their reward (their length).

python examples/reward.py            # needs metazo[llm]

The same function on the command line:

    metazo finetune --model pico --task pico_span --objective examples/reward.py:negative_reward --scale rms --lr 0.03 \
        --eps 0.03 --steps 15 --out runs/reward
"""

from __future__ import annotations

from statistics import fmean

from torch import nn

import metazo
from metazo.tasks.objectives import AnswerBatch

WANTED = 40  # characters


def reward(text: str) -> float:
    """The share of the wanted length that an answer has, at most 1."""
    return min(len(text), WANTED) / WANTED


def negative_reward(model: nn.Module, batch: AnswerBatch) -> float:
    """What the run minimises. `answers` are generated greedily for all rows together, so the value is not random."""
    return -fmean(reward(text) for text in batch.answers(model))


if __name__ == "__main__":
    tuned = metazo.finetune(
        "pico",
        "pico_span",
        objective=negative_reward,
        scale="rms",
        lr=0.03,  # a reward changes in steps: the probe and the rate are longer than for a loss
        eps=0.03,
        steps=10,
        batch_size=32,
        dev_examples=16,
        test_examples=32,
        eval_every=5,
    )
    for name in ("before", "dev", "test"):
        print(f"reward {-tuned.summary[name]['objective']:.3f} {name}")
