"""CurvZO's mathematics: water-filling against a solver, sampling, unbiasedness, and the exact variance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import LinearConstraint, minimize

from metazo.errors import UserError
from metazo.optimizers.curvzo import CurvZO, next_fraction, sample, water_fill

SIZES = (1, 2, 3, 5)


def problem(sizes=SIZES):
    generator = torch.Generator().manual_seed(3)
    named = [(f"w{i}", torch.nn.Parameter(torch.zeros(n, dtype=torch.float64))) for i, n in enumerate(sizes)]
    gradients = [torch.randn(n, generator=generator, dtype=torch.float64) * (i + 1) for i, n in enumerate(sizes)]
    return named, gradients, lambda: sum(p @ g for (_, p), g in zip(named, gradients))


@pytest.mark.parametrize("total", [0.5, 1.0, 2.5, 4.0, 5.9])
@pytest.mark.parametrize("floor", [0.02, 0.08])
def test_water_filling(total, floor):
    weights = np.array([5.0, 1.0, 0.3, 2.0, 0.0, 1.0])
    pi = water_fill(weights, total, floor)
    assert abs(pi.sum() - total) < 1e-9 and pi.max() <= 1 and pi.min() >= floor
    solved = minimize(
        lambda x: (weights**2 / x).sum(),
        np.full(6, total / 6),
        jac=lambda x: -(weights**2) / x**2,
        bounds=[(floor, 1)] * 6,
        constraints=LinearConstraint(np.ones(6), total, total),
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    assert (weights**2 / pi).sum() <= solved.fun * (1 + 1e-6)
    np.testing.assert_allclose(pi[weights > 0], solved.x[weights > 0], atol=2e-3)


def test_water_filling_at_the_ends():
    assert (water_fill(np.array([1.0, 2.0]), 2.0, 0.05) == 1).all()
    np.testing.assert_allclose(water_fill(np.array([1.0, 2.0]), 0.01, 0.05), 0.05)
    np.testing.assert_allclose(water_fill(np.zeros(4), 2.0, 0.05), 0.5)


def test_sampling_is_independent_given_that_something_is_taken():
    pi = np.array([0.1, 0.3, 0.05])
    draws = np.stack([sample(pi, u) for u in np.random.RandomState(0).rand(20000, 3)])
    assert draws.any(axis=1).all()
    none = np.prod(1 - pi)
    for expected, found in [
        *zip(pi / (1 - none), draws.mean(axis=0)),
        (pi[0] * pi[1] / (1 - none), (draws[:, 0] & draws[:, 1]).mean()),
        (pi[0] * pi[2] / (1 - none), (draws[:, 0] & draws[:, 2]).mean()),
    ]:
        assert abs(found - expected) < 5 * math.sqrt(expected * (1 - expected) / 20000)


def test_update_is_the_weighted_probe():
    """theta moves by -lr c z_b / P(b taken) on the tensors that were probed, and nowhere else."""
    named, gradients, loss = problem()
    optimizer = CurvZO(named, lr=1.0, eps=1e-2, budget=0.5, floor=0.1, seed=4)
    sizes = set()
    for _ in range(12):
        before = [p.data.clone() for _, p in named]
        optimizer.step(loss)
        assert optimizer.last_step is not None
        pi, taken = optimizer.zo_state["pi"].numpy(), optimizer.zo_state["selected"].tolist()
        stream = optimizer.noise.stream(optimizer.last_step.seeds[0])
        z = [stream.draw(tensor) * m for tensor, m in zip(optimizer.tensors, taken)]
        c = sum(float(a @ b) for a, b in zip(z, gradients))  # exact: the loss is linear
        for (_, p), start, v, share in zip(named, before, z, pi / (1 - np.prod(1 - pi))):
            torch.testing.assert_close(p.data, start - c * v / share, rtol=1e-9, atol=1e-9)
        sizes.add(sum(taken))
    assert len(sizes) > 1


def test_block_estimator_is_unbiased_and_its_variance_exact():
    """Prop. 3.2 and the second moment of the module's docstring, 60,000 draws, within five standard errors."""
    _, gradients, _ = problem()
    pi = water_fill(np.array([2.0, 0.5, 1.0, 0.2]), 2.0, 0.1)
    inclusion = pi / (1 - np.prod(1 - pi))
    assert len(set(np.round(pi, 6))) == 4, "the probabilities must differ for this to test anything"
    generator = np.random.RandomState(0)
    n = 60_000
    masks = np.stack([sample(pi, u) for u in generator.rand(n, len(pi))])
    v = [masks[:, b : b + 1] * generator.randn(n, d) for b, d in enumerate(SIZES)]
    slope = sum(block @ g.numpy() for block, g in zip(v, gradients))
    energy = [float(g @ g) for g in gradients]
    for b, (block, gradient) in enumerate(zip(v, gradients)):
        samples = slope[:, None] * block / inclusion[b]
        error = samples.std(axis=0) / math.sqrt(n)
        assert (np.abs(samples.mean(axis=0) - gradient.numpy()) < 5 * error).all(), b
        assert error.max() < 0.1 * math.sqrt(energy[b])
        squares = (samples**2).sum(axis=1)
        d, others = len(gradient), sum(pi[a] * energy[a] for a in range(len(pi)) if a != b)
        expected = ((d + 2) * energy[b] + d * others) / inclusion[b]
        spread = squares.std() / math.sqrt(n)
        assert abs(squares.mean() - expected) < 5 * spread and spread < 0.05 * expected, b


