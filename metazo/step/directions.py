"""Directions: the vectors along which a step probes and moves.

A direction turns the noise of one seed into a vector d over all tensors, tensor by tensor. Directions wrap each other:
`Scaled(LowRank(...))` is LOZO under a learned block scale. A direction is added to a tensor or to a chunk of one, which is
a flat run of whole rows from entry `start` (metazo.blocks.chunks). No direction makes a temporary larger than a chunk.
Drawing never writes state: a direction does not change after `propose` returns it, and may be drawn any number of times.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metazo.blocks import NamedTensor, chunk_of, chunks
from metazo.kernels.outer import Product
from metazo.noise import DENSE, Draw, Move, Place, Stream


def in_chunks(tensor: NamedTensor, out: Tensor, start: int = 0) -> Iterator[tuple[int, Tensor]]:
    """`out` in chunks, as (start, entries); one if `out` is a chunk already, or if it or the parameter is not contiguous."""
    if out.numel() < tensor.param.numel() or not (out.is_contiguous() and tensor.param.is_contiguous()):
        yield start, out
        return
    ranges = list(chunks(tensor.param))
    for first, stop in ranges:
        yield first, out if len(ranges) == 1 else out.view(-1)[first:stop]


def drawn(stream: Stream, tensor: NamedTensor) -> Iterator[tuple[int, Tensor]]:
    """z of a tensor in new memory, chunk by chunk: (start, entries)."""
    ranges = list(chunks(tensor.param))
    if len(ranges) == 1:
        yield 0, stream.draw(tensor)
    else:
        for start, stop in ranges:
            yield start, stream.draw(tensor, start=start, count=stop - start)


def draw_like(direction: Direction, stream: Stream, tensor: NamedTensor, chunk: Tensor, start: int) -> Tensor:
    """d on a chunk, in its dtype."""
    count = None if chunk.shape == tensor.param.shape else chunk.numel()
    return direction.draw(stream, tensor, chunk.dtype, start, count)


class Direction(ABC):
    """Base of directions. The `add_` and `place_` here work for every direction that can be drawn; many have faster ones."""

    @abstractmethod
    def touches(self, tensor: NamedTensor) -> bool:
        """False if d is zero on the tensor and draws no noise for it."""

    @abstractmethod
    def draw(self, stream: Stream, tensor: NamedTensor, dtype=None, start: int = 0, count: int | None = None) -> Tensor:
        """d on this tensor, in its shape, or count entries of it from start. dtype: default the tensor's, at least float32."""

    def draws(self, tensor: NamedTensor) -> Iterable[Draw]:
        """The numbers that d needs of a stream for this tensor, in the order of the published code."""
        return [(tensor, None, DENSE)] if self.touches(tensor) else []

    def factors(self, stream: Stream, tensor: NamedTensor) -> tuple[Tensor, Tensor] | None:
        """(U, V), (m, r) and (n, r), if d = U V^T on this matrix."""
        return None

    def dense(self, tensor: NamedTensor, alpha: float) -> float | None:
        """The number a, if alpha d = a z with the noise z of this tensor."""
        return None

    def add_(
        self, stream: Stream, tensor: NamedTensor, out: Tensor, alpha: float, beta: float = 1.0, start: int = 0
    ) -> None:
        """out = beta * out + alpha * d, in place; out: in the tensor's shape, or a chunk of it."""
        for first, chunk in in_chunks(tensor, out, start):
            if beta != 1.0:
                chunk.mul_(beta)
            chunk.add_(draw_like(self, stream, tensor, chunk, first), alpha=alpha)

    def add_all_(self, stream: Stream, moves: Sequence[Move]) -> None:
        """add_ on several whole tensors that d touches. Subclasses may do all of them at once if that is faster."""
        stream.prepare(draw for move in moves for draw in self.draws(move.tensor))
        for move in moves:
            self.add_(stream, *move)

    def parts(self, stream: Stream, moves: Sequence[Move]) -> tuple[list[Move], list[Product]] | None:
        """What `add_all_` adds, as multiples of the stream's noise and as products of factors; None if it is neither.

        The result does not change if the method's state changes later.
        """
        return None

    def place_(self, stream: Stream, tensor: NamedTensor, out: Tensor, base: Tensor, alpha: float) -> None:
        """out = base + alpha * d on the whole tensor, computed in base's dtype and rounded to out's."""
        for start, chunk in in_chunks(tensor, base):
            moved = chunk.clone()
            self.add_(stream, tensor, moved, alpha, 1.0, start)
            chunk_of(out, start, moved).copy_(moved)

    def place_all_(self, stream: Stream, places: Sequence[Place]) -> None:
        """place_ on several tensors that d touches. Subclasses may do all of them at once if that is faster."""
        stream.prepare(draw for place in places for draw in self.draws(place.tensor))
        for place in places:
            self.place_(stream, *place)


