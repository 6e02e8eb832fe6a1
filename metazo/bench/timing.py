"""Interleaved timing: every round runs each case once, in a new order, so that drift of the machine affects all equally."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

Samples = dict[str, list[float]]
"""Seconds by case, one figure per round."""


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    seconds: float = 0.0,
    device: str = "cpu",
    twice: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> Samples:
    """Run the cases in turn, after two uncounted rounds. The first compiles and uses memory for the first time; so does the
    second, because a step whose update waits for the next probe makes the two together from its second call on.

    Args: rounds: least number of rounds; seconds: continue, up to 100 rounds, until this time is measured; twice: run each
    case twice in a row and count the second, for cases of which each has memory of its own; tick: called after each case.
    """
    samples: Samples = {name: [] for name in cases}
    order = list(cases)
    for count in range(-1, 101):
        random.Random(count).shuffle(order)
        for name in order:
            if twice:
                _seconds(cases[name], device)
            taken = _seconds(cases[name], device)
            if count > 0:
                samples[name].append(taken)
            tick()
        if count >= rounds and sum(map(sum, samples.values())) >= seconds:
            break
    return samples


def _seconds(case: Callable[[], object], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    case()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and number of the values, to four digits."""
    low, median, high = (float(f"{value:.4g}") for value in np.percentile(values, (25, 50, 75)))
    return {"median": median, "low": low, "high": high, "rounds": len(values)}


def ratios(samples: Samples, over: str, under: str) -> list[float]:
    """The ratio of two cases, round by round."""
    return [a / b for a, b in zip(samples[over], samples[under], strict=True)]
