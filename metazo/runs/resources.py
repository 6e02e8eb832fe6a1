"""A run's order of data, and its polite end: what fine-tuning and meta-training share."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metazo.errors import UserError


class Interrupted(Exception):
    """A run was asked to stop by a signal and has saved what it needs to go on; the message says how."""

    def __init__(self, message: str, by: str = "SIGINT"):
        super().__init__(message)
        self.exit_code = 128 + signal.Signals[by].value  # as a shell reports it: 130, 143


def batch_indices(step: int, batch_size: int, examples: int, seed: int) -> list[int]:
    """Examples of a step: a walk through a new permutation each epoch, a function of the step alone.

    So a resumed run reads what the first would have read. Returns: batch_size indices.
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(examples) for epoch in {p // examples for p in places}
    }
    return [int(orders[place // examples][place % examples]) for place in places]


@contextmanager
def interruptible() -> Iterator[list[str]]:
    """Within, SIGINT and SIGTERM are put into the list that is given; a second one ends the process as usual.

    Look at the list after each step, save and go. Outside the main thread signals are left alone.
    """
    caught: list[str] = []

    def note(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)

    before = {}
    with suppress(ValueError):  # not the main thread
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def require_space(folder: Path, needed: int, what: str) -> None:
    """UserError where the disk of `folder` has less than `needed` bytes free."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{what} needs {size(needed)} on the disk of {folder} and {size(free)} are free; choose another place."
        )


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def peak_memory() -> int:
    """Bytes: the process's largest resident set, or the GPU's peak where one is in use."""
    import resource

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
