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
    """The loss of these examples. The batch is padded once, at the first call (a replayed step needs no batch)."""

    def __init__(self, model: nn.Module, prepared: Data, examples: Sequence[Any], device: torch.device):
        self.model, self.prepared, self.examples, self.device = model, prepared, examples, device
        self.batch: Any = None

    def __call__(self) -> Tensor:
        if self.batch is None:
            with torch.inference_mode(False):  # not inference tensors: a gradient may pass by them later
                self.batch = self.prepared.collate(self.examples).to(self.device)
        return self.prepared.loss(self.model, self.batch)


class FullLoss:
    """The mean loss over all training examples, in batches; one evaluation costs `batches` forward passes."""

    def __init__(self, model: nn.Module, prepared: Data, batch_size: int, device: torch.device):
        train = sorted(prepared.train, key=len)  # examples of similar length need less padding
        batches = [train[start : start + batch_size] for start in range(0, len(train), batch_size)]
        self.parts = [(len(batch) / len(train), BatchLoss(model, prepared, batch, device)) for batch in batches]
        self.batches = len(self.parts)

    def __call__(self) -> Tensor:
        return torch.stack([share * part() for share, part in self.parts]).sum()
