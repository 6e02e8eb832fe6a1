"""Which examples a step reads: a function of the step and the seed alone."""

from __future__ import annotations

import numpy as np


def batch_indices(step: int, batch_size: int, examples: int, seed: int) -> list[int]:
    """Examples of a step: a walk through a new permutation each epoch, a function of the step alone.

    So a resumed run reads what the first would have read. Returns: batch_size indices.
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(examples) for epoch in {p // examples for p in places}
    }
    return [int(orders[place // examples][place % examples]) for place in places]
