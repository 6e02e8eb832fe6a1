"""A method of your own in one file: MEAZO (Dbouk et al., "On Adaptivity in Zeroth-Order Optimization", arXiv 2605.03869).

    g = mean of the two-point coefficients c_k
    v <- beta v + (1 - beta) g^2
    theta <- theta - lr / (sqrt(v / (1 - beta^t)) + stability) mean(c_k z_k)

METAZO_METHODS=examples/own_method.py metazo finetune --optimizer own-meazo ...

Written after a summary of the paper. Where not to use: if the learning rate is to follow the slope; here a step has about
the same length on every slope.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from metazo.errors import UserError
from metazo.optimizers.mezo import MeZO
from metazo.optimizers.registry import Case, register
from metazo.step.rules import Rule


@dataclass(frozen=True)
class ScalarSecondMoment(Rule):
    """The whole update over the root of a running mean of g^2: one number of state."""

    beta: float = 0.999
    stability: float = 1e-8
    fused = True  # plain descent by the factor of `begin`: the update regenerates its noise in place

    def __post_init__(self):
        if not 0 <= self.beta < 1:
            raise UserError(f"`beta` is {self.beta}; choose a number of at least 0 and below 1.")

    def init(self, tensors):
        return {"second_moment": torch.zeros(2, dtype=torch.float64)}  # v, and the count of steps

    def begin(self, state, coefficients):
        g, moment = sum(coefficients), state["second_moment"]  # an average over queries is divided already
        moment[0] = self.beta * moment[0] + (1 - self.beta) * g**2
        moment[1] += 1
        v, count = moment.tolist()
        return 1 / ((v / (1 - self.beta**count)) ** 0.5 + self.stability)


@register
class OwnMEAZO(MeZO):
    """MeZO with a scalar second moment. Forwards per step: 2 queries. Extra memory: two numbers.

    Args:
        beta: weight of the second moment before; 0.999 as in Adam.
        stability: added to the root of the second moment; 1e-8 as in Adam.
    """

    name, paper = "own-meazo", "arXiv 2605.03869"
    own_rule = "brings a rule of its own; use `optimizer='mezo'` with `rule`"
    contract_case = Case(quadratic=0.02, stiff=0.02, llama=3e-3, saddle=0.02)

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-4,
        eps: float = 1e-3,
        *,
        beta: float = 0.999,
        stability: float = 1e-8,
        **common,
    ):
        self.default_rule = ScalarSecondMoment(beta, stability)
        super().__init__(params, lr, eps, **common)
