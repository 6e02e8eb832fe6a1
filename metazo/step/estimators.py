"""Estimators: the points at which a step evaluates the loss, and the coefficients of its directions from the losses.

With d_k the direction of seed k, the gradient estimate is g = sum_k c_k d_k. An estimator lists probes (query, multiple
of eps) and turns their losses, in that order, into c. The type of the losses is the estimator's, so a method cannot use a
loss that its estimator did not evaluate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple, Protocol

from metazo.errors import UserError


class Probe(NamedTuple):
    """One evaluation, at theta + multiple * eps * d(seed of this query); `query` is None for theta itself.

    snapshot: the evaluation is at the method's snapshot of the weights instead of theta.
    """

    query: int | None
    multiple: float
    snapshot: bool = False


class Estimator(Protocol):
    @property
    def queries(self) -> int: ...

    def probes(self) -> list[Probe]: ...
    def coefficients(self, losses: Sequence[float], eps: float) -> list[float]: ...
    def plus_minus(self, losses: Sequence[float]) -> tuple[float, float]:
        """Mean loss on the two sides (plus, minus); an estimator with one side gives its mean loss twice."""
        ...

    def loss(self, losses: Sequence[float]) -> float:
        """The step's loss, for display: at theta if it was evaluated there, else the mean of the probes."""
        ...


def balanced(estimator: Estimator) -> bool:
    """Whether the coefficients of every step add up to 0."""
    return getattr(estimator, "balanced", False)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


MOST_QUERIES = 2**16
"""A log or recipe with more queries is refused, because the list of its probes alone would fill the memory."""


def check_queries(queries: int, least: int = 1, why: str = "") -> None:
    """Raises UserError for no whole number of queries, or one below `least` (`why` completes the message) or above
    MOST_QUERIES.
    """
    if not isinstance(queries, Integral) or isinstance(queries, bool):
        raise UserError(f"`queries` must be a whole number, not {queries!r}.")
    if not least <= queries <= MOST_QUERIES:
        wanted = f"at least {least}{why}" if queries < least else f"at most {MOST_QUERIES:,}"
        raise UserError(f"`queries` must be {wanted}, not {queries}.")


@dataclass(frozen=True)
class TwoPoint:
    """c_k = (L(theta + eps d_k) - L(theta - eps d_k)) / (2 eps n): SPSA, averaged over n = queries directions."""

    queries: int = 1

    def __post_init__(self):
        check_queries(self.queries)

    def probes(self) -> list[Probe]:
        return [Probe(k, sign) for k in range(self.queries) for sign in (1.0, -1.0)]

    def coefficients(self, losses: Sequence[float], eps: float) -> list[float]:
        pairs = zip(losses[::2], losses[1::2])
        return [(plus - minus) / (2 * eps) / self.queries for plus, minus in pairs]

    def plus_minus(self, losses: Sequence[float]) -> tuple[float, float]:
        return mean(losses[::2]), mean(losses[1::2])

    def loss(self, losses: Sequence[float]) -> float:
        return mean(losses)


@dataclass(frozen=True)
class ThreeLosses:
    """L(theta), then the pair: c as in TwoPoint, and the second difference L+ + L- - 2 L0 for curvature (HiZOO)."""

    queries: int = 1

    def probes(self) -> list[Probe]:
        return [Probe(None, 0.0), Probe(0, 1.0), Probe(0, -1.0)]

    def coefficients(self, losses: Sequence[float], eps: float) -> list[float]:
        return [(losses[1] - losses[2]) / (2 * eps)]

    def second_difference(self, losses: Sequence[float]) -> float:
        return losses[1] + losses[2] - 2 * losses[0]

    def plus_minus(self, losses: Sequence[float]) -> tuple[float, float]:
        return losses[1], losses[2]

    def loss(self, losses: Sequence[float]) -> float:
        return losses[0]


@dataclass(frozen=True)
class AtTheta:
    """One evaluation at theta, along no direction: for methods whose gradient estimate does not come from losses but, for
    example, from forward hooks or a backward pass."""

    queries: int = 0

    def probes(self) -> list[Probe]:
        return [Probe(None, 0.0)]

    def coefficients(self, losses: Sequence[float], eps: float) -> list[float]:
        return [1.0]

    def plus_minus(self, losses: Sequence[float]) -> tuple[float, float]:
        return losses[0], losses[0]

    def loss(self, losses: Sequence[float]) -> float:
        return losses[0]


@dataclass(frozen=True)
class ControlVariate:
    """c = c(theta) - c(snapshot), each from two points along one d, so that their common part cancels (SVRG)."""

    queries: int = 1

    def probes(self) -> list[Probe]:
        return [Probe(0, 1.0, True), Probe(0, -1.0, True), Probe(0, 1.0), Probe(0, -1.0)]

    def coefficients(self, losses: Sequence[float], eps: float) -> list[float]:
        return [((losses[2] - losses[3]) - (losses[0] - losses[1])) / (2 * eps)]

    def plus_minus(self, losses: Sequence[float]) -> tuple[float, float]:
        return losses[2], losses[3]

    def loss(self, losses: Sequence[float]) -> float:
        return mean(losses[2:])


