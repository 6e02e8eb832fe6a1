"""Metrics against examples computed by hand, and those of classes against scikit-learn."""

from __future__ import annotations

import random

import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from metazo.tasks import metrics


@pytest.mark.parametrize(
    ("predicted", "accepted", "f1", "exact"),
    [
        ("the Cat.", ["cat"], 1.0, 1.0),
        ("a black cat", ["black cat sat"], 4 / 5, 0.0),  # 2 common of 2 and 3
        ("cat cat", ["cat"], 2 / 3, 0.0),  # a word counts as often as it occurs
        ("dog", ["cat"], 0.0, 0.0),
        ("", ["cat"], 0.0, 0.0),
        ("the", ["an"], 1.0, 1.0),  # both empty after normalisation
        ("in 1999", ["1999", "in the year 1999"], 2 * 2 / 5, 0.0),  # the best of the accepted ones
        ("Saxon-Garden", ["saxongarden"], 1.0, 1.0),
    ],
)
def test_squad_f1_and_exact_match(predicted, accepted, f1, exact):
    assert metrics.f1([predicted], [accepted]) == pytest.approx(f1)
    assert metrics.exact_match([predicted], [accepted]) == exact


def test_squad_scores_are_means_over_examples():
    assert metrics.f1(["cat", "dog", "black cat"], [["cat"], ["cat"], ["cat"]]) == pytest.approx((1 + 0 + 2 / 3) / 3)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18.\n#### 18", "18.0"),
        ("#### 1,234.50", "1234.5"),
        ("#### -5", "-5.0"),
        ("#### -$5", "-5.0"),
        ("He is at \N{MINUS SIGN}€1,234.50", "-1234.5"),
        ("#### $-5", "-5.0"),
        ("It costs $3-$5", "5.0"),  # a range
        ("5 plus 3 is 8.", "8.0"),
        ("The answer is: 42", "42.0"),
        ("#### 7\nQuestion: 9", "7.0"),
        ("no idea", "no idea"),
        ("12345678901234568", "12345678901234568.0"),  # no float
        ("007", "7.0"),
        ("-0.0", "0.0"),
        ("1e3", "1000.0"),
        ("It is 2.5E-3.", "0.0025"),
        ("It is ...5", "5.0"),  # the dots are no decimal point
        ("1.50, 2", "2.0"),
        ("1.000.000", "1.000.000"),
        ("It starts at 3:30.", "3:30"),
        ("The answer is 1/2", "1/2"),
        ("#### 1.234,56", "1.234,56"),
        ("1e9999", "1e9999"),
    ],
)
def test_the_number_of_a_worked_answer(text, number):
    assert metrics.number(text) == number


def test_exact_number_compares_values_not_digits():
    assert metrics.exact_number(["#### 18.0", "17", ""], [["so\n#### 18"], ["#### 18"], ["#### 18"]]) == pytest.approx(
        1 / 3
    )


def test_numbers_of_many_digits_and_other_forms_agree_with_themselves_alone():
    assert metrics.exact_number(["12345678901234567"], [["#### 12345678901234568"]]) == 0
    assert metrics.exact_number(["0.1e1", "at 3:30"], [["#### 1"], ["#### 3:30"]]) == 1
    assert metrics.exact_number(["1.000.000", "3:30", "1/2"], [["#### 0"], ["#### 30"], ["#### 2"]]) == 0
    assert metrics.exact_number(["12", "35", "5"], [["1,2"], ["3,5"], ["\N{MINUS SIGN}5"]]) == 0
    assert metrics.exact_number(["1234", "123456", "-5"], [["1,234"], ["1,23,456"], ["\N{MINUS SIGN}5"]]) == 1