class Isotropic(Direction):
    """d = z, the noise itself."""

    def touches(self, tensor: NamedTensor) -> bool:
        return True

    def dense(self, tensor: NamedTensor, alpha: float) -> float | None:
        return alpha

    def add_(self, stream, tensor, out, alpha, beta=1.0, start=0) -> None:
        stream.add_(tensor, out, alpha, beta, start=start)

    def add_all_(self, stream, moves) -> None:
        stream.add_all_(moves)

    def parts(self, stream, moves) -> tuple[list[Move], list[Product]] | None:
        return list(moves), []

    def place_all_(self, stream, places) -> None:
        stream.place_all_(places)

    def draw(self, stream, tensor, dtype=None, start=0, count=None) -> Tensor:
        return stream.draw(tensor, dtype=dtype, start=start, count=count)


class Scaled(Direction):
    """d = s_b d' with one positive number s_b per tensor (block scales)."""

    def __init__(self, inner: Direction, scales: Mapping[str, float]):
        self.inner, self.scales = inner, scales

    def touches(self, tensor: NamedTensor) -> bool:
        return self.inner.touches(tensor)

    def draws(self, tensor: NamedTensor) -> Iterable[Draw]:
        return self.inner.draws(tensor)

    def dense(self, tensor: NamedTensor, alpha: float) -> float | None:
        return self.inner.dense(tensor, alpha * self.scales[tensor.name])

    def add_(self, stream, tensor, out, alpha, beta=1.0, start=0) -> None:
        self.inner.add_(stream, tensor, out, alpha * self.scales[tensor.name], beta, start)

    def _scaled(self, moves: Sequence[Move]) -> list[Move]:
        return [move._replace(alpha=move.alpha * self.scales[move.tensor.name]) for move in moves]

    def add_all_(self, stream, moves) -> None:
        self.inner.add_all_(stream, self._scaled(moves))

    def parts(self, stream, moves) -> tuple[list[Move], list[Product]] | None:
        return self.inner.parts(stream, self._scaled(moves))

    def place_all_(self, stream, places) -> None:
        self.inner.place_all_(stream, [p._replace(alpha=p.alpha * self.scales[p.tensor.name]) for p in places])

    def factors(self, stream, tensor) -> tuple[Tensor, Tensor] | None:
        pair = self.inner.factors(stream, tensor)
        return pair and (pair[0] * self.scales[tensor.name], pair[1])

    def draw(self, stream, tensor, dtype=None, start=0, count=None) -> Tensor:
        return self.inner.draw(stream, tensor, dtype, start, count).mul_(self.scales[tensor.name])


class Diagonal(Direction):
    """d = D * d', elementwise; `factor(tensor, start, count)` gives D as `draw` gives d (HiZOO: H^-1/2)."""

    def __init__(self, inner: Direction, factor: Callable[[NamedTensor, int, int | None], Tensor]):
        self.inner, self.factor = inner, factor

    def touches(self, tensor: NamedTensor) -> bool:
        return self.inner.touches(tensor)

    def draws(self, tensor: NamedTensor) -> Iterable[Draw]:
        return self.inner.draws(tensor)

    def draw(self, stream, tensor, dtype=None, start=0, count=None) -> Tensor:
        return self.inner.draw(stream, tensor, dtype, start, count).mul_(self.factor(tensor, start, count))


