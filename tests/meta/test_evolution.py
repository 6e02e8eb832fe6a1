"""Evolution strategies against closed forms: the mean over many estimates, within error bars."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from metazo.meta.evolution import Pairs, differences, es_gradient

SIGMAS = 4  # standard errors within which a mean must be


def quadratic(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return root @ root.T / n, torch.randn(n, generator=generator, dtype=torch.float64)


def mean_and_error(draws: Tensor) -> tuple[Tensor, Tensor]:
    return draws.mean(0), draws.std(0) / math.sqrt(len(draws))


def test_the_gradient_of_a_quadratic_in_closed_form() -> None:
    """For L = x'Ax/2 + b'x the gradient of the smoothed objective is A x + b, for any spread by parameter."""
    n, pairs = 4, 3
    matrix, vector = quadratic(n)
    point, spread = torch.linspace(-1, 1, n, dtype=torch.float64), torch.tensor([0.3, 0.1, 0.5, 0.2]).double()

    def loss(x: Tensor) -> float:
        return float(x @ matrix @ x / 2 + vector @ x)

    estimates = []
    for trial in range(1500):
        es = Pairs(spread, pairs, "none", seed=trial)
        for pair in range(pairs):
            move = es.move(pair)
            es.begin(pair)
            es.tell(pair, pair, loss(point + move), loss(point - move))
        estimates.append(es.gradient())
    mean, error = mean_and_error(torch.stack(estimates))
    assert ((mean - (matrix @ point + vector)).abs() < SIGMAS * error).all()
    assert (error < 0.15).all(), "the test must be able to fail"


class Unroll:
    """The state s <- a s + theta from s = 1, and the loss (s - 2)^2 / 2 after every step."""

    a, steps, target = 0.8, 6, 2.0

    def advance(self, state: float, theta: float, steps: int) -> tuple[float, float]:
        """(state, mean loss over these steps)."""
        total = 0.0
        for _ in range(steps):
            state = self.a * state + theta
            total += (state - self.target) ** 2 / 2
        return state, total / steps

    def derivative(self, theta: float) -> float:
        """d/dtheta of the sum over truncations of two steps of their mean loss."""
        state, slope, total = 1.0, 0.0, 0.0
        for _ in range(self.steps):
            state, slope = self.a * state + theta, self.a * slope + 1
            total += (state - self.target) * slope
        return total / 2


def truncated(persistent: bool, theta: float, trials: int) -> Tensor:
    """Estimates of the derivative, each the sum over the three truncations of one run, (trials,)."""
    task, spread, found = Unroll(), torch.tensor([0.2], dtype=torch.float64), []
    for trial in range(trials):
        es = Pairs(spread, 1, "none", seed=trial)
        es.begin(0)
        states, total = [1.0, 1.0], 0.0
        for window in range(task.steps // 2):
            if not persistent:
                es.begin(0)  # forgets the perturbations before this truncation
            move, losses = float(es.move(window)), []
            for member, sign in enumerate((1, -1)):
                states[member], loss = task.advance(states[member], theta + sign * move, 2)
                losses.append(loss)
            es.tell(window, 0, *losses)
            total += float(es.gradient())
        found.append(total)
    return torch.tensor(found, dtype=torch.float64)


def test_persistent_estimates_are_unbiased_where_truncated_ones_are_not() -> None:
    theta = 0.1
    exact = Unroll().derivative(theta)
    mean, error = mean_and_error(truncated(True, theta, 3000))
    assert abs(mean - exact) < SIGMAS * error
    biased, own = mean_and_error(truncated(False, theta, 1500))
    assert abs(biased - exact) > 10 * own, "the truncated estimate must differ, or the test shows nothing"
    assert error < 0.1 * abs(exact)


def test_ranks_compare_pairs_by_their_own_mean() -> None:
    """Pairs of tasks with other losses count alike: only order and sign of the differences matter."""
    plus, minus = torch.tensor([1.0, 101.0, 5.0]), torch.tensor([2.0, 100.0, 5.5])
    # halved differences of all six members: -1/2, 1/2, -1/4 and their opposites: ranks 1/2, 9/2, 2 | 9/2, 1/2, 3 of 5
    expected = torch.tensor([-4.0, 4.0, -1.0], dtype=torch.float64) / 5
    torch.testing.assert_close(differences(plus, minus, "rank"), expected)
    torch.testing.assert_close(differences(plus, minus, "none"), (plus - minus).double())


@pytest.mark.parametrize("shaping", ["rank", "none"])
def test_losses_that_are_not_finite(shaping: str) -> None:
    inf, nan = math.inf, math.nan
    found = differences(torch.tensor([1.0, nan, inf, 1.0]), torch.tensor([inf, nan, 3.0, 0.5]), shaping)
    assert found.isfinite().all() and found[1] == 0
    if shaping == "rank":
        assert found[0] < 0 < found[3] < found[2], "a member that diverged is worse than any difference"
    else:
        assert found.tolist() == [0, 0, 0, 0.5]


def test_a_step_has_one_perturbation_and_others_have_others() -> None:
    spread = torch.full((5,), 0.3, dtype=torch.float64)
    es: Callable[[int], Pairs] = lambda seed: Pairs(spread, 2, "rank", seed)  # noqa: E731
    assert torch.equal(es(1).move(4), es(1).move(4))
    assert not torch.equal(es(1).move(4), es(1).move(5)) and not torch.equal(es(1).move(4), es(2).move(4))
    moves = torch.stack([es(0).move(step) for step in range(2000)])
    assert abs(float(moves.std()) / 0.3 - 1) < 0.03 and abs(float(moves.mean())) < SIGMAS * 0.3 / math.sqrt(10000)
    assert torch.equal(
        es_gradient(moves[:2], torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), spread), 0 * spread
    ), "no difference, no gradient"
