"""MEAZO: the scalar second moment against its formula, as a method and as a rule over others."""

from __future__ import annotations

import math

import pytest
import torch

from metazo.errors import UserError
from metazo.optimizers import FZOO, LOZO, MEAZO, METHODS, MeZO
from metazo.step.rules import ScalarMoment
from tests.optimizers.montecarlo import Linear


@pytest.mark.parametrize("queries", [1, 3])
def test_steps_against_the_formula(queries):
    """In float64, with z drawn from its seeds and c from the slopes: the loss is linear, so c is exact."""
    model, beta, lr, decay = Linear(), 0.9, 0.05, 0.1
    optimizer = MEAZO(model.named_parameters(), lr=lr, beta=beta, queries=queries, weight_decay=decay, seed=4)
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    moment = 0.0
    for step in range(1, 9):
        optimizer.step(model)
        streams = [optimizer.noise.stream(seed) for seed in optimizer.last_step.seeds]
        z = [{t.name: stream.draw(t) for t in optimizer.tensors} for stream in streams]
        c = [sum(float((model.slopes[n] * v).sum()) for n, v in one.items()) for one in z]
        moment = beta * moment + (1 - beta) * (sum(c) / queries) ** 2
        length = lr / (math.sqrt(moment / (1 - beta**step)) + 1e-8)
        for name, parameter in model.named_parameters():
            estimate = sum(ck * one[name] for ck, one in zip(c, z)) / queries
            shrunk = theta[name] * (1 - (0 if name == "bias" else lr * decay))
            theta[name] = shrunk - length * estimate
            torch.testing.assert_close(parameter.data, theta[name], rtol=1e-7, atol=1e-9)
    assert optimizer.zo_state["meazo/steps"] == 8


def test_the_step_does_not_depend_on_the_scale_of_the_loss():
    ends = []
    for scale in (1.0, 1e4):
        model = Linear()
        optimizer = MEAZO(model.named_parameters(), lr=0.05, stability=1e-12, beta=0.5)
        for _ in range(5):
            optimizer.step(lambda: scale * model())
        ends.append(model.weight.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("cls", "own"), [(MeZO, {}), (LOZO, {"interval": 2}), (FZOO, {"queries": 3})])
def test_as_a_rule_it_scales_the_plain_step(cls, own, dtype):
    """The first step is that of the method times 1 / |sum of coefficients|; only two numbers are kept."""
    moves = []
    for rule in (None, ScalarMoment()):
        model = Linear(dtype)
        optimizer = cls(model.named_parameters(), 1e-3, 0.1, rule=rule, **own)
        optimizer.step(model)
        state = optimizer.tensors_state()
        theta = torch.cat([v.flatten() for v in (state.get(f"master/{n}", p) for n, p in model.named_parameters())])
        start = torch.cat([p.detach().flatten() for p in Linear(dtype).parameters()])
        moves.append((theta.detach().double() - start.double(), optimizer))
    (plain, first), (scaled, second) = moves
    length = abs(math.fsum(first.last_step.coefficients))
    assert first.last_step == second.last_step and length > 0
    rtol, atol = (1e-6, 1e-12) if dtype == torch.float64 else (1e-3, 1e-6)
    torch.testing.assert_close(scaled * length, plain, rtol=rtol, atol=atol)
    extra = {k: v.numel() for k, v in second.zo_state.items() if k not in first.zo_state}
    assert extra == {"meazo/moment": 1, "meazo/steps": 1}


@pytest.mark.parametrize(("own", "words"), [({"beta": 1.0}, "beta"), ({"stability": 0.0}, "stability")])
def test_bad_hyperparameters(own, words):
    with pytest.raises(UserError, match=words):
        MEAZO(Linear().named_parameters(), **own)


@pytest.mark.parametrize("name,options", [("loren", {}), ("es", {}), ("eggroll", {"antithetic": False})])
def test_refused_where_the_coefficients_add_up_to_0(name, options):
    """Their sum is rounding, by which the step was divided: weights were 20,000 times as long after three steps."""
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=f"which is 0 for {name}"):
        METHODS[name](layer.named_parameters(), rule=ScalarMoment(), **options)
    METHODS["es"](layer.named_parameters(), rule=ScalarMoment(), antithetic=True)


@pytest.mark.parametrize("name", ["zo-muon", "mezo-svrg"])
def test_refused_where_a_step_does_not_grow_with_its_coefficients(name):
    layer = torch.nn.Linear(4, 4)
    with pytest.raises(UserError, match=f"they do not set the length of a step for {name}"):
        METHODS[name](layer.named_parameters(), rule="meazo")


def test_msign_makes_steps_as_long_on_every_slope():
    """So that dividing by the coefficients would make them short where the loss is steep."""
    lengths = []
    for steepness in (1.0, 1e3):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))
        target = torch.randn(8, 8, dtype=torch.float64)
        optimizer = METHODS["zo-muon"]([("weight", weight)], lr=0.1, rank=4, msign="svd")
        optimizer.step(lambda: steepness * (weight * target).sum())
        lengths.append(float(weight.detach().norm()))
    assert lengths[1] == pytest.approx(lengths[0], rel=1e-6)
    assert lengths[0] == pytest.approx(0.1 * 2, rel=1e-6)  # lr sqrt(rank)
