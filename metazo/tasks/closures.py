"""Closures for an optimizer: the loss of a batch, and of all training examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metazo.tasks import Batch, Prepared
from metazo.tasks.encode import Encoded


class BatchLoss:
    """The loss of these examples. The batch is padded once, at the first call (a replayed step needs no batch)."""

    def __init__(self, model: nn.Module, prepared: Prepared, examples: Sequence[Encoded], device: torch.device):
        self.model, self.prepared, self.examples, self.device = model, prepared, examples, device
        self.batch: Batch | None = None

    def __call__(self) -> Tensor:
        if self.batch is None:
            with torch.inference_mode(False):  # not inference tensors: a gradient may pass by them later
                self.batch = self.prepared.collate(self.examples).to(self.device)
        return self.prepared.loss(self.model, self.batch)


class FullLoss:
    """The mean loss over all training examples, in batches; one evaluation costs `batches` forward passes."""

    def __init__(self, model: nn.Module, prepared: Prepared, batch_size: int, device: torch.device):
        train = sorted(prepared.train, key=len)  # examples of similar length need less padding
        batches = [train[start : start + batch_size] for start in range(0, len(train), batch_size)]
        self.parts = [(len(batch) / len(train), BatchLoss(model, prepared, batch, device)) for batch in batches]
        self.batches = len(self.parts)

    def __call__(self) -> Tensor:
        return torch.stack([share * part() for share, part in self.parts]).sum()
