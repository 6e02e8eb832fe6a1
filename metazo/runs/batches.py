"""The examples that a step reads: a function of the step and the seed alone."""

from __future__ import annotations

import numpy as np


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
