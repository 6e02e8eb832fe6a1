"""The ratio objective: perturb blocks for which batches agree on the gradient, not blocks with high curvature.

One step along u with block variances p_b = s_b^2, at its best learning rate, gains in proportion to S / T with
S = sum p_b |g_b|^2, of the gradient that batches agree on, and T = sum p_b tr H_b. The objective is therefore to minimise

    log sum p_b T_b - log sum p_b G_b - entropy * H(q),      q_b = p_b T_b / sum p_b T_b

with G_b = <g_b(batch 1), g_b(batch 2)>, and T_b the trace of the Fisher information from one backward pass with labels
sampled from the model's own predictions, batch size * |g_b|^2. For answers of n tokens, each sampled given the true ones
before it, g_b is the gradient of the mean over examples of sqrt(n) times the loss per token, because the n samples are
independent. The objective needs no direction and no inner step size, and does not change with kappa. The entropy of the
fractions q keeps one block from taking the whole perturbation. On a task with fewer than two batches of examples the batches
share some, so that G is too large; the run says so.

Memory beyond the weights: one gradient, as for the teacher's own step. Cost: three backward passes. Where not to use: it
looks at one step only and does not predict the ranking of scales over hundreds of steps; compare with the RMS rule first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metazo.blocks import Block, NamedTensor
from metazo.errors import UserError
from metazo.meta.gradient import block_of, dot, stream_gradients
from metazo.meta.objective import Outcome, Situation
from metazo.step.scales import State

_SIGNAL_FLOOR = 0.05  # fraction of sum p |G|: the measured agreement may be negative, and has then no logarithm


def block_type(name: str) -> str:
    """A block's name without layer numbers: `layers.3.mlp.up_proj.weight` -> `layers.mlp.up_proj.weight`."""
    return re.sub(r"\.\d+(?=\.|$)", "", name)


def pooled(values: Tensor, counts: Tensor, types: Sequence[str], floor: float) -> Tensor:
    """Values by block, raised to at least `floor` times the mean per entry of the block's type, and of all blocks.

    Key biases have no curvature at all: without a floor they would take the whole perturbation.
    """
    out = torch.maximum(values, floor * counts * values.sum() / counts.sum())
    for kind in set(types):
        members = torch.tensor([index for index, name in enumerate(types) if name == kind])
        density = values[members].sum() / counts[members].sum()
        out[members] = torch.maximum(out[members], floor * counts[members] * density)
    return out


@dataclass(frozen=True)
class RatioObjective:
    """Args: entropy: weight of the entropy of shares; floor: see `pooled`; average: G and T are exponential averages
    over meta-steps with this factor, because one batch pair alone gives G with the wrong sign in many blocks.
    """

    entropy: float = 0.1
    floor: float = 0.1
    average: float = 0.9

    def __post_init__(self):
        if not (self.entropy >= 0 and 0 <= self.floor <= 1 and 0 <= self.average < 1):
            raise UserError("entropy must be at least 0, ratio floor from 0 to 1, ratio average from 0 to below 1.")

    def init(self, blocks: Sequence[Block]) -> State:
        return {"ratio/moments": torch.zeros(3, len(blocks), dtype=torch.float64)}  # G, T, and the weight so far

    def __call__(self, situation: Situation) -> Outcome:
        s = situation
        loss, agreement, curvature = measure(s)
        if not (math.isfinite(loss) and bool(torch.isfinite(agreement + curvature).all())):
            return Outcome(math.nan, loss, loss, None)
        moments = s.state["ratio/moments"]
        fresh = torch.stack([agreement, curvature, torch.ones_like(agreement)])
        moments.mul_(self.average).add_(fresh, alpha=1 - self.average)
        g, t = moments[0] / moments[2], moments[1] / moments[2]
        types = [block_type(block.name) for block in s.blocks]
        value = ratio(s.sigma, g, pooled(t, s.counts, types, self.floor), self.entropy)
        return Outcome(float(value.detach()), loss, loss, value)


def ratio(sigma: Tensor, agreement: Tensor, curvature: Tensor, entropy: float) -> Tensor:
    """The objective, a scalar, differentiable in sigma; all arguments have shape (blocks,), and curvature is above 0."""
    p = sigma**2
    signal = torch.maximum((p * agreement).sum(), _SIGNAL_FLOOR * (p * agreement.abs()).sum())
    cost = p * curvature
    shares = cost / cost.sum()
    spread = -(shares * shares.clamp(min=1e-12).log()).sum()
    return cost.sum().log() - signal.clamp(min=1e-30).log() - entropy * spread


def measure(s: Situation) -> tuple[float, Tensor, Tensor]:
    """Loss on the first batch, G_b and T_b, (blocks,), float64, at the current weights."""
    place = block_of(s.blocks)
    first: dict[str, Tensor] = {}
    agreement, curvature = [0.0] * len(s.blocks), [0.0] * len(s.blocks)

    def keep(tensor: NamedTensor, gradient: Tensor) -> None:
        first[tensor.name] = gradient

    def agree(tensor: NamedTensor, gradient: Tensor) -> None:
        if tensor.name in first:
            agreement[place[tensor.name]] += dot(first.pop(tensor.name), gradient)

    def square(tensor: NamedTensor, gradient: Tensor) -> None:
        curvature[place[tensor.name]] += s.examples * dot(gradient, gradient)

    loss = stream_gradients(s.weights.tensors, s.loss, keep)
    other = stream_gradients(s.weights.tensors, s.other, agree)
    if not math.isfinite(loss + other):  # no labels can be sampled from such scores
        nothing = torch.zeros(2, len(s.blocks), dtype=torch.float64)
        return math.nan, nothing[0], nothing[1]
    own = stream_gradients(s.weights.tensors, s.sampled(), square)
    both = torch.tensor([agreement, curvature], dtype=torch.float64)
    return loss + 0.0 * (other + own), both[0], both[1]  # not finite if any of the three is not
