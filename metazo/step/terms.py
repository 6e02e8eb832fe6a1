"""Sums of multiples of directions, of which probes and updates consist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from metazo.blocks import NamedTensor
from metazo.noise import Stream
from metazo.step.directions import Direction


@dataclass(frozen=True)
class Term:
    """A multiple of the direction of one seed: amount * d(seed). A probe, and an update, is a sum of terms.

    In a method's Update, direction None is the direction that the step proposed.
    """

    direction: Direction | None
    seed: int
    amount: float

    @property
    def key(self) -> tuple[int, Direction | None]:
        """Equal for two terms that are multiples of one vector."""
        return self.seed, self.direction

    @property
    def along(self) -> Direction:
        """The direction, which every term but those of a method's Update has."""
        assert self.direction is not None
        return self.direction

    def touches(self, tensor: NamedTensor) -> bool:
        return self.along.touches(tensor)

    def add_(self, stream: Stream, tensor: NamedTensor, out: Tensor, beta: float = 1.0, start: int = 0) -> None:
        """out = beta * out + amount * d, in place."""
        self.along.add_(stream, tensor, out, self.amount, beta, start)


@dataclass(frozen=True)
class Estimate:
    """A sum of terms. It never exists as a tensor: it is added to one, or to a chunk."""

    terms: Sequence[Term]
    streams: Sequence[Stream]

    def add_(self, tensor: NamedTensor, start: int, out: Tensor, alpha: float, beta: float) -> None:
        """out = beta * out + alpha * estimate, on a tensor (start 0) or the chunk of it from start."""
        add_sum_(tensor, out, self.terms, self.streams, [alpha * term.amount for term in self.terms], beta, start)


def add_sum_(
    tensor: NamedTensor,
    out: Tensor,
    terms: Sequence[Term],
    streams: Sequence[Stream],
    amounts: Sequence[float],
    beta: float,
    start: int,
) -> None:
    for term, stream, amount in zip(terms, streams, amounts):
        if term.touches(tensor):
            term.along.add_(stream, tensor, out, amount, beta, start)
            beta = 1.0
    if beta != 1.0:
        out.mul_(beta)
