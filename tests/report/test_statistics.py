"""Means, intervals and tests against numbers computed by hand, and against all sign flips."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from metazo.report.statistics import average, holm, level, paired, sign_flips, signed_rank


def test_average_counts_each_task_once_and_has_students_interval():
    found = average([[1.0, 2.0, 3.0]])
    assert (found.mean, found.spread) == (2.0, 1.0)
    reach = 4.302652730 / math.sqrt(3)  # t(0.975, 2 degrees of freedom) times the standard error
    assert (found.low, found.high) == pytest.approx((2 - reach, 2 + reach))
    assert average([[1.0, 2.0, 3.0], [10.0]]).mean == 6.0
    assert average([[1.0, 2.0, 3.0], [10.0]]).low is None  # one seed gives no spread
    same = average([[1.0, 2.0], [5.0, 6.0]])  # two tasks of variance 0.5: squared error 0.125, 2 degrees of freedom
    assert same.high == pytest.approx(3.5 + 4.302652730 * math.sqrt(0.125))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    assert holm([0.001, 0.01], 10) == pytest.approx([0.01, 0.09])


def test_a_column_that_was_chosen_by_its_runs_needs_a_larger_family():
    """24 columns without any difference: the best of them seems better than another too often, unless all pairs count."""
    generator, seen = np.random.default_rng(0), [0, 0]
    for _ in range(100):
        values = generator.normal(size=(24, 24))
        best = int(stats.rankdata(values, axis=1).mean(0).argmin())
        p = [signed_rank(values[:, best] - values[:, other])[0] for other in range(24) if other != best]
        seen = [count + (min(holm(p, family)) < 0.05) for count, family in zip(seen, (None, 276))]
    assert seen[0] > 15 and seen[1] < 10  # 27 and 5


def flips(differences: np.ndarray, statistic) -> float:
    """Two-sided p over all 2^n assignments of signs."""
    centre = statistic(differences)
    values = [statistic(np.abs(differences) * signs) for signs in itertools.product((-1, 1), repeat=len(differences))]
    return 2 * min(np.mean([v >= centre - 1e-12 for v in values]), np.mean([v <= centre + 1e-12 for v in values]))


def test_signed_rank_is_the_sum_of_ranks_over_all_sign_flips():
    differences = np.array([0.3, -0.1, 0.5, 0.7, 0.2, 0.9, -0.05, 1.1])
    ranks = np.abs(differences).argsort().argsort() + 1

    def positive(values):
        return float(ranks[values > 0].sum())

    assert signed_rank(differences) == (pytest.approx(flips(differences, positive)), "Wilcoxon")
    assert signed_rank(np.array([1.0, 2, 3, 4, 5, math.inf]))[0] == 2 / 64


@pytest.mark.parametrize("count", [6, 9, 13, 14, 24])
def test_signed_rank_is_scipys_where_that_is_exact(count):
    generator = np.random.default_rng(count)
    for step in (0.0, 0.5) if count <= 13 else (0.0,):  # rounded to steps, many are equal in size
        differences = generator.normal(0.4, 1, count)
        if step:
            differences = np.round(differences / step) * step
            differences[differences == 0] = step
        assert signed_rank(differences)[0] == pytest.approx(stats.wilcoxon(differences).pvalue, rel=1e-12)


def test_signed_rank_counts_all_choices_of_signs_beside_ties_too():
    """From 14 pairs on, scipy has an approximation there: the counts of all sums, in whole numbers, do not."""
    generator = np.random.default_rng(0)
    for count in (14, 16, 40):
        differences = np.round(generator.normal(0.5, 2, count))
        differences[differences == 0] = 1.0
        ranks = [round(2 * rank) for rank in stats.rankdata(np.abs(differences))]
        sums = {0: 1}
        for rank in ranks:
            more = Counter(sums)
            more.update({total + rank: ways for total, ways in sums.items()})
            sums = more
        found = sum(rank for rank, each in zip(ranks, differences) if each > 0)
        ends = [sum(w for s, w in sums.items() if s <= found), sum(w for s, w in sums.items() if s >= found)]
        assert signed_rank(differences)[0] == pytest.approx(min(1, 2 * min(ends) / 2**count), rel=1e-12)


@pytest.mark.parametrize("count", [5, 8, 14, 24, 60, 250])
def test_the_least_p_is_that_of_pairs_that_are_all_won(count):
    gains = [float(1 + number // 2) for number in range(count)]  # each size twice
    found = paired({"task": gains})
    assert found.p == found.least and paired({"task": [-gains[0], *gains[1:]]}).least == found.least
    assert count > 200 or found.least == 2.0 ** (1 - count)


def test_few_pairs_are_tested_by_sign_flips_and_cannot_be_significant():
    differences = np.array([0.3, -0.1, 0.5, 0.7])
    assert sign_flips(differences)[0] == pytest.approx(min(1.0, flips(differences, np.mean)))
    found = paired({"task": [1.0, 2.0, 3.0, 4.0, 5.0]})
    assert (found.p, found.least, found.test) == (0.0625, 0.0625, "sign flips")


def gains_of(counts: list[tuple[int, int]], examples: int) -> list[float]:
    """Differences of accuracies, as fractions of the examples that are right."""
    return [ours / examples - theirs / examples for theirs, ours in counts]


def test_a_diverged_run_does_not_make_small_differences_ties():
    """A loss that is large and finite: the sizes of the others are told apart, and so are their signs."""
    gains = [0.01, -0.02, 0.03, 0.04, -0.05, 0.06, 0.07, 0.08]
    ordered, outlier = level(np.array(gains)), level(np.array([*gains, -1e12]))
    assert np.array_equal(ordered, gains) and np.array_equal(outlier, [*gains, -1e12])


def test_equal_differences_of_accuracies_tie_though_they_were_rounded():
    before, after = [136, 163, 166, 167, 139, 139, 153, 175], [139, 165, 170, 170, 141, 137, 155, 174]
    counts = [ours - theirs for theirs, ours in zip(before, after)]
    ranks = stats.rankdata(np.abs(counts))
    found = paired({"task": gains_of([*zip(before, after)], 200)})
    assert found.p == flips(np.array(counts, float), lambda values: ranks[values > 0].sum()) == 0.078125
    for examples in (100, 120, 300, 700):  # few pairs: 1 + 1 - 2 is no gain, whatever its last bit is
        few = [(67, 68), (83, 84), (91, 89)]
        found = paired({"task": gains_of(few, examples)})
        assert (found.p, found.tasks_won) == (1.0, 0), examples
        assert paired({"task": gains_of([*few, (71, 74)], examples)}).p == flips(np.array([1.0, 1, -2, 3]), np.sum)
    tiny = [1e-14, -2e-14, 3e-14, 5e-14, 7e-14, 9e-14]  # larger than the rounding of a loss
    assert (paired({"task": tiny}).losses, paired({"task": tiny}).p) == (1, paired({"task": [1, -2, 3, 5, 7, 9]}).p)
    assert paired({"task": [0.5, 1e-17, -1e-17]}).ties == 2


def test_a_task_is_won_and_the_gain_is_shown_by_the_gains_that_the_pairs_count():
    """Losses that differ in their last bit tie, so that they win no task and gain nothing."""
    found = paired({"a": [0.3 - (0.1 + 0.2) + 1.2e-16, 0.0, 5.5e-17], "b": [0.0, 5.5e-17, 5.5e-17]})
    assert (found.wins, found.ties, found.tasks_won, found.gain, found.low) == (0, 6, 0, 0.0, 0.0)
    assert paired({"a": [1e-14, 2e-14], "b": [-1e-14, 2e-14]}).tasks_won == 2  # larger than rounding
    mixed = paired({"a": [1.0, 1e-16, 3.0], "b": [2.0, 0.0]})
    assert (mixed.gain, mixed.tasks_won) == ((4 / 3 + 1) / 2, 2)


def test_a_failure_is_a_lost_pair_and_is_not_in_the_gain():
    found = paired({"a": [0.5, -math.inf, 0.0], "b": [math.inf, 0.1, 0.3]})
    assert (found.pairs, found.wins, found.losses, found.ties) == (6, 4, 1, 1)
    assert found.gain == pytest.approx((0.25 + 0.2) / 2)
    assert found.least == 1 / 16  # a tie is no evidence
    assert (found.tasks, found.tasks_won) == (2, 1)  # a failure wins no task
    assert paired({"a": [-math.inf, -math.inf]}).gain is None
    assert (
        paired({"a": [-0.1, -0.1, math.inf], "b": [math.inf]}).tasks_won == 1
    )  # a lost task is not won by one failure
    assert paired({"a": [0.0]}).p == 1.0
