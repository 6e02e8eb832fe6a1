"""MeZO (Malladi et al. 2023, arXiv 2305.17333): descent along the noise that was probed.

    c = (L(theta + eps z) - L(theta - eps z)) / (2 eps)          z ~ N(0, I), drawn again from its seed
    theta <- theta - lr (c z + weight_decay theta)

With n queries, c_k z_k is averaged (n-SPSA). Momentum and Adam use the same estimate as a gradient.

Differences from the published code (princeton-nlp/MeZO): three passes over the weights instead of four (removing the
probe is folded into the update); weights narrower than float32 are not perturbed in place, so they do not drift;
`momentum`, which its README names, is implemented; weight decay always uses the name rule of large_models and the
scheduler's learning rate. Adam is torch's AdamW, as in medium_models, without storing the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable

from metazo.optimizers.base import ZOOptimizer
from metazo.optimizers.registry import Case, register
from metazo.step.estimators import TwoPoint
from metazo.step.rules import Adam, Momentum


@register
class MeZO(ZOOptimizer):
    """MeZO-SGD. Forwards per step: 2 queries. Extra memory: none.

    Args:
        queries: directions averaged per step (n-SPSA); at equal forwards one is usually best.
    """

    name, paper = "mezo", "arXiv 2305.17333"

    deferrable = True
    shardable = True

    def __init__(self, params: Iterable, lr: float = 1e-6, eps: float = 1e-3, *, queries: int = 1, **common):
        self.estimator = TwoPoint(queries)
        super().__init__(params, lr, eps, **common)


@register
class MeZOMomentum(MeZO):
    """MeZO with heavy-ball momentum in torch's form. Extra memory: one copy of the weights, float32.

    Args:
        momentum: mu in [0, 1), the weight of the previous buffer; 0.9 in the field's experiments.
    """

    name = "mezo-momentum"
    own_rule = "is MeZO with a rule already; use `optimizer='mezo'` with `rule`"
    search_factor = 0.1
    contract_case = Case(quadratic=0.005, stiff=2e-4, llama=3e-4, saddle=0.01)

    def __init__(self, params: Iterable, lr: float = 1e-6, eps: float = 1e-3, *, momentum: float = 0.9, **common):
        self.default_rule = Momentum(momentum)
        super().__init__(params, lr, eps, **common)


@register
class MeZOAdam(MeZO):
    """MeZO with AdamW. Extra memory: two copies of the weights, float32. lr is of Adam's size (1e-5 .. 1e-3).

    Args:
        betas: weights of the previous first and second moments; 0.9 0.999 as in torch.
        stability: Adam's epsilon, added to the root of the second moment; 1e-8 as in torch.
    """

    name = "mezo-adam"
    own_rule = "is MeZO with a rule already; use `optimizer='mezo'` with `rule`"
    search_rate = 1e-4
    contract_case = Case(quadratic=0.1, stiff=0.05, llama=3e-3, along="sign")

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-4,
        eps: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        stability: float = 1e-8,
        **common,
    ):
        self.default_rule = Adam(betas, stability)
        super().__init__(params, lr, eps, **common)
