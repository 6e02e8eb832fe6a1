"""The count of floating-point operations, against the formulas of products."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from metazo.kernels.operations import count_operations


class Cut(torch.autograd.Function):
    """A layer without a backward pass: no gradient passes it, not even zeros."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, above: Tensor) -> None:  # type: ignore[override]
        return None


def test_a_product_is_counted_and_attention_that_no_gradient_reaches_is_not() -> None:
    x = torch.randn(1, 2, 8, 4, requires_grad=True)
    attention = scaled_dot_product_attention(x, x, x)
    whole, cut = attention.sum(), Cut.apply(attention).sum()  # type: ignore[attr-defined]
    assert count_operations(lambda: torch.autograd.grad(whole, x, retain_graph=True)) == 5 * 2 * 2 * 8 * 8 * 4
    assert count_operations(lambda: torch.autograd.grad(cut, x, allow_unused=True)) == 0
    assert count_operations(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == 2 * 3 * 4 * 5
