"""Tasks for meta-training, and the order of their batches, which depends only on (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from metazo.errors import UserError
from metazo.tasks.prepared import Batch, Prepared

_OTHER = 1 << 20  # separates the random numbers of second batches from those of epochs


class MetaTask(Protocol):
    """A training set with a loss."""

    name: str

    def __len__(self) -> int: ...

    def loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        """Mean loss on these examples, a scalar, differentiable if grad is enabled."""
        ...

    def sampled_loss(self, model: nn.Module, indices: Sequence[int], generator: torch.Generator) -> SampledLoss:
        """Draw labels from the model's predictions on these examples; returns a loss on them, of whose gradient the squared
        norm times the number of examples is in the mean the trace of the Fisher information."""
        ...


class SampledLoss(Protocol):
    def __call__(self) -> Tensor: ...


class PreparedTask:
    """The training split of a prepared task."""

    def __init__(self, prepared: Prepared, device: torch.device | str = "cpu"):
        self.prepared, self.device = prepared, device
        self.name = prepared.task.name

    @property
    def tokens(self) -> int:
        """Labels that are sampled for the longest answer: its tokens, or one class."""
        if self.prepared.task.kind == "classification":
            return 1
        return max(len(example.options[example.targets[0]]) for example in self.prepared.train)

    def __len__(self) -> int:
        return len(self.prepared.train)

    def batch(self, indices: Sequence[int]) -> Batch:
        return self.prepared.collate([self.prepared.train[index] for index in indices]).to(self.device)

    def loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        return self.prepared.loss(model, self.batch(indices))

    def sampled_loss(self, model: nn.Module, indices: Sequence[int], generator: torch.Generator) -> SampledLoss:
        batch = with_sampled_labels(self.prepared, model, self.batch(indices), generator)
        return lambda: self.prepared.sampled_loss(model, batch)


@torch.no_grad()
def with_sampled_labels(prepared: Prepared, model: nn.Module, batch: Batch, generator: torch.Generator) -> Batch:
    """The batch with labels sampled from the model itself: classes, or, for choice and generation, answer tokens.

    Each token is drawn given the true tokens before it, so that squared gradients of `Prepared.sampled_loss` estimate the
    Fisher information of the loss as it is trained.
    """
    if prepared.task.kind == "classification":
        scores = prepared.scores(model, batch).float().cpu()
        drawn = torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
        return Batch(batch | {"targets": drawn.to(batch["targets"].device)})
    answer = batch["answer"]
    logits = prepared.answer_logits(model, batch).cpu()
    drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator).view(answer.shape)
    return Batch(batch | {"answer": torch.where(answer == -100, answer, drawn.to(answer.device))})


class Order:
    """Batches of several tasks: in every epoch each task is shuffled and split into batches, and all batches are shuffled.

    A last, smaller batch of an epoch is left out. Attributes: steps_per_epoch.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int):
        self.sizes, self.batch_size, self.seed = list(sizes), batch_size, seed
        for size in sizes:
            if size < batch_size:
                raise UserError(f"`batch_size` {batch_size} is more than the {size} training examples of a task.")
        self.steps_per_epoch = sum(size // batch_size for size in sizes)
        self._epoch: tuple[int, list[tuple[int, list[int]]]] = (-1, [])

    def batch(self, step: int) -> tuple[int, list[int]]:
        """Task and examples of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            batches = []
            for task, size in enumerate(self.sizes):
                shuffled = rng.permutation(size)
                for start in range(0, size - self.batch_size + 1, self.batch_size):
                    batches.append((task, shuffled[start : start + self.batch_size].tolist()))
            self._epoch = epoch, [batches[index] for index in rng.permutation(len(batches))]
        return self._epoch[1][place]

    def other(self, step: int, task: int, first: Sequence[int]) -> list[int]:
        """A second batch for the step: examples of the same task that are not in the first batch. If the task has fewer
        examples than two batches, it is drawn from all of them and overlaps the first (metazo/meta/path_setup.py says so).
        """
        taken = sorted(set(first))
        if self.sizes[task] - len(taken) < self.batch_size:
            taken = []
        rng = np.random.default_rng([self.seed, step, _OTHER])
        chosen = rng.choice(self.sizes[task] - len(taken), self.batch_size, replace=False)  # among those not taken
        for index in taken:
            chosen[chosen >= index] += 1
        return chosen.tolist()
