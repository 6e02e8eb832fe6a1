"""EGGROLL (Sarkar et al., "Evolution strategies at the hyperscale", arXiv 2511.16652): evolution strategies whose members
are perturbed by low-rank matrices and evaluated together.

    E_n = A_n B_n^T / sqrt(r),   A_n ~ N(0, I), m x r,   B_n ~ N(0, I), n x r        tensors of one dimension: dense noise
    L_n = L(W + eps E_n),   s_n the shaped loss                                       (metazo/optimizers/es.py)
    W <- W - lr (1/N sum_n s_n E_n + weight_decay W)

A member's forward pass is x W^T + eps (x B) A^T / sqrt(r). All members share the product with W, so that a population costs
little more than a batch of that size (metazo/step/batched.py). The mean square of an entry of E_n is 1, as in ES, and the
sum over the population has rank N r. E_n has heavier tails than Gaussian noise, most of all at r = 1, but
the same mean and covariance, so that on a linear loss the two-point estimate has the same mean.

We did not have the paper's text, but a part of a port of its code, from which pairs +E, -E, z-scores and 1/sqrt(r) are
taken. The population of 32 is ours (the paper's are in the thousands), because activations take N times the memory. Noise
that is reused over steps and integer weights are not implemented.

Where not to use: with a closure that torch.func.vmap cannot vectorise, because members are then evaluated in turn (with a
warning), or with batches so large that the activations of all members do not fit in memory (use `probing="in-turn"`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from metazo.blocks import NamedTensor
from metazo.errors import UserError
from metazo.optimizers.base import State
from metazo.optimizers.es import ES
from metazo.optimizers.registry import Case, register
from metazo.step.directions import Direction, Isotropic
from metazo.step.lowrank import DrawnFactors, within_sides


@register
class EGGROLL(ES):
    """ES with low-rank members, all in one forward pass. Forwards per step: population. Extra memory: none, except that
    activations are population times as large.

    Args:
        population: N, perturbed models per step; 32, ours. At least 2, or an even number of at least 4.
        antithetic: members in pairs at +eps and -eps, as in the published code.
        rank: r, columns of A and B; 1 in most of the paper. A matrix with a side below r uses that side as its rank.
    """

    name, paper = "eggroll", "arXiv 2511.16652"
    low_rank = True
    default_probing = "together"
    contract_case = Case(
        quadratic=0.05, stiff=0.03, llama=4e-3, saddle=0.05, options={"population": 6, "probing": "in-turn"}
    )

    def __init__(
        self,
        params: Iterable,
        lr: float = 5e-4,
        eps: float = 1e-3,
        *,
        population: int = 32,
        antithetic: bool = True,
        shaping: Literal["z-score", "rank"] = "z-score",
        rank: int = 1,
        **common,
    ):
        if not isinstance(rank, int) or rank < 1:
            raise UserError(f"`rank` must be a whole number of at least 1, not {rank}.")
        self.rank = rank
        super().__init__(params, lr, eps, population=population, antithetic=antithetic, shaping=shaping, **common)

    def init(self, tensors: Sequence[NamedTensor]) -> State:
        self.ranks = within_sides(self.rank, tensors)
        return {}

    def propose(self, state: State, step: int, seeds: Sequence[int]) -> Direction:
        return DrawnFactors(Isotropic(), self.ranks)
