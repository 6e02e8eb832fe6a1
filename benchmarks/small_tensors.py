"""What a step costs beyond its forward passes if tensors are many and small: a Llama of 39 tensors with 0.2 million weights.

The loss costs nothing, so that all of the time is the method's own. One thread; every round times each method once.

python benchmarks/small_tensors.py --out benchmarks/small_tensors.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from metazo.bench.measurements import environment
from metazo.optimizers import OPTIMIZERS, ZOOptimizer

METHODS = ("mezo", "lozo", "hizoo", "hizoo-l", "zo-muon", "loren", "eggroll")
STEPS = 3
"""Steps of a method in a round."""


def losses() -> Iterator[float]:
    return cycle([1.0 + 0.01 * k for k in range(7)])


def prepared(name: str) -> ZOOptimizer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    return OPTIMIZERS[name](model.named_parameters(), lr=1e-4, probing="in-turn", check_loss=False)  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    optimizers, seen = {name: prepared(name) for name in METHODS}, losses()
    taken: dict[str, list[float]] = {name: [] for name in METHODS}
    for number in range(given.rounds + 1):
        for name, optimizer in optimizers.items():
            started = time.process_time()
            for _ in range(STEPS):
                optimizer.step(lambda: next(seen))
            if number:  # the first round compiles
                taken[name].append((time.process_time() - started) / STEPS * 1e3)
    found = {name: round(statistics.median(times), 1) for name, times in taken.items()}
    for name, milliseconds in found.items():
        print(f"{name}: {milliseconds} ms per step")
    if given.out:
        result = {"environment": environment("cpu", "float32", False), "milliseconds": found}
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