@pytest.mark.parametrize(
    ("predicted", "answer", "right"),
    [
        ("The answer is: 1", r"The answer is: \frac{1}{2}", 0),
        ("1", r"The answer is: \frac{1}{2}", 0),
        ("The answer is: 3", r"The answer is: 3\sqrt{5}", 0),
        ("The answer is: 2", "The answer is: 2x + 7", 0),
        ("The answer is: 10", r"The answer is: \frac{10}{3}", 0),
        ("The answer is: 5", "The answer is: 5^{10}", 0),
        ("The answer is: 2", "The answer is: 2x", 0),
        ("The answer is: 2", "The answer is: x2", 0),
        ("The answer is: 7", "The answer is: x - 7", 0),
        ("#### 1", "#### 1 000", 0),
        (r"The answer is: \frac{3}{4}", "The answer is: 3", 0),
        (r"The answer is: \pi", r"The answer is: -\pi", 0),
        (r"So the answer is \frac{1}{2}.", "x = 3\nThe answer is: \\frac{1}{2}", 1),
        (r"The answer is: 3 \sqrt{5}", r"The answer is: $3\sqrt{5}$", 1),
        ("so\n2x+7", "The answer is: 2x + 7", 1),
        ("#### 1000", "#### 1 000", 1),
        ("The answer is: 50", r"The answer is: 50\%", 1),
        (r"The answer is: \boxed{5}", r"The answer is: $5$.", 1),
        ("5", r"The answer is: 5\text{ cm}", 1),
        ("The answer is: 30", r"The answer is: 30^\circ", 1),
        ("The answer is: 10", r"The answer is: 10,\!000", 0),
        (r"\$12.50", "#### $12.50", 1),
        ("#### 1000", "#### 1,000", 1),
        ("#### 12", "#### 12 apples", 1),
        ("12 apples in 3 bags: #### 12 apples in 3 bags", "#### 12", 1),
        ("She has 12.", "She has 12 apples.\n#### 12.", 1),
        ("The answer is: x = 5", "The answer is: 5", 1),
        ("#### 5km", "#### 5", 1),
        ("no", "The answer is: No", 1),
    ],
)
def test_an_accepted_expression_is_compared_whole(predicted, answer, right):
    assert metrics.exact_number([predicted], [[answer]]) == right


def test_class_metrics_by_hand():
    predicted, right = [0, 0, 1, 1, 2, 2], [[0], [0], [1], [0], [2], [1]]
    assert metrics.accuracy(predicted, right) == pytest.approx(4 / 6)
    # class 0: precision 1, recall 2/3 -> 0.8; class 1: 1/2, 1/2 -> 0.5; class 2: 1/2, 1 -> 2/3
    assert metrics.macro_f1(predicted, right) == pytest.approx((0.8 + 0.5 + 2 / 3) / 3)
    assert metrics.mcc([0, 0, 1, 1], [[0], [0], [1], [0]]) == pytest.approx((1 * 2 - 1 * 0) / (2 * 1 * 2 * 3) ** 0.5)
    assert metrics.mcc([1, 1], [[0], [1]]) == 0


@pytest.mark.parametrize(("classes", "count"), [(2, 3), (2, 40), (5, 7), (5, 200), (1, 4)])
def test_class_metrics_are_those_of_scikit_learn(classes, count):
    draw = random.Random(classes * count)
    for _ in range(20):
        right = [draw.randrange(classes) for _ in range(count)]
        predicted = [draw.choice([label, draw.randrange(-1, classes)]) for label in right]  # -1 is no class
        accepted = [[label] for label in right]
        assert metrics.macro_f1(predicted, accepted) == pytest.approx(f1_score(right, predicted, average="macro"))
        assert metrics.mcc(predicted, accepted) == pytest.approx(matthews_corrcoef(right, predicted))


def test_a_prediction_is_right_if_any_accepted_class_is_it():
    assert metrics.accuracy([2, 0], [[1, 2], [1, 2]]) == 0.5


def test_the_number_is_the_first_after_the_first_mark():
    text = "so #### 7\n\nQuestion: 3 apples\n#### 9"
    assert metrics.exact_number([text], [["x #### 7"]]) == 1.0
    assert metrics.number("The Answer Is 5 because 3") == "5.0"
    assert (
        metrics.number("12-5") == "5.0"
        and metrics.number("it is -5") == "-5.0"
        and metrics.number("a, 1,200.5") == "1200.5"
    )
