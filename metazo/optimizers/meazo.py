"""MEAZO (Dbouk, Gazagnadou, Reisser and Louizos, "On Adaptivity in Zeroth-Order Optimization", arXiv 2605.03869): MeZO with
a step length from one number of state.

    c_k = (L(theta + eps z_k) - L(theta - eps z_k)) / (2 eps),   g = mean_k c_k                    k = 1 .. queries
    v  <- beta v + (1 - beta) g^2                                v^ = v / (1 - beta^t),  t = 1 at the first step
    theta <- theta - lr / (sqrt(v^) + stability) mean_k(c_k z_k)

Adam's second moment of a zeroth-order estimate is mostly determined by the size of g and hardly by single weights; MEAZO
keeps only the size of g. The rule is `rule="meazo"` (metazo.step.rules.ScalarMoment), which works with every method that
has no rule of its own and whose steps are multiples of their coefficients (not ZO-Muon and SVRG), which do not add up to 0 (not
LOREN, and not ES without pairs); this class is MeZO with that rule.

We did not have the paper's text, but a public restatement of its algorithm. It has 1 - beta^(t-1) in v^ with steps counted
from 2, which is the same. It does not give beta and stability: 0.999 and 1e-8 are Adam's.

Where not to use: if step lengths should follow the slope. The length of a step is about lr |z| on every slope, so that
with a constant learning rate MEAZO does not converge to a minimum.
"""

from __future__ import annotations

from collections.abc import Iterable

from metazo.optimizers.mezo import MeZO
from metazo.optimizers.registry import Case, register
from metazo.step.rules import ScalarMoment


@register
class MEAZO(MeZO):
    """MeZO with a scalar second moment. Forwards per step: 2 queries. Extra memory: two numbers.

    State: meazo/moment, v; meazo/steps, t.

    Args:
        beta: weight of the previous second moment, at least 0 and below 1; 0.999 as in Adam.
        stability: zeta, added to the root of the second moment; 1e-8 as in Adam.
    """

    name, paper = "meazo", "arXiv 2605.03869"
    own_rule = "is MeZO with a rule already; use `optimizer='mezo'` with `rule`"
    contract_case = Case(quadratic=0.02, stiff=0.02, llama=3e-3, saddle=0.02)

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        beta: float = 0.999,
        stability: float = 1e-8,
        **common,
    ):
        self.default_rule = ScalarMoment(beta, stability)
        super().__init__(params, lr, eps, **common)
