"""The fused first-order step: beside plain SGD in float64, its memory, precision, and what it refuses."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from metazo.bench.architectures import build
from metazo.errors import UserError
from metazo.optimizers import FirstOrderFused, FirstOrderSGD
from metazo.optimizers.recomputed import FLOOR
from metazo.runs.cost import measure
from metazo.step.record import Step
from tests.kernels.test_operations import Cut


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT, classifier"])
def test_steps_are_plain_sgd(name: str) -> None:
    """Three steps beside torch's SGD on a copy; GPT-2's head is tied to its embedding."""
    fused, plain = build(name), build(name)
    optimizer = FirstOrderFused(fused.model.named_parameters(), 0.1, weight_decay=0.5)
    named = list(plain.model.named_parameters())
    exempt = ("bias", "layer_norm", "layernorm")
    groups = [
        {
            "params": [p for key, p in named if any(part in key for part in exempt) == bare],
            "weight_decay": 0.0 if bare else 0.5,
        }
        for bare in (False, True)
    ]
    torch_sgd = torch.optim.SGD(groups, lr=0.1)
    for _ in range(3):
        torch_sgd.zero_grad()
        loss = plain.every()
        loss.backward()
        # torch adds wd theta to the gradient, which for plain SGD is the decoupled decay
        torch_sgd.step()
        assert optimizer.step(fused.every) == pytest.approx(float(loss.detach()), rel=1e-12)
    for key, p in plain.model.named_parameters():
        assert torch.allclose(fused.model.get_parameter(key), p, rtol=1e-9, atol=1e-10), key
        assert fused.model.get_parameter(key).grad is None


def test_updates_in_place_that_narrow_weights_lose_are_said() -> None:
    model = nn.Linear(3, 2).bfloat16()
    in_place, master = (FirstOrderFused(model.named_parameters(), precision=name) for name in ("in-place", "auto"))
    with pytest.warns(UserWarning, match="first-order-fused in place has no float32 master .* below 1/512 of") as found:
        in_place.step(lambda: model.weight.sum())
    assert found[0].filename == __file__ and in_place.notes == [str(found[0].message)]
    master.step(lambda: model.weight.sum())
    assert master.notes == []


def test_closures_are_averaged() -> None:
    model, both = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    both.load_state_dict(model.state_dict())
    x = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    FirstOrderFused(model.named_parameters(), 0.1).step([lambda i=i: model(x[i]).square().mean() for i in range(2)])
    FirstOrderFused(both.named_parameters(), 0.1).step(lambda: both(x).square().mean())
    assert torch.allclose(model.weight, both.weight, atol=1e-14)


def test_a_normalised_step_has_the_length_of_the_tensor_times_lr() -> None:
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        model.bias.zero_()
    before = copy.deepcopy(model)
    x = torch.ones(4, 3, dtype=torch.float64)
    before(x).square().mean().backward()
    FirstOrderFused(model.named_parameters(), 0.01, normalise=True).step(lambda: model(x).square().mean())
    for name, p in model.named_parameters():
        old = before.get_parameter(name)
        size = max(float(old.detach().norm()), FLOOR * math.sqrt(p.numel()))
        assert torch.allclose(p, old.detach() - 0.01 * size * old.grad / old.grad.norm(), atol=1e-12), name


class Deep(nn.Module):
    def __init__(self, layers: int, width: int = 64):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x.square().mean()


def test_one_gradient_exists_at_a_time() -> None:
    """A further layer costs its activation; with SGD it costs its gradient and momentum as well."""
    x = torch.ones(1, 64)
    taken = {}
    for method in (FirstOrderFused, FirstOrderSGD):
        peaks = []
        for layers in (4, 12):
            model = Deep(layers)
            cost = measure(model, method(model.named_parameters(), lr=1e-3), lambda model=model: model(x))
            peaks.append(cost.step_bytes - sum(4 * p.numel() for p in model.parameters()))
        taken[method] = (peaks[1] - peaks[0]) / 8
    layer = 4 * 64 * 65
    assert taken[FirstOrderFused] < 0.2 * layer
    assert taken[FirstOrderSGD] > 1.8 * layer


def test_weights_of_16_bits_keep_what_they_cannot_show() -> None:
    model = nn.Linear(8, 1, bias=False).bfloat16()
    start = model.weight.detach().float().clone()
    optimizer = FirstOrderFused(model.named_parameters(), 1e-5, precision="master")
    for _ in range(1000):
        optimizer.step(lambda: model(torch.ones(1, 8, dtype=torch.bfloat16)).sum())
    assert torch.allclose(model.weight.detach().float() - start, torch.full((1, 8), -0.01), atol=4e-3)
    assert not torch.equal(model.weight.detach().float(), start)


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    optimizer = FirstOrderFused(model.named_parameters(), 0.1)
    loss = optimizer.step(lambda: model(torch.full((1, 2), math.inf)).sum())
    assert not math.isfinite(loss) and torch.equal(model.weight, before)
    assert optimizer.last_step is not None and optimizer.last_step.coefficients == ()


def test_a_gradient_that_is_not_finite_is_left_out() -> None:
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    optimizer = FirstOrderFused(model.named_parameters(), 0.1)
    # the root's derivative at 0 is infinite, and 0 * inf is not a number
    optimizer.step(lambda: (0 * model(torch.zeros(1, 2)).sum()).square().sqrt())
    assert torch.equal(model.weight, before)
    assert optimizer.vanished == 2 and optimizer.notes


def test_a_recorded_step_is_computed_again() -> None:
    model = nn.Linear(2, 1)
    optimizer = FirstOrderFused(model.named_parameters(), 0.1)
    loss = lambda: model(torch.ones(1, 2)).square().sum()  # noqa: E731
    with pytest.raises(UserError, match="first-order-fused cannot be replayed from its record"):
        optimizer.step(replay=Step(0, (), (1.0,), (1.0,), (0.1,)))
    again = copy.deepcopy(model)
    optimizer.step(loss)
    repeat = FirstOrderFused(again.named_parameters(), 0.5)
    repeat.step(lambda: again(torch.ones(1, 2)).square().sum(), replay=optimizer.last_step)
    assert torch.equal(again.weight, model.weight)
    with pytest.raises(UserError, match="was recorded with loss"):
        repeat.step(lambda: again(torch.zeros(1, 2)).square().sum(), replay=optimizer.last_step)


def test_a_loss_without_a_graph_is_refused() -> None:
    model = nn.Linear(2, 1)
    optimizer = FirstOrderFused(model.named_parameters(), 0.1)
    with pytest.raises(UserError, match="first-order-fused needs the loss as a tensor with a graph"):
        optimizer.step(lambda: 1.0)
    with pytest.raises(UserError, match="needs a closure"):
        optimizer.step()


def test_a_gradient_that_was_there_before_is_dropped() -> None:
    model, twin = nn.Linear(2, 1), nn.Linear(2, 1)
    twin.load_state_dict(model.state_dict())
    model.weight.grad = torch.full((1, 2), 100.0)
    for each in (model, twin):
        FirstOrderFused(each.named_parameters(), 0.1).step(lambda each=each: each(torch.ones(1, 2)).square().sum())
    assert torch.equal(model.weight, twin.weight)


def test_a_loss_above_the_limit_is_returned_and_changes_nothing() -> None:
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    optimizer = FirstOrderFused(model.named_parameters(), 0.1)
    optimizer.max_loss = 1.0
    assert optimizer.step(lambda: model(torch.ones(1, 2)).sum() * 0 + 3.0) == 3.0
    assert torch.equal(model.weight, before)


def test_weights_that_were_loaded_between_steps_are_gone_on_from() -> None:
    model = nn.Linear(4, 1, bias=False).bfloat16()
    optimizer = FirstOrderFused(model.named_parameters(), 1e-3)
    loss = lambda: model(torch.ones(1, 4).bfloat16()).square().sum() * 0  # noqa: E731
    optimizer.step(loss)
    model.load_state_dict({"weight": torch.full((1, 4), 5.0)})
    optimizer.step(loss)
    assert torch.equal(model.weight.data, torch.full((1, 4), 5.0).bfloat16())


def test_a_precision_without_effect_is_refused() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(UserError, match="`precision` compensated-16 keeps bits below bfloat16"):
        FirstOrderFused(model.named_parameters(), precision="compensated-16").step(
            lambda: model(torch.ones(1, 2)).sum()
        )


def test_a_tensor_that_gets_no_gradient_is_left_as_it_is_and_a_step_of_none_is_refused() -> None:
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    cut = lambda: Cut.apply(model(torch.ones(1, 2)))  # noqa: E731
    FirstOrderFused(model.named_parameters(), 0.1).step(lambda: (cut() + model.bias).sum())
    assert torch.equal(model.weight, before)
    bias = model.bias.detach().clone()
    with pytest.raises(UserError, match="No trained tensor gets a gradient .* first-order-fused would train nothing"):
        FirstOrderFused(model.named_parameters(), 0.1).step(lambda: cut().sum())
    assert torch.equal(model.weight, before) and torch.equal(model.bias, bias)


class Used(nn.Module):
    """A weight that is used in a lower layer as well, without a gradient there."""

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.high(nn.functional.linear(self.low(x), self.high.weight.detach()).tanh())


class Shared(nn.Module):
    """A layer that runs three times under checkpoints."""

    def __init__(self, reentrant: bool):
        super().__init__()
        self.first, self.layer, self.reentrant = nn.Linear(4, 4), nn.Linear(4, 4), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for _ in range(3):
            x = x + checkpoint(lambda given: self.layer(given).tanh(), x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("make, fine", [(Used, False), (lambda: Shared(True), False), (lambda: Shared(False), True)])
def test_a_weight_that_backward_needs_after_its_update_is_refused(make, fine: bool) -> None:
    model, x = make().double(), torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)
    true = torch.autograd.grad(model(x).square().mean(), list(model.parameters())) if fine else ()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = FirstOrderFused(model.named_parameters(), lr=0.1)
    if fine:
        optimizer.step(lambda: model(x).square().mean())
        moved = [old - p for p, old in zip(model.parameters(), before)]
        assert all(torch.allclose(m, 0.1 * g, atol=1e-12) for m, g in zip(moved, true, strict=True))
    else:
        with pytest.raises(
            UserError, match="the backward pass still needed the earlier value of .* Part of the weights"
        ):
            optimizer.step(lambda: model(x).square().mean())


@pytest.mark.parametrize("found", ["shape (5,)", "type complex64"])
def test_a_loss_that_is_no_number_is_refused_in_a_sentence(found: str) -> None:
    model = nn.Linear(4, 3)

    def loss() -> torch.Tensor:
        each = model(torch.ones(5, 4)).mean(1)
        return each if "5" in found else torch.complex(each.sum(), each.sum())

    with pytest.raises(UserError, match=f"The closure returned a tensor of .*{re.escape(found)}"):
        FirstOrderFused(model.named_parameters(), lr=1e-2).step(loss)
