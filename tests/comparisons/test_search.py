"""The search over learning rates: its best rate is inside the range, or is reported as on the boundary."""

from __future__ import annotations

import math

import pytest

from metazo.comparisons.rates import beyond, start, walk


def search(lrs: list[float], loss, extensions: int = 5):
    """Search with a loss function; returns (best, at_boundary) and the rates in the order of their trial."""
    walker, tried = walk(lrs, extensions), []
    wanted = next(walker)
    while True:
        tried += wanted
        try:
            wanted = walker.send({lr: loss(lr) for lr in wanted})
        except StopIteration as stop:
            return stop.value, tried


def valley(at: float):
    return lambda lr: abs(math.log10(lr / at))


def test_an_interior_optimum_ends_it_at_once():
    assert search([1e-4, 3e-4, 1e-3], valley(3e-4)) == ((3e-4, False), [1e-4, 3e-4, 1e-3])


@pytest.mark.parametrize(("best", "more"), [(3e-3, [3e-3, 1e-2]), (1e-5, [3e-5, 1e-5, 3e-6])])
def test_it_goes_on_past_a_boundary_until_the_best_has_neighbours(best, more):
    assert search([1e-4, 3e-4, 1e-3], valley(best)) == ((best, False), [1e-4, 3e-4, 1e-3, *more])


def test_a_boundary_that_remains_is_said():
    assert search([1e-4, 3e-4, 1e-3], valley(1.0), extensions=2)[0] == (1e-2, True)
    assert search([1e-4, 3e-4, 1e-3], valley(1.0), extensions=0)[0] == (1e-3, True)


def test_a_rate_that_diverges_is_a_boundary_like_any_other():
    cliff = lambda lr: math.inf if lr > 1e-3 else valley(1e-3)(lr)  # noqa: E731
    assert search([1e-4, 3e-4, 1e-3], cliff)[0] == (1e-3, False)


def test_where_all_diverge_it_goes_down_by_tens():
    (best, at_boundary), tried = search([1e-1, 1.0], lambda lr: math.inf if lr > 2e-3 else valley(1e-3)(lr))
    assert tried[2:4] == [1e-2, 1e-3] and best == 1e-3 and not at_boundary
    assert search([1e-1, 1.0], lambda lr: math.inf, extensions=2)[0] == (None, False)


def test_of_equal_losses_the_smaller_rate():
    assert search([1e-4, 3e-4, 1e-3, 3e-3], lambda lr: 1.0 if lr in (1e-4, 3e-3) else 0.0)[0] == (3e-4, False)


@pytest.mark.parametrize(("edge", "middle"), [(1e-4, 3e-4), (1e-3, 3e-4)])
def test_a_plateau_is_no_reason_to_search_beyond_it(edge, middle):
    """Runs that do not move have equal losses at any smaller rate: each extension would find another."""
    assert search([1e-4, 3e-4, 1e-3], lambda lr: 0.5) == ((3e-4, False), [1e-4, 3e-4, 1e-3])
    assert search([1e-4, 3e-4, 1e-3], lambda lr: 0.5 if lr in (edge, middle) else 0.6)[0] == (middle, False)
    assert search([1e-4, 3e-4], lambda lr: 0.5) == ((1e-4, False), [1e-4, 3e-4, 3e-5])


def test_the_ladder_and_rates_off_it():
    assert [beyond(3e-4, True), beyond(1e-3, True), beyond(1e-3, False)] == [1e-3, 3e-3, 3e-4]
    assert beyond(2e-4, True) == 6e-4 and beyond(6e-4, False) == 2e-4


def test_the_start_follows_the_number_of_weights_and_the_size_of_the_direction():
    assert start("mezo", 1_600_000) == [1e-4, 3e-4, 1e-3]
    assert start("mezo", 355_000_000) == [3e-7, 1e-6, 3e-6]
    assert start("mezo", 1_600_000, energy=10.0) == [1e-5, 3e-5, 1e-4]
    assert start("first-order-adamw", 10) == start("first-order-adamw", 10**9)


def test_the_rate_between_the_best_and_one_ten_times_larger_that_failed_is_tried():
    cliff = lambda lr: math.inf if lr > 5e-6 else valley(3e-6)(lr)  # noqa: E731
    (best, at_boundary), tried = search([1e-5, 3e-5, 1e-4], cliff)
    assert (best, at_boundary) == (3e-6, False) and tried[3:] == [1e-6, 3e-7, 3e-6]
