"""MeZO-SVRG: the same z at theta and at a copied snapshot, no bias, and variance that falls with their distance."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from metazo.errors import UserError
from metazo.optimizers import MeZO, MeZOSVRG
from metazo.step.rules import Momentum
from tests.optimizers.montecarlo import assert_mean, estimates

CURVATURES = torch.tensor([[1.0, 3.0, 0.5], [4.0, 0.2, 1.0], [2.0, 2.0, 5.0], [0.1, 1.0, 0.3]], dtype=torch.float64)
CENTRES = torch.tensor([[1.0, 0.0, 2.0], [-1.0, 3.0, 0.5], [0.0, 1.0, -2.0], [5.0, -4.0, 1.0]], dtype=torch.float64)


class Sum(nn.Module):
    """The mean over four examples of sum_j a_ij (theta_j - b_ij)^2 / 2; `choose` makes a batch of one."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=dtype))
        self.example, self.seen = 0, []
        self.generator = torch.Generator().manual_seed(9)

    def choose(self, *_):
        self.example = int(torch.randint(4, (), generator=self.generator))

    def losses(self):
        self.seen.append(self.theta.detach().double().clone())
        return (CURVATURES * (self.theta.double() - CENTRES) ** 2).sum(1) / 2

    def forward(self):
        return self.losses()[self.example]

    def full(self):
        return self.losses().mean()

    def gradient(self, theta):
        return (CURVATURES * (theta - CENTRES)).mean(0)


def make(model: Sum, cls=MeZOSVRG, **settings):
    optimizer = cls(
        model.named_parameters(), **({"lr": 1.0, "mini_lr": 1.0, "eps": 1e-2, "check_loss": False} | settings)
    )
    optimizer.full_closure = model.full
    return optimizer


def snapshot_at(optimizer, model: Sum) -> None:
    """A full step whose update is undone, so that snapshot and gbar are those of the present weights."""
    here = model.theta.detach().clone()
    optimizer.step(model)
    torch.testing.assert_close(optimizer.tensors_state()["snapshot/theta"], here, rtol=1e-12, atol=1e-12)
    model.theta.data.copy_(here)


def test_both_estimates_share_z_and_the_snapshot_is_by_value():
    model = Sum()
    optimizer = make(model, interval=3, lr=0.1, mini_lr=0.05)
    start = None
    for step in range(8):
        theta = model.theta.detach().clone()
        model.seen.clear()
        optimizer.step(model)
        if step % 3 == 0:
            start = theta
            continue
        a, b, c, d = model.seen
        torch.testing.assert_close((a + b) / 2, start)
        torch.testing.assert_close((c + d) / 2, theta)
        torch.testing.assert_close(a - b, c - d)
        assert (a - b).norm() > 0 and (start - theta).norm() > 0


def test_estimate_against_its_formula():
    model = Sum()
    optimizer = make(model, interval=100, lr=0.1, mini_lr=0.05)
    model.seen.clear()
    optimizer.step(model)
    z_full, c_full = (model.seen[0] - model.seen[1]) / 0.02, optimizer.last_step.coefficients[0]
    start = model.seen[0] - 0.01 * z_full
    torch.testing.assert_close(model.theta.data, start - 0.1 * c_full * z_full)
    model.choose()
    theta = model.theta.detach().clone()
    model.seen.clear()
    optimizer.step(model)
    z, slope = (model.seen[2] - model.seen[3]) / 0.02, CURVATURES[model.example]
    difference = (slope * (theta - start)) @ z  # the two slopes along z, exact for a quadratic
    torch.testing.assert_close(
        model.theta.data, theta - 0.05 * (difference * z + c_full * z_full), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_mean_is_the_gradient_of_the_whole_sum(noise):
    model = Sum()
    optimizer = make(model, noise=noise)
    origin = model.theta.detach().clone()
    away = origin + torch.tensor([4.0, -3.0, 2.0], dtype=torch.float64)
    found = []
    for _ in range(350):
        model.theta.data.copy_(origin)
        optimizer.step(model)  # full: another gbar
        model.theta.data.copy_(away)
        model.choose()
        optimizer.step(model)
        found.append(away - model.theta.data)
    assert_mean(torch.stack(found), model.gradient(away))


def test_variance_falls_to_nothing_as_theta_comes_to_the_snapshot():
    """Over batches and z, given gbar: proportional to the squared distance; MeZO's stays."""
    variance, plain, steps = {}, {}, 200
    origin = Sum().theta.detach().clone()
    for distance in (1.0, 0.1, 0.0):
        model = Sum()
        optimizer = make(model, interval=10**6)
        snapshot_at(optimizer, model)
        model.theta.data.copy_(origin + distance * torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64))
        variance[distance] = float(estimates(optimizer, model, steps, model.choose)["theta"].var(0).sum())
        model.generator.manual_seed(9)
        mezo = MeZO(model.named_parameters(), lr=1.0, eps=1e-2)
        plain[distance] = float(estimates(mezo, model, steps, model.choose)["theta"].var(0).sum())
    assert variance[0.0] < 1e-20 * variance[1.0]
    assert variance[0.1] == pytest.approx(0.01 * variance[1.0], rel=1e-6)  # the same batches and seeds
    assert plain[0.0] > 0.1 * plain[1.0] and plain[0.0] > 10 * variance[0.1]


