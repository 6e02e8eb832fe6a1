"""Means, intervals and paired tests, with their limits for few seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean, variance

import numpy as np

from metazo.io.extras import needs

with needs("report"):
    from scipy import stats

ENOUGH = (
    6  # pairs that differ, from which on a two-sided Wilcoxon test can fall below 0.05: its least p is 2 ** (1 - pairs)
)
COUNTED = 200  # pairs for which all choices of signs are counted: 40,000 sums, 10 ms
ROUNDING = 1e-9  # sizes that are closer than this fraction of them differ by rounding alone,
SMALLEST = 1e-15  # and so do those that are closer than this


@dataclass(frozen=True)
class Average:
    """The mean over tasks of means over seeds, with its 95 % interval over seeds; None if a task has one seed."""

    mean: float
    low: float | None
    high: float | None
    spread: float | None
    """Standard deviation over seeds, root mean square over tasks"""


def equal(one: float, other: float) -> bool:
    """Whether two averages tie: they differ by rounding at most."""
    return math.isclose(one, other, rel_tol=ROUNDING, abs_tol=SMALLEST)


def average(groups: Sequence[Sequence[float]]) -> Average:
    """The average of one group of values per task. Tasks have equal weight and are fixed; seeds are a random sample.

    The interval is Student's, its degrees of freedom by Welch and Satterthwaite.
    """
    mean = fmean(fmean(group) for group in groups)
    if any(len(group) < 2 for group in groups):
        return Average(mean, None, None, None)
    spread = math.sqrt(fmean(variance(group) for group in groups))
    parts = [variance(group) / len(group) / len(groups) ** 2 for group in groups]
    squared = sum(parts)
    if squared == 0:
        return Average(mean, mean, mean, spread)
    freedom = squared**2 / sum(part**2 / (len(group) - 1) for part, group in zip(parts, groups))
    reach = float(stats.t.ppf(0.975, freedom)) * math.sqrt(squared)
    return Average(mean, mean - reach, mean + reach, spread)


@dataclass(frozen=True)
class Paired:
    """A method against the reference over pairs of runs with the same task and seed.

    gain: mean over tasks of how much better the method is (positive: better), of the pairs that both finished, with
    its 95 % interval over seeds; p: two-sided; holm: p corrected for all methods tested; least, least_holm: the smallest
    p and holm that so many pairs can give.
    """

    pairs: int
    wins: int
    losses: int
    ties: int
    gain: float | None
    low: float | None
    high: float | None
    test: str
    p: float | None
    least: float | None
    holm: float | None = None
    least_holm: float | None = None
    tasks: int = 0
    tasks_won: int = 0
    better: bool = False
    """Whether the sum of signed ranks is above 0, as the mean need not be if a few differences are large"""


def paired(gains: Mapping[str, Sequence[float]]) -> Paired:
    """Test gains by task; inf: the reference failed and the method finished, -inf: the other way round.

    From ENOUGH pairs that differ on, Wilcoxon's signed-rank test over all of them (a failure ranks as the largest
    difference); with fewer, the exact sign-flip permutation test of the mean. Gains
    of one size but for rounding, such as 0.76 - 0.75 and 0.51 - 0.50, tie. A task on which a run of the method failed is not
    won.
    """
    everything = level(np.array([gain for group in gains.values() for gain in group], dtype=float))
    rest = iter(everything.tolist())
    groups = [[*islice(rest, len(group))] for group in gains.values()]
    finite = [known for group in groups if (known := [gain for gain in group if math.isfinite(gain)])]
    mean = average(finite) if finite else Average(math.nan, None, None, None)
    moved = everything[everything != 0]
    p, test, least = None, "no pairs", None
    if len(everything):
        tested = signed_rank if len(moved) >= ENOUGH else sign_flips
        (p, test), (least, _) = tested(moved), tested(np.abs(moved))
    return Paired(
        pairs=len(everything),
        wins=int((everything > 0).sum()),
        losses=int((everything < 0).sum()),
        ties=int((everything == 0).sum()),
        gain=mean.mean if finite else None,
        low=mean.low,
        high=mean.high,
        test=test,
        p=p,
        least=least if len(moved) else None,
        tasks=len(gains),
        tasks_won=sum(map(_won, groups)),
        better=bool((stats.rankdata(np.abs(moved)) * np.sign(moved)).sum() > 0),
    )


def _won(gains: Sequence[float]) -> bool:
    """Whether a task is won, by levelled gains: no run of the method failed, and the mean of the finite ones is above 0."""
    finite = [gain for gain in gains if math.isfinite(gain)]
    if not finite:
        return -math.inf not in gains and bool(gains)
    return -math.inf not in gains and fmean(finite) > ROUNDING * max(map(abs, finite))


def level(differences: np.ndarray) -> np.ndarray:
    """The differences, with one size for all sizes that are equal but for rounding (ROUNDING), so that they tie in ranks."""
    sizes = np.abs(differences)
    known = np.unique(np.append(sizes[np.isfinite(sizes)], 0.0))
    begins = np.append(True, np.diff(known) > np.maximum(ROUNDING * known[1:], SMALLEST))  # where another size begins
    levels = known[begins][np.cumsum(begins) - 1]
    places = np.searchsorted(known, np.where(np.isfinite(sizes), sizes, 0.0))
    return np.where(np.isfinite(sizes), np.sign(differences) * levels[places], differences)


def signed_rank(differences: np.ndarray) -> tuple[float, str]:
    """Two-sided p of Wilcoxon's signed-rank test, exact up to COUNTED pairs, with and without ties. No difference is 0.

    scipy takes a normal approximation beside ties above 13 pairs, whose p is far too large if nearly all pairs are won.
    """
    if len(differences) > COUNTED:
        with np.errstate(invalid="ignore"):
            return float(stats.wilcoxon(differences).pvalue), "Wilcoxon"  # type: ignore[union-attr]
    doubled = np.rint(2 * stats.rankdata(np.abs(differences))).astype(int)  # whole numbers, also of tied sizes
    ways = np.zeros(doubled.sum() + 1)  # by sum of the positive ranks: the number of choices of signs
    ways[0] = 1
    for rank in doubled:
        ways[rank:] += ways[:-rank].copy()
    found = doubled[differences > 0].sum()
    tail = min(ways[: found + 1].sum(), ways[found:].sum())
    return min(1.0, float(tail) * 2.0 ** (1 - len(doubled))), "Wilcoxon"


def sign_flips(differences: np.ndarray) -> tuple[float, str]:
    """Two-sided p of the exact permutation test (all sign flips of few pairs); a failure counts as the largest."""
    if len(differences) == 0:
        return 1.0, "no difference"
    known = np.abs(differences[np.isfinite(differences)])
    largest = float(known.max()) if len(known) else 1.0
    bounded, sums = np.clip(differences, -largest, largest), np.zeros(1)
    for each in bounded:
        sums = np.concatenate([sums - each, sums + each])
    return float((np.abs(sums) >= abs(bounded.sum()) - ROUNDING * largest).mean()), "sign flips"


def holm(values: Sequence[float], family: int | None = None) -> list[float]:
    """Holm's (1979) step-down correction: adjusted p values to compare with 0.05, for the whole family.

    family: the number of tests, if there are more than the given ones; the others then count as if their p were larger, which
    makes the adjusted values no smaller than those of the whole family.
    """
    family = len(values) if family is None else family
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, so_far = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        so_far = max(so_far, min(1.0, (family - rank) * values[place]))
        corrected[place] = so_far
    return corrected
