"""Errors propagated through the whole stream: the exact error at every block's output, from cotangents after the last one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from metazo.feedback.passes import Pass
from metazo.feedback.residual import Residual


def exact_errors(residual: Residual, one: Pass, cotangents: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """(block index, the error at its output per cotangent), from the last block but one to the lowest recorded block - 1.

    Args: one: a pass whose calls were recorded, not kept as graphs; cotangents: (B, T, d) each, after the last block.
    Index -1 is the input of the first block. Each block is run once and its graph is used for all cotangents.
    """
    errors = list(cotangents)
    for index in sorted(one.calls, reverse=True):
        leaf = one.calls[index].hidden.detach().requires_grad_()
        with torch.enable_grad():
            output = one.calls[index].run(residual.blocks[index], leaf)
        last = len(errors) - 1
        errors = [torch.autograd.grad(output, leaf, error, retain_graph=k < last)[0] for k, error in enumerate(errors)]
        yield index - 1, errors
