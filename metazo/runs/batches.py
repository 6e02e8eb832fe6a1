"""The examples that a step reads: a function of the step and the seed alone (and of the examples' lengths)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from metazo.runs.config import FinetuneConfig

WINDOW = 8  # batches that are sorted together


def batch_indices(step: int, batch_size: int, examples: int, seed: int) -> list[int]:
    """Indices of the examples of a step: each epoch goes through a new permutation.

    The permutation depends on the seed and the epoch alone, so a resumed run reads the same examples as an uninterrupted
    one. Returns: batch_size indices.
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(examples) for epoch in {p // examples for p in places}
    }
    return [int(orders[place // examples][place % examples]) for place in places]


def batch_indices_by_length(step: int, batch_size: int, lengths: Sequence[int], seed: int) -> list[int]:
    """As `batch_indices`, with examples of similar length in a batch, so that little of it is padding.

    The examples of WINDOW steps are those of `batch_indices`; they are sorted by length, cut into WINDOW batches, and the
    batches are taken in an order that the seed decides. lengths: of the inputs, in tokens. Returns: batch_size indices.
    """
    window, place = divmod(step, WINDOW)
    drawn = batch_indices(window, WINDOW * batch_size, len(lengths), seed)
    drawn.sort(key=lengths.__getitem__)
    batch = int(np.random.default_rng([seed, window, WINDOW]).permutation(WINDOW)[place])
    return drawn[batch * batch_size : (batch + 1) * batch_size]


def reader(config: FinetuneConfig, train: Sequence[Any]) -> Callable[[int], list[Any]]:
    """A function that gives the examples of the batch of that number, counted from 0 over the whole run."""
    size, seed, lengths = config.batch_size, config.seed, [len(example) for example in train]

    def read(number: int) -> list[Any]:
        if config.batches == "by-length":
            places = batch_indices_by_length(number, size, lengths, seed)
        else:
            places = batch_indices(number, size, len(train), seed)
        return [train[place] for place in places]

    return read
