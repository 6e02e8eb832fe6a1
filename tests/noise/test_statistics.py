"""The distribution of the noise, and its independence. Every bound is a number of standard errors."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from metazo.blocks import NamedTensor
from metazo.noise import DENSE, LEFT, PhiloxNoise, philox

N = 1 << 22
ERRORS = 4.5  # standard errors that pass; a correct generator exceeds them once in 150,000


def draw(distribution: str, seed: int, tensor: int = 20, purpose: int = DENSE, count: int = 1 << 18) -> torch.Tensor:
    w = NamedTensor("w", torch.nn.Parameter(torch.zeros(count)), tensor)
    return PhiloxNoise(0, distribution).stream(seed).draw(w, purpose=purpose).double()


@pytest.fixture(scope="module")
def normals() -> torch.Tensor:
    return draw("gaussian", 12345, count=N)


def double_factorial(n: int) -> float:
    return math.prod(range(n, 0, -2))


@pytest.mark.parametrize("order", range(1, 9))
def test_moments(normals, order):
    expected = 0.0 if order % 2 else double_factorial(order - 1)
    error = math.sqrt((double_factorial(2 * order - 1) - expected**2) / N)
    assert abs(float((normals**order).mean()) - expected) < ERRORS * error


@pytest.mark.parametrize("limit", [0.001, 0.1, 1.0, 2.0, 3.0, 4.0, 4.5])
def test_tails(normals, limit):
    p = float(stats.norm.sf(limit))
    for side in (normals > limit, normals < -limit):
        assert abs(float(side.double().mean()) - p) < ERRORS * math.sqrt(p * (1 - p) / N)


def test_distribution(normals):
    assert stats.kstest(normals.numpy(), "norm").pvalue > 1e-4


def test_numbers_of_a_block_are_independent(normals):
    """All pairs among its eight: products, and products of squares (two share a word's radius)."""
    numbers = normals.view(-1, 8, philox.LANES).transpose(0, 1).reshape(8, -1)
    for power, spread in ((1, 1.0), (2, 2.0)):
        centred = numbers**power - float(power == 2)
        products = centred @ centred.T / numbers.shape[1]
        products.fill_diagonal_(0)
        assert float(products.abs().max()) < ERRORS * spread / math.sqrt(numbers.shape[1])


def test_directions_of_pairs_are_even(normals):
    pairs = normals.view(-1, 2, philox.LANES).transpose(1, 2).reshape(-1, 2)
    turns = torch.atan2(pairs[:, 1], pairs[:, 0]) / (2 * math.pi) % 1
    assert stats.kstest(turns.numpy(), "uniform").pvalue > 1e-4
    far = turns[pairs.square().sum(1) > 16]  # in the tail, for which few bits of the radius are left
    assert stats.kstest(far.numpy(), "uniform").pvalue > 1e-4


def test_bits_of_a_block_are_independent():
    signs = draw("rademacher", 77, count=1 << 21).view(-1, 128, philox.LANES).transpose(0, 1).reshape(128, -1)
    assert float(signs.mean(1).abs().max()) < ERRORS / math.sqrt(signs.shape[1])
    products = (signs @ signs.T / signs.shape[1]).fill_diagonal_(0)
    assert float(products.abs().max()) < (ERRORS + 1) / math.sqrt(signs.shape[1])  # 8,128 pairs


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_streams_are_uncorrelated(distribution):
    base = draw(distribution, 10)
    others = {
        "neighbouring seed": draw(distribution, 11),
        "neighbouring tensor": draw(distribution, 10, 21),
        "other purpose": draw(distribution, 10, purpose=LEFT),
        "high seed bits": draw(distribution, 10 + (1 << 32)),
        "high tensor bits": draw(distribution, 10, 20 + (1 << 32)),
        "swapped": draw(distribution, 20, 10),
    }
    others |= {f"lag {lag}": torch.roll(base, lag) for lag in (1, 2, 8, 16, 17, 64, 128, 2048)}
    for name, other in others.items():
        assert abs(float((base * other).mean())) < ERRORS / math.sqrt(len(base)), name
        if distribution == "gaussian":
            squares = (base**2 - 1) * (other**2 - 1)
            assert abs(float(squares.mean())) < ERRORS * 2 / math.sqrt(len(base)), name


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_steps_and_queries_are_uncorrelated(distribution):
    noise, count = PhiloxNoise(3, distribution), 1 << 14
    draws = torch.stack(
        [draw(distribution, noise.seed(step, query), count=count) for step in range(24) for query in (0, 1)]
    )
    products = (draws @ draws.T / count).fill_diagonal_(0)
    assert float(products.abs().max()) < (ERRORS + 0.5) / math.sqrt(count)  # 1,128 pairs
    squared_norms = draws.square().sum(1)
    spread = math.sqrt(2 * count) if distribution == "gaussian" else 0.0
    assert float((squared_norms - count).abs().max()) <= ERRORS * spread


def test_the_published_estimate_of_a_gradient_is_unbiased():
    """E[z z'g] = g, on which every estimate relies. 16 entries, 2^18 draws of 16."""
    z = draw("gaussian", 9, count=1 << 22).view(-1, 16)
    gradient = torch.linspace(-1, 1, 16, dtype=torch.float64)
    estimate = ((z @ gradient)[:, None] * z).mean(0)
    error = math.sqrt((float(gradient.square().sum()) + 1) / len(z))
    assert float((estimate - gradient).abs().max()) < ERRORS * error
