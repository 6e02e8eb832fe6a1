"""The measured cost of a step: operations by count, memory by what tensors take."""

from __future__ import annotations

import gc

import torch
from torch import nn

from metazo.optimizers import FirstOrderAdamW, FirstOrderSGD, MeZO, MeZOAdam
from metazo.runs.cost import measure, most_bytes

WIDTH, ROWS = 32, 5


def model() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)])


def test_operations_are_those_of_the_products() -> None:
    """Forward: 2 m n per row and layer. Backward: twice that, without the gradient of the first layer's input."""
    net, x = model(), torch.ones(ROWS, WIDTH)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    layer = 2 * ROWS * WIDTH * WIDTH
    mezo = measure(net, MeZO(net.named_parameters(), lr=1e-3), lambda: net(x).square().mean())
    sgd = measure(net, FirstOrderSGD(net.named_parameters(), lr=1e-3), lambda: net(x).square().mean())
    assert mezo.forward_flops == sgd.forward_flops == 3 * layer
    assert mezo.step_flops == 2 * 3 * layer
    assert sgd.step_flops == (3 + 5) * layer
    for method, one in ((MeZO, mezo), (FirstOrderSGD, sgd)):
        four = measure(net, method(net.named_parameters(), lr=1e-3), lambda: net(x).square().mean(), accumulate=4)
        assert (four.forward_flops, four.step_flops) == (3 * layer, 4 * one.step_flops)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_frozen_layers_are_not_pulled_through() -> None:
    net, x = model(), torch.ones(ROWS, WIDTH)
    net[0].requires_grad_(False)
    net[1].requires_grad_(False)
    cost = measure(net, FirstOrderSGD(net.named_parameters(), lr=1e-3), lambda: net(x).square().mean())
    assert cost.step_flops == 4 * 2 * ROWS * WIDTH * WIDTH


def test_memory_is_weights_gradients_and_moments() -> None:
    net, x = model(), torch.ones(1, WIDTH)
    weights = sum(4 * p.numel() for p in net.parameters())
    loss = lambda: net(x).square().mean()  # noqa: E731
    mezo = measure(net, MeZO(net.named_parameters(), lr=1e-3), loss)
    adamw = measure(net, FirstOrderAdamW(net.named_parameters(), lr=1e-3), loss)
    assert weights <= mezo.inference_bytes <= 1.15 * weights
    assert (
        mezo.step_bytes < weights + 1.5 * 4 * WIDTH**2
    )  # the check that weights are finite looks at one tensor at a time
    assert 4 * weights <= adamw.step_bytes <= 5.5 * weights  # gradients, two moments, and what the update makes


def test_memory_has_the_state_that_was_made_before() -> None:
    """A plan of the disk asks for the tensors of the state, and makes them so."""
    net, x = model(), torch.ones(1, WIDTH)
    weights = sum(4 * p.numel() for p in net.parameters())
    taken = []
    for asked in (False, True):
        adam = MeZOAdam(net.named_parameters(), lr=1e-3)
        if asked:
            adam.tensors_state()
        taken.append(measure(net, adam, lambda: net(x).square().mean()).step_bytes)
    assert taken[0] >= 3 * weights and taken[1] - taken[0] <= 16  # a counter that steps make anew


def test_garbage_of_earlier_measurements_is_no_memory_of_a_step() -> None:
    """Tensors in reference cycles are freed by the next collection, which may come within a measured call. The profiler knows
    the sizes of those that were made in another measured call, and its sum is less by them.
    """

    class Node:
        pass

    def leave() -> None:
        node = Node()
        node.itself, node.tensor = node, torch.empty(10**6)  # type: ignore[attr-defined]

    def measured() -> int:
        return most_bytes(lambda: (gc.collect(), torch.empty(1000)))

    assert measured() == 4000
    most_bytes(leave)
    assert measured() == 4000


def test_sizes_that_the_profiler_kept_from_an_earlier_profile_are_not_used() -> None:
    """It keeps the size of a tensor that is freed between two profiles, for whatever has that place later."""
    kept: list[torch.Tensor] = []
    most_bytes(lambda: kept.append(torch.empty(10**6)))
    kept.clear()  # unseen by the profiler
    later = [torch.empty(10**6)]  # likely in the same place
    assert most_bytes(lambda: (later.clear(), torch.empty(1000))) == 4000