class Reflected(Direction):
    """d = B d', with B the reflected root of rho (rho I + a a^T)^-1 on every len(a) consecutive entries of a tensor (LOREN).

        B u = u - (1 + sqrt(rho / (rho + s))) a (a.u) / s,    s = |a|^2        so that B B^T = rho (rho I + a a^T)^-1

    B leaves vectors orthogonal to a unchanged and maps a to -sqrt(rho / (rho + s)) a. a.u needs whole rows, so a process with a
    shard of a tensor draws all rows of which it has a part.

    Args: inner: the direction d'. vector: gives the vector a of a tensor; its length divides the tensor's number of entries
        (one B per row if it is the length of a row). damping: rho > 0.
    """

    def __init__(self, inner: Direction, vector: Callable[[NamedTensor], Tensor], damping: float):
        self.inner, self.vector, self.damping = inner, vector, damping
        self.along: tuple[Any, ...] = ()
        """Which chunk comes next of a long row that is drawn chunk by chunk, with its a, and what each chunk takes of a."""

    def touches(self, tensor: NamedTensor) -> bool:
        return self.inner.touches(tensor)

    def draws(self, tensor: NamedTensor) -> Iterable[Draw]:
        return self.inner.draws(tensor)

    def draw(self, stream, tensor, dtype=None, start=0, count=None) -> Tensor:
        if tensor.spans is not None:
            return self._own_entries(stream, tensor, dtype, start, count)
        noise = self.inner.draw(stream, tensor, dtype, start, count)
        stop = start + noise.numel()
        if start and self.along and self.along[0] == (stream.seed, tensor.id, noise.dtype, start):
            _, a, amount = self.along
        else:
            a = self.vector(tensor).to(noise.dtype)
            square = float(a @ a)
            if not square > 0:
                return noise
            factor = (1 + math.sqrt(self.damping / (self.damping + square))) / square
            if noise.numel() % len(a) == 0:
                rows = noise.view(-1, len(a))
                return rows.addr_(rows @ a, a, alpha=-factor).view_as(noise)
            # the chunk is part of one long row, and the product with a needs the whole row
            drawn = ((self.inner.draw(stream, tensor, noise.dtype, i, j - i), i, j) for i, j in chunks(tensor.param))
            amount = factor * sum(float(part @ a[i:j]) for part, i, j in drawn)
        unfinished = stop < tensor.param.numel()
        self.along = ((stream.seed, tensor.id, noise.dtype, stop), a, amount) if unfinished else ()
        return noise.sub_(a[start:stop], alpha=amount)

    def _own_entries(self, stream, tensor: NamedTensor, dtype, start: int, count: int | None) -> Tensor:
        """`draw` for a shard, from the chunks of the whole tensor in which it has entries."""
        param, spans, whole = tensor.param, tensor.spans, tensor.entire
        assert spans is not None
        places = spans.part(start, start + (param.numel() if count is None else count)).entries()
        own = param.data.new_empty(len(places), dtype=dtype or torch.promote_types(param.dtype, torch.float32))
        for first, stop in chunks(whole.param):
            low, high = np.searchsorted(places, [first, stop])
            if low < high:
                index = torch.from_numpy(places[low:high] - first).to(own.device)
                own[low:high] = self.draw(stream, whole, own.dtype, first, stop - first)[index]
        return own if count is not None else own.view(param.shape)


class Sparse(Direction):
    """d = d' on the selected tensors; on all others d is zero and draws no noise."""

    def __init__(self, inner: Direction, selected):
        self.inner, self.selected = inner, frozenset(selected)

    def touches(self, tensor: NamedTensor) -> bool:
        return tensor.name in self.selected and self.inner.touches(tensor)

    def draws(self, tensor: NamedTensor) -> Iterable[Draw]:
        return self.inner.draws(tensor) if self.touches(tensor) else []

    def factors(self, stream, tensor) -> tuple[Tensor, Tensor] | None:
        return self.inner.factors(stream, tensor) if self.touches(tensor) else None

    def dense(self, tensor: NamedTensor, alpha: float) -> float | None:
        return self.inner.dense(tensor, alpha) if self.touches(tensor) else None

    def add_(self, stream, tensor, out, alpha, beta=1.0, start=0) -> None:
        if self.touches(tensor):
            self.inner.add_(stream, tensor, out, alpha, beta, start)
        elif beta != 1.0:
            out.mul_(beta)

    def add_all_(self, stream, moves) -> None:
        self.inner.add_all_(stream, moves)

    def parts(self, stream, moves) -> tuple[list[Move], list[Product]] | None:
        return self.inner.parts(stream, moves)

    def place_all_(self, stream, places) -> None:
        self.inner.place_all_(stream, places)

    def draw(self, stream, tensor, dtype=None, start=0, count=None) -> Tensor:
        if self.touches(tensor):
            return self.inner.draw(stream, tensor, dtype, start, count)
        return tensor.param.new_zeros(tensor.param.shape if count is None else (count,), dtype=dtype)
