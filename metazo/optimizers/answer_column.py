"""Answer column: exact backpropagation along the positions that contribute to the loss, one block at a time.

    e_L = delta                                  positions with delta != 0 are the column
    e_{l-1} = C (d f_l / d x_{l-1})^T e_l        C keeps the column; positions="all": C = I
    g_l = (d f_l / d theta_l)^T e_l              W_k and W_v with the terms of every position that the column attends to

For a causal model with a label word at the last position, this is the gradient without the paths that leave the column and
return to it: errors at other positions of the residual stream are left out, which matters from two hops of attention on. If
every position contributes to the loss (mean pooling, next-token loss), it is the exact gradient: backpropagation with the
graph of one block at a time and no stored gradient, as in LOMO (Lv et al. 2023, arXiv 2306.09782). Differences from LOMO:
gradients of matrices are never formed, and steps are normalised per tensor.

Where not to use: if the model is small enough for first-order training with moments, because this method is first-order
training with the memory of one block.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from metazo.errors import UserError
from metazo.feedback.surrogates import Column, Exact, Surrogate
from metazo.optimizers.registry import register
from metazo.optimizers.structured import Structured


@register
class AnswerColumn(Structured):
    """Errors are propagated from block to block along the column. Arguments, cost and limits: see `Structured`.

    Args: positions: "carrying", the positions at which delta is not zero, or "all" for the exact gradient.
    """

    name = "answer-column"
    paper = "ours"

    def __init__(
        self, params: Iterable, lr: float = 1e-3, *, positions: Literal["carrying", "all"] = "carrying", **rest
    ):
        if positions not in ("carrying", "all"):
            raise UserError(f"`positions` {positions!r} is unknown: choose carrying or all.")
        self.positions = positions
        super().__init__(params, lr, **rest)

    def surrogate(self) -> Surrogate:
        return Column() if self.positions == "carrying" else Exact()
