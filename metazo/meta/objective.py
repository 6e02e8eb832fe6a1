"""The objective that meta-training minimises: the published loss after one zeroth-order step.

An objective turns the current sigma into a scalar whose gradient in sigma is the meta-gradient. The ratio objective is
in ratio.py, the unrolled reference in unrolled.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from metazo.blocks import Block
from metazo.errors import UserError
from metazo.meta.gradient import Loss, OneStep, one_step
from metazo.step.scales import State, normalisation
from metazo.step.weights import Weights


@dataclass(frozen=True)
class Situation:
    """Everything that an objective may use in one meta-step."""

    weights: Weights
    blocks: Sequence[Block]
    sigma: Tensor
    """(blocks,), float64, with its graph into the networks."""
    counts: Tensor
    """D_b, (blocks,), float64."""
    normalise: bool
    root: Tensor | None
    """Numerator of kappa if it is not sqrt(sum D_b); see scales.normalisation."""
    seed: Callable[[int], int]
    """Noise seed of a query of this step."""
    loss: Loss
    """Loss on this step's batch."""
    other: Loss
    """Loss on another batch of the same task."""
    sampled: Callable[[], Loss]
    """Draws labels for this step's batch from the model's own predictions; a loss on them."""
    examples: int
    """Number of examples in a batch."""
    state: State
    """State for this step's task, in which an objective keeps its own tensors."""

    def scales(self, detach_kappa: bool) -> Tensor:
        """s_b = kappa sigma_b, (blocks,), differentiable."""
        if not self.normalise:
            return self.sigma
        sigma = self.sigma.detach() if detach_kappa else self.sigma
        return self.sigma * normalisation(sigma, self.counts, self.root)


@dataclass(frozen=True)
class Outcome:
    """The result of a meta-step; surrogate is None if a loss was not finite."""

    loss: float
    plus: float
    minus: float
    surrogate: Tensor | None
    """Scalar, differentiable in sigma: its gradient is the meta-gradient; its value has no meaning."""


class Objective(Protocol):
    def init(self, blocks: Sequence[Block]) -> State:
        """The objective's own tensors for one task."""
        ...

    def __call__(self, situation: Situation) -> Outcome: ...


@dataclass(frozen=True)
class OneStepLoss:
    """The loss after one zeroth-order step (arXiv 2510.00419), averaged over `queries` directions.

    Args:
        eps, lr_update: of the inner step. The meta-gradient is proportional to lr_update.
        detach_kappa: treat the normalisation as a constant, as published; otherwise its derivative is kept, which removes
            the component of the meta-gradient that only makes the step longer or shorter.
        separate: measure the loss on another batch than that of the step.
    """

    eps: float = 1e-3
    lr_update: float = 1e-6
    queries: int = 1
    detach_kappa: bool = True
    separate: bool = False

    def __post_init__(self):
        if not (self.eps > 0 and self.lr_update > 0 and self.queries >= 1):
            raise UserError("eps and lr_update must be above 0 and queries at least 1.")

    def init(self, blocks: Sequence[Block]) -> State:
        return {}

    def __call__(self, situation: Situation) -> Outcome:
        s = situation
        scales = s.scales(self.detach_kappa)
        outer = s.other if self.separate else None
        fixed = scales.detach()
        steps = [
            one_step(s.weights, s.blocks, fixed, s.seed(k), s.loss, outer, eps=self.eps, lr_update=self.lr_update)
            for k in range(self.queries)
        ]
        return averaged(steps, scales)


def averaged(steps: Sequence[OneStep], scales: Tensor) -> Outcome:
    """The mean over directions, as a surrogate that is differentiable in the scales."""
    n = len(steps)
    plus, minus, loss = (sum(getattr(step, name) for step in steps) / n for name in ("plus", "minus", "loss"))
    gradient = torch.stack([step.gradient for step in steps]).mean(0)
    finite = math.isfinite(plus + minus + loss) and bool(torch.isfinite(gradient).all())
    return Outcome(loss, plus, minus, (gradient * scales).sum() if finite else None)
