"""Estimators on a linear loss: coefficients are exact slopes along the directions, averaged over queries."""

from __future__ import annotations

import pytest
import torch

from metazo.step.estimators import LeaveOneOut, OneSided, ThreeLosses, TwoPoint

EPS = 0.01


@pytest.mark.parametrize("estimator", [TwoPoint(), TwoPoint(5), ThreeLosses(), OneSided(4), LeaveOneOut(4)], ids=repr)
def test_coefficients_are_slopes(estimator):
    slopes = torch.linspace(-2, 3, estimator.queries, dtype=torch.float64).tolist()
    losses = [7.0 + (multiple * EPS * slopes[q] if q is not None else 0.0) for q, multiple, *_ in estimator.probes()]
    if isinstance(estimator, LeaveOneOut):
        rest = [sum(slopes[:k] + slopes[k + 1 :]) / (len(slopes) - 1) for k in range(len(slopes))]
        expected = [(s - r) / len(slopes) for s, r in zip(slopes, rest)]
    else:
        expected = [s / len(slopes) for s in slopes]
    assert estimator.coefficients(losses, EPS) == pytest.approx(expected)
    assert estimator.loss(losses) == pytest.approx(7.0, abs=0.1)
    plus, minus = estimator.plus_minus(losses)
    assert (plus + minus) / 2 == pytest.approx(sum(losses) / len(losses), abs=0.05)
