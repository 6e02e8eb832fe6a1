"""Directions of low rank: d = U V^T on matrices (LOZO), drawn or given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from metazo.blocks import NamedTensor, chunk_of
from metazo.kernels.outer import add_product_, add_products_
from metazo.noise import LEFT, Draw, Move, Stream
from metazo.step.directions import Direction


class LowRank(Direction):
    """d = U V^T on matrices, U drawn and V given; the inner direction on everything else.

    Args: inner; right: V by tensor name, (n, r), for the tensors to treat so.
    """

    def __init__(self, inner: Direction, right: Mapping[str, Tensor]):
        self.inner, self.right = inner, right

    def touches(self, tensor: NamedTensor) -> bool:
        return tensor.name in self.right or self.inner.touches(tensor)

    def draws(self, tensor: NamedTensor) -> Iterable[Draw]:
        if tensor.name in self.right:
            return [(tensor, self._left_shape(tensor), LEFT)]
        return self.inner.draws(tensor)

    def left(self, stream: Stream, tensor: NamedTensor, dtype: torch.dtype) -> Tensor:
        """U of the tensor. Returns: (m, r)."""
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
            add_to_rows_(tensor, out, self.left(stream, tensor, out.dtype), right, alpha, beta, start)

    def add_all_(self, stream, moves) -> None:
        self.inner.add_all_(stream, [move for move in moves if move.tensor.name not in self.right])
        matrices = [move for move in moves if move.tensor.name in self.right]
        lefts = self._lefts(stream, matrices)
        add_products_(
            [
                (out, left, self.right[tensor.name], alpha, beta)
                for (tensor, out, alpha, beta), left in zip(matrices, lefts)
            ]
        )

    def _lefts(self, stream: Stream, matrices: Sequence[Move]) -> list[Tensor]:
        """U of each, in the type of the tensor that it is added to: drawn at once, in memory taken at once."""
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
        return added_to_zeros(self, stream, tensor, dtype, start, count)


class Held(Direction):
    """d is given, not drawn: left right^T for a tensor with such a pair, else a whole tensor, else zero (LOZO-M).

    Args: left, right: factors by tensor name, (m, r) and (n, r); whole: tensors by name, in the tensors' shapes.
    """

    def __init__(self, left: Mapping[str, Tensor], right: Mapping[str, Tensor], whole: Mapping[str, Tensor]):
        self.left, self.right, self.whole = left, right, whole

    def touches(self, tensor: NamedTensor) -> bool:
        return tensor.name in self.left or tensor.name in self.whole

    def draws(self, tensor: NamedTensor) -> Iterable[Draw]:
        return []

    def factors(self, stream, tensor) -> tuple[Tensor, Tensor] | None:
        left = self.left.get(tensor.name)
        return None if left is None else (left, self.right[tensor.name])

    def add_(self, stream, tensor, out, alpha, beta=1.0, start=0) -> None:
        left = self.left.get(tensor.name)
        if left is None:
            out.mul_(beta).add_(chunk_of(self.whole[tensor.name], start, out), alpha=alpha)
        else:
            add_to_rows_(tensor, out, left, self.right[tensor.name], alpha, beta, start)

    def draw(self, stream, tensor, dtype=None, start=0, count=None) -> Tensor:
        return added_to_zeros(self, stream, tensor, dtype, start, count)


def added_to_zeros(direction: Direction, stream, tensor: NamedTensor, dtype, start: int, count: int | None) -> Tensor:
    """`draw` of a direction that is quicker to add than to draw."""
    param = tensor.param
    dtype = dtype or torch.promote_types(param.dtype, torch.float32)
    out = torch.zeros(param.shape if count is None else (count,), dtype=dtype, device=param.device)
    direction.add_(stream, tensor, out, 1.0, 1.0, start)
    return out


def add_to_rows_(
    tensor: NamedTensor, out: Tensor, left: Tensor, right: Tensor, alpha: float, beta: float, start: int
) -> None:
    """add_product_ on a tensor, or on the rows of it that a chunk holds."""
    if out.shape != tensor.param.shape:
        first = start // len(right)
        out = out.view(-1, len(right))
        left = left[first : first + len(out)]
    add_product_(out, left, right, alpha, beta)
