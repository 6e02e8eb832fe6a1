"""Directions of low rank: d = U V^T on matrices (LOZO), drawn or given."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from metazo.blocks import LocalShard, NamedTensor, chunk_of, sides_of
from metazo.kernels.outer import Product, add_product_, add_products_, place_products_
from metazo.noise import LEFT, RIGHT, Draw, Move, Stream
from metazo.step.directions import Direction


class Factors(Direction):
    """d = U V^T on the matrices for which a subclass gives the pair, and the inner direction on all other tensors."""

    inner: Direction

    @abstractmethod
    def is_matrix(self, tensor: NamedTensor) -> bool:
        """Whether d has factors on this tensor."""

    @abstractmethod
    def pair(self, stream: Stream, tensor: NamedTensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """U, (m, r), and V, (n, r), of a matrix; those of the whole matrix if this process has a shard of it."""

    def touches(self, tensor: NamedTensor) -> bool:
        return self.is_matrix(tensor) or self.inner.touches(tensor)

    def factors(self, stream, tensor) -> tuple[Tensor, Tensor] | None:
        if not self.is_matrix(tensor):
            return None
        return self.pair(stream, tensor, torch.promote_types(tensor.param.dtype, torch.float32))

    def add_(self, stream, tensor, out, alpha, beta=1.0, start=0) -> None:
        if self.is_matrix(tensor):
            add_to_rows_(tensor, out, *cut(tensor, *self.pair(stream, tensor, out.dtype)), alpha, beta, start)
        else:
            self.inner.add_(stream, tensor, out, alpha, beta, start)

    def add_all_(self, stream, moves) -> None:
        self.inner.add_all_(stream, [move for move in moves if not self.is_matrix(move.tensor)])
        matrices = [move for move in moves if self.is_matrix(move.tensor)]
        pairs = self.pairs(stream, matrices)
        add_products_([(move.out, *pair, move.alpha, move.beta) for move, pair in zip(matrices, pairs)])

    def parts(self, stream, moves) -> tuple[list[Move], list[Product]] | None:
        rest = self.inner.parts(stream, [move for move in moves if not self.is_matrix(move.tensor)])
        if rest is None:
            return None
        matrices = [move for move in moves if self.is_matrix(move.tensor)]
        pairs = [(left.clone(), right.clone()) for left, right in self.pairs(stream, matrices)]
        products = [(move.out, *pair, move.alpha, move.beta) for move, pair in zip(matrices, pairs)]
        return rest[0], [*rest[1], *products]

    def pairs(self, stream: Stream, matrices: Sequence[Move]) -> list[tuple[Tensor, Tensor]]:
        """The pair of each move's tensor, cut to a shard, in the type of the tensor to which it is added."""
        stream.prepare(draw for move in matrices for draw in self.draws(move.tensor))
        return [cut(move.tensor, *self.pair(stream, move.tensor, move.out.dtype)) for move in matrices]

    def place_all_(self, stream, places) -> None:
        self.inner.place_all_(stream, [place for place in places if not self.is_matrix(place.tensor)])
        matrices = [place for place in places if self.is_matrix(place.tensor)]
        together = [place for place in matrices if place.out.is_cuda]  # elsewhere there is no kernel for them
        pairs = self.pairs(stream, [Move(place.tensor, place.base, place.alpha) for place in together])
        products = [(place.out, place.base, *pair, place.alpha) for place, pair in zip(together, pairs)]
        placed = {id(place) for place, done in zip(together, place_products_(products)) if done}
        for place in matrices:
            if id(place) not in placed:
                self.place_(stream, *place)

    def draw(self, stream, tensor, dtype=None, start=0, count=None) -> Tensor:
        if not self.is_matrix(tensor):
            return self.inner.draw(stream, tensor, dtype, start, count)
        return added_to_zeros(self, stream, tensor, dtype, start, count)


class LowRank(Factors):
    """U drawn and V given (LOZO).

    Args: inner: the direction of all other tensors; right: V by tensor name, (n, r).
    """

    def __init__(self, inner: Direction, right: Mapping[str, Tensor]):
        self.inner, self.right = inner, right

    def is_matrix(self, tensor: NamedTensor) -> bool:
        return tensor.name in self.right

    def draws(self, tensor: NamedTensor) -> Iterable[Draw]:
        if tensor.name in self.right:
            return [(tensor, self._left_shape(tensor), LEFT)]
        return self.inner.draws(tensor)

    def pair(self, stream, tensor, dtype) -> tuple[Tensor, Tensor]:
        return self.left(stream, tensor, dtype), self.right[tensor.name]

    def left(self, stream: Stream, tensor: NamedTensor, dtype: torch.dtype) -> Tensor:
        """U of the tensor. Returns: (m, r)."""
        return stream.draw(tensor, self._left_shape(tensor), LEFT, dtype)

    def _left_shape(self, tensor: NamedTensor) -> tuple[int, int]:
        return sides_of(tensor.param)[0], self.right[tensor.name].shape[1]

    def pairs(self, stream: Stream, matrices: Sequence[Move]) -> list[tuple[Tensor, Tensor]]:
        """As in the base class; all U are one call and one allocation, which takes a tenth of a step less than `prepare`."""
        lefts: list[Tensor] = []
        for _, group in groupby(matrices, lambda move: (move.out.dtype, move.out.device)):
            together = list(group)
            shapes = [self._left_shape(move.tensor) for move in together]
            memory = together[0].out.new_zeros(sum(rows * rank for rows, rank in shapes))
            drawn = memory.split([rows * rank for rows, rank in shapes])
            lefts += [left.view(shape) for left, shape in zip(drawn, shapes)]
        stream.add_all_([Move(move.tensor, left, 1.0) for move, left in zip(matrices, lefts)], LEFT)
        return [cut(move.tensor, left, self.right[move.tensor.name]) for move, left in zip(matrices, lefts)]


