"""Momentum stored as two factors per matrix: m <- mu m + g, reduced to rank r after every step.

With m = L R^T and g = l r^T, the sum is [mu L, l] [R, r]^T. QR decompositions of both sides and a singular value
decomposition of the small product give its best approximation of rank r (Eckart and Young 1936). The rest is lost, so the
momentum is slightly shorter than the exact one. Memory: r (m + n) numbers per matrix.

The gradient of a batch with more positions than m n / (m + n) comes as a whole matrix. A large one is approximated by a
randomised range finder (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1), because the decomposition of a matrix
takes much longer than its gradient.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from metazo.blocks import NamedTensor
from metazo.feedback.factors import Gradient
from metazo.step.rules import State

DIRECT = 256  # the shorter side of a matrix up to which it is decomposed
MORE, POWERS = 8, 2  # columns beyond the rank, and repetitions, of the range finder


class FactoredMomentum:
    """Args: momentum: mu, in [0, 1); rank: r; matrices: names of the tensors whose gradients are factors."""

    def __init__(self, momentum: float, rank: int, matrices: Iterable[str]):
        self.momentum, self.rank, self.matrices = momentum, rank, frozenset(matrices)

    def init(self, tensors: Iterable[NamedTensor]) -> State:
        """Zeros: momentum/left/<name> (m, r), momentum/right/<name> (n, r), momentum/<name> for other tensors."""
        state: State = {}
        for tensor in tensors:
            param = tensor.param
            kind = {"dtype": torch.promote_types(param.dtype, torch.float32), "device": param.device}
            if tensor.name in self.matrices:
                rank = min(self.rank, *param.shape)
                state[f"momentum/left/{tensor.name}"] = torch.zeros(param.shape[0], rank, **kind)
                state[f"momentum/right/{tensor.name}"] = torch.zeros(param.shape[1], rank, **kind)
            else:
                state[f"momentum/{tensor.name}"] = torch.zeros(param.shape, **kind)
        return state

    def update(self, state: State, gradient: Gradient) -> Gradient:
        """Add a gradient to the momentum; returns the momentum of its tensors, as this step uses it."""
        out = Gradient()
        for name, left in gradient.left.items():
            kept, right = state[f"momentum/left/{name}"], state[f"momentum/right/{name}"]
            lefts = torch.cat([kept * self.momentum, left.to(kept.dtype)], 1)
            rights = torch.cat([right, gradient.right[name].to(kept.dtype)], 1)
            new_left, new_right = truncated(lefts, rights, kept.shape[1])
            kept.copy_(new_left)
            right.copy_(new_right)
            out.add_product(name, kept, right)
        for name, value in gradient.whole.items():
            if name in self.matrices and min(value.shape) <= DIRECT:
                u, values, vt = torch.linalg.svd(value.to(state[f"momentum/left/{name}"].dtype), full_matrices=False)
                out.add(self.update(state, Gradient({name: u * values}, {name: vt.t()})))
            elif name in self.matrices:
                left, right = state[f"momentum/left/{name}"], state[f"momentum/right/{name}"]
                moved = torch.addmm(value.to(left.dtype), left, right.t(), alpha=self.momentum)
                for old, new in zip((left, right), approximated(moved, left.shape[1])):
                    old.copy_(new)
                out.add_product(name, left, right)
            else:
                out.add_whole(name, state[f"momentum/{name}"].mul_(self.momentum).add_(value))
        return out


def approximated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Nearly the best factors of a rank for a matrix, (m, n) -> (m, rank) and (n, rank); always the same for one matrix."""
    shape, generator = (matrix.shape[1], rank + MORE), torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    q, _ = torch.linalg.qr(matrix @ start.to(matrix))
    for _ in range(POWERS):
        p, _ = torch.linalg.qr(matrix.t() @ q)
        q, _ = torch.linalg.qr(matrix @ p)
    u, values, vt = torch.linalg.svd(q.t() @ matrix, full_matrices=False)
    return q @ (u[:, :rank] * values[:rank]), vt[:rank].t()


def truncated(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of a rank for left right^T, (m, K) and (n, K) -> (m, rank) and (n, rank)."""
    q, r = torch.linalg.qr(left)
    p, s = torch.linalg.qr(right)
    u, values, vt = torch.linalg.svd(r @ s.t(), full_matrices=False)
    found = min(rank, len(values))
    new_left, new_right = left.new_zeros(len(left), rank), right.new_zeros(len(right), rank)
    new_left[:, :found] = q @ (u[:, :found] * values[:found])
    new_right[:, :found] = p @ vt[:found].t()
    return new_left, new_right
