"""The examples that a step reads: a function of the step and the seed alone (and of the examples' lengths).

Processes divide them: each takes every so many examples of a batch, and its loss is weighted by their number, so that the mean
over the processes is the loss of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from metazo.errors import UserError
from metazo.runs.config import FinetuneConfig
from metazo.runs.own import OwnBatch
from metazo.tasks.closures import BatchLoss

WINDOW = 8  # most batches that are sorted together
ORDER = 2
"""Version of the order of batches by length, part of a step log's header. Version 1 sorted windows over several epochs."""


def batch_indices(step: int, batch_size: int, examples: int, seed: int) -> list[int]:
    """Indices of the examples of a step: each epoch goes through a new permutation.

    The permutation depends on the seed and the epoch alone, so a resumed run reads the same examples as an uninterrupted
    one. Returns: batch_size indices.
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: _order(epoch, examples, seed) for epoch in {p // examples for p in places}}
    return [int(orders[place // examples][place % examples]) for place in places]


@lru_cache(maxsize=2)  # a batch may begin in one epoch and end in the next
def _order(epoch: int, examples: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(examples)


def batch_indices_by_length(step: int, batch_size: int, lengths: Sequence[int], seed: int) -> list[int]:
    """As `batch_indices`, with examples of similar length in a batch, so that little of it is padding.

    The examples of up to WINDOW steps within an epoch are those of `batch_indices`; they are sorted by length, cut into
    batches, and the batches are taken in an order that the seed decides. The last window of an epoch may be shorter. A batch
    that begins in one epoch and ends in the next is that of `batch_indices`, because sorting would put the copies of an
    example side by side. lengths: of the inputs, in tokens. Returns: batch_size indices.
    """
    examples = len(lengths)
    epoch = step * batch_size // examples
    first, end = -(-epoch * examples // batch_size), (epoch + 1) * examples // batch_size  # steps within the epoch
    if step >= end:
        return batch_indices(step, batch_size, examples, seed)
    first += (step - first) // WINDOW * WINDOW
    count = min(WINDOW, end - first)
    drawn = [place for k in range(count) for place in batch_indices(first + k, batch_size, examples, seed)]
    drawn.sort(key=lengths.__getitem__)
    batch = int(np.random.default_rng([seed, first // WINDOW, WINDOW]).permutation(count)[step - first])
    return drawn[batch * batch_size : (batch + 1) * batch_size]


def order_of(config: FinetuneConfig, examples: int) -> dict[str, int]:
    """The version of the order of the batches as a field of a step log's header, if the run's order has versions: it has one
    in batches by length, unless an epoch is a whole number of windows.
    """
    versions = config.batches == "by-length" and examples % (WINDOW * config.batch_size)
    return {"order": ORDER} if versions else {}


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


def padding(config: FinetuneConfig, train: Sequence[Any]) -> list[str]:
    """A sentence for the user if batches of inputs of similar length would have a quarter fewer tokens."""
    if config.resume or config.batches is not None or config.batch_size == 1 or len(train) < 2 * config.batch_size:
        return []
    kept, found = sum(map(len, train)) / len(train), []
    for chosen in (config, replace(config, batches="by-length")):
        read, steps = reader(chosen, train), min(4 * WINDOW, len(train) // config.batch_size)
        found.append(sum(max(map(len, read(number))) for number in range(steps)) / steps)
    if found[1] > 0.75 * found[0]:
        return []
    random, alike = (f"{100 * max(0.0, 1 - kept / length):.0f} %" for length in found)
    return [
        f"Of the tokens in a batch {random} are padding; with `batches` by-length, which takes inputs of similar length, "
        f"{alike} are, and forward passes take less time."
    ]


def check_shares(config: FinetuneConfig, own: bool, shares: int) -> None:
    """Raises UserError if the batches of a step cannot be divided. own: they are batches of the caller, which are not cut."""
    if own and config.accumulate % shares:
        raise UserError(
            f"`accumulate` is {config.accumulate} and {shares} processes divide the batches of a step, which are not cut: "
            f"choose a multiple of {shares}, or a higher `probe_ranks`."
        )
    if config.objective is not None and shares > 1:
        raise UserError(
            f"`objective` {config.objective} is computed on whole batches, and {shares} processes divide them: choose a "
            f"`probe_ranks` of {shares * config.probe_ranks}, so that they divide the probes."
        )
    if not own and config.batch_size < shares:
        raise UserError(
            f"`batch_size` is {config.batch_size} and {shares} processes divide its examples: choose {shares} or more, or a "
            "higher `probe_ranks`."
        )


def step_losses(
    config: FinetuneConfig, setup: Any, read: Callable[[int], list[Any]], step: int, share: tuple[int, int]
) -> list[BatchLoss]:
    """The losses of a step's batches, on this process's share of them: (index, number) of the shares."""
    index, shares = share
    batches = [read(number) for number in range(step * config.accumulate, (step + 1) * config.accumulate)]
    fixed = setup.loaded.model, setup.data
    if isinstance(batches[0][0], OwnBatch):
        return [BatchLoss(*fixed, batch, setup.device, batches=shares) for batch in batches[index::shares]]
    parts = [(batch[index::shares], len(batch)) for batch in batches]
    return [BatchLoss(*fixed, part, setup.device, shares * len(part) / whole) for part, whole in parts]
