"""Evolution strategies with antithetic pairs, for whole runs and for truncated ones (persistent evolution strategies).

The gradient of the smoothed objective E L(theta + s e), e ~ N(0, I), from N pairs (Salimans et al. 2017, arXiv 1703.03864):

    g = 1/(2 N) sum_i (L(theta + m_i) - L(theta - m_i)) m_i / s^2,       m_i = s e_i

If a run is cut into truncations with an update after each, the loss of a truncation depends on every perturbation that the
run has had. The estimate of the last one alone is biased: it lacks the effect that earlier parameters have through the state
of the run. With the sum of the perturbations x_i = m_i,1 + ... + m_i,t of a pair since its run began,

    g = 1/(2 N) sum_i (L+_i,t - L-_i,t) x_i / s^2

has no such bias (PES, Vicol et al. 2021, arXiv 2112.13835, eq. 9). Both members of a pair continue their own run.

Rank shaping replaces L+ - L- by the difference of the members' centred ranks among all members of the update, each loss
taken relative to the mean of its pair, because pairs may be of different tasks. It removes the influence of the scale of
the losses and keeps the sign of every pair; the result is no gradient any more, and its length has no meaning.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metazo.step.estimators import centred_ranks


def differences(plus: Tensor, minus: Tensor, shaping: str) -> Tensor:
    """L+ - L- of each pair, or with shaping "rank" the difference of ranks in [-1, 1], (pairs,), float64.

    A loss that is not finite is above every finite one; a pair of two such losses, or without shaping of one, counts as 0.
    """
    plus, minus = plus.double(), minus.double()
    whole = plus.isfinite() & minus.isfinite()
    found = torch.where(whole, plus - minus, 0.0)
    if shaping == "none":
        return found
    found = torch.where(plus.isfinite() & ~minus.isfinite(), -math.inf, found)
    found = torch.where(~plus.isfinite() & minus.isfinite(), math.inf, found)
    ranks = centred_ranks([*(found / 2).tolist(), *(-found / 2).tolist()])
    return torch.tensor(ranks[: len(found)], dtype=torch.float64) - torch.tensor(
        ranks[len(found) :], dtype=torch.float64
    )


def es_gradient(moves: Tensor, plus: Tensor, minus: Tensor, spread: Tensor, shaping: str = "none") -> Tensor:
    """The estimate g, (n,), float64.

    moves: each pair's perturbation, or the sum of those since its run began, (pairs, n). plus, minus: losses, (pairs,).
    spread: standard deviation of the perturbations by parameter, (n,).
    """
    weights = differences(plus, minus, shaping) / (2 * len(moves))
    return (weights[:, None] * moves).sum(0) / spread**2


class Pairs:
    """The pairs of one update, asked and told one after the other.

    Args: spread: standard deviation of the perturbations by parameter, (n,), float64; pairs; shaping; seed of the
    perturbations, which depend on it and the number of the meta-step alone.
    Attributes: sums, (pairs, n): perturbations since the run of a pair began; losses, (pairs, 2): of the present update.
    """

    def __init__(self, spread: Tensor, pairs: int, shaping: str, seed: int):
        self.spread, self.shaping, self.seed = spread, shaping, seed
        self.sums = torch.zeros(pairs, len(spread), dtype=torch.float64)
        self.losses = torch.zeros(pairs, 2, dtype=torch.float64)

    def move(self, step: int) -> Tensor:
        """The perturbation of a meta-step, (n,)."""
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + step) % 2**63)
        return self.spread * torch.randn(len(self.spread), generator=generator, dtype=torch.float64)

    def begin(self, pair: int) -> None:
        """The run of a pair begins."""
        self.sums[pair] = 0

    def tell(self, step: int, pair: int, plus: float, minus: float) -> None:
        """The losses of both members after the move of this meta-step."""
        self.sums[pair] += self.move(step)
        self.losses[pair] = torch.tensor([plus, minus], dtype=torch.float64)

    def gradient(self) -> Tensor:
        """The estimate from the losses that were told last, (n,)."""
        return es_gradient(self.sums, self.losses[:, 0], self.losses[:, 1], self.spread, self.shaping)