def second_moment(pi: np.ndarray, sizes: np.ndarray, energy: np.ndarray) -> float:
    """The sum over tensors of the second moment in the module's docstring, with independent inclusions."""
    others = (pi * energy).sum() - pi * energy
    return float((((sizes + 2) * energy + sizes * others) / pi).sum())


def test_only_probabilities_against_the_gradient_lower_the_variance():
    generator = np.random.RandomState(0)
    for _ in range(200):  # probabilities that grow with |g|^2 / d
        sizes, energy = generator.randint(1, 50, 8), generator.exponential(size=8) ** 3
        pi = np.empty(8)
        pi[np.argsort(energy / sizes)] = np.sort(generator.uniform(0.05, 1, 8))
        assert second_moment(pi, sizes, energy) >= second_moment(np.ones(8), sizes, energy)
    sizes, energy = np.full(20, 10), np.eye(20)[0]
    pi = np.where(energy, 0.25, 1.0)
    assert second_moment(np.ones(20), sizes, energy) == pytest.approx(202)
    assert second_moment(pi, sizes, energy) == pytest.approx(95.5)
    n, slope = 60_000, np.zeros((20, 10))
    slope[0, 0] = 1
    v = generator.randn(n, 20, 10) * (generator.rand(n, 20) < pi)[..., None]
    squares = (((v * slope).sum((1, 2))[:, None, None] * v / pi[:, None]) ** 2).sum((1, 2))
    assert abs(squares.mean() - 95.5) < 5 * squares.std() / math.sqrt(n) < 10


def test_losses_that_are_equal_leave_the_budget():
    model = torch.nn.Linear(3, 2)
    optimizer = CurvZO(model.named_parameters(), lr=1e-3, beta=1.0, budget=1.0, adapt_every=1, check_loss=False)
    optimizer.step(lambda: 1.0)
    assert float(optimizer.zo_state["fraction"]) == 1.0
    before = model.weight.clone()
    optimizer.step(lambda: model.weight.square().sum())
    assert not torch.equal(model.weight, before)


def test_entry_wise_variance():
    """Def. 3.1 as printed, one mask per entry: E g_i^2 = (3 g_i^2 + sum_{j != i} pi_j g_j^2) / pi_i."""
    generator = torch.Generator().manual_seed(1)
    gradient = torch.tensor([2.0, -1.0, 0.3, 0.7], dtype=torch.float64)
    pi = torch.tensor([0.9, 0.4, 0.2, 0.5], dtype=torch.float64)
    n = 400_000
    v = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    v *= torch.rand(n, 4, generator=generator, dtype=torch.float64) < pi
    samples = (v @ gradient)[:, None] * v / pi
    assert ((samples.mean(0) - gradient).abs() < 5 * samples.std(0) / math.sqrt(n)).all()
    energy = pi * gradient**2
    expected = (3 * gradient**2 + energy.sum() - energy) / pi
    squares = samples**2
    assert ((squares.mean(0) - expected).abs() < 5 * squares.std(0) / math.sqrt(n)).all()
    # total variance is never below that of the dense estimator, (d + 1) |g|^2
    assert expected.sum() - gradient @ gradient > 5 * gradient @ gradient


def test_scores_find_the_blocks_that_matter():
    """Two of six blocks have a gradient. All scores contain a common term, so that their contrast is low."""
    sizes = (4,) * 6
    named, gradients, _ = problem(sizes)
    slopes = [5.0 if i in (1, 4) else 0.05 for i in range(6)]
    optimizer = CurvZO(named, lr=0.0, eps=1e-3, budget=0.3, beta=0.05, adapt_every=0, seed=0)
    seen = []
    for _ in range(600):
        optimizer.step(lambda: sum(s * (p @ g) / g.norm() for s, (_, p), g in zip(slopes, named, gradients)))
        seen.append(optimizer.zo_state["pi"].clone())
    pi = torch.stack(seen[100:]).mean(0)
    matter, rest = pi[[1, 4]].mean(), pi[[0, 2, 3, 5]].mean()
    assert 1.3 * rest < matter < 2 * rest, (matter, rest)


def test_budget_moves_towards_what_is_wanted():
    even, sharp = np.ones(10), np.array([1.0] + [1e-6] * 9)
    assert next_fraction(even, 0.4, 0.05) == pytest.approx(0.9 * 0.4 + 0.1 * (0.1 + 0.49))
    assert next_fraction(sharp, 0.4, 0.05) < 0.4 and next_fraction(even, 0.9, 0.05) == 0.8
    assert next_fraction(np.ones(1), 0.1, 0.05) >= 0.1


@pytest.mark.parametrize(
    "bad, word",
    [({"budget": 0}, "budget"), ({"budget": 1.5}, "budget"), ({"budget": math.nan}, "budget"),
     ({"floor": 0}, "floor"), ({"floor": 0.5}, "floor"), ({"beta": 0}, "beta"), ({"magnitude_beta": 2}, "magnitude"),
     ({"adapt_every": -1}, "adapt_every"), ({"adapt_every": 2.5}, "adapt_every` must be a whole"),
     ({"adapt_every": math.nan}, "adapt_every` must be a whole"), ({"score": "x"}, "score"), ({"eps": 0}, "eps")],
)  # fmt: skip
def test_bad_hyperparameters(bad, word):
    with pytest.raises(UserError, match=word):
        CurvZO(problem()[0], **bad)


def test_the_official_floor_is_none():
    named = [("w", torch.nn.Parameter(torch.zeros(3)))]
    with pytest.warns(UserWarning, match="`floor` 0.3 changes nothing with `compat` official"):
        assert CurvZO(named, budget=0.4, floor=0.3, compat="official").floor == 0.0
    assert CurvZO(named, budget=0.04, compat="official").budget == 0.04
