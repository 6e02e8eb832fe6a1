"""Skip feedback: the error after the last block, given to every block as it is.

    delta = dL/dx_L                              exact, by a backward pass through final norm, head and loss alone
    e_l = delta                                  at the output x_l of every block l: the Jacobian of what follows is taken as I
    g_l = (d f_l / d theta_l)^T e_l              exact within block l, x_l = f_l(x_{l-1}; theta_l)

In a residual network x_L = x_l + what the blocks above add, so dx_L/dx_l is the identity plus something that is small at
the top of the stack and grows downwards. Nothing is learned and nothing is stored; the last block and the head get their exact
gradients. Source: direct feedback alignment (Nokland 2016, arXiv 1609.01596) with the skip connection in the place
of a random matrix. Differences: the forward weights are pretrained, the error is not projected, and within a block it is
propagated exactly.

Where not to use: where the lower blocks of a deep model are to learn; there the identity explains little of the error. If one
or a few positions carry loss, `answer-column` costs the same and is exact along them.
"""

from __future__ import annotations

from metazo.feedback.surrogates import Skip, Surrogate
from metazo.optimizers.registry import register
from metazo.optimizers.structured import Structured


@register
class SkipFeedback(Structured):
    """Every block is given delta. Arguments, cost and limits: see `Structured`."""

    name = "skip-feedback"
    paper = "ours"

    def surrogate(self) -> Surrogate:
        return Skip()
