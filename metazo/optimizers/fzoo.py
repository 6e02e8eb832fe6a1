"""FZOO (Dang et al., arXiv 2506.09034, ICLR 2026): many one-sided sign vectors per step, and a step length from the spread
of their losses.

    l_0 = L(theta),  l_k = L(theta + eps u_k),   u_k uniform in {-1, 1}^d,   k = 1 .. K
    g       = 1 / (eps K) sum_k (l_k - l_0) u_k
    sigma^2 = 1 / (K - 1) sum_k (l_k - mean l)^2
    theta   <- theta - lr g / sigma

sigma is about eps times the length of the gradient, so this is normalised descent: the length of a step does not depend
on the slope, and lr is eps times the learning rate of normalised descent. If all losses are equal (sigma = 0), no weight
moves, but by weight decay.

The losses, the signs, K = 8, eps = 1e-3 and the normalisation by the standard deviation are the same in the published code
and in a summary of the paper. The factor 1 / eps in g and K - 1 in sigma are from the summary alone.

Differences from the published code (DKmiyan/FZOO, trainer.py): there the coefficient is (l_k - l_0) / (K sigma) without
eps, sigma divides by K, and weight decay is left out; `compat="official"` does the same (official/fzoo.py), and its lr 1e-5
is 1e-8 here at eps 1e-3. The published speed comes from running the forwards of a step as one batch, with a model that is
rewritten for it. Here dense sign vectors are evaluated in turn, because z x costs as much as W x. With `rank` = r, ours, the
sign vector of a matrix is U V^T / sqrt(r) with signs in U and V, at r = 1 a matrix of signs again: the mean of the estimate
is the same, its variance is larger (the entries are uncorrelated, but no longer independent), and `probing="together"`
evaluates all losses of a step in one forward pass of any model (docs/speed.md).

Where not to use: with a constant learning rate near a minimum, because steps of a fixed length do not converge.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Literal

from metazo.blocks import NamedTensor
from metazo.errors import UserError
from metazo.noise import Noise
from metazo.optimizers.base import State, Update, ZOOptimizer
from metazo.optimizers.registry import Case, register
from metazo.step.directions import Direction, Isotropic
from metazo.step.estimators import OneSided, check_queries
from metazo.step.lowrank import DrawnFactors, within_sides


@register
class FZOO(ZOOptimizer):
    """One-sided descent over a batch of sign vectors, normalised by the spread of their losses.

    Forwards per step: queries + 1. Extra memory: none; together, activations are queries + 1 times as large.

    Args:
        queries: perturbed losses per step, at least 2; the paper's 8.
        noise: "rademacher" as published, or "gaussian".
        rank: 0 for dense directions as published; r >= 1 for matrices of rank r, ours, whose probes can be evaluated together
            ("auto" and the default do so for small batches). A matrix with a side below r uses that side as its rank. A
            replay without closures reads "auto" as "in-turn": for a bit-identical result name the `probing` of the run.
        compat: "paper", or "official" for the published code's normalisation (lr 1e-5).
    """

    name, paper = "fzoo", "arXiv 2506.09034"
    low_rank = True  # if `rank` says so
    shardable = True  # if rank is 0
    default_probing = "auto"
    contract_case = Case(quadratic=1e-4, stiff=5e-5, llama=4e-6, saddle=4e-4, options={"queries": 4})

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-8,
        eps: float = 1e-3,
        *,
        queries: int = 8,
        noise: str | Noise = "rademacher",
        rank: int = 0,
        compat: Literal["paper", "official"] = "paper",
        **common,
    ):
        check_queries(queries, 2, " to have a spread")
        if not isinstance(rank, int) or rank < 0:
            raise UserError(f"`rank` must be a whole number of at least 0, not {rank}.")
        self.estimator, self.rank, self.low_rank = OneSided(queries), rank, rank > 0
        super().__init__(params, lr, eps, noise=noise, **common)

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        self.ranks = within_sides(self.rank, tensors) if self.rank else {}
        return {}

    def propose(self, state: State, step: int, seeds: Sequence[int]) -> Direction:
        return DrawnFactors(Isotropic(), self.ranks) if self.ranks else Isotropic()

    def update(self, state: State, step: int, seeds: Sequence[int], losses: Sequence[float]) -> Update:
        spread = statistics.stdev(losses[1:])
        if spread == 0:
            return Update([0.0] * len(seeds))
        return Update([c / spread for c in self.estimator.coefficients(losses, self.eps)])
