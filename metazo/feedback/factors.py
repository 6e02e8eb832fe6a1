"""A gradient whose matrices exist as two factors: dL/dW = left right^T, the errors at the output times the inputs.

The rank R is the number of positions with an error. The matrix (m, n) is not formed: it is added to the weights by
`Held` (metazo/step/lowrank.py), and its norm comes from products of factors,

    |left right^T|^2 = sum_ij (left_i . left_j) (right_i . right_j)        over pairs of positions i, j

If the factors are larger than the matrix, R (m + n) > m n, their product replaces them, which takes less memory and is
shared by norm and update. Only the products of one block exist at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

_CANCELLED = 1e-3  # share of the parts' own squares below which the sum of parts is computed in float64
_NOISE = 1e-11  # share below which a sum of float32 products, about 30 roundings of the parts, has no direction


@dataclass
class Gradient:
    """left (m, R) and right (n, R) by tensor name for matrices; whole tensors for norms, biases and multiplied factors."""

    left: dict[str, Tensor] = field(default_factory=dict)
    right: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [*self.left, *self.whole]

    def add_product(self, name: str, left: Tensor, right: Tensor) -> None:
        """Add left right^T to the gradient of a matrix; narrow factors are kept in float32."""
        left, right = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (left, right))
        if name in self.left:
            left, right = torch.cat([self.left[name], left], 1), torch.cat([self.right[name], right], 1)
        self.left[name], self.right[name] = left, right

    def add_whole(self, name: str, value: Tensor) -> None:
        self.whole[name] = self.whole[name] + value if name in self.whole else value

    def add(self, other: Gradient) -> None:
        for name, left in other.left.items():
            self.add_product(name, left, other.right[name])
        for name, value in other.whole.items():
            self.add_whole(name, value)

    def square_norm(self, name: str) -> float:
        """|g|^2 of a tensor, with products in its dtype and sums in float64."""
        if name in self.whole:
            return float(self.whole[name].double().square().sum())
        return product_square_norm(self.left[name], self.right[name])

    def settle(self) -> None:
        """Replace factors by their product if the product is smaller."""
        for name in list(self.left):
            (m, rank), n = self.left[name].shape, self.right[name].shape[0]
            if rank * (m + n) > m * n:
                self.add_whole(name, self.left.pop(name) @ self.right.pop(name).t())

    def dense(self, name: str) -> Tensor:
        """The whole gradient of a tensor, for tests and measurements."""
        return self.whole[name] if name in self.whole else self.left[name] @ self.right[name].t()


def product_square_norm(left: Tensor, right: Tensor) -> float:
    """|left right^T|^2 in the Frobenius norm, without the product: (m, R), (n, R); R^2 (m + n) multiplications.

    0 if the R parts cancel to the rounding of their sum, whose direction is then noise.
    """
    own, other = left.t() @ left, right.t() @ right
    found = float((own * other).sum(dtype=torch.float64))
    apart = float((own.diagonal() * other.diagonal()).sum(dtype=torch.float64))  # the sum of the parts' own squares
    if found > _CANCELLED * apart or not math.isfinite(found):
        return found
    left, right = left.double(), right.double()  # rounding of the Gram matrices would decide, even the sign
    found = float(((left.t() @ left) * (right.t() @ right)).sum())
    return found if found > _NOISE * apart else 0.0
