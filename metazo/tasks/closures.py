"""Closures for an optimizer: the loss of a batch, and of all training examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Data(Protocol):
    """What a loss is computed on: a task's encoded rows (`metazo.tasks.Prepared`), or batches of the caller."""

    @property
    def train(self) -> Sequence[Any]: ...
    def collate(self, examples: Any, /) -> Any: ...
    def loss(self, model: Any, batch: Any, /) -> Tensor: ...


class BatchLoss:
    """The loss of these examples. The batch is padded once, at the first call (a replayed step needs no batch).

    factor: by which the loss is multiplied, if the examples are one process's share of a batch. batches: the number of
    batches as which an evaluation counts.
    """

    def __init__(
        self,
        model: nn.Module,
        prepared: Data,
        examples: Sequence[Any],
        device: torch.device,
        factor: float = 1.0,
        batches: int = 1,
    ):
        self.model, self.prepared, self.examples, self.device = model, prepared, examples, device
        self.factor, self.batches = factor, batches
        self.batch: Any = None

    def __call__(self) -> Tensor:
        if self.batch is None:
            with torch.inference_mode(False):  # not inference tensors: a gradient may pass by them later
                self.batch = self.prepared.collate(self.examples).to(self.device)
        loss = self.prepared.loss(self.model, self.batch)
        return loss if self.factor == 1 else loss * self.factor


class FullLoss:
    """The mean loss over all training examples, in batches; one evaluation costs `batches` forward passes.

    share: (index, number) of the processes that divide the batches among them; the mean over them is the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        prepared: Data,
        batch_size: int,
        device: torch.device,
        share: tuple[int, int] = (0, 1),
    ):
        train = sorted(prepared.train, key=len)  # examples of similar length need less padding
        batches = [train[start : start + batch_size] for start in range(0, len(train), batch_size)]
        index, shares = share
        self.parts = [
            (shares * len(batch) / len(train), BatchLoss(model, prepared, batch, device))
            for batch in batches[index::shares]
        ]
        self.batches = len(batches)

    def __call__(self) -> Tensor:
        return torch.stack([weight * part() for weight, part in self.parts]).sum() if self.parts else torch.zeros(())
