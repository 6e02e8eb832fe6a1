"""What the two passes of a MeZO step over 134M weights take, and how the machine changes meanwhile.

The passes are timed in steps at (1, 32), and in steps whose loss costs nothing, so that no forward pass runs between them. Then
pairs of forward passes and three plain passes are timed by turns, as medians of five, for a minute.

python benchmarks/passes.py --out benchmarks/passes.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from metazo.bench import steps
from metazo.bench.measurements import environment
from metazo.bench.models import build, lm_loss
from metazo.noise import cpu

ROUNDS = 15
SECONDS = 60
NAMES = {"_add_two": "two seeds", "_add": "one seed"}


def passes(optimizer: Any, loss: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Milliseconds of each pass of a step, medians."""
    found: dict[str, list[float]] = defaultdict(list)
    share = cpu.share

    def timed(run: Any, jobs: Any) -> None:
        start = time.perf_counter()
        share(run, jobs)
        found[NAMES[run.__name__.split("-")[0]]].append(1e3 * (time.perf_counter() - start))

    for _ in range(2):
        optimizer.step(loss)
    cpu.share = timed
    try:
        for _ in range(ROUNDS):
            optimizer.step(loss)
    finally:
        cpu.share = share
    return {name: round(statistics.median(times), 1) for name, times in found.items()}


def milliseconds(call: Callable[[], object]) -> float:
    """The median of five calls."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    model = build("134M")
    loss = lm_loss(model, (1, 32))
    optimizer = steps.make("MeZO", model)
    optimizer.defer = True
    result: dict[str, Any] = {"environment": environment("cpu", "float32", False), "threads": torch.get_num_threads()}
    result["milliseconds of a pass"] = {
        "in steps at (1, 32)": passes(optimizer, loss),
        "without forward passes": passes(optimizer, lambda: torch.tensor(1.0)),
    }
    print(result["milliseconds of a pass"])
    minute, end = [], time.monotonic() + SECONDS
    while time.monotonic() < end:
        pair = milliseconds(lambda: steps._forwards(loss)), milliseconds(lambda: steps._passes(model))
        minute.append(dict(zip((steps.FORWARDS, steps.PASSES), pair)))
        print(*pair, end="; ", flush=True)
    result["by turns, milliseconds"] = minute
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
