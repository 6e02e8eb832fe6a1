"""Whether a lead is more than chance, in words."""

from __future__ import annotations

from collections.abc import Sequence

from .analysis import Analysis
from .statistics import Paired
from .table import p_value, some

SURE = 0.05


def sure(analysis: Analysis) -> str:
    data, ranked = analysis.data, analysis.contest
    if not analysis.tasks or len(ranked) < 2:
        return "There are no two methods to compare, so nothing can be said about which is better."
    if data.reference is None:
        return f"There is no finished column {data.wanted} to test against, so the difference may be due to chance."
    column = next(column for column, _ in ranked if column != data.reference)
    test = analysis.tests.get(column)
    return _tested(analysis, column, test) if test else "There are no pairs of runs to test."


def _tested(analysis: Analysis, column: str, test: Paired) -> str:
    """A paired test in words."""
    text = f"In {some(test.pairs, 'pair')} of runs with the same task and seed, {column} was better than "
    text += f"{analysis.data.reference} in {test.wins} and worse in {test.losses}. "
    if test.holm is None or test.least is None or test.least_holm is None or test.least_holm > SURE:
        number, least = test.wins + test.losses, ""
        if test.least:
            differ = f"{some(number, 'pair')} that {'differs' if number == 1 else 'differ'}"
            least = f": {differ} cannot give p below {p_value(test.least)}"
            if test.least <= SURE:
                least += f", which correction for {len(analysis.tests)} comparisons makes {p_value(test.least_holm)}"
        return f"{text}These are too few pairs to rule out chance, whatever the result{least}."
    others = f"After correction for {len(analysis.tests)} comparisons, " if len(analysis.tests) > 1 else ""
    p = p_value(test.holm)
    text += f"{others}p {p if p.startswith('<') else f'= {p}'}: "
    if test.holm < SURE and test.gain is not None and test.better != (test.gain > 0):
        return text + (
            "the pairs differ beyond chance on these tasks and this model, but in the other direction than the averages, which "
            "a few large differences decide."
        )
    if test.holm < SURE:
        return text + "the difference is unlikely to be chance on these tasks and this model; others were not tried."
    return text + f"no evidence that either is better (the usual limit is {SURE:g})."


def against_chance(analysis: Analysis, first: Sequence[str], other: str) -> str:
    """What the tests say against the lead of the first columns over another; only tests against the reference are made."""
    reference = analysis.data.reference
    pairs = [(column, other) for column in first if reference in (column, other)]
    tests = [(ours, analysis.tests.get(other if ours == reference else ours), ours == reference) for ours, _ in pairs]
    if len(pairs) < len(first) or any(test is None or test.holm is None or test.holm >= SURE for _, test, _ in tests):
        return " The difference may be due to chance."
    for column, test, turned in tests:
        if test and test.better is turned:
            losses = test.wins if turned else test.losses
            return f" But most pairs of runs go the other way: {column} was worse in {losses} of {test.pairs}."
    return ""
