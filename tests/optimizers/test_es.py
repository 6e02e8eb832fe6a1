"""ES and EGGROLL: shaped losses, the mean of the estimate in closed form, steps against a reference, one batched pass."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from metazo.errors import UserError
from metazo.noise import LEFT, RIGHT
from metazo.optimizers import EGGROLL, ES
from metazo.step.estimators import centred_ranks, z_scores
from tests.optimizers.contract import IDS, llama
from tests.optimizers.montecarlo import Linear, assert_mean, linear_estimates

CLASSES = [(ES, {}), (EGGROLL, {"probing": "in-turn", "rank": 2})]


def test_shaping_against_numpy_and_scipy():
    for losses in ([3.0, 1.0, 2.0, 2.0, 7.0], [1.0, 1.0, 1.0], [0.9] * 30, [5.0, -2.0]):
        array = np.array(losses)
        spread = array.std() if np.ptp(array) else 0.0  # the mean of equal numbers may differ from them
        wanted = (array - array.mean()) / spread if spread else np.zeros(len(array))
        np.testing.assert_allclose(z_scores(losses), wanted, rtol=1e-12, atol=1e-12)
        ranks = (rankdata(array) - 1) / (len(array) - 1) - 0.5
        np.testing.assert_allclose(centred_ranks(losses), ranks, rtol=1e-12, atol=1e-12)


def expected_length(population: int, antithetic: bool, shaping: str) -> float:
    """a in E[estimate] = a g / |g| on a linear loss under Gaussian noise."""
    if shaping == "rank":
        # sum_i (2i - n + 1) y_(i) = sum of |y_j - y_k| over pairs, each 2 / sqrt(pi) on average
        return 1 / (2 * math.sqrt(math.pi))
    n = population // 2 if antithetic else population
    free = n if antithetic else n - 1  # E[sqrt(chi^2_free / n)]
    return math.sqrt(2 / n) * math.gamma((free + 1) / 2) / math.gamma(free / 2)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize(("population", "shaping"), [(4, "z-score"), (6, "z-score"), (6, "rank")])
def test_mean_is_along_the_gradient_with_the_length_of_the_closed_form(population, antithetic, shaping):
    model = Linear()
    own = {"population": population, "antithetic": antithetic, "shaping": shaping}
    optimizer = ES(model.named_parameters(), lr=1.0, eps=1e-3, **own)
    found = linear_estimates(optimizer, model, 400)
    norm = math.sqrt(sum(float((slope**2).sum()) for slope in model.slopes.values()))
    length = expected_length(population, antithetic, shaping)
    if antithetic and shaping == "rank":  # pairs are dependent: both sides of a direction have opposite ranks
        values = torch.tensor(np.random.RandomState(0).randn(100_000, population // 2))
        both = torch.stack([values, -values], dim=2).flatten(1)
        ranks = both.argsort(dim=1).argsort(dim=1).double() / (population - 1) - 0.5
        length = float((ranks * both).mean(dim=1).mean())
    for name, slope in model.slopes.items():
        assert_mean(found[name], length * slope / norm)


def member(optimizer, tensor, stream):
    if isinstance(optimizer, EGGROLL) and tensor.name == "weight":
        rank = optimizer.rank
        return stream.draw(tensor, (2, rank), LEFT) @ stream.draw(tensor, (3, rank), RIGHT).t() / math.sqrt(rank)
    return stream.draw(tensor)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("shaping", ["z-score", "rank"])
@pytest.mark.parametrize(("cls", "own"), CLASSES)
def test_steps_against_a_float64_reference(cls, own, antithetic, shaping):
    model, lr, eps, population = Linear(), 0.05, 1e-2, 6
    optimizer = cls(
        model.named_parameters(), lr, eps, population=population, antithetic=antithetic, shaping=shaping,
        weight_decay=0.1, **own,
    )  # fmt: skip
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(5):
        optimizer.step(model)
        streams = [optimizer.noise.stream(seed) for seed in optimizer.last_step.seeds]
        noise = [{t.name: member(optimizer, t, s) for t in optimizer.tensors} for s in streams]
        if antithetic:
            noise = [{n: sign * v for n, v in one.items()} for one in noise for sign in (1, -1)]
        losses = np.array([sum(float((model.slopes[n] * (theta[n] + eps * e[n])).sum()) for n in e) for e in noise])
        np.testing.assert_allclose(optimizer.last_step.losses, losses, rtol=1e-9)
        shaped = (losses - losses.mean()) / losses.std()
        if shaping == "rank":
            shaped = losses.argsort().argsort() / (population - 1) - 0.5
        for name in theta:
            update = sum(s * e[name] for s, e in zip(shaped, noise)) / population
            theta[name] = theta[name] * (1 - (0 if name == "bias" else lr * 0.1)) - lr * update
            torch.testing.assert_close(model.get_parameter(name).data, theta[name], rtol=1e-6, atol=1e-8)


def test_members_of_eggroll_have_unit_entries_and_the_rank():
    model = torch.nn.Linear(30, 20, bias=False).double()
    for rank in (1, 3, 50):
        optimizer = EGGROLL(model.named_parameters(), rank=rank, population=4)
        optimizer._prepare()
        (tensor,), direction = optimizer.tensors, optimizer.propose({}, 0, [1])
        samples = torch.stack([direction.draw(optimizer.noise.stream(s), tensor) for s in range(400)])
        assert np.linalg.matrix_rank(samples[0].numpy()) == min(rank, 20)
        squares = samples.square().mean(dim=(1, 2))
        assert abs(float(squares.mean()) - 1) < 5 * float(squares.std()) / 20
        assert abs(float((samples[:, 0, 0] * samples[:, 1, 1]).mean())) < 0.5


@pytest.mark.parametrize("antithetic", [False, True])
def test_eggroll_together_is_in_turn(antithetic):
    """One closure call per step, weights that do not move, the same losses; LOZO has one V, members have their own."""
    ends = []
    for probing in ("in-turn", "together"):
        model, calls = llama().double(), []
        optimizer = EGGROLL(
            model.named_parameters(),
            1e-3,
            population=6,
            rank=2,
            antithetic=antithetic,
            probing=probing,
            scale="rms",
            check_loss=False,
        )
        records = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                optimizer.step(lambda: [calls.append(1), model(input_ids=IDS, labels=IDS).loss][1])
                records.append(optimizer.last_step)
        assert len(calls) == (18 if probing == "in-turn" else 3) and optimizer.forwards == 18
        ends.append((records, [p.detach() for p in model.parameters()]))
    for a, b in zip(ends[0][0], ends[1][0]):
        assert a.seeds == b.seeds
        torch.testing.assert_close(a.losses, b.losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=1e-2, atol=1e-6)  # z-scores amplify rounding of the losses
    assert EGGROLL(llama().named_parameters()).probing == "together"


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"population": 1}, "population"),
        ({"population": 2**16 + 2, "antithetic": True}, "at most 65,536"),
        ({"population": 5, "antithetic": True}, "even"),
        ({"population": 2, "antithetic": True}, "at least 4"),
        ({"shaping": "none"}, "shaping"),
    ],
)
def test_bad_hyperparameters(own, words):
    with pytest.raises(UserError, match=words):
        ES(Linear().named_parameters(), **own)
    with pytest.raises(UserError, match="rank"):
        EGGROLL(Linear().named_parameters(), rank=0)
    with pytest.raises(UserError, match="low-rank"):
        ES(Linear().named_parameters(), probing="together")