class Projected(Factors):
    """U given and V drawn (ZO-Muon: U is the basis P of a subspace).

    Args: inner: the direction of all other tensors; basis: U by tensor name, (m, r).
    """

    def __init__(self, inner: Direction, basis: Mapping[str, Tensor]):
        self.inner, self.basis = inner, basis

    def is_matrix(self, tensor: NamedTensor) -> bool:
        return tensor.name in self.basis

    def _right_shape(self, tensor: NamedTensor) -> tuple[int, int]:
        return sides_of(tensor.param)[1], self.basis[tensor.name].shape[1]

    def draws(self, tensor: NamedTensor) -> Iterable[Draw]:
        if tensor.name in self.basis:
            return [(tensor, self._right_shape(tensor), RIGHT)]
        return self.inner.draws(tensor)

    def pair(self, stream, tensor, dtype) -> tuple[Tensor, Tensor]:
        return self.basis[tensor.name], self.right(stream, tensor, dtype)

    def right(self, stream: Stream, tensor: NamedTensor, dtype: torch.dtype) -> Tensor:
        """V of the tensor. Returns: (n, r)."""
        return stream.draw(tensor, self._right_shape(tensor), RIGHT, dtype)


def within_sides(rank: int, tensors: Sequence[NamedTensor]) -> dict[str, int]:
    """The rank of each matrix by name: `rank`, or its shorter side if that is smaller. Vectors are left out."""
    shorter = {t.name: min(sides_of(t.param)) for t in tensors if t.param.ndim > 1}
    return {name: min(rank, side) for name, side in shorter.items() if side > 1}


class DrawnFactors(Factors):
    """U and V drawn, d = U V^T / sqrt(r): the mean square of an entry is 1 (EGGROLL, FZOO with `rank`).

    Args: inner: the direction of all other tensors; ranks: r by tensor name.
    """

    def __init__(self, inner: Direction, ranks: Mapping[str, int]):
        self.inner, self.ranks = inner, ranks

    def is_matrix(self, tensor: NamedTensor) -> bool:
        return tensor.name in self.ranks

    def _shapes(self, tensor: NamedTensor) -> tuple[tuple[int, int], tuple[int, int]]:
        rows, columns = sides_of(tensor.param)
        return (rows, self.ranks[tensor.name]), (columns, self.ranks[tensor.name])

    def draws(self, tensor: NamedTensor) -> Iterable[Draw]:
        if tensor.name not in self.ranks:
            return self.inner.draws(tensor)
        left, right = self._shapes(tensor)
        return [(tensor, left, LEFT), (tensor, right, RIGHT)]

    def pair(self, stream, tensor, dtype) -> tuple[Tensor, Tensor]:
        left, right = self._shapes(tensor)
        u = stream.draw(tensor, left, LEFT, dtype).div_(math.sqrt(self.ranks[tensor.name]))
        return u, stream.draw(tensor, right, RIGHT, dtype)


class Held(Direction):
    """d is given, not drawn: left right^T for a tensor with such a pair, else a given tensor, else zero (LOZO-M).

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
            add_to_rows_(tensor, out, *cut(tensor, left, self.right[tensor.name]), alpha, beta, start)

    def draw(self, stream, tensor, dtype=None, start=0, count=None) -> Tensor:
        return added_to_zeros(self, stream, tensor, dtype, start, count)


def added_to_zeros(direction: Direction, stream, tensor: NamedTensor, dtype, start: int, count: int | None) -> Tensor:
    """`draw` for a direction that is faster to add than to draw."""
    param = tensor.param
    dtype = dtype or torch.promote_types(param.dtype, torch.float32)
    out = torch.zeros(param.shape if count is None else (count,), dtype=dtype, device=param.device)
    direction.add_(stream, tensor, out, 1.0, 1.0, start)
    return out


def cut(tensor: NamedTensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of U and V that belong to the entries of the tensor that this process has."""
    return tensor.param.cut(left, right) if isinstance(tensor.param, LocalShard) else (left, right)


def add_to_rows_(
    tensor: NamedTensor, out: Tensor, left: Tensor, right: Tensor, alpha: float, beta: float, start: int
) -> None:
    """add_product_ on a tensor, or on the rows of a chunk of it."""
    if out.shape != tensor.param.shape:
        first = start // len(right)
        out = out.view(-1, len(right))
        left = left[first : first + len(out)]
    add_product_(out, left, right, alpha, beta)
