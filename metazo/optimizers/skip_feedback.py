"""Skip feedback: every block gets the error after the last block, unchanged.

    delta = dL/dx_L                              exact, by a backward pass through final norm, head and loss alone
    e_l = delta                                  at the output x_l of every block l: the Jacobian of later blocks is taken as I
    g_l = (d f_l / d theta_l)^T e_l              exact within block l, x_l = f_l(x_{l-1}; theta_l)

In a residual network x_L is x_l plus the outputs of the later blocks, so dx_L/dx_l is the identity plus a term that is small
for the last blocks and grows towards the first. Nothing is learned or stored; the last block and the head get their exact
gradients. Source: direct feedback alignment (Nokland 2016, arXiv 1609.01596), with the skip connection instead of a random
matrix. Differences: the forward weights are pretrained, the error is not projected, and within a block it is propagated
exactly.

Where not to use: to train the first blocks of a deep model, because the identity is a poor estimate of their Jacobian. If one
or a few positions contribute to the loss, `answer-column` costs the same and is exact along them.
"""

from __future__ import annotations

from metazo.feedback.surrogates import Skip, Surrogate
from metazo.optimizers.registry import register
from metazo.optimizers.structured import Structured


@register
class SkipFeedback(Structured):
    """Every block gets the error delta. Arguments, cost and limits: see `Structured`."""

    name = "skip-feedback"
    paper = "ours"

    def surrogate(self) -> Surrogate:
        return Skip()