def test_forwards_rates_and_whose_turn_it_is():
    model = Sum()
    optimizer = make(model, interval=3, lr=0.1, mini_lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    counts, rates, before = [], [], 0
    for _ in range(4):
        optimizer.step(model)
        scheduler.step()
        counts.append(optimizer.forwards - before)
        rates.append(optimizer.last_step.lr[0])
        before = optimizer.forwards
    assert counts == [2, 4, 4, 2]
    assert rates == pytest.approx([0.1, 0.01, 0.005, 0.05])


def test_full_closure_counts_its_batches():
    class Whole:
        batches = 7

        def __call__(self):
            return model.full()

    model = Sum()
    optimizer = make(model)
    optimizer.full_closure = Whole()
    optimizer.step(model)
    assert optimizer.forwards == 14
    optimizer.step(model)
    optimizer.full_closure = [model.full] * 5
    optimizer.step(model)
    assert optimizer.forwards == 14 + 4 + 10


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_forwards_of_the_first_steps_are_known_before(interval):
    model = Sum()
    optimizer = make(model, interval=interval)
    optimizer.full_closure = [model.full] * 5
    for steps in range(1, 8):
        optimizer.step(model)
        assert optimizer.forwards == optimizer.forwards_in(steps)
    assert optimizer.forwards_per_step() == pytest.approx((10 + 4 * (interval - 1)) / interval)


def test_needs_a_full_closure():
    model = Sum()
    with pytest.raises(UserError, match="full_closure"):
        MeZOSVRG(model.named_parameters()).step(model)


def test_a_first_full_step_without_a_finite_loss_is_taken_again():
    model = Sum()
    optimizer = make(model, interval=2)
    optimizer.full_closure = lambda: math.nan
    assert math.isnan(optimizer.step(model))
    optimizer.full_closure = model.full
    assert optimizer.is_full()
    optimizer.step(model)
    assert optimizer.steps == 2 and optimizer.is_full()  # full by the step count


@pytest.mark.parametrize("call", [0, 1, 2, 3])
def test_a_closure_that_fails_at_the_snapshot_leaves_weights_and_snapshot(call):
    model = Sum(torch.bfloat16)
    optimizer = make(model, lr=1e-2, interval=10)
    optimizer.step(model)
    before = {key: value.clone() for key, value in optimizer.tensors_state().items()}
    theta, calls = model.theta.detach().clone(), iter(range(4))

    def closure():
        if next(calls) == call:
            raise KeyboardInterrupt
        return model()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(model.theta.data, theta)
    after = optimizer.tensors_state()
    assert all(torch.equal(before[key], after[key]) for key in before if key != "counters" and "svrg" not in key)


@pytest.mark.parametrize(("snapshot", "dtype"), [("theta", torch.float32), ("weights", torch.bfloat16)])
def test_bfloat16_does_not_drift(snapshot, dtype):
    model = Sum(torch.bfloat16)
    optimizer = make(model, lr=0.0, interval=5, snapshot=snapshot)
    theta = model.theta.detach().clone()
    for _ in range(25):
        optimizer.step(model)
    assert torch.equal(model.theta.data, theta)
    assert optimizer.tensors_state()["snapshot/theta"].dtype == dtype


def test_float32_exchange_brings_theta_back():
    model = Sum(torch.float32)
    optimizer = make(model, lr=0.0, interval=10**6)
    theta = model.theta.detach().clone()
    for _ in range(50):
        optimizer.step(model)
    state = optimizer.tensors_state()
    torch.testing.assert_close(model.theta.data, theta, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state["snapshot/theta"], theta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", [None, Momentum()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [4, 5])
def test_save_and_load_in_mid_run_is_bit_identical(rule, dtype, cut):
    settings = {"lr": 0.02, "mini_lr": 0.01, "interval": 3, "epoch_steps": 2, "rule": rule, "scale": "rms"}
    model = Sum(dtype)
    optimizer = make(model, **settings)
    for step in range(10):
        if step == cut:
            twin = copy.deepcopy(model)
            other = make(twin, **settings)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step(model)
        if step >= cut:
            other.step(twin)
            assert torch.equal(model.theta, twin.theta)


def test_annealing_divides_both_rates_when_the_loss_rises():
    model = Sum()
    optimizer = make(model, lr=1e-4, mini_lr=1e-5, interval=2, epoch_steps=2, anneal=5.0)
    rates = []
    for step in range(24):
        level = torch.tensor(1.02**step)  # above 1.05 over two epochs, below it over one
        optimizer.full_closure = lambda: level
        optimizer.step(lambda: level)
        rates.append(optimizer.last_step.lr[0])
    # epochs of two steps; the first one looked at ends with step 9, and each from there on anneals
    assert rates[8:14] == pytest.approx([1e-4, 1e-5, 2e-5, 2e-6, 1e-5, 1e-6])
    assert rates[-2:] == pytest.approx([1e-5, 1e-6])  # down to the floors and no further


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"interval": 0}, "interval"),
        ({"interval": math.nan}, "interval"),
        ({"mini_lr": -1.0}, "mini_lr"),
        ({"mini_lr": math.nan}, "mini_lr"),
        ({"anneal": 0.5}, "anneal"),
        ({"anneal": math.nan}, "anneal"),
        ({"epoch_steps": -1}, "epoch_steps"),
        ({"snapshot": "float8"}, "snapshot"),
    ],
)
def test_bad_hyperparameters(settings, words):
    with pytest.raises(UserError, match=words):
        MeZOSVRG(Sum().named_parameters(), **settings)


