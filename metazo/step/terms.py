"""Sums of multiples of directions, of which probes and updates consist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from metazo.blocks import NamedTensor
from metazo.errors import UserError
from metazo.noise import Stream
from metazo.step.directions import Direction, Scaled


@dataclass(frozen=True)
class Term:
    """A multiple of the direction of one seed: amount * d(seed). A probe, and an update, is a sum of terms.

    In a method's Update, direction None is the direction that the step proposed.
    """

    direction: Direction | None
    seed: int
    amount: float

    def __post_init__(self):
        if type(self.direction).__hash__ is None:
            raise UserError(
                f"The direction {type(self.direction).__name__} cannot be hashed, by which equal terms are found: declare it "
                "with @dataclass(frozen=True), or with eq=False."
            )

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


class Along:
    """The directions of one step under its block scales: the proposed one, and those that a method brings in its terms.

    Attribute probed: the proposed direction as it is probed.
    """

    def __init__(self, proposed: Direction, scales: Mapping[str, float] | None):
        self.scales, self.own = scales, dict[Direction, Direction]()
        self.probed = proposed if scales is None else Scaled(proposed, scales)

    def scaled(self, term: Term) -> Term:
        """The same multiple of the term's direction under the scales, or of the proposed one if the term has none."""
        direction = term.direction
        if direction is None:
            return replace(term, direction=self.probed)
        if self.scales is None or self._is_scaled(direction):
            return term
        return replace(term, direction=self.own.setdefault(direction, Scaled(direction, self.scales)))

    def _is_scaled(self, direction: Direction | None) -> bool:
        """Whether this is the probed direction, or one around it (`inner`)."""
        while direction is not None and direction is not self.probed:
            direction = getattr(direction, "inner", None)
        return direction is not None

    def estimate(self, seeds: Sequence[int], coefficients: Sequence[float], terms: Sequence[Term] | None) -> list[Term]:
        """The sum of terms that is the estimate of a method's Update."""
        if terms is None:
            terms = [Term(None, seed, c) for seed, c in zip(seeds, coefficients)]
        return [self.scaled(term) for term in terms]


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
