"""ES, evolution strategies (Salimans et al. 2017, arXiv 1703.03864; Qiu et al., "Evolution strategies at scale: LLM
fine-tuning beyond reinforcement learning", arXiv 2509.24372).

    L_n = L(theta + eps e_n),   e_n ~ N(0, I),   n = 1 .. N        antithetic: e_n in pairs z, -z
    s_n = (L_n - mean L) / std L                                    shaping="z-score" (2509.24372)
    s_n = rank of L_n among the N, from -1/2 to 1/2                 shaping="rank"    (1703.03864)
    theta <- theta - lr (1/N sum_n s_n e_n + weight_decay theta)

The factor 1 / eps of the gradient estimate is part of lr, as in 2509.24372. Shaping removes the scale of the loss: on a
linear loss with gradient g, the mean of the estimate is a times g / |g|, with a = E[std of N standard normals] under
z-scores and a = 1 / (2 sqrt(pi)) under ranks. Pairs have E[rms of N / 2 standard normals] and
((N - 2) / (2 sqrt(pi)) + 1 / sqrt(2 pi)) / (N - 1) (tests/optimizers/test_es.py). The loss need not be differentiable.

Differences from the papers: rewards are minus the loss, and one batch is evaluated by all members of a step; equal losses
share the mean of their ranks (1703.03864 breaks ties by order); Adam is applied only if `rule` names it.

Where not to use: if a population per step is too expensive. At equal forward passes, few queries and more steps are usually
better on a smooth loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from metazo.optimizers.base import ZOOptimizer
from metazo.optimizers.registry import Case, register
from metazo.step.estimators import Population


@register
class ES(ZOOptimizer):
    """Descent along a population, weighted by shaped losses. Forwards per step: population. Extra memory: none.

    Args:
        population: N, perturbed models per step; 30 in 2509.24372. At least 2, or an even number of at least 4.
        antithetic: members in pairs at +eps and -eps, along half as many directions; as in 1703.03864.
        shaping: "z-score" or "rank".
    """

    name, paper = "es", "arXiv 2509.24372"
    search_factor = 3.0
    shardable = True
    contract_case = Case(quadratic=0.05, stiff=0.03, llama=4e-3, saddle=0.05, options={"population": 8})

    def __init__(
        self,
        params: Iterable,
        lr: float = 5e-4,
        eps: float = 1e-3,
        *,
        population: int = 30,
        antithetic: bool = False,
        shaping: Literal["z-score", "rank"] = "z-score",
        **common,
    ):
        self.estimator = Population(population, antithetic, shaping)
        super().__init__(params, lr, eps, **common)
