"""PertNN against a plain Python loop over `nn.Sequential`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metazo.tuner.networks import PertNN


def sequentials(blocks: int, features: int = 5, hidden: int = 64) -> list[nn.Sequential]:
    torch.manual_seed(3)
    layers = [nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, 1)) for _ in range(blocks)]
    return [layer.double() for layer in layers]


def stacked(networks: list[nn.Sequential]) -> PertNN:
    return PertNN.from_sequentials([tuple(net.parameters()) for net in networks])  # type: ignore[misc]


@pytest.mark.parametrize(("blocks", "features", "hidden"), [(1, 5, 64), (7, 5, 64), (3, 6, 16)])
def test_equals_a_loop_of_sequentials(blocks: int, features: int, hidden: int) -> None:
    networks = sequentials(blocks, features, hidden)
    inputs = torch.randn(blocks, features, dtype=torch.float64)
    wanted = torch.cat([net(row) for net, row in zip(networks, inputs, strict=True)])
    torch.testing.assert_close(stacked(networks)(inputs), wanted, rtol=1e-12, atol=1e-12)


def test_gradients_equal_a_loop_of_sequentials() -> None:
    networks = sequentials(4)
    pertnn = stacked(networks)
    inputs = torch.randn(4, 5, dtype=torch.float64)
    weights = torch.arange(1.0, 5.0, dtype=torch.float64)
    (pertnn(inputs) * weights).sum().backward()
    for index, (net, row, weight) in enumerate(zip(networks, inputs, weights, strict=True)):
        (net(row) * weight).sum().backward()
        for name, parameter in zip(("w1", "b1", "w2", "b2"), net.parameters(), strict=True):
            assert parameter.grad is not None
            found = getattr(pertnn, name).grad[index]
            torch.testing.assert_close(found, parameter.grad.reshape(found.shape), rtol=1e-12, atol=1e-12)


def test_initialisation_is_that_of_linear() -> None:
    pertnn = PertNN(400, seed=1)
    for parameter, bound in ((pertnn.w1, 5**-0.5), (pertnn.b1, 5**-0.5), (pertnn.w2, 1 / 8), (pertnn.b2, 1 / 8)):
        assert parameter.abs().max() <= bound
        assert parameter.abs().max() > 0.98 * bound
        assert abs(parameter.std() / (bound / 3**0.5) - 1) < 0.1


def test_seed_alone_decides_and_leaves_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, longer, other = PertNN(3, seed=5), PertNN(3, seed=5), PertNN(9, seed=5), PertNN(3, seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.w1, again.w1)
    assert torch.equal(first.w2, longer.w2[:3])
    assert not torch.equal(first.w1, other.w1)


def test_zero_init_outputs_zero_and_still_learns() -> None:
    pertnn = PertNN(3, zero_init=True)
    output = pertnn(torch.randn(3, 5))
    assert torch.equal(output, torch.zeros(3))
    output.sum().backward()
    assert pertnn.w2.grad is not None and pertnn.w2.grad.abs().min() > 0