def test_a_snapshot_in_the_dtype_of_theta_is_named_as_without_effect():
    optimizer = make(Sum(torch.float32), snapshot="weights")
    with pytest.warns(UserWarning, match="`snapshot` weights changes nothing: theta has the dtype of the weights"):
        optimizer.tensors_state()


def test_mini_steps_follow_schedulers_that_begin_elsewhere():
    """OneCycleLR calls a 25th of its peak initial_lr, and a rate that was set before LambdaLR is its start."""
    model = nn.Linear(3, 2)
    optimizer = MeZOSVRG(model.named_parameters(), 1e-3, mini_lr=1e-5, interval=2)
    optimizer.full_closure = lambda: model(torch.ones(3)).square().sum()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=20, cycle_momentum=False)
    found = []
    for _ in range(19):
        optimizer.step(optimizer.full_closure)
        found.append((optimizer.last_step.lr[0], optimizer.param_groups[0]["lr"]))
        schedule.step()
    for step, (rate, full) in enumerate(found):
        assert rate == pytest.approx(full / 100 if step % 2 else full)
    other = MeZOSVRG(model.named_parameters(), 1e-2, mini_lr=1e-3, interval=2)
    other.param_groups[0]["lr"] = 1e-3
    torch.optim.lr_scheduler.LambdaLR(other, lambda step: 1.0)
    assert other.learning_rates(0) == (1e-3,)


@pytest.mark.parametrize("number", [float, lambda lr: torch.tensor(lr, dtype=torch.float64)], ids=["float", "tensor"])
def test_mini_steps_have_their_own_rate_in_every_group_under_a_schedule_and_after_loading(number):
    def make_one(lr: float) -> tuple[MeZOSVRG, torch.optim.lr_scheduler.LambdaLR]:
        model = nn.Linear(3, 2)
        groups = [{"params": [("w", model.weight)], "lr": number(1e-2)}, {"params": [("b", model.bias)]}]
        optimizer = MeZOSVRG(groups, number(lr), mini_lr=1e-3, interval=2)
        optimizer.full_closure = lambda: model(torch.ones(3)).square().sum()
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def rates(optimizer, schedule, steps: int) -> list[tuple[float, ...]]:
        found = []
        for _ in range(steps):
            optimizer.step(optimizer.full_closure)
            found.append(optimizer.last_step.lr)
            schedule.step()
        return found

    optimizer, schedule = make_one(1e-4)
    expected = [(1e-2, 1e-4), (1e-3 / 2, 1e-3 / 2), (1e-2 / 3, 1e-4 / 3), (1e-3 / 4, 1e-3 / 4)]
    for own, right in zip(rates(optimizer, schedule, 2), expected[:2], strict=True):
        assert own == pytest.approx(right, rel=1e-12)
    other, again = make_one(5e-6)
    other.load_state_dict(optimizer.state_dict())
    again.load_state_dict(schedule.state_dict())
    for own, right in zip(rates(other, again, 2), expected[2:], strict=True):
        assert own == pytest.approx(right, rel=1e-12)


def test_a_rate_that_began_at_nothing_has_mini_steps_too():
    model = Sum()
    optimizer, rates = make(model, interval=2, lr=0.0, mini_lr=0.01), []
    for lr in (0.0, 0.0, 0.1, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step(model)
        rates.append(optimizer.last_step.lr[0])
    assert rates == [0.0, 0.0, 0.1, 0.01]
