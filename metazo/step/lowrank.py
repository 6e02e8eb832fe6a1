"""Directions of low rank: d = U V^T on matrices (LOZO), drawn or given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from metazo.blocks import NamedTensor, part
from metazo.kernels.outer import add_product_, add_products_
from metazo.noise import LEFT, Move, Stream
from metazo.step.directions import Direction


class LowRank(Direction):
    """d = U V^T on matrices, U drawn fresh, V given; the inner direction on everything else.

    Args: inner; right: V by tensor name, (n, r), for the tensors to treat so; before: called with (stream, tensor)
        ahead of U, for noise in the published order, where V's numbers come first on the same stream.
    """

    def __init__(self, inner: Direction, right: Mapping[str, Tensor], before=None):
        self.inner, self.right, self.before = inner, right, before

    def touches(self, tensor: NamedTensor) -> bool:
        return tensor.name in self.right or self.inner.touches(tensor)

    def left(self, stream: Stream, tensor: NamedTensor, dtype: torch.dtype) -> Tensor:
        """U of the tensor. Returns: (m, r)."""
        if self.before is not None:
            self.before(stream, tensor)
        return stream.draw(tensor, self._left_shape(tensor), LEFT, dtype)

    def _left_shape(self, tensor: NamedTensor) -> tuple[int, int]:
        return tensor.param.shape[0], self.right[tensor.name].shape[1]

    def factors(self, stream, tensor) -> tuple[Tensor, Tensor] | None:
        right = self.right.get(tensor.name)
        return None if right is None else (self.left(stream, tensor, right.dtype), right)

    def add_(self, stream, tensor, out, alpha, beta=1.0, start=0) -> None:
        right = self.right.get(tensor.name)
        if right is None:
            self.inner.add_(stream, tensor, out, alpha, beta, start)
        else:
            left = self.left(stream, tensor, out.dtype)
            _add_to_rows_(tensor, out, left, self.right[tensor.name], alpha, beta, start)

    def add_all_(self, stream, moves) -> None:
        if stream.ordered:
            return super().add_all_(stream, moves)
        self.inner.add_all_(stream, [move for move in moves if move.tensor.name not in self.right])
        matrices = [move for move in moves if move.tensor.name in self.right]
        if self.before is not None:
            for move in matrices:
                self.before(stream, move.tensor)
        lefts = self._lefts(stream, matrices)
        add_products_(
            [
                (out, left, self.right[tensor.name], alpha, beta)
                for (tensor, out, alpha, beta), left in zip(matrices, lefts)
            ]
        )

    def _lefts(self, stream: Stream, matrices: Sequence[Move]) -> list[Tensor]:
        """U of each, in the type of what it is added to: drawn at once, in memory taken at once."""
        lefts: list[Tensor] = []
        for _, group in groupby(matrices, lambda move: (move.out.dtype, move.out.device)):
            together = list(group)
            shapes = [self._left_shape(move.tensor) for move in together]
            memory = together[0].out.new_zeros(sum(rows * rank for rows, rank in shapes))
            drawn = memory.split([rows * rank for rows, rank in shapes])
            lefts += [left.view(shape) for left, shape in zip(drawn, shapes)]
        stream.add_all_([Move(move.tensor, left, 1.0) for move, left in zip(matrices, lefts)], LEFT)
        return lefts

    def place_(self, stream, tensor, out, base, alpha) -> None:
        (super() if tensor.name in self.right else self.inner).place_(stream, tensor, out, base, alpha)

    def draw(self, stream, tensor, dtype=None, start=0, count=None) -> Tensor:
        if tensor.name not in self.right:
            return self.inner.draw(stream, tensor, dtype, start, count)
        return _added_to_zeros(self, stream, tensor, dtype, start, count)


class Held(Direction):
    """d is given, not drawn: left right^T where a tensor has such a pair, a whole tensor elsewhere (LOZO-M)."""

    def __init__(self, left: Mapping[str, Tensor], right: Mapping[str, Tensor], whole: Mapping[str, Tensor]):
        self.left, self.right, self.whole = left, right, whole

    def touches(self, tensor: NamedTensor) -> bool:
        return True

    def add_(self, stream, tensor, out, alpha, beta=1.0, start=0) -> None:
        left = self.left.get(tensor.name)
        if left is None:
            out.mul_(beta).add_(part(self.whole[tensor.name], start, out), alpha=alpha)
        else:
            _add_to_rows_(tensor, out, left, self.right[tensor.name], alpha, beta, start)

    def draw(self, stream, tensor, dtype=None, start=0, count=None) -> Tensor:
        return _added_to_zeros(self, stream, tensor, dtype, start, count)


def _added_to_zeros(direction: Direction, stream, tensor: NamedTensor, dtype, start: int, count: int | None) -> Tensor:
    param = tensor.param
    dtype = dtype or torch.promote_types(param.dtype, torch.float32)
    out = torch.zeros(param.shape if count is None else (count,), dtype=dtype, device=param.device)
    direction.add_(stream, tensor, out, 1.0, 1.0, start)
    return out


def _add_to_rows_(
    tensor: NamedTensor, out: Tensor, left: Tensor, right: Tensor, alpha: float, beta: float, start: int
) -> None:
    """add_product_ on a tensor, or on the rows of it that a piece holds."""
    if out.shape != tensor.param.shape:
        first = start // len(right)
        out = out.view(-1, len(right))
        left = left[first : first + len(out)]
    add_product_(out, left, right, alpha, beta)