@dataclass(frozen=True)
class LeaveOneOut:
    """One-sided probes, each compared with the mean of the others (RLOO): c_k = (f_k - mean f) / (eps (K - 1)), K = queries."""

    queries: int = 6
    balanced = True

    def __post_init__(self):
        check_queries(self.queries, 2, " to leave one out")

    def probes(self) -> list[Probe]:
        return [Probe(k, 1.0) for k in range(self.queries)]

    def coefficients(self, losses: Sequence[float], eps: float) -> list[float]:
        centre = mean(losses)
        return [(f - centre) / (eps * (self.queries - 1)) for f in losses]

    def plus_minus(self, losses: Sequence[float]) -> tuple[float, float]:
        return mean(losses), mean(losses)

    def loss(self, losses: Sequence[float]) -> float:
        return mean(losses)


def z_scores(losses: Sequence[float]) -> list[float]:
    """(L - mean) / standard deviation of the population; zeros if no loss differs."""
    centre = mean(losses)
    spread = math.sqrt(mean([(loss - centre) ** 2 for loss in losses]))
    if spread == 0 or min(losses) == max(losses):  # the mean of equal numbers may differ from them by rounding
        return [0.0] * len(losses)
    return [(loss - centre) / spread for loss in losses]


def centred_ranks(losses: Sequence[float]) -> list[float]:
    """Ranks from -1/2 (the lowest loss) to 1/2; equal losses share the mean of their ranks."""
    ranks = [sum(other < loss for other in losses) + (losses.count(loss) - 1) / 2 for loss in losses]
    return [rank / (len(losses) - 1) - 0.5 for rank in ranks]


SHAPINGS: dict[str, Callable[[list[float]], list[float]]] = {"z-score": z_scores, "rank": centred_ranks}


@dataclass(frozen=True)
class Population:
    """Shaped losses of N = members perturbed models: c_k = 1/N times the shaped loss, summed over the members along d_k.

    antithetic: members are pairs at +eps and -eps along N / 2 directions; otherwise +eps along N directions.
    """

    members: int = 30
    antithetic: bool = False
    shaping: str = "z-score"

    @property
    def balanced(self) -> bool:
        return not self.antithetic

    def __post_init__(self):
        least = 4 if self.antithetic else 2
        if not isinstance(self.members, int) or self.members < least or (self.antithetic and self.members % 2):
            even = "an even number" if self.antithetic else "a whole number"
            raise UserError(f"`population` must be {even} of at least {least}, not {self.members}.")
        if self.members > MOST_QUERIES:
            raise UserError(f"`population` must be at most {MOST_QUERIES:,}, not {self.members}.")
        if self.shaping not in list(SHAPINGS):  # a value that cannot be a key, too
            raise UserError(f"`shaping` {self.shaping!r} is unknown: choose {' or '.join(SHAPINGS)}.")

    @property
    def queries(self) -> int:
        return self.members // 2 if self.antithetic else self.members

    def probes(self) -> list[Probe]:
        signs = (1.0, -1.0) if self.antithetic else (1.0,)
        return [Probe(k, sign) for k in range(self.queries) for sign in signs]

    def coefficients(self, losses: Sequence[float], eps: float) -> list[float]:
        shaped = SHAPINGS[self.shaping]([*losses])
        if self.antithetic:
            shaped = [plus - minus for plus, minus in zip(shaped[::2], shaped[1::2])]
        return [value / self.members for value in shaped]

    def plus_minus(self, losses: Sequence[float]) -> tuple[float, float]:
        return (mean(losses[::2]), mean(losses[1::2])) if self.antithetic else (mean(losses), mean(losses))

    def loss(self, losses: Sequence[float]) -> float:
        return mean(losses)


@dataclass(frozen=True)
class OneSided:
    """One-sided probes compared with the loss at theta: c_k = (L(theta + eps d_k) - L(theta)) / (eps K), K = queries."""

    queries: int = 8

    def __post_init__(self):
        check_queries(self.queries)

    def probes(self) -> list[Probe]:
        return [Probe(None, 0.0), *(Probe(k, 1.0) for k in range(self.queries))]

    def coefficients(self, losses: Sequence[float], eps: float) -> list[float]:
        return [(f - losses[0]) / (eps * self.queries) for f in losses[1:]]

    def plus_minus(self, losses: Sequence[float]) -> tuple[float, float]:
        return mean(losses), mean(losses)

    def loss(self, losses: Sequence[float]) -> float:
        return losses[0]
