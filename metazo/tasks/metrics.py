"""Metrics: accuracy, macro F1, Matthews correlation; token F1 and exact match of SQuAD; the exact number of GSM8K.

Classes come as numbers with the list of accepted ones; answers as text with the list of accepted ones.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from math import sqrt

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Digits with all that joins them to other digits, so that no part of 3:30 is taken; the 5 of 12-5 is not negative.
_DIGITS = re.compile(r"(?:(?<!\d)-)?(?:\d+|(?<!\.)\.\d+)(?:[.,:/]\d+|[eE][+-]?\d+)*")
# Three digits of an exponent at most, because a number is written out in full.
# Commas between thousands, or between groups of two before the last three; in 1,2 the comma may mean anything.
_NUMBER = re.compile(r"-?(?:(?:\d{1,3}(?:,\d{2,3})*,\d{3}|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3})?")
_SIGNED = re.compile(r"-[$€£¥₹](?=\.?\d)")
_ANSWER = re.compile(r"answer is:?", re.IGNORECASE)
# LaTeX that changes no number: words, boxes, \$ and \%, degrees, brackets of formulas, and spaces.
_TYPESET = re.compile(r"\\(?:text|mbox|mathrm|boxed)\s*\{([^{}]*)\}|\\([$%])|\^\{?\\circ\}?|\\[()\[\]!,;:]")
# Around a number, what makes it a part of an expression: an operator, a command of LaTeX, or one letter (2x, not 2 km).
_EXPRESSION = re.compile(r"[\\^_{}+*/<>|]|\s-\s|\d[^\W\d_](?![^\W_])|(?<![^\W_])[^\W\d_]\d")


def accuracy(predicted: Sequence[int], accepted: Sequence[Sequence[int]]) -> float:
    """Fraction of predictions that are accepted classes."""
    return sum(p in a for p, a in zip(predicted, accepted, strict=True)) / len(predicted)


def macro_f1(predicted: Sequence[int], accepted: Sequence[Sequence[int]]) -> float:
    """Unweighted mean of F1 over the classes that occur or are predicted, as in scikit-learn."""
    right, given, hits = _counts(predicted, accepted)
    classes = right.keys() | given.keys()
    return sum(2 * hits[c] / (right[c] + given[c]) for c in classes) / len(classes)


def mcc(predicted: Sequence[int], accepted: Sequence[Sequence[int]]) -> float:
    """Matthews correlation coefficient (for several classes: Gorodkin, 2004): 1 perfect, 0 no better than a constant."""
    right, given, hits = _counts(predicted, accepted)
    total = right.total()
    covariance = hits.total() * total - sum(right[c] * given[c] for c in right)
    variances = [total**2 - sum(n**2 for n in counts.values()) for counts in (right, given)]
    return covariance / sqrt(variances[0] * variances[1]) if all(variances) else 0.0


def _counts(predicted: Sequence[int], accepted: Sequence[Sequence[int]]) -> tuple[Counter[int], ...]:
    """How often each class is the first accepted one, is predicted, and is both."""
    pairs = [(a[0], p) for a, p in zip(accepted, predicted, strict=True)]
    return Counter(a for a, _ in pairs), Counter(p for _, p in pairs), Counter(a for a, p in pairs if a == p)


def normalise(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def token_f1(predicted: str, answer: str) -> float:
    """F1 of the bags of normalised words; two empty bags agree."""
    words, right = normalise(predicted).split(), normalise(answer).split()
    if not words or not right:
        return float(words == right)
    common = sum((Counter(words) & Counter(right)).values())
    return 2 * common / (len(words) + len(right))


def _marked(text: str) -> tuple[str, bool]:
    """What is after the mark of a worked answer, and whether there is one; else the whole text."""
    text = _SIGNED.sub("-", text.replace("\N{MINUS SIGN}", "-"))
    _, mark, answer = text.partition("####")
    if not mark:
        _, mark, answer = _ANSWER.sub("####", text).partition("####")
    return answer if mark else text, bool(mark)


def _line(text: str) -> tuple[str, bool]:
    """The line of a worked answer after its mark, or else the last one, and whether there is a mark."""
    answer, mark = _marked(text)
    lines = answer.strip().splitlines() or [""]
    return lines[0 if mark else -1].rstrip(" .").strip("$ "), mark


def _same_number(predicted: str, answer: str) -> bool:
    """Whether the predicted number is that of an accepted answer.

    After its mark an answer may be an expression, more than one number with a currency, %, words or a full stop: \\frac{1}{2},
    2x + 7, 1 000. The predicted line is then the same but for spaces. A predicted expression of LaTeX is no number.
    """
    predicted, answer = (_TYPESET.sub(r"\1\2", text) for text in (predicted, answer))
    (wanted, marked), (given, ended) = _line(answer), _line(predicted)
    whole = _DIGITS.sub("0", wanted)
    if marked and (whole.count("0") > 1 or _EXPRESSION.search(whole)):
        return "".join(given.split()) == "".join(wanted.split())
    return not (ended and re.search(r"[\\^]", given)) and number(predicted) == number(answer)


def number(text: str) -> str:
    """The number a worked answer gives: the first after the first "####", or else "answer is"; else the last one; else the
    text.

    5, -5, -$5, .5, 1,234.50 and 1e3 are numbers, and equal ones give the same text. Digits in any other form (3:30, 1/2,
    1.000.000, 1,2) are given as they are written, so that they agree with the same writing alone.
    """
    answer, mark = _marked(text)
    found = _DIGITS.findall(answer)
    if not found:
        return normalise(answer)
    written = found[0 if mark else -1]
    return _in_full(written.replace(",", "")) if _NUMBER.fullmatch(written) else written


def _in_full(written: str) -> str:
    """A number as text with all its digits, which a float has not: 18.0 for 18, 18.00 and 1.8e1."""
    whole, _, rest = f"{Decimal(written) or Decimal():f}".partition(".")  # -0 is 0
    return f"{whole}.{rest.rstrip('0') or '0'}"


def _best(score: Callable[[str, str], float]) -> Callable[[Sequence[str | None], Sequence[Sequence[str]]], float]:
    """Mean over examples of the best score over the accepted answers; a prediction of None scores 0."""

    def metric(predicted: Sequence[str | None], accepted: Sequence[Sequence[str]]) -> float:
        pairs = zip(predicted, accepted, strict=True)
        best = [0.0 if p is None else max(score(p, answer) for answer in a) for p, a in pairs]
        return sum(best) / len(best)

    return metric


f1 = _best(token_f1)
exact_match = _best(lambda predicted, answer: float(normalise(predicted) == normalise(answer)))
exact_number = _best(lambda predicted, answer: float(_same_number(predicted, answer)))

METRICS: dict[str, Callable[..., float]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "mcc": mcc,
    "f1": f1,
    "exact_match": exact_match,
    "exact_number": exact_number,
}
